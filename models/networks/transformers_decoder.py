"""A batch of token ids -> hidden states of any plain decoder that transformers implements.

transformers computes the network; only its attention is replaced, through its own AttentionInterface, by the engine's,
which owns the KV cache and keeps the sequences of a ragged batch apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.family import ImportRefused
from serving.engine.interface import CAUSAL, AttentionFunction, NetworkShape, PromptLayout, RaggedBatch

ATTENTION_NAME = "engine"
LAYER_TYPES = {"full_attention", "sliding_attention"}
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # the angles depend on the longest sequence of the batch
# arguments that layers pass to attention and that do not change its result
IGNORED_ARGUMENTS = {
    "position_ids", "position_embeddings", "use_cache", "cache_position", "past_key_values", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip


def engine_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    attend: AttentionFunction | None = None,
    **kwargs: object,  # transformers passes on whatever arguments a layer adds
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, heads, rows, head_dim] -> ([1, rows, heads, head_dim], None).

    Raises ImportRefused for an attention that needs more than the engine implements.
    """
    name = type(module).__name__
    extra = sorted(key for key, given in kwargs.items() if given is not None and key not in IGNORED_ARGUMENTS)
    if extra:
        raise ImportRefused(f"{name} needs {', '.join(extra)} in its attention, which the engine does not implement")
    if attend is None or attention_mask is not None or is_causal is False or not getattr(module, "is_causal", True):
        raise ImportRefused(f"{name} is not plain causal self-attention, the only kind that the engine implements")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ImportRefused(f"{name} has keys and values of different widths, which the KV cache cannot store")
    out = attend(
        cast("int", module.layer_idx),
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
    )
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, engine_attention)


@dataclass
class _RecordingAttention:
    """An attention that records the arguments of each layer and lets every row attend only to itself."""

    cache: None = None  # so that networks call this function
    layers: list[int] = field(default_factory=list[int])
    windows: list[int | None] = field(default_factory=list["int | None"])
    shapes: set[tuple[int, int, int]] = field(default_factory=set[tuple[int, int, int]])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        self.layers.append(layer)
        self.windows.append(window)
        self.shapes.add((query.shape[1], key.shape[1], key.shape[2]))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


class TransformersDecoder:
    """A CausalLM that runs a transformers decoder.

    Replaces the model's attention by the engine's, so `model.generate` does not work afterwards.
    """

    def __init__(self, model: PreTrainedModel, num_tokens: int, max_positions: int) -> None:
        """num_tokens: ids at or past it are never sampled. Raises ImportRefused for networks that cannot run here."""
        self._check_config(model)
        model.set_attn_implementation(ATTENTION_NAME)
        model.eval().requires_grad_(False)
        self._model = model
        self._backbone = cast("Callable[..., Any]", model.base_model)
        self._head = cast("Callable[[Tensor], Tensor]", model.get_output_embeddings())
        self.device = model.device
        self.dtype = torch.float32  # until `_trial_run` measures it
        self.shape = self._trial_run(num_tokens, max_positions)

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return CAUSAL

    @torch.no_grad()
    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        return self._hidden(batch.token_ids, batch.indices, attend)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def _hidden(self, token_ids: Tensor, indices: Tensor, attend: AttentionFunction) -> Tensor:
        out = self._backbone(input_ids=token_ids[None], position_ids=indices[None], use_cache=False, attend=attend)
        return cast("Tensor", out.last_hidden_state)[0]

    @staticmethod
    def _check_config(model: PreTrainedModel) -> None:
        config, name = model.config, type(model).__name__
        if config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise ImportRefused(f"{name} is not a decoder with a language-model head")
        unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
        if unknown:
            raise ImportRefused(
                f"{name} has layers of the type {', '.join(sorted(unknown))}, which the engine does not implement"
            )
        rotary = _rotary_types(getattr(config, "rope_parameters", None)) & BATCH_DEPENDENT_ROPE
        if rotary:
            raise ImportRefused(
                f"{name} has {min(rotary)} rotary positions, which depend on the other requests of a batch"
            )
        parameters = inspect.signature(model.base_model.forward).parameters
        if model.base_model is model or "position_ids" not in parameters:
            raise ImportRefused(f"{name} does not take position_ids, which a ragged batch needs")

    @torch.no_grad()
    def _trial_run(self, num_tokens: int, max_positions: int) -> NetworkShape:
        """Run two tokens to find the shapes of attention, and to check that logits are the output layer's alone."""
        config, name = self._model.config, type(self._model).__name__
        ids, indices = torch.tensor([[0, 1], [0, 1]], device=self.device)
        attention = _RecordingAttention()
        hidden = self._hidden(ids, indices, attention)
        self.dtype = hidden.dtype
        if attention.layers != list(range(config.num_hidden_layers)) or len(attention.shapes) != 1:
            raise ImportRefused(f"{name} does not call attention once a layer with one shape, which the engine needs")
        kinds = getattr(config, "layer_types", None) or ()
        if any(kind == "sliding_attention" and attention.windows[i] is None for i, kind in enumerate(kinds)):
            raise ImportRefused(f"{name} passes its sliding window only in a mask, which the engine does not read")
        logits = self.logits(hidden)
        whole = self._model(
            input_ids=ids[None], position_ids=indices[None], use_cache=False, attend=_RecordingAttention()
        ).logits[0]
        if not torch.allclose(logits.float(), whole.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
            raise ImportRefused(
                f"{name} scales or caps its logits after the output layer, which the engine does not implement"
            )
        num_heads, num_kv_heads, head_dim = next(iter(attention.shapes))
        return NetworkShape(
            num_layers=len(attention.layers),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=hidden.shape[1],
            vocab_size=logits.shape[1],
            num_tokens=min(num_tokens, logits.shape[1]),
            max_positions=max_positions,
        )


def _rotary_types(rope_parameters: object) -> set[str]:
    """The rope types of a config; some networks have one for each kind of layer."""
    if not isinstance(rope_parameters, dict):
        return set()
    values = cast("dict[str, object]", rope_parameters)
    nested = [_rotary_types(value) for value in values.values()]
    return {str(values.get("rope_type"))}.union(*nested)
