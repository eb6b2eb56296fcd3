"""Where the golden data made with the original 2023 code lies, if this machine has it."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY.parent / "shared" / "golden"

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden data (../shared/golden) is not on this machine"
)
