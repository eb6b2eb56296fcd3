"""Fits a decoder that transformers implements into the engine's socket. Knows attention's shapes, no family.

transformers computes the network; only its attention is replaced, through its own AttentionInterface, by the engine's,
which owns the KV cache and keeps the sequences of a ragged batch apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

from kernels import linears, linears_cuda
from kernels.precision import Precision, Progress
from models.checkpoints import quantized
from models.family import ImportRefused
from models.networks.flat_decoder import FlatDecoder, can_flatten
from serving.engine.interface import CAUSAL, AttentionFunction, CausalLM, NetworkShape, PromptLayout, RaggedBatch

ATTENTION = "engine"
LAYER_KINDS = {"full_attention", "sliding_attention"}
COUPLED_ROTARY = {"dynamic", "longrope"}  # their angles depend on the longest sequence of the batch
# what layers pass to attention besides the tensors and that changes nothing here
HARMLESS = {
    "position_ids",
    "position_embeddings",
    "use_cache",
    "cache_position",
    "past_key_values",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}


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
    **kwargs: object,  # transformers hands every attention function whatever a layer adds
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, heads, rows, head_dim] -> ([1, rows, heads, head_dim], None).

    Raises ImportRefused for an attention that asks for more than the engine does.
    """
    name = type(module).__name__
    extra = sorted(key for key, given in kwargs.items() if given is not None and key not in HARMLESS)
    if extra:
        raise ImportRefused(f"{name} needs {', '.join(extra)} in its attention, which the engine does not have")
    if attend is None or attention_mask is not None or is_causal is False or not getattr(module, "is_causal", True):
        raise ImportRefused(f"{name} is not plain causal self-attention, which is all that the engine does")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ImportRefused(f"{name} has keys and values of different widths, which the engine does not store")
    out = attend(
        cast("int", module.layer_idx),
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
    )
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, engine_attention)


@dataclass
class _Probe:
    """An attention that looks: it records what each layer asks for and lets every row see only itself."""

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
    """A transformers decoder as the engine's CausalLM.

    Takes the model over: its attention is the engine's from then on, so `model.generate` needs a copy of its own.
    """

    def __init__(self, model: PreTrainedModel, num_tokens: int, max_positions: int) -> None:
        """num_tokens: ids at or past it are never sampled. Raises ImportRefused, in one line, for other networks."""
        self._check_config(model)
        model.set_attn_implementation(ATTENTION)
        model.eval().requires_grad_(False)
        self._model = model
        self._backbone = cast("Callable[..., Any]", model.base_model)
        self._head = cast("Callable[[Tensor], Tensor]", model.get_output_embeddings())
        self.device = model.device
        self.dtype = torch.float32  # the probe finds out
        self.shape = self._probe(num_tokens, max_positions)

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
        strange = set(getattr(config, "layer_types", None) or ()) - LAYER_KINDS
        if strange:
            raise ImportRefused(
                f"{name} has layers of the kind {', '.join(sorted(strange))}, which the engine does not do"
            )
        rotary = _rotary_types(getattr(config, "rope_parameters", None)) & COUPLED_ROTARY
        if rotary:
            raise ImportRefused(f"{name} has {min(rotary)} rotary positions, which would tie requests together")
        parameters = inspect.signature(model.base_model.forward).parameters
        if model.base_model is model or "position_ids" not in parameters:
            raise ImportRefused(f"{name} does not take positions from outside, which a ragged batch needs")

    @torch.no_grad()
    def _probe(self, num_tokens: int, max_positions: int) -> NetworkShape:
        """Run two tokens through: what the layers ask of attention, and whether the head is all that follows it."""
        config, name = self._model.config, type(self._model).__name__
        ids, indices = torch.tensor([[0, 1], [0, 1]], device=self.device)
        probe = _Probe()
        hidden = self._hidden(ids, indices, probe)
        self.dtype = hidden.dtype
        if probe.layers != list(range(config.num_hidden_layers)) or len(probe.shapes) != 1:
            raise ImportRefused(f"{name} does not call one attention of one shape a layer, which the engine needs")
        kinds = getattr(config, "layer_types", None) or ()
        if any(kind == "sliding_attention" and probe.windows[i] is None for i, kind in enumerate(kinds)):
            raise ImportRefused(f"{name} hides its sliding window in a mask, where the engine cannot see it")
        logits = self.logits(hidden)
        whole = self._model(input_ids=ids[None], position_ids=indices[None], use_cache=False, attend=_Probe()).logits[0]
        if not torch.allclose(logits.float(), whole.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
            raise ImportRefused(f"{name} scales or caps its logits after the head, which the engine does not do")
        num_heads, num_kv_heads, head_dim = next(iter(probe.shapes))
        return NetworkShape(
            num_layers=len(probe.layers),
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


def open_decoder(
    folder: Path, device: torch.device, precision: Precision, progress: Progress, num_tokens: int, max_positions: int
) -> CausalLM:
    """A transformers folder as the engine's CausalLM, in its fastest form. Errors: see `load_transformers`."""
    if quantized.is_quantized(folder, precision):
        model = quantized.load_quantized(folder, progress)
    else:
        model = load_transformers(folder, device, precision, progress)
    if can_flatten(model):
        return FlatDecoder(model, precision, num_tokens, max_positions, progress, device)
    linears.pack(model, precision, device, progress)
    return TransformersDecoder(model, num_tokens, max_positions)


def load_transformers(folder: Path, device: torch.device, precision: Precision, progress: Progress) -> PreTrainedModel:
    """Open a transformers folder: weights mapped from safetensors, frozen, not packed yet; on `device` already, but for
    weights that have to shrink before a card can hold them.

    No network access, no code of the folder. Raises OSError or ValueError if transformers cannot load it by itself.
    """
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    read_to = linears_cuda.load_device(precision, device)
    disable_progress_bar()  # a server's log is no place for one; `progress` tells the caller
    progress(0, total, "weights")
    stored = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).dtype
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=linears.storage_dtype(precision, device, stored or torch.float32),
        # a map lets every tensor go to the device as it is read; on the CPU that is what happens anyway
        device_map=None if read_to.type == "cpu" else {"": read_to},
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    progress(total, total, "weights")
    return cast("PreTrainedModel", model.requires_grad_(False))
