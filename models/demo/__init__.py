"""The embedded default model: the folder of its ChatGLM2 checkpoint."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"
