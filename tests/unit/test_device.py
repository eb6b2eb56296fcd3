"""What `auto` takes, by the device's kind and by the memory that is free."""

from __future__ import annotations

import pytest
import torch

from serving.engine.native.device import GIB, choose_precision

CPU = torch.device("cpu")
CHATGLM2_6B = 6_243_584_000


@pytest.mark.parametrize(
    ("free_gib", "expected"), [(64, "bfloat16"), (14, "bfloat16"), (12, "int8"), (8, "int8"), (5, "int4"), (0, "int4")]
)
def test_weights_get_fewer_bits_where_16_would_leave_no_room(free_gib: int, expected: str) -> None:
    assert choose_precision(CPU, CHATGLM2_6B, free_gib * GIB) == expected


def test_a_small_model_keeps_full_precision() -> None:
    assert choose_precision(CPU, 1_300_000, 8 * GIB) == "float32"
