"""Quantised weights for GPUs: their values, their kernels' shapes, and what a CPU can compute of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kernels import linears, linears_cuda
from kernels.layouts import GROUP
from kernels.linears import TOLERANCE
from kernels.linears_cuda import VARIANTS
from kernels.precision import QuantizedPrecision, UnsupportedPrecision
from kernels.quantization import QuantizedLinear, quantize_groups, quantize_rows
from models.store.progress import no_progress

CPU = torch.device("cpu")


def layer(bias: bool = True, inputs: int = 256, outputs: int = 96) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs, bias=bias)


def packed(variant: type, precision: QuantizedPrecision, linear: nn.Linear) -> nn.Module:
    module: nn.Module = variant(QuantizedLinear.from_linear(linear, precision), torch.float32)
    return module


@pytest.fixture
def cuda_kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linears.DEVICES, "cpu", linears.DEVICES["cuda"])


RUN_ON_CPU = [(linears_cuda.DequantizingLinear, precision) for precision in VARIANTS]


@pytest.mark.parametrize(("variant", "precision"), RUN_ON_CPU)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 256), (40, 256), (1, 70, 256)])
def test_the_product_is_right_within_the_format(
    variant: type, precision: QuantizedPrecision, bias: bool, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = layer(bias)(x).detach()
    with torch.inference_mode():
        product = packed(variant, precision, layer(bias))(x)
    assert product.shape == expected.shape
    assert (product - expected).norm() <= TOLERANCE[precision] * expected.norm()


@pytest.mark.parametrize(("variant", "precision"), RUN_ON_CPU)
def test_a_row_does_not_depend_on_its_neighbours(variant: type, precision: QuantizedPrecision) -> None:
    row = torch.randn(1, 256)
    batch = torch.cat([row, 1000 * torch.randn(1, 256), row, torch.zeros(60, 256)])
    with torch.inference_mode():
        module = packed(variant, precision, layer())
        assert torch.allclose(module(batch)[[0, 2]], module(row).expand(2, -1), rtol=1e-4, atol=1e-5)
        assert torch.allclose(module(batch)[-1], layer().bias.detach(), atol=1e-5)


def test_each_weight_is_within_half_a_step_of_the_original() -> None:
    weight = layer(outputs=64).weight.detach()
    rows = quantize_rows(weight, 8)
    assert ((rows.dequantized() - weight).abs() <= 0.5001 * rows.scale[:, None]).all()
    for bits in (8, 4):
        groups = quantize_groups(weight, bits)
        assert groups.scale.shape == (64, 256 // GROUP)
        steps = groups.scale.float().abs().repeat_interleave(GROUP, dim=1)
        within = ((groups.dequantized() - weight).abs() <= 0.5001 * steps).float().mean()
        assert within > (0.999 if bits == 8 else 0.95)  # the rest is clamped


@pytest.mark.usefixtures("cuda_kernels_on_cpu")
def test_without_a_kernel_the_precision_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # few rows are computed by an instruction of GPUs
    assert isinstance(linears.packed_linear(layer(), "int4", CPU), linears_cuda.DequantizingLinear)
    without_fallback = replace(linears.DEVICES["cpu"], variants={"int4": VARIANTS["int4"][:1]})
    monkeypatch.setitem(linears.DEVICES, "cpu", without_fallback)
    with pytest.raises(UnsupportedPrecision, match="int4 weights do not work on cpu"):
        linears.packed_linear(layer(), "int4", CPU)


@pytest.mark.usefixtures("cuda_kernels_on_cpu")
def test_packing_quantises_every_layer_and_keeps_the_output_layer_at_eight_bits() -> None:
    model = nn.ModuleDict({"up": layer(), "odd": layer(inputs=96), "lm_head": layer(outputs=64)})
    linears.pack(model, "int4", CPU, no_progress)
    assert [type(model[name]).__name__ for name in ("up", "odd", "lm_head")] == [
        "DequantizingLinear",
        "DequantizingLinear",
        "DequantizingLinear",
    ]
    assert [model[name]._linear.precision for name in ("up", "odd", "lm_head")] == ["int4", "int4", "int8"]
    assert not list(model["up"].parameters())


@pytest.mark.usefixtures("cuda_kernels_on_cpu")
def test_what_is_stored_quantised_is_packed_with_the_same_values() -> None:
    for inputs, precision in ((256, "int8"), (256, "int4"), (96, "int4")):
        x = torch.randn(3, inputs)
        stored = QuantizedLinear.from_linear(layer(inputs=inputs), precision)
        models = nn.Sequential(stored), nn.Sequential(stored.dequantized())
        for model in models:
            linears.pack(model, precision, CPU, no_progress)
        with torch.inference_mode():
            torch.testing.assert_close(models[0](x), models[1](x))


def test_quantised_weights_are_read_to_the_host_for_a_gpu_and_refused_on_other_devices() -> None:
    cuda = torch.device("cuda", 1)
    assert linears.load_device("int8", cuda) == CPU
    assert linears.load_device("float16", cuda) == cuda
    with pytest.raises(UnsupportedPrecision, match="int8 weights are for CPUs and CUDA"):
        linears.pack(nn.Sequential(layer()), "int8", torch.device("mps"), no_progress)
