"""What masks cost: a decode step of 16 sequences without and with a JSON grammar, A B A B in one run.

    python -m benchmarks.masks --precision float16 int8 --json benchmarks/results/DATE-masks.json
    python -m benchmarks.masks --cpu-time ...     (one thread, by its own time: for a machine that others use, too)

Vocabulary of ChatGLM2's size: its own with --tokenizer /path/to/tokenizer.model, else 64,794 made-up words and bytes.
The masked answers are JSON documents that never end; a step's time holds masks, sampling and the grammar's advance.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.shapes import NUM_TOKENS, SHAPES, random_model
from kernels.precision import Precision
from models.networks.flat_decoder import FlatDecoder
from models.store.progress import no_progress
from models.tokenizers.sentencepiece import SentencePieceTokenizer
from serving.engine.interface import SamplingParams
from serving.engine.native.device import num_usable_cores
from serving.engine.native.model_runner import ModelRunner
from serving.engine.native.scheduler import Scheduler
from serving.engine.native.sequence import SequenceState
from serving.generation.structured.grammar import JsonAnswer, answer_grammar
from serving.generation.structured.token_masks import Grammar, Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
        "note": {"type": ["string", "null"]},
    },
    "required": ["name", "age", "tags", "note"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 100_000}


class WordTable:
    """Every byte, then words of letters and Chinese characters: a vocabulary without a file."""

    num_tokens = NUM_TOKENS
    stop_token_ids = frozenset({2})

    def __init__(self) -> None:
        rng = random.Random(0)
        letters = [*"etaoinshrdlucmfwyp ", *(chr(code) for code in range(0x4E00, 0x5200))]
        words = {"".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(2 * NUM_TOKENS)}
        self._tokens = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]
        self._tokens += [word.encode() for word in sorted(words)[: NUM_TOKENS - len(self._tokens)]]

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]


def stepper(
    network: FlatDecoder, batch: int, num_tokens: int, grammar: Grammar | None, clock: Callable[[], float]
) -> Callable[[], float]:
    """Prefills `batch` sequences. The function returned carries out one decode step and returns its seconds."""
    rng = random.Random(0)
    scheduler = Scheduler(batch, 512, batch * (num_tokens + 128))
    runner = ModelRunner(network, scheduler.num_tokens)
    for seed in range(batch):
        sampling = SamplingParams(max_tokens=num_tokens, temperature=1.0, top_k=50)  # the same cost for any logits
        mask = grammar.new_mask() if grammar else None
        scheduler.add(SequenceState(rng.choices(range(1000, 60_000), k=64), sampling, seed=seed, mask=mask))

    def step() -> float:
        plan = scheduler.schedule()
        started = clock()
        results = runner.run(plan)
        for each in plan.scheduled:
            scheduler.computed(each)
        for work, (sampled, *_) in results:
            assert sampled.token_id is not None
            if work.sequence.mask is not None:
                work.sequence.mask.accept(sampled.token_id)
            work.sequence.append(sampled.token_id)
        return clock() - started

    while scheduler.waiting or not all(s.num_generated for s in scheduler.running):
        step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="quarter")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for a quick look")
    parser.add_argument("--precision", nargs="+", default=["float16", "int8"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu_time else num_usable_cores())
    token_table = _SentencePieceTable(arguments.tokenizer) if arguments.tokenizer else WordTable()
    grammar = Grammars(token_table).compile(answer_grammar(JsonAnswer(ENDLESS, "schema")), "schema", "schema")
    results = [measure(arguments, precision, grammar) for precision in arguments.precision]
    if arguments.json:
        head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


def measure(arguments: argparse.Namespace, precision: Precision, grammar: Grammar) -> dict[str, object]:
    """Alternates steps without and with masks; reports the ratios of their times."""
    model = random_model(arguments.shape, torch.bfloat16, arguments.layers)
    network = FlatDecoder(model, precision, NUM_TOKENS, 8192, no_progress)
    del model
    gc.collect()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    plain = stepper(network, arguments.batch, arguments.steps + 8, None, clock)
    masked = stepper(network, arguments.batch, arguments.steps + 8, grammar, clock)
    pairs = [(plain(), masked()) for _ in range(arguments.steps)]
    without, with_masks = ([pair[side] for pair in pairs] for side in (0, 1))
    mean = statistics.mean(with_masks) / statistics.mean(without)
    median = statistics.median(with_masks) / statistics.median(without)
    print(
        f"{precision:9} batch {arguments.batch}: {1000 * statistics.median(without):.1f} ms a step without masks, "
        f"{1000 * statistics.median(with_masks):.1f} ms with; ratio {median:.3f} (median), {mean:.3f} (mean)",
        flush=True,
    )
    return {
        "shape": arguments.shape,
        "precision": precision,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "clock": "cpu time" if arguments.cpu_time else "wall time",
        "median_ratio": median,
        "mean_ratio": mean,
        "step_seconds_without": statistics.median(without),
        "step_seconds_with": statistics.median(with_masks),
    }


class _SentencePieceTable:
    """The tokens of a SentencePiece model."""

    stop_token_ids = frozenset({2})

    def __init__(self, file: Path) -> None:
        self._tokenizer = SentencePieceTokenizer(file)
        self.num_tokens = self._tokenizer.num_tokens

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)


if __name__ == "__main__":
    main()
