"""Keeps vLLM from sampling ids that have no text: the padding of the embedding. Runs inside of vLLM's processes."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class OnlyKnownTokens(LogitsProcessor):
    """Bans every id at or past `num_tokens` of vLLM's additional_config, for all requests alike."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._num_tokens = int(vllm_config.additional_config["num_tokens"])

    def is_argmax_invariant(self) -> bool:
        return False  # greedy requests must not get padding either

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing here depends on the request."""

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [rows, vocabulary], changed in place."""
        logits[:, self._num_tokens :] = -torch.inf
        return logits
