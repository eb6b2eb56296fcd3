"""Compares each weight format with float32: error of the logits on the demonstration model, and bytes of weights.

    python -m benchmarks.formats --json benchmarks/results/DATE-formats.json

On the demonstration model, which is trained: every format computes the logits at each token of float32's greedy
answers. Reported are the relative error and how often the most likely token is the same.
On ChatGLM2-6B's shape: bytes of all weights in memory, computed from the shapes.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.demo import QUESTIONS, conversation, demo
from benchmarks.sizing import weight_bytes
from kernels.precision import Precision
from models.family import LoadedNetwork
from serving.engine.interface import CAUSAL, CausalLM, RaggedBatch, Span
from serving.engine.native.attention import AttentionSpan, StepAttention
from serving.engine.native.device import kv_dtype
from serving.engine.native.kv_memory import KVMemory
from serving.engine.native.sequence import BLOCK

MAX_TOKENS = 60


def logits(network: CausalLM, token_ids: list[int], precision: Precision) -> Tensor:
    """[tokens, vocab_size] float32 after each token of one text, with keys and values in the server's data type."""
    kept = kv_dtype(network.device, precision, network.dtype)
    num_blocks = -(-len(token_ids) // BLOCK)
    memory = KVMemory(network.shape, num_blocks, network.device, kept)
    attend = StepAttention(memory, (AttentionSpan(0, len(token_ids), range(num_blocks), len(token_ids), CAUSAL),))
    batch = RaggedBatch(torch.tensor(token_ids), torch.arange(len(token_ids)), (Span(0, len(token_ids), CAUSAL),))
    with torch.inference_mode():
        return network.logits(network.forward(batch, attend)).float()[:, : network.shape.num_tokens]


def greedy_answer(model: LoadedNetwork, question: str) -> tuple[list[int], int]:
    """(ids of prompt and greedy answer in float32, index of the answer's first token)"""
    ids = model.chat_format.render(conversation(question))
    start = len(ids)
    while len(ids) < start + MAX_TOKENS and ids[-1] not in model.chat_format.stop_token_ids:
        ids.append(int(logits(model.network, ids, "float32")[-1].argmax()))
    return ids, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    precisions: list[Precision] = list(get_args(Precision))
    models = demo(precisions)
    texts = [greedy_answer(models["float32"], question) for question in QUESTIONS]
    exact = [logits(models["float32"].network, ids, "float32")[start - 1 : -1] for ids, start in texts]
    results: list[dict[str, object]] = []
    for precision, model in models.items():
        near = [logits(model.network, ids, precision)[start - 1 : -1] for ids, start in texts]
        difference = torch.cat([a - b for a, b in zip(near, exact, strict=True)])
        error = float(difference.norm() / torch.cat(exact).norm())
        same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(near, exact, strict=True)])
        gib = weight_bytes(precision) / 2**30
        print(
            f"{precision:9} relative logit error {error:.2e}   same token {float(same.float().mean()):.2%} "
            f"of {len(same)}   ChatGLM2-6B: {gib:.1f} GiB"
        )
        results.append(
            {"precision": precision, "logit_error": error, "same_token": float(same.float().mean()), "gib_6b": gib}
        )
    if arguments.json:
        head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": "python -m benchmarks.formats"}
        arguments.json.write_text(json.dumps(head | {"num_tokens": len(same), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
