"""A batch of token ids -> hidden states of ChatGLM-6B, the first version.

Its rotary positions have two dimensions, its prompt is read in both directions, its output layer is the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from serving.engine.interface import AttentionFunction, NetworkShape, PromptLayout, RaggedBatch

# The original uses the depth of the 6B model even in a checkpoint of another depth.
ALPHA = math.sqrt(2 * 28)


@dataclass(frozen=True)
class ChatGLMConfig:
    """The sizes of one ChatGLM-6B network, and the ids that determine the layout of its prompt."""

    num_layers: int
    num_heads: int
    hidden_size: int
    inner_hidden_size: int
    vocab_size: int
    num_tokens: int  # ids at or past this have no text
    max_positions: int
    layernorm_epsilon: float
    bos_token_id: int  # <sop>, where the answer begins
    eos_token_id: int  # <eop>, where the answer ends
    mask_token_id: int
    gmask_token_id: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def positions(batch: RaggedBatch) -> Tensor:
    """The two position rows, [2, rows]: the index in the context, and the index in the answer.

    Within the context they are (index, 0); from <sop> on (mask_index, 1), (mask_index, 2), …
    Source: chatglm-6b modeling_chatglm.py, get_position_ids.
    """
    lengths = torch.tensor([span.stop - span.start for span in batch.spans])
    layouts = torch.tensor([(span.layout.num_two_way, span.layout.mask_index) for span in batch.spans])
    num_context, mask_index = layouts.repeat_interleave(lengths, dim=0).to(batch.indices.device).unbind(1)
    in_context = torch.where(batch.indices < num_context, batch.indices, mask_index)
    in_answer = (batch.indices - num_context + 1).clamp(min=0)
    return torch.stack((in_context, in_answer))


def rotary_frequencies(head_dim: int) -> Tensor:
    """[head_dim / 4], fp32: each half of a head is rotated on its own. The original rounds them to half precision."""
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32) / half
    return (1.0 / (10000.0**exponents)).half().float()


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate both halves of every head, each by its own position row.

    heads: [rows, heads, head_dim]; cosine, sine: [rows, 1, 2, head_dim / 4]. Returns heads' shape.
    Channel i of a half is paired with channel i + head_dim / 4. Source: modeling_chatglm.py, rotate_half.
    """
    rows, num_heads, head_dim = heads.shape
    first, second = heads.view(rows, num_heads, 2, 2, head_dim // 4).unbind(3)
    rotated = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=3)
    return rotated.view(rows, num_heads, head_dim)


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
        # the original divides by (layer + 1) here and multiplies by it after the product, which leaves one scale
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
    """A `CausalLM`, to be made on the meta device before its weights are assigned."""

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
        """Tokens before the first <sop> attend to each other in both directions; later ones get the position of
        [gMASK], or else of [MASK].

        The original fails on a prompt without <sop> or without a mask. Here such ids (a raw completion may send any)
        are all context, and later tokens get the position of the last one.
        """
        ids, config = list(prompt_ids), self.config
        num_context = ids.index(config.bos_token_id) if config.bos_token_id in ids else len(ids)
        mask = config.gmask_token_id if config.gmask_token_id in ids else config.mask_token_id
        mask_index = ids.index(mask) if mask in ids else max(num_context - 1, 0)
        return PromptLayout(num_two_way=num_context, mask_index=mask_index)

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        """Hidden state of every row after the final norm, [rows, hidden_size]."""
        frequencies = rotary_frequencies(self.config.head_dim).to(batch.indices.device)
        # angles in fp32 for every type of weights, [rows, 1, 2, head_dim / 4]
        angles = (positions(batch).T[:, :, None] * frequencies).unsqueeze(1)
        cosine, sine = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        hidden = self.word_embeddings(batch.token_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(index, hidden, cosine, sine, attend)
        return cast("Tensor", self.final_layernorm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size]."""
        return cast("Tensor", self.lm_head(hidden))
