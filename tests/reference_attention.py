"""The engine's attention, written as plainly as possible: every sequence on its own, no pages, no kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.engine.interface import CausalLM, PromptLayout, RaggedBatch, Span


@dataclass
class ReferenceAttention:
    """Keys and values of some sequences, kept whole. `select` says which sequence each span of a batch belongs to."""

    keys: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (sequence, layer) -> [tokens, heads, head_dim]
    values: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    cache: None = None  # so that networks call this function
    sequences: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()

    def select(self, sequences: tuple[int, ...], spans: tuple[Span, ...]) -> None:
        self.sequences, self.spans = sequences, spans

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """query: [rows, heads, head_dim]; key, value: [rows, kv_heads, head_dim]. Returns query's shape."""
        seen = torch.empty_like(query)
        for sequence, span in zip(self.sequences, self.spans, strict=True):
            rows = slice(span.start, span.stop)
            keys = self._append(self.keys, (sequence, layer), key[rows])
            values = self._append(self.values, (sequence, layer), value[rows])
            allowed = visible(len(keys), span.stop - span.start, span.layout, window).to(query.device)
            seen[rows] = dense_attention(query[rows], keys, values, allowed, scale)
        return seen

    @staticmethod
    def _append(memory: dict[tuple[int, int], Tensor], place: tuple[int, int], new: Tensor) -> Tensor:
        memory[place] = torch.cat((memory[place], new)) if place in memory else new
        return memory[place]


def visible(num_keys: int, num_rows: int, layout: PromptLayout, window: int | None) -> Tensor:
    """[num_rows, num_keys]: which tokens the last `num_rows` tokens of a sequence may see."""
    key_index = torch.arange(num_keys)[None, :]
    row_index = torch.arange(num_keys - num_rows, num_keys)[:, None]
    allowed = (key_index <= row_index) | ((row_index < layout.num_two_way) & (key_index < layout.num_two_way))
    return allowed if window is None else allowed & (key_index > row_index - window)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """query: [rows, heads, head_dim]; key, value: [tokens, kv_heads, head_dim]; allowed: [rows, tokens]."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,thd->hrt", query.float(), key.float()) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("hrt,thd->rhd", weights, value.float()).to(query.dtype)


def forward(
    network: CausalLM, attention: ReferenceAttention, rows: dict[int, tuple[list[int], int, PromptLayout]]
) -> dict[int, Tensor]:
    """One step: for each sequence its new ids, the index of the first of them and its layout. Returns last logits."""
    token_ids, indices, spans = [], [], []
    for ids, first, layout in rows.values():
        spans.append(Span(len(token_ids), len(token_ids) + len(ids), layout))
        token_ids += ids
        indices += range(first, first + len(ids))
    batch = RaggedBatch(torch.tensor(token_ids), torch.tensor(indices), tuple(spans))
    attention.select(tuple(rows), batch.spans)
    with torch.no_grad():
        hidden = network.forward(batch, attention)
        last = network.logits(hidden[[span.stop - 1 for span in spans]])
    return dict(zip(rows, last, strict=True))


def greedy(
    network: CausalLM, prompts: list[list[int]], num_tokens: int, suppressed: frozenset[int] = frozenset()
) -> list[list[int]]:
    """The greedy continuations of all prompts, as one ragged batch that holds no padding."""
    attention = ReferenceAttention()
    layouts = [network.layout(prompt) for prompt in prompts]
    rows = {number: (list(prompt), 0, layouts[number]) for number, prompt in enumerate(prompts)}
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        for number, logits in forward(network, attention, rows).items():
            logits = logits.clone()
            logits[list(suppressed)] = float("-inf")
            answers[number].append(int(logits.argmax()))
        rows = {
            number: ([answer[-1]], len(prompts[number]) + len(answer) - 1, layouts[number])
            for number, answer in enumerate(answers)
        }
    return answers
