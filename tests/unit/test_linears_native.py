"""The compiled products equal torch's, for every format and every instruction set that this CPU has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import native_library
from kernels.layouts import Format, PackedLinear, QuantizedWeight, pack, unpack
from kernels.linears_native import NativeLinear
from kernels.quantization import quantize_groups, quantize_rows

SETS = [each.name for each in native_library.usable()]
SHAPES = [(16, 32), (48, 96), (17, 40), (1000, 100), (5, 1000), (130, 64)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 24, 25, 33, 64, 71, 530]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if errors := native_library.compile_all(native_library.usable()):
        pytest.skip(errors[0])


def weights(format: Format, outputs: int, inputs: int, seed: int = 0) -> Tensor | QuantizedWeight:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    match format:
        case Format.FLOAT32:
            return weight
        case Format.BFLOAT16:
            return weight.bfloat16()
        case Format.FLOAT16:
            return weight.half()
        case Format.INT8_ROW | Format.INT4_ROW:
            return quantize_rows(weight, 8 if format == Format.INT8_ROW else 4)
        case _:
            return quantize_groups(weight, 8 if format == Format.INT8 else 4, format == Format.INT4_MIDDLE)


def exact(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.double() if isinstance(weight, Tensor) else weight.dequantized().double()


def packed(format: Format, outputs: int, inputs: int, bias: bool = True) -> tuple[PackedLinear, Tensor, Tensor | None]:
    weight = weights(format, outputs, inputs)
    offset = torch.randn(outputs) if bias else None
    return pack(weight, offset), exact(weight), offset


@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_back_what_was_packed(format: Format, shape: tuple[int, int]) -> None:
    weight = weights(format, *shape)
    back = unpack(pack(weight, None))
    if isinstance(weight, Tensor):
        assert torch.equal(weight, back)
        return
    assert isinstance(back, QuantizedWeight)
    assert torch.equal(weight.values, back.values)
    assert torch.equal(weight.scale, back.scale)
    assert (weight.middle is None and back.middle is None) or torch.equal(weight.middle, back.middle)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_torchs(instruction_set: str, format: Format, shape: tuple[int, int]) -> None:
    layer, weight, bias = packed(format, *shape, bias=shape[0] % 2 == 0)
    linear = NativeLinear(layer, instruction_set)
    tolerance = 1e-5 if format in (Format.FLOAT32, Format.FLOAT16) else 5e-3 if format == Format.BFLOAT16 else 1.5e-2
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
        expected = x.double() @ weight.T + (0 if bias is None else bias)
        error = linear(x) - expected
        assert float(error.norm() / expected.norm()) < 2 * tolerance, rows
        usual = x.double().norm(dim=1) * weight.norm() / shape[1] ** 0.5  # length of a product: few outputs can cancel
        assert float((error.norm(dim=1) / usual).max()) < 4 * tolerance, rows


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("format", [Format.INT8, Format.INT8_ROW, Format.INT4, Format.INT4_ROW, Format.INT4_MIDDLE])
def test_integer_products_are_exact(instruction_set: str, format: Format) -> None:
    """Activations that eight bits hold exactly, up to their extremes: nothing saturates."""
    layer, weight, _ = packed(format, 33, 96, bias=False)
    linear = NativeLinear(layer, instruction_set)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (5, 96), generator=generator).float()
    x[:, ::32] = 127  # every group's scale is one
    x[1], x[2] = 127, -127
    torch.testing.assert_close(linear(x).double(), x.double() @ weight.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("copies", [1, 2, 8])
def test_extremes_stay_in_their_row(instruction_set: str, format: Format, copies: int) -> None:
    """copies: of the rows, for the kernels of few and of many."""
    layer, weight, _ = packed(format, 40, 64, bias=False)
    linear = NativeLinear(layer, instruction_set)
    x = torch.randn(6, 64)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0
    x[4] = 1e-42  # a denormal number
    x[5] *= 1e30
    out = linear(x.repeat(copies, 1))[-6:]
    assert not out[1].isfinite().any()
    assert not out[2].isfinite().all()
    assert torch.equal(out[3], torch.zeros(40))
    assert out[4].abs().max() < 1e-38
    assert torch.allclose(out[0].double(), x[0].double() @ weight.T, atol=0.5, rtol=0.05)
    assert out[5].isfinite().all()


@pytest.mark.parametrize("instruction_set", SETS)
def test_one_large_channel_does_not_spoil_a_product(instruction_set: str) -> None:
    """A channel 100 times larger than the others put a product with one scale a row off by 7 to 12.5 %."""
    layer, weight, _ = packed(Format.INT8, 64, 512, bias=False)
    x = torch.randn(4, 512)
    x[:, 77] *= 100
    expected = x.double() @ weight.T
    without = expected - x[:, 77:78].double() * weight[:, 77]
    error = (NativeLinear(layer, instruction_set)(x) - expected).norm() / without.norm()
    assert float(error) < 0.1  # of the product without that channel; with one scale a row it is above 0.5


def test_threads_of_torch_are_used_and_give_the_same() -> None:
    layer, _, _ = packed(Format.INT8, 2000, 640)
    linear, x = NativeLinear(layer), torch.randn(9, 640)
    expected = linear(x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear(x), expected)
    finally:
        torch.set_num_threads(threads)
