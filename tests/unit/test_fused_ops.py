"""Fused operations compute what their eager formulas compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.fused_ops import EAGER, agrees_with_eager, compile_with

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_formulas_given_to_the_compiler_agree_with_the_eager_operations(dtype: torch.dtype, rows: int) -> None:
    assert agrees_with_eager(compile_with(lambda function: function), CPU, dtype, rows)


def test_other_numbers_are_noticed() -> None:
    for wrong in (
        replace(EAGER, swiglu=lambda gate_up: EAGER.swiglu(gate_up) * 1.01),
        replace(EAGER, rotate=lambda heads, rotations: None),
        replace(EAGER, quantize_activations=lambda rows: (rows.to(torch.int8), EAGER.quantize_activations(rows)[1])),
    ):
        assert not agrees_with_eager(wrong, CPU, torch.float32, 3)
