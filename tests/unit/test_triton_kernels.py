"""The GPU's kernels compute what torch's operators compute, by Triton's interpreter on the CPU.

Products of up to four rows use an instruction that the interpreter does not have: a GPU checks them when it starts.
"""

from __future__ import annotations

import pytest
import torch

from kernels import linears_triton
from kernels.fused_ops import agrees_with_eager, triton_ops
from kernels.layouts import QuantizedWeight
from kernels.quantization import quantize_groups, quantize_rows
from serving.engine.interface import NetworkShape
from serving.engine.native.attention_cuda import triton_store, triton_works_here
from serving.engine.native.kv_memory import KVMemory

CPU = torch.device("cpu")
FORMATS = {
    "int8": lambda weight: quantize_groups(weight, 8),
    "int8 by row": lambda weight: quantize_rows(weight, 8),
    "int4": lambda weight: quantize_groups(weight, 4),
    "int4 with a middle": lambda weight: quantize_groups(weight, 4, has_middle=True),
    "int4 by row": lambda weight: quantize_rows(weight, 4),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 200), (64, 544)])
def test_products_are_those_of_the_dequantised_weights(name: str, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight: QuantizedWeight = FORMATS[name](torch.randn(outputs, inputs, generator=generator))
    bias = torch.randn(outputs, generator=generator)
    packed = linears_triton.pack(weight, bias)
    torch.testing.assert_close(linears_triton.widened(packed, torch.float32), weight.dequantized())
    for rows in (5, 17, 64, 70):
        x = torch.randn(rows, inputs, generator=generator).half()
        x[1] = 0
        values, scales, sums = linears_triton.quantize(x, packed.padded)
        groups = values.view(rows, -1, 32).float()
        torch.testing.assert_close(sums, groups.sum(2) * scales)
        rounded = (groups * scales[..., None]).flatten(1)[:, :inputs]
        assert ((rounded - x.float()).abs() <= 0.5001 * scales.repeat_interleave(32, 1)[:, :inputs]).all()
        expected = (x.float() if rows > linears_triton.MANY else rounded) @ weight.dequantized().T + bias
        got = linears_triton.product(x, packed).float()
        assert (got - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("rows", [1, 7])
def test_small_operations_agree_with_torchs(rows: int) -> None:
    assert agrees_with_eager(triton_ops(), CPU, torch.float16, rows)


@pytest.mark.parametrize("kept", [torch.float16, torch.int8])
def test_attention_over_blocks_agrees_with_plain_attention(kept: torch.dtype) -> None:
    assert triton_works_here(CPU, kept)


@pytest.mark.parametrize("kept", [torch.float16, torch.int8])
def test_the_cache_store_writes_the_same_places(kept: torch.dtype) -> None:
    shape = NetworkShape(2, 4, 2, 64, 256, 100, 100, 64)
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, 8, 64, generator=generator).half()
    blocks, offsets = torch.tensor([1, 1, 3]), torch.tensor([0, 5, 15])
    memories = [KVMemory(shape, 4, CPU, kept) for _ in range(2)]
    for memory, store in zip(memories, (triton_store, KVMemory.store), strict=True):
        memory.keys.zero_()
        memory.values.zero_()
        for scales in memory.scales or ():
            scales.zero_()
        store(memory, 1, blocks, offsets, heads[:, 4:6], heads[:, 6:])
    assert torch.equal(memories[0].keys, memories[1].keys)
    assert torch.equal(memories[0].values, memories[1].values)
    assert 3 * 2 * 60 < memories[0].keys.count_nonzero() <= 3 * 2 * 64
    if kept == torch.int8:
        torch.testing.assert_close(memories[0].scales, memories[1].scales)
