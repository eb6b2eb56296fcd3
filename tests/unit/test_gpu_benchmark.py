"""The GPU's benchmark works before there is a GPU: all of it with a tiny shape, and with parts that fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_measure
from benchmarks.plots import Chart


def test_a_dry_run_measures_every_section_and_what_it_writes_can_be_drawn(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    gpu.main(["--dry-run", "--out", str(tmp_path), "--precision", "float16", "int8"])
    torch.set_num_threads(threads)
    (full,) = [path for path in tmp_path.iterdir() if path.name.endswith("-gpu.json")]
    sections = json.loads(full.read_text(encoding="utf-8"))["sections"]
    assert {name: found for name, found in sections.items() if "error" in found or "skipped" in found} == {}
    expected = {f"{p}/{part}" for p in ("float16", "int8") for part in ("load", "linear", "error", "eager", "graphs")}
    assert expected | {"limits", "transformers generate/2", "transformers continuous batching/2"} <= set(sections)
    served = sections[
        "float16/graphs"
    ]  # int8 rounds activations, which two ways of computing them may decide otherwise
    assert served["same_tokens_as_eager"]
    assert served["start"]["graphs"] == 5
    assert served["prefix"]["miss"]["cached_tokens"] == 0 < served["prefix"]["hit"]["cached_tokens"]
    (drawn,) = tmp_path.glob("*-gpu-throughput.json")
    chart = Chart.model_validate_json(drawn.read_text(encoding="utf-8"))
    assert [line.name for line in chart.series] == [
        "float16",
        "int8",
        "transformers generate",
        "transformers continuous batching",
    ]


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    report = gpu.Report(tmp_path, {"date": "2026-11-22", "machine": "", "command": ""}, time.monotonic() + 60)
    assert report.section("first", fail) is None
    assert report.section("second", lambda: {"value": 1}) == {"value": 1}
    report.deadline = time.monotonic()
    assert report.section("late", fail) is None
    written = json.loads((tmp_path / "2026-11-22-gpu.json").read_text(encoding="utf-8"))["sections"]
    assert written["first"]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert written["second"] == {"value": 1}
    assert "skipped" in report.sections["late"]


def test_a_precision_with_wrong_numbers_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = gpu.Report(tmp_path, {"date": "2026-11-22", "machine": "", "command": ""}, time.monotonic() + 60)
    bench = gpu_measure.Bench(torch.device("cpu"), "tiny", 64, max_positions=512)
    reference = torch.full((2 * len(gpu.CHECKED), 65_024), float("nan"))
    gpu.measure_precision(bench, gpu.DRY, report, "float16", reference)
    assert "float16/refused" in report.sections
    assert "float16/graphs" not in report.sections


def test_the_true_shape_reads_what_the_issue_says_for_each_token() -> None:
    assert gpu.read_bytes("float16") == pytest.approx(11.95e9, rel=0.002)
