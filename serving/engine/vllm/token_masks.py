"""A vLLM logits processor: mask specification of a request and its tokens so far -> logits without forbidden tokens.

Runs in vLLM's processes. The vocabulary comes with the engine's configuration, the specification with each request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from serving.engine.interface import TokenMask
from serving.engine.vllm.known_tokens import SPECIFICATION, MaskMaker
from serving.generation.structured.token_masks import Grammars, TokenTable
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)

TOKENS, STOPS = "tokens", "stop_token_ids"  # keys of vLLM's additional_config


def mask_maker(token_table: TokenTable) -> MaskMaker:
    """For the engine's arguments. vLLM writes its configuration as JSON: bytes become characters below U+0100."""
    tokens = [token_table.token_bytes(i).decode("latin-1") for i in range(token_table.num_tokens)]
    config = {TOKENS: tokens, STOPS: sorted(token_table.stop_token_ids)}
    return MaskMaker(f"{__name__}:{Masks.__name__}", config)


class ShippedTokenTable:
    """The TokenTable that `mask_maker` wrote into the configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._tokens: list[bytes] = [token.encode("latin-1") for token in config[TOKENS]]
        self.stop_token_ids = frozenset[int](config[STOPS])
        self.num_tokens = len(self._tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]


class Masks(AdapterLogitsProcessor):
    """Applies each request's mask. After a fault every token of that request is allowed: the engine, which checks the
    tokens again, fails the request. An exception here would end vLLM's process and all of its requests."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._grammars = Grammars(ShippedTokenTable(vllm_config.additional_config))
        self._grammars.build_vocabulary()

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        """Also called for a request that comes back after a preemption, with its tokens so far."""
        specification = (params.extra_args or {}).get(SPECIFICATION)
        if specification is None:
            return None
        try:
            return MaskState(self._grammars.mask_of(specification))
        except Exception as error:  # noqa: BLE001
            logger.error("a mask could not be made: %s", where_from(error))
            return None


class MaskState:
    """The mask of one answer, advanced by the tokens so far."""

    def __init__(self, mask: TokenMask) -> None:
        self._mask: TokenMask | None = mask
        self._num_accepted = 0

    def __call__(self, output_ids: list[int], logits: Tensor) -> Tensor:
        """logits: [vocabulary] of this answer's next token; changed in place."""
        if self._mask is None:
            return logits
        try:
            for token_id in output_ids[self._num_accepted :]:
                self._mask.accept(token_id)
            self._num_accepted = len(output_ids)
            words = self._mask.allowed()
        except Exception as error:  # noqa: BLE001
            logger.error("a mask failed: %s", where_from(error))
            self._mask = None
            return logits
        if words is not None:
            bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")
            forbidden = torch.from_numpy(bits == 0).to(logits.device, non_blocking=True)
            known = min(len(forbidden), logits.shape[-1])
            logits[:known].masked_fill_(forbidden[:known], -torch.inf)
        return logits
