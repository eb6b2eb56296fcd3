"""Measures decode and prefill speed of the native engine without HTTP, and the machine's limits in the same run.

    python -m benchmarks.engine --shape quarter --precision float16 int8 --batch 1 16 --prompt 64
    python -m benchmarks.engine --shape 6b --folder /tmp/6b --precision bfloat16 --batch 1 --steps 8

Prints decode and prefill as tokens per second, and the fraction of the limits: memory bandwidth for decode with one
sequence, and the best matrix product of that precision for prefill.
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
from typing import Any, cast

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import SHAPES, random_model
from kernels.linears import compute_dtype, packed_linear
from kernels.precision import Precision
from models.checkpoints.open_decoder import open_decoder
from models.networks.flat_decoder import FlatDecoder
from models.store.progress import no_progress
from serving.engine.interface import SamplingParams
from serving.engine.native.device import keep_freed_memory, kv_dtype, num_usable_cores
from serving.engine.native.model_runner import ModelRunner
from serving.engine.native.scheduler import Scheduler
from serving.engine.native.sequence import SequenceState

BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 64}


def bandwidth() -> float:
    """Bytes per second that all cores together read from memory."""
    values = torch.ones(256 * 2**20 // 4)
    return values.nbytes / _best_seconds(lambda: values.sum())


def product_flops(precision: Precision) -> float:
    """Floating-point operations per second of one large product in this precision, weights packed."""
    rows, inputs, outputs = 512, 2048, 4096
    linear = packed_linear(nn.Linear(inputs, outputs, bias=False), precision, torch.device("cpu"))
    x = torch.randn(rows, inputs).to(compute_dtype(precision, torch.device("cpu")))
    return 2 * rows * inputs * outputs / _best_seconds(lambda: linear(x))


def _best_seconds(run: Callable[[], object], rounds: int = 7) -> float:
    with torch.inference_mode():
        run()
        times: list[float] = []
        for _ in range(rounds):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return min(times)


def measure(
    network: FlatDecoder, batch: int, prompt_tokens: int, num_steps: int, precision: Precision = "bfloat16"
) -> tuple[float, float]:
    """(prefill tokens per second, median seconds of a decode step) for `batch` concurrent sequences."""
    rng = random.Random(0)
    scheduler = Scheduler(batch, 512, batch * (prompt_tokens + num_steps + 64))
    kept = kv_dtype(network.device, precision, network.dtype)
    runner = ModelRunner(network, scheduler.num_tokens, kv_dtype=kept)
    plain = SamplingParams(max_tokens=num_steps + 8, temperature=1.0, top_k=1)  # greedy, but without drafts
    for seed in range(batch):
        ids = rng.choices(range(1000, 60_000), k=prompt_tokens)
        scheduler.add(SequenceState(ids, plain, seed=seed))

    def step() -> float:
        plan = scheduler.schedule()
        begun = time.perf_counter()
        results = runner.run(plan)
        seconds = time.perf_counter() - begun
        for each in plan.scheduled:
            scheduler.computed(each)
        for each, sampled in results:
            each.sequence.append(sampled[0].token_id)
        return seconds

    prefill = 0.0
    while scheduler.waiting or not all(s.num_generated for s in scheduler.running):
        prefill += step()
    return batch * prompt_tokens / prefill, statistics.median(step() for _ in range(num_steps))


def opened(arguments: argparse.Namespace, precision: Precision) -> tuple[FlatDecoder, dict[str, float]]:
    """The network, and the seconds and memory that loading took."""
    begun = time.perf_counter()
    if arguments.folder is None:
        model = random_model(arguments.shape, torch.bfloat16, arguments.layers)
        network = FlatDecoder(model, precision, model.config.vocab_size, 8192, no_progress)
    else:
        network = cast(
            "FlatDecoder", open_decoder(arguments.folder, torch.device("cpu"), precision, no_progress, 64_794, 8192)
        )
    gc.collect()
    memory = psutil.Process().memory_info()
    return network, {"load_seconds": time.perf_counter() - begun, "own_gib": (memory.rss - memory.shared) / 2**30}


def report(network: FlatDecoder, precision: Precision, batch: int, peak: float, arguments: Any) -> dict[str, Any]:
    """Measure one batch size and print its line."""
    shape = network.shape
    hidden, inner = shape.hidden_size, SHAPES[arguments.shape]["intermediate_size"]
    width = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    weights = shape.num_layers * hidden * (2 * width + 3 * inner) + hidden * shape.vocab_size
    before = bandwidth()
    prefill, seconds = measure(network, batch, arguments.prompt, arguments.steps, precision)
    read = (before + bandwidth()) / 2  # measured around each run: on shared machines it changes by the minute
    num_bytes = weights * BYTES_PER_WEIGHT[precision]
    in_prompts = weights - hidden * shape.vocab_size * (1 - 1 / arguments.prompt)  # the head computes only the last row
    figures = {
        "precision": precision,
        "batch": batch,
        "decode_tokens_per_second": batch / seconds,
        "of_bandwidth": num_bytes / seconds / read,
        "bandwidth": read,
        "bytes_per_token": num_bytes,
        "product_tokens_per_second": peak / 2 / weights,
        "prefill_tokens_per_second": prefill,
        "of_product_peak": 2 * in_prompts * prefill / peak,
    }
    print(
        f"{precision:9} batch {batch:<3} decode {batch / seconds:8.1f} tokens/s ({1000 * seconds:.1f} ms, "
        f"{figures['of_bandwidth']:.0%} of {read / 1e9:.1f} GB/s)   prefill {prefill:8.1f} tokens/s "
        f"({figures['of_product_peak']:.0%} of the product's peak, {peak / 1e9:.0f} GFLOP/s)",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="quarter")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a short run")
    parser.add_argument("--folder", type=Path, help="read the weights that benchmarks.shapes wrote here")
    parser.add_argument("--precision", nargs="+", default=["float16", "int8"], choices=BYTES_PER_WEIGHT)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--profile", action="store_true", help="print the operations of the first batch size")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(num_usable_cores())
    keep_freed_memory()
    results: list[dict[str, Any]] = []
    for precision in arguments.precision:
        network, loaded = opened(arguments, precision)
        peak = product_flops(precision)
        print(f"{precision}: loaded in {loaded['load_seconds']:.1f} s, {loaded['own_gib']:.2f} GiB")
        if arguments.profile:
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                measure(network, arguments.batch[0], arguments.prompt, arguments.steps, precision)
            print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
        results += [report(network, precision, batch, peak, arguments) | loaded for batch in arguments.batch]
        del network
        gc.collect()
    if arguments.json:
        head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "shape": arguments.shape}
        arguments.json.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
