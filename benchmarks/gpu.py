"""Measures the GPU path in one call: ChatGLM2-6B's shape with random weights generated on the device.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --precision bfloat16 int4 --minutes 9   (sections that would begin later are skipped)
    python -m benchmarks.gpu --dry-run                               (a tiny shape on the CPU, to test the script)

Each precision is first compared with float32 (relative error of the logits), then measured: one stream, many at once,
long prompts, prefixes hit and missed, with and without CUDA graphs. transformers' `generate` and its continuous
batching are measured for comparison, and the device's limits in the same run. A section that fails is recorded with its
error and the others continue. Results are written after every section: DATE-gpu.json with everything, DATE-gpu-*.json
for benchmarks.plots.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import GlmForCausalLM

from benchmarks import gpu_measure
from benchmarks.gpu_measure import Bench, Figures, Serving
from benchmarks.plots import ROOT
from benchmarks.shapes import SHAPES, VOCABULARY, random_model
from benchmarks.sizing import weight_bytes
from kernels.precision import Precision
from models.networks.flat_decoder import FlatDecoder
from serving.engine.native.device import cache_tokens

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float16", "int8", "int4")
CHECKED = (5, 64, 300)  # lengths of the prompts whose logits are compared
ALLOWED_ERROR = {"bfloat16": 0.06, "float16": 0.02, "int8": 0.4, "int4": 1.1}  # of random weights; see docs/gpu.md


@dataclass(frozen=True)
class Plan:
    """The loads that are measured."""

    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    new_tokens: int = 64
    long_prompts: tuple[tuple[int, int], ...] = ((1000, 1), (1000, 16), (8000, 1), (8000, 8))  # (tokens, at once)
    prefix_tokens: int = 4000
    others: tuple[int, ...] = (1, 16, 64, 256)  # requests at once for transformers' engines
    copy_megabytes: int = 4096
    side: int = 8192
    kv_tokens: int | None = None  # None: by free memory


DRY = Plan((1, 3), 6, ((200, 1),), 100, (1, 2), 8, 256, 2048)


@dataclass
class Report:
    """The measured sections, written to a file after each one."""

    folder: Path
    head: Figures
    deadline: float
    sections: dict[str, Any] = field(default_factory=dict[str, Any])

    def section(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure and write. Returns None for a measurement that raised, and records its error."""
        begun = time.perf_counter()
        if time.monotonic() > self.deadline:
            self.sections[name] = {"skipped": "no time left; see --minutes"}
            return None
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001
            # one precision without a kernel or without memory must not end the whole run
            found = None
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.sections[name] = {
                "error": f"{type(error).__name__}: {error}"[:2000],
                "at": f"{last.name}:{last.lineno}",
            }
        else:
            self.sections[name] = found
        print(f"{name}: {json.dumps(self.sections[name])[:400]}  ({time.perf_counter() - begun:.1f} s)", flush=True)
        self.write()
        return found

    def write(self) -> None:
        base = f"{self.head['date'][:10]}-gpu"
        self._save(f"{base}.json", self.head | {"sections": self.sections})
        for name, chart in charts(self.sections).items():
            self._save(
                f"{base}-{name}.json", {**chart, **{key: self.head[key] for key in ("date", "machine", "command")}}
            )

    def _save(self, name: str, content: Figures) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure_precision(
    bench: Bench, plan: Plan, report: Report, precision: Precision, reference: torch.Tensor | None
) -> None:
    """All sections of one precision. Stops early if loading fails or the logits are wrong."""
    bench.clear()
    holder: list[FlatDecoder] = []

    def load() -> Figures:
        begun = time.perf_counter()
        holder.append(gpu_measure.network(bench, precision))
        return {"seconds": time.perf_counter() - begun, **bench.memory_gb()}

    if report.section(f"{precision}/load", load) is None:
        return
    decoder = holder.pop()
    report.section(f"{precision}/linear", lambda: gpu_measure.linear_speeds(bench, precision, (1, 16, 64, 256)))
    if reference is not None:
        error = report.section(
            f"{precision}/error", lambda: gpu_measure.relative_error(gpu_measure.logits_of(decoder, CHECKED), reference)
        )
        if error is None or not error["relative"] <= ALLOWED_ERROR[precision]:
            report.section(f"{precision}/refused", lambda: "the logits are wrong, so its speed is not measured")
            return
    kv_tokens = plan.kv_tokens or min(cache_tokens(decoder.shape, bench.device, decoder.dtype, 0, 256), 300_000)
    answers: list[list[int]] = []
    for graphs in (False, True):
        name = f"{precision}/{'graphs' if graphs else 'eager'}"
        report.section(name, lambda graphs=graphs: _measure_serving(bench, plan, decoder, kv_tokens, graphs, answers))
        bench.clear()


