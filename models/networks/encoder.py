"""Padded batches of texts -> pooled hidden states or the scores of a cross-encoder, by a network of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from serving.engine.interface import EncoderInput

Pooling = Literal["cls", "mean", "last", "scores"]


class TransformersEncoder:
    """See serving.engine.interface.Encoder."""

    def __init__(self, model: Any, pooling: Pooling, max_positions: int, pad_id: int) -> None:
        """model: one of transformers' classes for the pooling. pad_id: its row is looked up and hidden by the mask."""
        self._model = model.eval()
        self._pooling = pooling
        self._pad_id = pad_id
        config = model.config
        self._has_types = int(getattr(config, "type_vocab_size", 0) or 0) > 1
        self.num_outputs = 1 if pooling == "scores" else int(config.hidden_size)
        self.num_tokens = int(config.vocab_size)
        self.max_positions = max_positions

    @torch.inference_mode()
    def encode(self, inputs: Sequence[EncoderInput]) -> list[list[float]]:
        """[inputs][num_outputs], computed in one batch that is padded on the right."""
        lengths = torch.tensor([len(each.token_ids) for each in inputs])
        longest = int(lengths.max())
        ids = torch.full((len(inputs), longest), self._pad_id)
        types = torch.zeros_like(ids)
        for row, each in enumerate(inputs):
            ids[row, : len(each.token_ids)] = torch.tensor(each.token_ids)
            if each.type_ids:
                types[row, : len(each.type_ids)] = torch.tensor(each.type_ids)
        mask = torch.arange(longest)[None] < lengths[:, None]
        device = self._model.device
        arguments = {"input_ids": ids.to(device), "attention_mask": mask.to(device, torch.int64)}
        if self._has_types:
            arguments["token_type_ids"] = types.to(device)
        outputs = self._model(**arguments)
        if self._pooling == "scores":
            vectors: Tensor = outputs.logits.float()
        else:
            vectors = self._pooled(outputs.last_hidden_state.float(), mask.to(device), lengths.to(device))
        numbers: list[list[float]] = vectors.cpu().tolist()
        return numbers

    def _pooled(self, hidden: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """[inputs, tokens, hidden_size] -> [inputs, hidden_size]."""
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "last":
            return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
        return (hidden * mask[..., None]).sum(1) / lengths[:, None]
