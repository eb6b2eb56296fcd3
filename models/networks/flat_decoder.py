"""GLM and Llama decoders in fewer, larger operations: the weights are transformers', the loop is ours.

transformers' modules spend some fifty small operations a layer; on a CPU that is a quarter of a token of a small model,
and on a GPU one launch each. Here a layer is fourteen: query, key and value in one product, gate and up in one, the
rotation as one complex multiplication in place. tests/parity holds it equal to transformers; what it does not know
runs through models/native.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GlmForCausalLM, LlamaForCausalLM, PreTrainedModel

from kernels import linears, linears_cuda
from kernels import small_ops as fused
from kernels.precision import Precision, Progress
from kernels.quantization import QuantizedLinear, joined
from serving.engine.interface import CAUSAL, AttentionFunction, NetworkShape, PromptLayout, RaggedBatch

INTERLEAVED = {GlmForCausalLM: True, LlamaForCausalLM: False}  # whether rotary pairs neighbours or halves
PLAIN_ROTARY = {"default", "linear", "llama3"}  # angles that follow from the position alone


def can_flatten(model: PreTrainedModel) -> bool:
    """Whether this network is one of those that `FlatDecoder` computes."""
    config = model.config
    rope: dict[str, object] = getattr(config, "rope_parameters", None) or {}
    return (
        type(model) in INTERLEAVED
        and config.hidden_act == "silu"
        and rope.get("rope_type") in PLAIN_ROTARY
        and not getattr(config, "mlp_bias", False)
    )


class FlatLayer(nn.Module):
    """One decoder layer's weights, adopted from transformers' layer, which is emptied."""

    def __init__(self, layer: Any, halves_to_pairs: Tensor | None) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm: Tensor = layer.input_layernorm.weight.detach()
        self.post_norm: Tensor = layer.post_attention_layernorm.weight.detach()
        self.epsilon: float = layer.input_layernorm.variance_epsilon
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj], halves_to_pairs)
        self.out: nn.Module = attention.o_proj
        self.gate_up: nn.Module = (
            mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else _joined([mlp.gate_proj, mlp.up_proj], None)
        )
        self.down: nn.Module = mlp.down_proj
        layer.self_attn = layer.mlp = None

    def forward(
        self,
        index: int,
        hidden: Tensor,
        turns: Tensor,
        shape: NetworkShape,
        attend: AttentionFunction,
        small: fused.SmallOps,
    ) -> Tensor:
        """hidden: [rows, hidden_size]; turns: [rows, 1, rotated / 2] complex64. Returns hidden's shape."""
        normed = fused.norm(hidden, self.input_norm, self.epsilon)
        heads = self.qkv(normed).view(len(hidden), -1, shape.head_dim)
        num_rotated = shape.num_heads + shape.num_kv_heads
        small.rotate(heads[:, :num_rotated, : 2 * turns.shape[-1]], turns)
        query, key, value = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        seen = attend(index, query, key, value, shape.head_dim**-0.5)
        hidden, normed = small.add_norm(hidden, self.out(seen.reshape(len(hidden), -1)), self.post_norm, self.epsilon)
        return hidden + cast("Tensor", self.down(small.swiglu(self.gate_up(normed))))


