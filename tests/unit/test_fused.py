"""What a GPU compiles computes what the plain operations compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.small_ops import PLAIN, agree, with_compiler

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_formulas_are_the_operations(dtype: torch.dtype, rows: int) -> None:
    assert agree(with_compiler(lambda formula: formula), CPU, dtype, rows)


def test_other_numbers_are_noticed() -> None:
    for wrong in (
        replace(PLAIN, swiglu=lambda gate_up: PLAIN.swiglu(gate_up) * 1.01),
        replace(PLAIN, rotate=lambda heads, turns: None),
        replace(PLAIN, eight_bits=lambda rows: (rows.to(torch.int8), PLAIN.eight_bits(rows)[1])),
    ):
        assert not agree(wrong, CPU, torch.float32, 3)
