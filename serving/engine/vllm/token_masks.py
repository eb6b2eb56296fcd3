"""Our masks on vLLM's logits, inside of vLLM's processes: recipes come with the requests, the vocabulary at the start.

Composition: knows the grammars of `serving.chat` and the engine's words, no model. Imports vllm.
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


def mask_maker(spelling: TokenTable) -> MaskMaker:
    """For the engine's arguments. vLLM writes its configuration as JSON, so bytes go as characters below 256."""
    tokens = [spelling.token_bytes(i).decode("latin-1") for i in range(spelling.num_tokens)]
    config = {TOKENS: tokens, STOPS: sorted(spelling.stop_token_ids)}
    return MaskMaker(f"{__name__}:{Masks.__name__}", config)


class ShippedTokenTable:
    """The part of a chat format that a grammar needs, as it came with the configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._tokens: list[bytes] = [token.encode("latin-1") for token in config[TOKENS]]
        self.stop_token_ids = frozenset[int](config[STOPS])
        self.num_tokens = len(self._tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]


class Masks(AdapterLogitsProcessor):
    """Holds each request to the mask of its specification. A fault lets everything pass: it is found by whoever reads
    the tokens, and must not end vLLM's process and with it everybody's requests."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._grammars = Grammars(ShippedTokenTable(vllm_config.additional_config))
        self._grammars.prepare()

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
    """One answer's way through its mask, as far as its tokens have come."""

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