class FlatDecoder(nn.Module):
    """The engine's CausalLM over adopted weights."""

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision,
        num_tokens: int,
        max_positions: int,
        progress: Progress,
        device: torch.device | None = None,
    ) -> None:
        """Takes the model's weights over, joins them and packs them; `model` is of no use afterwards.

        device: where to compute, if the weights are not there yet.
        """
        super().__init__()
        config, backbone = model.config, cast("Any", model.base_model)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.device = device or model.device
        frequencies: Tensor = backbone.rotary_emb.inv_freq.float().to(self.device)
        self._frequencies = frequencies  # [rotated / 2]
        self._scaling = float(backbone.rotary_emb.attention_scaling)
        order = None if INTERLEAVED[cast("Any", type(model))] else _halves_to_pairs(head_dim, 2 * len(frequencies))
        self.embedding: nn.Module = backbone.embed_tokens
        self.layers = nn.ModuleList(FlatLayer(layer, order) for layer in backbone.layers)
        self.norm: Tensor = backbone.norm.weight.detach()
        self.epsilon: float = backbone.norm.variance_epsilon
        self.lm_head = cast("nn.Module", model.get_output_embeddings())
        linears.pack(self, precision, self.device, progress)
        self.dtype = linears.compute_dtype(precision, self.device)
        self.norm = self.norm.to(self.device, self.dtype)
        for layer in cast("list[FlatLayer]", self.layers):
            layer.input_norm = layer.input_norm.to(self.device, self.dtype)
            layer.post_norm = layer.post_norm.to(self.device, self.dtype)
        self._small = fused.PLAIN
        self.shape = NetworkShape(
            num_layers=len(self.layers),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_tokens=min(num_tokens, config.vocab_size),
            max_positions=max_positions,
        )

    def prepare(self) -> None:
        """Compile what can be compiled: half a minute at most, and only where it pays."""
        if self.device.type == "cuda":
            self._small = fused.compiled(self.device, self.dtype)
            for module in self.modules():
                if isinstance(module, linears_cuda.Int8Linear):
                    module.small = self._small

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return CAUSAL

    @torch.no_grad()
    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        """Hidden state of every row after the final norm, [rows, hidden_size]."""
        angles = batch.indices[:, None, None].float() * self._frequencies  # fp32, whatever the weights are
        turns = torch.polar(torch.full_like(angles, self._scaling), angles)
        hidden = self.embedding(batch.token_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(index, hidden, turns, self.shape, attend, self._small)
        return fused.norm(hidden, self.norm, self.epsilon)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size]."""
        return cast("Tensor", self.lm_head(hidden))


def _joined(parts: list[nn.Module], row_order: Tensor | None) -> nn.Module:
    """Several products of one input as one. `row_order` rearranges the channels of each head of query and key."""
    if all(isinstance(part, QuantizedLinear) for part in parts):
        small = cast("list[QuantizedLinear]", parts)
        if row_order is not None:
            small = [*(part.reordered(_in_each_head(row_order, part.out_features)) for part in small[:2]), *small[2:]]
        return joined(small)
    return _joined_linears(cast("list[nn.Linear]", parts), row_order)


def _joined_linears(parts: list[nn.Linear], row_order: Tensor | None) -> nn.Linear:
    weights = [part.weight.detach() for part in parts]
    biases: list[Tensor | None] = [part.bias for part in parts]
    if row_order is not None:
        weights[:2] = [_reordered(weight, row_order) for weight in weights[:2]]
        biases[:2] = [None if bias is None else _reordered(bias.detach(), row_order) for bias in biases[:2]]
    joined = nn.Linear(parts[0].in_features, sum(p.out_features for p in parts), bias=False, device="meta")
    joined.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if biases[0] is not None:
        joined.bias = nn.Parameter(torch.cat([bias for bias in biases if bias is not None]), requires_grad=False)
    return joined


def _reordered(rows: Tensor, order: Tensor) -> Tensor:
    return rows.view(-1, len(order), *rows.shape[1:])[:, order].reshape(rows.shape)


def _in_each_head(order: Tensor, num_rows: int) -> Tensor:
    """An order of one head's channels as an order of all rows."""
    heads = torch.arange(0, num_rows, len(order))
    return (heads[:, None] + order).flatten()


def _halves_to_pairs(head_dim: int, num_rotated: int) -> Tensor:
    """Channel order that puts i and i + half side by side. Query and key both get it, so their products stay."""
    half = num_rotated // 2
    pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).flatten()
    return torch.cat((pairs, torch.arange(num_rotated, head_dim)))
