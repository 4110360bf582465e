"""The compiled product for several rows of activations, against the product in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="numba has no build for this platform")

from models.language_model.cpu_decode import FrozenLinear, frozen_linear, gemm, gemv
from models.language_model.quantisation import Int8Linear

pytestmark = pytest.mark.skipif(not gemm.HAS_INT8, reason="needs AVX2")


@pytest.fixture(scope="module", autouse=True, params=["AVX2", "AVX-512"])
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """The module as it is with vectors of either length."""
    lanes = {"AVX2": 8, "AVX-512": 16}[request.param]
    if lanes > gemm.LANES:
        pytest.skip("needs AVX-512")
    with mock.patch.object(gemv, "WIDE", lanes == 16):
        importlib.reload(gemm)
        assert lanes == gemm.LANES
        yield
    importlib.reload(gemm)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CPU with AVX2 and no bfloat16; the numbers of rows that were multiplied by the compiled product."""
    seen, real = [], gemm.product
    monkeypatch.setattr(frozen_linear, "is_native", lambda dtype: dtype not in frozen_linear._NATIVE)
    monkeypatch.setattr(gemm, "HAS_BFLOAT16", True)
    monkeypatch.setattr(gemm, "product", lambda x, *rest: seen.append(len(x)) or real(x, *rest))
    return seen


def matrix(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights, and their scale."""
    torch.manual_seed(outputs)
    if dtype is torch.bfloat16:
        return torch.randn(outputs, inputs).bfloat16(), None
    return torch.randint(-127, 128, (outputs, inputs), dtype=dtype), torch.rand(outputs) + 0.1


def exact(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    out = x.double() @ weight.double().T
    return out if scale is None else out * scale.double()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.usefixtures("three_threads")
def test_product_equals_the_exact_one(dtype: torch.dtype, rows: int) -> None:
    for outputs, inputs in ((1, 1), (5, 31), (3, 32), (49, 160), (100, 300), (48, gemm.SPAN + 70)):
        weight, scale = matrix(outputs, inputs, dtype)
        x = torch.randn(rows, inputs).bfloat16() * torch.logspace(-3, 3, rows)[:, None].bfloat16()
        found, expected = gemm.product(x, weight, scale), exact(x, weight, scale)
        assert found.shape == (rows, outputs) and found.dtype is torch.float32
        # Int8 rounds x to 2**-16 of its row's largest value; sums of such errors grow with the root of their number.
        sizes = x.double().abs().amax(1, keepdim=True) * weight.double().norm(dim=1)
        sizes = sizes if scale is None else sizes * scale
        assert ((found - expected).abs() <= (6e-5 if scale is not None else 2e-6) * sizes).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_strided_activations(dtype: torch.dtype) -> None:
    weight, scale = matrix(10, 64, dtype)
    x = torch.randn(64, 8).bfloat16().T
    assert torch.equal(gemm.product(x, weight, scale), gemm.product(x.contiguous(), weight, scale))


def test_no_sum_overflows() -> None:
    weight = torch.full((7, 2 * gemm.SPAN + 32), 127, dtype=torch.int8)
    weight[3] = -127
    x = torch.ones(5, weight.shape[1]).bfloat16() * 3
    found = gemm.product(x, weight, torch.ones(7))
    torch.testing.assert_close(found, exact(x, weight, None).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_rows_do_not_touch_each_other(dtype: torch.dtype) -> None:
    """Rows of zeros, of the smallest numbers, of infinities and of NaN."""
    weight, scale = matrix(10, 64, dtype)
    x = torch.randn(6, 64).bfloat16()
    x[1], x[2], x[3, 5], x[4, 7] = 0, 1e-40, torch.inf, torch.nan
    found = gemm.product(x, weight, scale)
    assert (found[1] == 0).all() and found[2].abs().max() < 1e-35
    assert not found[3].isfinite().any() and found[4].isnan().all()
    torch.testing.assert_close(found[[0, 5]], exact(x[[0, 5]], weight, scale).float(), rtol=1e-4, atol=1e-2)


def test_where_it_applies(emulated: list[int]) -> None:
    narrow, wide = matrix(8, 64, torch.int8)[0], matrix(8, 64, torch.bfloat16)[0]

    def rows(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(count, 64, dtype=dtype)

    kinds = (torch.bfloat16, torch.float16, torch.float32)
    assert all(gemm.applies(rows(n, kind), narrow) for n in (5, 10_000) for kind in kinds)
    assert gemm.applies(rows(gemm.MOST_ROWS), wide) and not gemm.applies(rows(gemm.MOST_ROWS + 1), wide)
    assert not gemm.applies(rows(4), narrow)  # the GEMV's
    assert gemm.applies(rows(3), wide) and not gemm.applies(rows(2), wide) and not gemm.applies(rows(9), wide.float())
    assert not gemm.applies(rows(9), narrow.T.contiguous().T)
    assert not gemm.applies(rows(9).to("meta"), narrow)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_use_it_and_their_gradients_are_as_before(int8: bool, bias: bool, emulated: list[int]) -> None:
    torch.manual_seed(0)
    layer = FrozenLinear(70, 37, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    layer = Int8Linear.of(layer) if int8 else layer
    weight = layer.weight.float() * (layer.scale[:, None] if int8 else 1)
    x = torch.randn(2, 10, 70).bfloat16().requires_grad_()
    out = layer(x)
    expected = torch.nn.functional.linear(x.float(), weight, layer.bias.float() if bias else None)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-3)
    grad = torch.randn(out.shape).bfloat16()
    out.backward(grad)
    torch.testing.assert_close(x.grad, (grad.float() @ weight).bfloat16(), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), out)
    assert emulated == [20, 20]


def test_a_cpu_with_bfloat16_instructions_keeps_pytorchs_product(
    emulated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_linear, "is_native", lambda _: True)
    FrozenLinear(70, 37, dtype=torch.bfloat16).requires_grad_(False)(torch.randn(10, 70).bfloat16())
    assert not emulated


@torch.no_grad()
def test_few_rows_of_a_float32_model_stay_with_the_gemv() -> None:
    layer, x = FrozenLinear(70, 37).requires_grad_(False), torch.randn(4, 70)
    assert torch.equal(layer(x), gemv.product(x, layer.weight, layer.bias))
