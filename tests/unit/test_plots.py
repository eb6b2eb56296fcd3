"""Plots: every point is drawn at the right position, and a malformed chart file is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.plots import Chart, Scale, draw, main

CHART = {
    "title": "Throughput & more",
    "date": "2026-11-22",
    "machine": "a test",
    "command": "python -m benchmarks.load",
    "x_label": "concurrent requests",
    "y_label": "tokens/s",
    "series": [
        {"name": "<ours>", "x": [1, 4, 16, 64], "y": [74, 260, 610, 900], "unit": "tokens/s"},
        {"name": "roofline", "x": [1, 64], "y": [130, 1200], "unit": "tokens/s", "is_limit": True},
    ],
}


def test_a_chart_is_well_formed_and_holds_every_point() -> None:
    text = draw(Chart.model_validate(CHART))
    tree = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert [circle[0].text for circle in tree.iter(f"{space}circle")] == [
        "<ours>: 74 tokens/s at 1",
        "<ours>: 260 tokens/s at 4",
        "<ours>: 610 tokens/s at 16",
        "<ours>: 900 tokens/s at 64",
    ]
    assert text.count("stroke-dasharray") == 2  # the limit, and its legend
    assert "prefers-color-scheme: dark" in text


def test_larger_is_higher_and_further_right_and_nothing_is_outside() -> None:
    scale = Scale(Chart.model_validate(CHART))
    assert scale.y(0) > scale.y(74) > scale.y(1200) >= scale.y(scale.y_ticks[-1]) > 0
    xs = [scale.x(x) for x in (1, 4, 16, 64)]
    assert [round(b - a, 6) for a, b in pairwise(xs)] == [round(xs[1] - xs[0], 6)] * 3  # logarithmic


def test_charts_are_drawn_raw_results_skipped_and_malformed_ones_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.json").write_text(json.dumps(CHART), encoding="utf-8")
    (tmp_path / "raw.json").write_text(json.dumps({"rows": []}), encoding="utf-8")
    assert main(tmp_path, tmp_path / "images") == 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["good.svg"]
    broken = {**CHART, "series": [{"name": "a", "x": [1], "y": [1, 2], "unit": ""}]}
    (tmp_path / "broken.json").write_text(json.dumps(broken), encoding="utf-8")
    assert main(tmp_path, tmp_path / "images") == 1
    assert re.search(r"broken\.json: .*a: 1 x and 2 y", capsys.readouterr().err, re.DOTALL)
