"""Small weights for GPUs: their numbers, their kernels' shapes, and what the CPU can compute of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import linears, linears_cuda
from kernels.linears_cuda import KERNELS, TOLERANCE
from kernels.precision import UnsupportedPrecision
from kernels.quantization import GROUP, quantize_groups, quantize_rows, widen_groups
from models.store.progress import no_progress

CPU = torch.device("cpu")


def layer(bias: bool = True, inputs: int = 256, outputs: int = 96) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs, bias=bias)


ON_CPU = [(kernel, kind) for kind, kernels in KERNELS.items() for kernel in kernels if kernel.__name__ != "Int4Linear"]


@pytest.mark.parametrize(("kernel", "kind"), ON_CPU)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 256), (40, 256), (1, 70, 256)])
def test_the_product_is_right_within_the_format(kernel: type, kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = layer(bias)(x).detach()
    with torch.inference_mode():
        got = kernel(layer(bias), CPU, torch.float32)(x)
    assert got.shape == expected.shape
    assert (got - expected).norm() <= TOLERANCE[kind] * expected.norm()


@pytest.mark.parametrize(("kernel", "kind"), ON_CPU)
def test_a_row_does_not_feel_its_neighbours(kernel: type, kind: str) -> None:
    calm = torch.randn(1, 256)
    company = torch.cat([calm, 1000 * torch.randn(1, 256), calm, torch.zeros(60, 256)])
    with torch.inference_mode():
        packed = kernel(layer(), CPU, torch.float32)
        assert torch.allclose(packed(company)[[0, 2]], packed(calm).expand(2, -1), rtol=1e-4, atol=1e-5)
        assert torch.allclose(packed(company)[-1], layer().bias.detach(), atol=1e-5)


def test_each_weight_is_within_half_a_level_of_what_was_given() -> None:
    weight = layer(outputs=64).weight.detach()
    values, scale = quantize_rows(weight)
    assert ((values * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    packed, middles = quantize_groups(weight)
    assert packed.shape == (64, 128)
    assert middles.shape == (256 // GROUP, 64, 2)
    steps = middles[..., 0].float().T.repeat_interleave(GROUP, dim=1)
    rounding = 0.01 * weight.abs().max()  # scale and middle are kept in bfloat16
    assert ((widen_groups(packed, middles, torch.float32) - weight).abs() <= 0.5001 * steps + rounding).all()


def test_the_groups_are_those_of_torchs_own_kernel_for_cpus() -> None:
    """tinygemm on a GPU reads the same numbers: (value - 8) * scale + middle."""
    weight = layer(outputs=64).weight.detach()
    packed, middles = quantize_groups(weight)
    values = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1).to(torch.int32)
    kernel_weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    x = torch.randn(5, 256).bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, kernel_weight, GROUP, middles)
    expected = x.float() @ widen_groups(packed, middles, torch.float32).T
    assert torch.allclose(product.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("inputs", [4096, 13696, 96 * 32])
def test_tinygemm_takes_what_it_is_given(inputs: int) -> None:
    """Without a GPU only its signature and shapes can be asked."""
    with FakeTensorMode():
        packed = linears_cuda.Int4Linear(nn.Linear(inputs, 4096), CPU, torch.bfloat16)
        assert packed(torch.empty(1, 3, inputs, dtype=torch.bfloat16)).shape == (1, 3, 4096)


def test_where_no_kernel_works_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(linears_cuda.packed_linear(layer(), "int4", CPU), linears_cuda.Widened4Linear)  # no tinygemm here
    monkeypatch.setitem(KERNELS, "int4", KERNELS["int4"][:1])
    with pytest.raises(UnsupportedPrecision, match="int4 weights do not work on cpu"):
        linears_cuda.packed_linear(layer(), "int4", CPU)


def test_packing_quantises_every_layer_and_keeps_the_head_at_eight_bits() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(8, 256), "up": layer(), "odd": layer(inputs=192), "lm_head": layer(outputs=64)}
    )
    linears_cuda.pack(model, "int4", CPU, no_progress)
    assert [type(model[name]).__name__ for name in ("embed", "up", "odd", "lm_head")] == [
        "Embedding",
        "Widened4Linear",
        "Int8Linear",
        "Int8Linear",
    ]
    assert not list(model["up"].parameters())


def test_small_weights_are_read_to_the_host_for_a_card_and_refused_elsewhere() -> None:
    cuda = torch.device("cuda", 1)
    assert linears_cuda.load_device("int8", cuda) == CPU
    assert linears_cuda.load_device("float16", cuda) == cuda
    with pytest.raises(UnsupportedPrecision, match="int8 weights are for CPUs and CUDA"):
        linears.pack(nn.Sequential(layer()), "int8", torch.device("mps"), no_progress)