def _measure_serving(
    bench: Bench, plan: Plan, decoder: FlatDecoder, kv_tokens: int, graphs: bool, answers: list[list[int]]
) -> Figures:
    """Without graphs only the smallest and largest load. answers: the tokens of each variant, to be compared."""
    serving = Serving(bench, decoder, kv_tokens, max(plan.concurrency), graphs)
    try:
        found: Figures = {"start": serving.start, "kv_tokens": kv_tokens}
        serving.load(1, 64, 8, seed=0)
        answers.append(serving.greedy(gpu_measure.prompt(64, 77), 64))
        found["same_tokens_as_eager"] = answers[0] == answers[-1]
        few = (plan.concurrency[0], plan.concurrency[-1])
        found["concurrency"] = {
            str(count): serving.load(count, 64, plan.new_tokens, seed=count)
            for count in (plan.concurrency if graphs else few)
        }
        if graphs:
            found["prompts"] = {
                f"{tokens} x {count}": serving.load(count, tokens, plan.new_tokens, seed=tokens + count)
                for tokens, count in plan.long_prompts
            }
            found["prefix"] = {
                name: serving.load(1, plan.prefix_tokens, plan.new_tokens, seed=999) for name in ("miss", "hit")
            }
        return found | {"memory": bench.memory_gb()}
    finally:
        serving.close()


def measure_others(bench: Bench, plan: Plan, report: Report) -> None:
    """Measure transformers' engines with the same weights in bfloat16."""
    bench.clear()
    holder: list[GlmForCausalLM] = []

    def load() -> Figures:
        holder.append(random_model(bench.shape, torch.bfloat16, device=bench.makes_on).to(bench.device))
        return bench.memory_gb()

    if report.section("transformers/load", load) is None:
        return
    engines = {
        "generate": gpu_measure.generate_speed,
        "continuous batching": gpu_measure.continuous_batching_speed,
    }
    for name, speed in engines.items():
        for count in plan.others:
            report.section(
                f"transformers {name}/{count}",
                lambda speed=speed, count=count: speed(bench, holder[0], count, 64, plan.new_tokens),
            )


def charts(sections: dict[str, Any]) -> dict[str, Figures]:
    """The chart for benchmarks.plots: throughput over concurrent requests."""
    series: list[Figures] = []
    for precision in PRECISIONS:
        many = (sections.get(f"{precision}/graphs") or {}).get("concurrency") or {}
        if many:
            _add(series, precision, {int(count): one["tokens_per_second"] for count, one in many.items()})
    for engine in ("generate", "continuous batching"):
        head = f"transformers {engine}/"
        many = {int(k.removeprefix(head)): v for k, v in sections.items() if k.startswith(head)}
        _add(
            series,
            f"transformers {engine}",
            {c: v["tokens_per_second"] for c, v in many.items() if "error" not in v and "skipped" not in v},
        )
    if not series:
        return {}
    made = {"throughput": _chart("ChatGLM2-6B on a GPU: total throughput", "concurrent requests", series)}
    single = [line for line in series if line["x"] and line["x"][0] == 1]
    speed = (sections.get("limits") or {}).get("copy_bytes_per_second")
    if single and speed:
        bars = [{**line, "x": line["x"][:4], "y": line["y"][:4]} for line in single]
        limit = {
            "name": "bandwidth, 16 bits",
            "x": [1.0, 4.0],
            "y": [n * speed / read_bytes("bfloat16") for n in (1, 4)],
        }
        bars.append({**limit, "unit": "tokens/s", "is_limit": True})
        made["few"] = _chart("ChatGLM2-6B on a GPU: few requests and the bandwidth limit", "concurrent requests", bars)
    return made


