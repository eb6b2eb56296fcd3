"""Every weight format gives the right product, for each row independently of the rest of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels import linears
from kernels.linears_native import StoredEmbedding
from kernels.precision import Precision

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16", "int8", "int4")


def layer(bias: bool, inputs: int = 256, outputs: int = 320) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs, bias=bias)


def product(precision: Precision, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        dtype = linears.compute_dtype(precision, CPU)
        return linears.packed_linear(linear, precision, CPU)(x.to(dtype)).float()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 256), (5, 256), (1, 70, 256)])
def test_the_product_is_right_within_the_format(precision: Precision, bias: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = layer(bias)(x).detach()
    error = product(precision, layer(bias), x) - expected
    assert error.shape == expected.shape
    assert error.norm() <= linears.TOLERANCE[precision] * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_outlier_in_a_neighbouring_row_changes_nothing(precision: Precision) -> None:
    """With one activation scale for the batch, int8 products were wrong by half: docs/decisions.md."""
    row = torch.randn(1, 256)
    batch = torch.cat([row, 1000 * torch.randn(1, 256), row])
    alone = product(precision, layer(True), row)
    products = product(precision, layer(True), batch)
    assert torch.allclose(products[0], alone[0], rtol=1e-2, atol=1e-3)
    assert torch.allclose(products[2], alone[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_of_zeros_gives_the_bias(precision: Precision) -> None:
    linear = layer(True)
    expected = linear.bias.detach().clone()
    assert torch.allclose(product(precision, linear, torch.zeros(2, 256))[1], expected, atol=1e-2)


def test_packing_keeps_embeddings_as_stored_and_widens_rows() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64)).half()
    linears.pack(model, "float16", CPU, lambda done, total, what: None)
    embedding = model[0]
    assert isinstance(embedding, StoredEmbedding)
    assert embedding.weight.dtype == torch.float16
    assert embedding(torch.tensor([3])).dtype == torch.float32
    assert not [name for name, child in model.named_modules() if type(child) is nn.Linear]
