"""Draws benchmarks/results/*.json as docs/images/*.svg, readable on light and on dark backgrounds.

    python -m benchmarks.plots        # or: make plots

A chart file is one JSON object; files without `series` are raw results and are skipped:

    {"title": "Throughput", "date": "2026-11-22", "machine": "2 cores …", "command": "python -m benchmarks.load …",
     "x_label": "concurrent requests", "y_label": "tokens/s",
     "series": [{"name": "this server", "x": [1, 4, 16], "y": [74, 260, 610], "unit": "tokens/s"},
                {"name": "roofline", "x": [1, 16], "y": [130, 980], "unit": "tokens/s", "is_limit": true}]}

`is_limit` (default false) draws a dashed line: a limit of the machine.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 62, 96
COLOURS = ("#4c6ef5", "#f08c00", "#0ca678", "#e64980", "#7950f2", "#868e96")
LIMIT_COLOUR = "#868e96"
LOGARITHMIC_FROM = 8  # times between the smallest and the largest x
STYLE = """
    .ground { fill: #ffffff; } .text { fill: #1b1f2a; } .soft { fill: #5b6378; } .grid { stroke: #e3e6ee; }
    @media (prefers-color-scheme: dark) {
      .ground { fill: #14161c; } .text { fill: #e7e9f1; } .soft { fill: #a6aec4; } .grid { stroke: #2f3443; }
    }
    text { font: 13px system-ui, "Segoe UI", "PingFang SC", "Noto Sans CJK SC", sans-serif; }
    .title { font-size: 17px; font-weight: 600; } .small { font-size: 11px; }
"""


class Series(BaseModel):
    """One line: y over x."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    x: list[float]
    y: list[float]
    unit: str
    is_limit: bool = False

    @model_validator(mode="after")
    def _check(self) -> Series:
        if len(self.x) != len(self.y) or not self.x:
            raise ValueError(f"{self.name}: {len(self.x)} x and {len(self.y)} y")
        return self


class Chart(BaseModel):
    """One chart, and the command that measures its numbers again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    date: str
    machine: str
    command: str
    x_label: str
    y_label: str
    series: list[Series]


class Scale:
    """Value -> position in pixels. x is logarithmic where the values span a factor of 8; y is linear, from 0."""

    def __init__(self, chart: Chart) -> None:
        xs = [x for line in chart.series for x in line.x]
        self.x_ticks = _few(sorted(set(xs)))
        self._low, self._high = min(xs), max(xs)
        self._is_log = self._low > 0 and self._high / self._low >= LOGARITHMIC_FROM
        self.y_ticks = _round_ticks(max(y for line in chart.series for y in line.y))

    def x(self, value: float) -> float:
        low, high, here = self._low, self._high, value
        if self._is_log:
            low, high, here = math.log(low), math.log(high), math.log(here)
        share = (here - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.y_ticks[-1] * (HEIGHT - TOP - BOTTOM)


def draw(chart: Chart) -> str:
    """The chart as SVG text."""
    scale = Scale(chart)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(chart.title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        _text(LEFT, 28, chart.title, "title text"),
        _text(LEFT, 48, chart.y_label, "soft"),
        *_axes(chart, scale),
    ]
    for number, line in enumerate(chart.series):
        parts += _line(line, LIMIT_COLOUR if line.is_limit else COLOURS[number % len(COLOURS)], scale)
    parts += _legend(chart.series)
    parts.append(_text(LEFT, HEIGHT - 10, f"{chart.machine} · {chart.date}", "small soft"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(chart: Chart, scale: Scale) -> list[str]:
    parts: list[str] = []
    for value in scale.y_ticks:
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, _number(value), "soft", "end"))
    for value in scale.x_ticks:
        parts.append(_text(scale.x(value), HEIGHT - BOTTOM + 18, _number(value), "soft", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 38, chart.x_label, "soft", "middle"))
    return parts


def _line(line: Series, colour: str, scale: Scale) -> list[str]:
    points = [(scale.x(x), scale.y(y), x, y) for x, y in sorted(zip(line.x, line.y, strict=True))]
    dashes = ' stroke-dasharray="6 5"' if line.is_limit else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}/>']
    if not line.is_limit:
        for left, top, x, y in points:
            hint = escape(f"{line.name}: {_number(y)} {line.unit} at {_number(x)}")
            parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{colour}"><title>{hint}</title></circle>')
    return parts


def _legend(series: Sequence[Series]) -> list[str]:
    parts: list[str] = []
    left: float = LEFT
    for number, line in enumerate(series):
        colour = LIMIT_COLOUR if line.is_limit else COLOURS[number % len(COLOURS)]
        dashes = ' stroke-dasharray="5 4"' if line.is_limit else ""
        y = HEIGHT - 34
        parts.append(
            f'<line x1="{left:.0f}" x2="{left + 22:.0f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"{dashes}/>'
        )
        parts.append(_text(left + 28, y + 4, line.name, "text"))
        left += 28 + 7.5 * sum(2 if ord(letter) > 0x2E80 else 1 for letter in line.name) + 22
    return parts


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _few(values: Sequence[float]) -> list[float]:
    """At most ten of the values, evenly chosen."""
    step = -(-len(values) // 10)
    return list(values[::step])


def _round_ticks(largest: float) -> list[float]:
    """From 0 past the largest value, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [step * number for number in range(math.ceil(largest / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


def main(results: Path = ROOT / "benchmarks" / "results", images: Path = ROOT / "docs" / "images") -> int:
    """Draw every chart file; returns 1 if one of them does not have the format above."""
    images.mkdir(parents=True, exist_ok=True)
    num_wrong = 0
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "series" not in content:
            continue
        try:
            chart = Chart.model_validate(content)
        except ValueError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            num_wrong += 1
            continue
        target = images / f"{path.stem}.svg"
        target.write_text(draw(chart), encoding="utf-8")
        print(f"{target.relative_to(images.parent)}  {chart.title}")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
