"""What a precision of the weights and of the KV cache costs on a trained model: perplexity, divergence, first choices.

    python -m models.store import hf --from SmolLM2-135M-Instruct --name smollm2
    python -m benchmarks.quality smollm2 --text LICENSE

Computes the text in windows of 1,024 tokens in float32 and in each precision, 512 rows at a time through the cache as
the server does. KL: of the distribution after each token from float32's, in nats; same: how often the most likely token
is the same one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoints.open_decoder import open_decoder
from models.store.model_store import resolve
from models.store.progress import no_progress
from models.tokenizers.tokenizer_json import FastTokenizer
from serving.engine.interface import CAUSAL, CausalLM, RaggedBatch, Span
from serving.engine.native.attention import AttentionSpan, StepAttention
from serving.engine.native.device import kv_dtype, num_usable_cores
from serving.engine.native.kv_memory import KVMemory
from serving.engine.native.sequence import BLOCK

CPU = torch.device("cpu")
WINDOW, ROWS = 1024, 512
RUNS = (("float32", "auto"), ("bfloat16", "16"), ("int8", "16"), ("int8", "8"), ("int4", "16"), ("float32", "8"))


@torch.inference_mode()
def log_probabilities(network: CausalLM, ids: list[int], kept: torch.dtype) -> Iterator[Tensor]:
    """[tokens of a window, vocabulary] for one window after the other."""
    for first in range(0, len(ids), WINDOW):
        window = ids[first : first + WINDOW]
        blocks = list(range(-(-len(window) // BLOCK)))
        memory = KVMemory(network.shape, len(blocks), CPU, kept)
        parts: list[Tensor] = []
        for begin in range(0, len(window), ROWS):
            rows = window[begin : begin + ROWS]
            end = begin + len(rows)
            batch = RaggedBatch(torch.tensor(rows), torch.arange(begin, end), (Span(0, len(rows), CAUSAL),))
            attend = StepAttention(memory, (AttentionSpan(0, len(rows), blocks, end, CAUSAL),))
            parts.append(network.logits(network.forward(batch, attend)).float().log_softmax(dim=-1))
        yield torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(num_usable_cores())
    folder = resolve(arguments.tag).path
    ids = FastTokenizer(folder / "tokenizer.json").encode_plain(arguments.text.read_text(encoding="utf-8"))
    ids = ids[: arguments.tokens]
    exact: list[Tensor] = []
    print(f"{len(ids)} tokens\n| weights | cache | perplexity | KL | same |\n|---|---|---|---|---|")
    for precision, kv_precision in RUNS:
        network = open_decoder(folder, CPU, precision, no_progress, 1 << 30, 1 << 20)
        kept = kv_dtype(CPU, precision, network.dtype, kv_precision)
        losses, divergences, same = list[Tensor](), list[Tensor](), list[Tensor]()
        for number, found in enumerate(log_probabilities(network, ids, kept)):
            if len(exact) == number:
                exact.append(found)
            reference = exact[number]
            following = torch.tensor(ids[number * WINDOW :][1 : len(found)])
            losses.append(-found[:-1].gather(1, following[:, None]))
            divergences.append((reference.exp() * (reference - found)).sum(dim=1))
            same.append(found.argmax(dim=1) == reference.argmax(dim=1))
        perplexity = math.exp(torch.cat(losses).mean())
        agree = float(torch.cat(same).float().mean())
        cache = str(kept).removeprefix("torch.")
        print(
            f"| {precision} | {cache} | {perplexity:.3f} | {float(torch.cat(divergences).mean()):.4f} | {agree:.1%} |"
        )


if __name__ == "__main__":
    main()