def _add(series: list[Figures], name: str, points: dict[int, float]) -> None:
    if points:
        xs = sorted(points)
        series.append({"name": name, "x": xs, "y": [points[x] for x in xs], "unit": "tokens/s"})


def _chart(title: str, x_label: str, series: list[Figures]) -> Figures:
    return {"title": title, "x_label": x_label, "y_label": "tokens/s", "series": series}


def summary(sections: dict[str, Any], shape: str) -> Figures:
    """Decode speed as a fraction of the copy bandwidth, with the bytes of the weights from benchmarks.sizing."""
    speed = (sections.get("limits") or {}).get("copy_bytes_per_second")
    found: Figures = {}
    for precision in PRECISIONS:
        one = ((sections.get(f"{precision}/graphs") or {}).get("concurrency") or {}).get("1")
        if one and speed and shape == "6b" and one["decode_tokens_per_second"]:
            fraction = one["decode_tokens_per_second"] * read_bytes(precision) / speed
            found[precision] = {"fraction_of_copy_bandwidth": fraction}
    return found


def read_bytes(precision: Precision) -> float:
    """Bytes of weights read per token: all except the embedding, of which only one row is read."""
    return weight_bytes(precision) - 2 * VOCABULARY * SHAPES["6b"]["hidden_size"]


def run(bench: Bench, plan: Plan, report: Report, precisions: list[Precision]) -> None:
    """Measure all sections, the most expensive last."""
    report.section("limits", lambda: gpu_measure.limits(bench, plan.copy_megabytes, plan.side))
    reference: torch.Tensor | None = report_reference(bench, report)
    for precision in precisions:
        measure_precision(bench, plan, report, precision, reference)
    measure_others(bench, plan, report)
    report.section("summary", lambda: summary(report.sections, bench.shape))


def report_reference(bench: Bench, report: Report) -> torch.Tensor | None:
    """float32's logits, or None (recorded) if float32 does not fit into memory."""
    holder: list[torch.Tensor] = []

    def measure() -> Figures:
        logits = gpu_measure.logits_of(gpu_measure.network(bench, "float32"), CHECKED)
        holder.append(logits)
        return {"rows": len(logits), "is_finite": bool(logits.isfinite().all())}

    report.section("float32 reference", measure)
    return holder[0] if holder else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="rows of one step, as the server has on a GPU")
    parser.add_argument("--minutes", type=float, default=30, help="sections that begin later are skipped")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results, for a dry run a temporary one")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("there is no CUDA device here; --dry-run tests the script on the CPU")
    if arguments.dry_run:
        bench, plan = Bench(torch.device("cpu"), "tiny", 64, max_positions=512), DRY
        machine = "dry run on a CPU"
        torch.set_num_threads(1)
        out = arguments.out or Path(tempfile.mkdtemp(prefix="gpu-dry-run-"))
    else:
        bench, plan = Bench(torch.device("cuda", 0), "6b", arguments.batch_tokens), Plan()
        machine = torch.cuda.get_device_name(0)
        out = arguments.out or ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "command": "python -m benchmarks.gpu" + (" --dry-run" if arguments.dry_run else ""),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "max_batch_tokens": bench.max_batch_tokens,
    }
    report = Report(out, head, time.monotonic() + 60 * arguments.minutes)
    run(bench, plan, report, arguments.precision)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
