"""Raw results of `benchmarks.load` and `benchmarks.engine` -> the chart files that `benchmarks.plots` draws.

    python -m benchmarks.charts --date 2026-11-22 --machine "2 cores …" --peer "vLLM CPU=FILE.json" [--peer …] \\
        --engine FILE.json

A chart combines figures of different runs, between which the machine's speed varies; each ratio of docs/performance.md
comes from one run. The limit: memory bandwidth for a step, and the peak of matrix products for all rows together.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CHARTS = {
    "throughput": ("tokens_per_second", "Throughput", "tokens/s"),
    "first-token": ("ttft_ms_p50", "Time to first token, median", "ms"),
    "token": ("tpot_ms_p50", "Time per token of one answer, median", "ms"),
}


def points(files: list[Path], server: str, key: str) -> dict[int, float]:
    """Concurrency -> the median over the files that have it. server: "a" (ours) or "b"."""
    found: dict[int, list[float]] = {}
    for path in files:
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
            found.setdefault(result["concurrency"], []).append(result["figures"][server][key])
    return {concurrency: statistics.median(values) for concurrency, values in sorted(found.items())}


def line(name: str, values: dict[int, float], unit: str, is_limit: bool = False) -> dict[str, Any]:
    return {"name": name, "x": list(values), "y": list(values.values()), "unit": unit, "is_limit": is_limit}


def limit(path: Path, concurrencies: list[int]) -> dict[int, float]:
    """New tokens per second that bandwidth and matrix products allow, each with one prompt row, from an engine run."""
    (result, *_) = json.loads(path.read_text(encoding="utf-8"))["results"]
    steps = result["bandwidth"] / result["bytes_per_token"]
    prompt_row = result["of_product_peak"] / result["prefill_tokens_per_second"]  # seconds at the peak
    return {c: 1 / (1 / min(c * steps, result["product_tokens_per_second"]) + prompt_row) for c in concurrencies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=FILE[,FILE]")
    parser.add_argument("--engine", type=Path, required=True)
    arguments = parser.parse_args()
    peers = {
        name: [Path(file) for file in files.split(",")]
        for name, _, files in (peer.partition("=") for peer in arguments.peer)
    }
    for chart, (key, title, unit) in CHARTS.items():
        ours = points([file for files in peers.values() for file in files], "a", key)
        series = [line("this server", ours, unit)]
        series += [line(name, points(files, "b", key), unit) for name, files in peers.items()]
        if chart == "throughput":
            series.append(line("limit here", limit(arguments.engine, list(ours)), unit, is_limit=True))
        content = {
            "title": f"{title}: 0.25B model, 64-token prompts, 64 new tokens",
            "date": arguments.date,
            "machine": arguments.machine,
            "command": "python -m benchmarks.load",
            "x_label": "concurrent requests",
            "y_label": unit,
            "series": series,
        }
        (RESULTS / f"{chart}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
