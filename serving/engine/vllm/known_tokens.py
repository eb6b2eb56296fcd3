"""A vLLM logits processor that bans ids without a text (the padding of the embedding), and the keys of our settings.

Runs in vLLM's processes, to which the server's process passes our settings under these keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

KNOWN_TOKENS = "serving.engine.vllm.known_tokens:OnlyKnownTokens"
NUM_TOKENS = "num_tokens"  # the key of vLLM's additional_config that carries it
SPECIFICATION = "specification"  # the key of a request's extra_args that carries its mask's


@dataclass(frozen=True)
class MaskMaker:
    """What builds masks from their specifications in vLLM's processes."""

    processor: str  # module:class of a vLLM LogitsProcessor
    config: Mapping[str, Any]  # its part of vLLM's additional_config


class OnlyKnownTokens(LogitsProcessor):
    """Bans every id at or past `num_tokens` of vLLM's additional_config, for all requests alike."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._num_tokens = int(vllm_config.additional_config[NUM_TOKENS])

    def is_argmax_invariant(self) -> bool:
        return False  # greedy requests must not get padding either

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Does nothing: all requests are treated alike."""

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [rows, vocabulary], changed in place."""
        logits[:, self._num_tokens :] = -torch.inf
        return logits
