"""Fused operations compute what their eager formulas compute."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.fused_ops import EAGER, agrees_with_eager

CPU = torch.device("cpu")


def test_other_numbers_are_noticed() -> None:
    assert agrees_with_eager(EAGER, CPU, torch.float32, 3)
    for wrong in (
        replace(EAGER, swiglu=lambda gate_up: EAGER.swiglu(gate_up) * 1.01),
        replace(EAGER, rotate=lambda heads, rotations: None),
        replace(EAGER, add_rms_norm=lambda *rows: (rows[0], EAGER.add_rms_norm(*rows)[1])),
        replace(EAGER, rms_norm=lambda *rows: EAGER.rms_norm(*rows).double()),
    ):
        assert not agrees_with_eager(wrong, CPU, torch.float32, 3)
