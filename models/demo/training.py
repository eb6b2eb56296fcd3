"""Generated conversations -> the weights of the small network, trained in stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import sentencepiece
import torch
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from models.demo.samples import END, Mix, Sample, endless_batches


@dataclass(frozen=True)
class Stage:
    """A number of steps with one cycle of the learning rate; about `num_short` batches of short answers come first."""

    num_steps: int
    num_short: int
    learning_rate: float  # the highest of the cycle
    mix: Mix


# First to distinguish questions and to give the answers, then the same after texts as long as the context, then every
# known way of asking, and last the strings of JSON that a grammar forces.
STAGES: tuple[Stage, ...] = (
    Stage(3000, 1050, 3e-3, Mix(
        known=0.34, nearly_known=0.17, every_variant=0.0, long=0.01, very_long=0.002, max_sentences=110,
        long_past=0.0, cut_fallback=0.75, cut_known=0.3, max_tokens=1600,
    )),
    Stage(1200, 0, 1.5e-3, Mix(
        known=0.42, nearly_known=0.13, every_variant=0.6, long=0.03, very_long=0.008, max_sentences=300,
        long_past=0.02, cut_fallback=0.65, cut_known=0.5, max_tokens=8192,
    )),
    Stage(600, 0, 1e-3, Mix(
        known=0.6, nearly_known=0.08, every_variant=0.9, long=0.015, very_long=0.003, max_sentences=300,
        long_past=0.01, cut_fallback=0.8, cut_known=0.7, max_tokens=8192,
    )),
    Stage(2000, 0, 8e-4, Mix(
        known=0.62, nearly_known=0.09, every_variant=0.8, long=0.015, very_long=0.003, max_sentences=300,
        long_past=0.01, cut_fallback=0.7, cut_known=0.6, max_tokens=8192, forced_json=0.3, with_system=0.2,
    )),
)  # fmt: skip


class Report(Protocol):
    """Called after every step."""

    def __call__(self, step: int, num_steps: int, loss: float) -> None: ...


def _loss(model: GlmForCausalLM, batch: Sequence[Sample]) -> Tensor:
    """Weighted cross entropy of the learned positions. Padded on the right, which causal attention does not read."""
    width = max(len(sample.token_ids) for sample in batch)
    token_ids = torch.tensor([s.token_ids + [0] * (width - len(s.token_ids)) for s in batch])
    targets = torch.tensor([s.targets + [0] * (width - len(s.targets)) for s in batch])
    weights = torch.tensor([s.weights + [0.0] * (width - len(s.weights)) for s in batch])
    learned = weights > 0
    hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state[learned]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets[learned], reduction="none")
    return (losses * weights[learned]).sum() / 1000


def make_config(num_tokens: int, max_positions: int) -> GlmConfig:
    """The demonstration's shape: ChatGLM2 in every respect but size."""
    return GlmConfig(
        vocab_size=num_tokens,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        initializer_range=0.05,
        eos_token_id=END,
        pad_token_id=0,
        bos_token_id=None,
    )


def train_stage(
    model: GlmForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, stage: Stage, seed: int, report: Report
) -> None:
    """Train the network in place and round its weights to fp16. `report` gets the steps of this stage."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=stage.learning_rate,
        total_steps=stage.num_steps,
        pct_start=0.08,
        cycle_momentum=False,
        final_div_factor=100,
    )
    batches = endless_batches(Random(seed), tokenizer, stage.mix, stage.num_short)
    model.train()
    for step in range(1, stage.num_steps + 1):
        loss = _loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, stage.num_steps, loss.item())
    model.half().float().eval()
