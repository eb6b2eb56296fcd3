"""ChatGLM-6B (v1) as a network: 2-D rotary positions, a two-way prompt, tied head. Knows no text and no cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from serving.engine.interface import AttentionFunction, NetworkShape, PromptLayout, RaggedBatch

# The original divides and multiplies by the depth of the real model even in a checkpoint of another depth.
ALPHA = math.sqrt(2 * 28)


@dataclass(frozen=True)
class ChatGLMConfig:
    """What the network of one ChatGLM-6B checkpoint looks like, and which ids shape its prompt."""

    num_layers: int
    num_heads: int
    hidden_size: int
    inner_hidden_size: int
    vocab_size: int
    num_tokens: int  # ids at or past this have no text
    max_positions: int
    layernorm_epsilon: float
    bos_token_id: int  # <sop>: the prompt ends and the answer begins here
    eos_token_id: int  # <eop>: the answer ends
    mask_token_id: int
    gmask_token_id: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def prompt_layout(prompt_ids: Sequence[int], config: ChatGLMConfig) -> PromptLayout:
    """Everything before the first <sop> sees itself both ways; [gMASK], or else [MASK], anchors what comes after.

    The original cannot take a prompt without <sop> or without a mask. Here such ids (a raw completion may send any) are
    all context, anchored at their last token.
    """
    ids = list(prompt_ids)
    context = ids.index(config.bos_token_id) if config.bos_token_id in ids else len(ids)
    mask = config.gmask_token_id if config.gmask_token_id in ids else config.mask_token_id
    anchor = ids.index(mask) if mask in ids else max(context - 1, 0)
    return PromptLayout(num_two_way=context, mask_index=anchor)


def positions(batch: RaggedBatch) -> Tensor:
    """The two position rows, [2, rows]: where a token stands in the context, and how far it is into the answer.

    Within the context they are (index, 0); from <sop> on (mask_index, 1), (mask_index, 2), …
    Source: chatglm-6b modeling_chatglm.py, get_position_ids.
    """
    lengths = torch.tensor([span.stop - span.start for span in batch.spans])
    layouts = torch.tensor([(span.layout.num_two_way, span.layout.mask_index) for span in batch.spans])
    context, anchor = layouts.repeat_interleave(lengths, dim=0).to(batch.indices.device).unbind(1)
    outer = torch.where(batch.indices < context, batch.indices, anchor)
    inner = (batch.indices - context + 1).clamp(min=0)
    return torch.stack((outer, inner))


def rotary_frequencies(head_dim: int) -> Tensor:
    """[head_dim / 4], fp32: each half of a head is rotated on its own. The original rounds them to half precision."""
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32) / half
    return (1.0 / (10000.0**exponents)).half().float()


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn both halves of every head, each by its own position row.

    heads: [rows, heads, head_dim]; cosine, sine: [rows, 1, 2, head_dim / 4]. Returns heads' shape.
    Channel i of a half is paired with channel i + head_dim / 4. Source: modeling_chatglm.py, rotate_half.
    """
    rows, num_heads, head_dim = heads.shape
    first, second = heads.view(rows, num_heads, 2, 2, head_dim // 4).unbind(3)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=3)
    return turned.view(rows, num_heads, head_dim)


class Attention(nn.Module):
    """Full multi-head attention; the projection holds query, key and value interleaved head by head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, layer: int, hidden: Tensor, cosine: Tensor, sine: Tensor, attend: AttentionFunction) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, hidden_size]."""
        mixed = self.query_key_value(hidden).view(-1, self.num_heads, 3, self.head_dim)
        query, key, value = mixed.unbind(2)
        query, key = rotate(query.contiguous(), cosine, sine), rotate(key.contiguous(), cosine, sine)
        # The original divides by (layer + 1) here and multiplies again after the product: one plain scale.
        seen = attend(layer, query, key, value.contiguous(), 1.0 / math.sqrt(self.head_dim))
        return cast("Tensor", self.dense(seen.reshape(hidden.shape)))


class Block(nn.Module):
    """One layer. Its residual is the normed input times alpha, not the input."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, layer: int, hidden: Tensor, cosine: Tensor, sine: Tensor, attend: AttentionFunction) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, hidden_size]."""
        normed = self.input_layernorm(hidden)
        hidden = normed * ALPHA + self.attention(layer, normed, cosine, sine, attend)
        normed = self.post_attention_layernorm(hidden)
        inner = functional.gelu(self.dense_h_to_4h(normed), approximate="tanh")
        return cast("Tensor", normed * ALPHA + self.dense_4h_to_h(inner))


class ChatGLMNetwork(nn.Module):
    """ChatGLM-6B as a `CausalLM`. Build it on the meta device and assign the weights."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.device, self.dtype = torch.device("meta"), torch.float32  # until weights are assigned
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.shape = NetworkShape(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_tokens=config.num_tokens,
            max_positions=config.max_positions,
        )

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        """See `prompt_layout`."""
        return prompt_layout(prompt_ids, self.config)

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        """Hidden state of every row after the final norm, [rows, hidden_size]."""
        frequencies = rotary_frequencies(self.config.head_dim).to(batch.indices.device)
        # Angles in fp32 whatever the weights are, [rows, 1, 2, head_dim / 4].
        angles = (positions(batch).T[:, :, None] * frequencies).unsqueeze(1)
        cosine, sine = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        hidden = self.word_embeddings(batch.token_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(index, hidden, cosine, sine, attend)
        return cast("Tensor", self.final_layernorm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size]."""
        return cast("Tensor", self.lm_head(hidden))
