"""A batch of token ids -> hidden states of GLM and Llama decoders, in fewer operations than transformers needs.

transformers' modules run about fifty operations a layer; on a CPU that is a quarter of a small model's time per token,
and on a GPU one launch each. Here a layer is fourteen: query, key and value in one product, gate and up in one, the
rotary embedding as one complex multiplication in place. tests/parity holds it equal to transformers; every other
decoder runs through `transformers_decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GlmForCausalLM, LlamaForCausalLM, PreTrainedModel

from kernels import linears
from kernels.decoder_native import MAX_GROUP, DecoderLayer, NativeAttention, NativeDecoder
from kernels.fused_ops import FusedOps, fastest
from kernels.linears_native import NativeLinear
from kernels.precision import Precision, Progress
from kernels.quantization import QuantizedLinear, concatenate
from serving.engine.interface import CAUSAL, AttentionFunction, NetworkShape, PromptLayout, RaggedBatch

INTERLEAVED = {GlmForCausalLM: True, LlamaForCausalLM: False}  # rotary embedding pairs neighbours, or else halves
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # whose angles depend on the position alone


def can_flatten(model: PreTrainedModel) -> bool:
    """Whether `FlatDecoder` computes this network."""
    config = model.config
    rope: dict[str, object] = getattr(config, "rope_parameters", None) or {}
    return (
        type(model) in INTERLEAVED
        and config.hidden_act == "silu"
        and rope.get("rope_type") in ROPE_TYPES
        and not getattr(config, "mlp_bias", False)
    )


class FlatLayer(nn.Module):
    """One decoder layer over the weights of a transformers layer, which loses them."""

    def __init__(self, layer: Any, halves_to_pairs: Tensor | None) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm: Tensor = layer.input_layernorm.weight.detach()
        self.post_norm: Tensor = layer.post_attention_layernorm.weight.detach()
        self.qkv = _concatenated([attention.q_proj, attention.k_proj, attention.v_proj], halves_to_pairs)
        self.out: nn.Module = attention.o_proj
        self.gate_up: nn.Module = (
            mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else _concatenated([mlp.gate_proj, mlp.up_proj], None)
        )
        self.down: nn.Module = mlp.down_proj
        layer.self_attn = layer.mlp = None

    def attention(
        self,
        index: int,
        normed: Tensor,
        rotations: Tensor,
        shape: NetworkShape,
        attend: AttentionFunction,
        ops: FusedOps,
    ) -> Tensor:
        """normed: [rows, hidden_size]; rotations: [rows, 1, rotated / 2] complex64. Returns normed's shape."""
        heads = self.qkv(normed).view(len(normed), -1, shape.head_dim)
        num_rotated = shape.num_heads + shape.num_kv_heads
        ops.rotate(heads[:, :num_rotated, : 2 * rotations.shape[-1]], rotations)
        query, key, value = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        seen = attend(index, query, key, value, shape.head_dim**-0.5)
        return cast("Tensor", self.out(seen.reshape(len(normed), -1)))

    def feed_forward(self, normed: Tensor, ops: FusedOps) -> Tensor:
        """[rows, hidden_size] -> the same shape"""
        return cast("Tensor", self.down(ops.swiglu(self.gate_up(normed))))


class FlatDecoder(nn.Module):
    """A CausalLM over the weights of a transformers model."""

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision,
        num_tokens: int,
        max_positions: int,
        progress: Progress,
        device: torch.device | None = None,
    ) -> None:
        """Takes the weights of `model`, which cannot be used afterwards, concatenates and packs them.

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
        self._ops = fastest(self.device, self.dtype)
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

        self._native = self._native_decoder()

    def _native_decoder(self) -> NativeDecoder | None:
        """All layers as one call, where the compiled kernels have every product."""
        layers = cast("list[FlatLayer]", list(self.layers))
        products = cast(
            "list[tuple[NativeLinear, ...]]", [(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in layers]
        )
        is_native = all(isinstance(product, NativeLinear) for each in products for product in each)
        shape = self.shape
        if not is_native or shape.num_heads // shape.num_kv_heads > MAX_GROUP:
            return None
        packed = [
            DecoderLayer(
                qkv.packed,
                out.packed,
                gate_up.packed,
                down.packed,
                layer.input_norm.float().contiguous(),
                layer.post_norm.float().contiguous(),
            )
            for layer, (qkv, out, gate_up, down) in zip(layers, products, strict=True)
        ]
        num_rotated = 2 * len(self._frequencies)
        return NativeDecoder(
            packed,
            self.norm.float().contiguous(),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            num_rotated,
            self.epsilon,
        )

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return CAUSAL

    @torch.no_grad()
    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        """Hidden state of every row after the final norm, [rows, hidden_size]."""
        angles = batch.indices[:, None, None].float() * self._frequencies  # fp32, whatever the weights are
        rotations = torch.polar(torch.full_like(angles, self._scaling), angles)
        hidden: Tensor = self.embedding(batch.token_ids).float()  # sums over the layers lose no bits
        cache = attend.cache
        if self._native is not None and cache is not None:
            attention = NativeAttention(
                cache.keys, cache.values, cache.scales, cache.first, cache.lengths, cache.two_way, cache.tables,
                self.shape.num_heads,
            )  # fmt: skip
            hidden = hidden.contiguous()
            self._native.forward(hidden, torch.view_as_real(rotations).contiguous(), attention)
            return hidden
        layers, ops = cast("list[FlatLayer]", list(self.layers)), self._ops
        normed = ops.rms_norm(hidden, layers[0].input_norm, self.epsilon)
        for index, layer in enumerate(layers):
            delta = layer.attention(index, normed, rotations, self.shape, attend, ops)
            hidden, normed = ops.add_rms_norm(hidden, delta, layer.post_norm, self.epsilon)
            delta = layer.feed_forward(normed, ops)
            following = layers[index + 1].input_norm if index + 1 < len(layers) else self.norm
            hidden, normed = ops.add_rms_norm(hidden, delta, following, self.epsilon)
        return normed

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size]."""
        return cast("Tensor", self.lm_head(hidden))


def _concatenated(parts: list[nn.Module], head_order: Tensor | None) -> nn.Module:
    """One layer with the outputs of several. `head_order`: the new order of the channels of each query and key head."""
    if all(isinstance(part, QuantizedLinear) for part in parts):
        quantized = cast("list[QuantizedLinear]", parts)
        if head_order is not None:
            quantized[:2] = [part.reordered(_order_of_rows(head_order, part.out_features)) for part in quantized[:2]]
        return concatenate(quantized)
    linears = cast("list[nn.Linear]", parts)
    weights = [part.weight.detach() for part in linears]
    biases = [part.bias.detach() for part in linears if part.bias is not None]
    if head_order is not None:
        for tensors in (weights, biases):
            tensors[:2] = [tensor[_order_of_rows(head_order, len(tensor))] for tensor in tensors[:2]]
    out = nn.Linear(linears[0].in_features, sum(part.out_features for part in linears), bias=False, device="meta")
    out.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if biases:
        out.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return out


def _order_of_rows(head_order: Tensor, num_rows: int) -> Tensor:
    """An order of one head's channels as an order of the rows of all heads."""
    heads = torch.arange(0, num_rows, len(head_order))
    return (heads[:, None] + head_order).flatten()


def _halves_to_pairs(head_dim: int, num_rotated: int) -> Tensor:
    """The channel order that puts i beside i + half. Query and key both get it, so their products stay the same."""
    half = num_rotated // 2
    pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).flatten()
    return torch.cat((pairs, torch.arange(num_rotated, head_dim)))
