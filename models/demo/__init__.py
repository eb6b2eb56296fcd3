"""The embedded default model: where its ChatGLM2 checkpoint lies. Knows nothing of training or serving."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"
