"""csrc/math.h through the gates that use it: accuracy over the whole range of each dtype.

The truth is NumPy's float64, which is good to a fraction of an ulp of float32.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchbp.functional as F
from tests.compare import assert_within_ulps


def sigmoid(x: Any) -> Any:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def elu(x: Any) -> Any:
    return np.where(x <= 0, np.expm1(np.minimum(x, 0)), x)


#: gate -> (truth, what it may be off in float32, in ulps).
GATES: dict[str, tuple[Callable[..., Tensor], Callable[[Any], Any], float]] = {
    "exp": (F.exp, np.exp, 2),
    "sigmoid": (F.sigmoid, sigmoid, 2),
    "tanh": (F.tanh, np.tanh, 2),
    "elu": (F.elu, elu, 2),
    "reciprocal": (F.reciprocal, np.reciprocal, 0.5),
}
EACH_GATE = pytest.mark.parametrize("gate", GATES)
HALF_TYPES = [torch.bfloat16, torch.float16]
EACH_HALF_TYPE = pytest.mark.parametrize("dtype", HALF_TYPES, ids=lambda d: str(d)[6:])
EACH_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, *HALF_TYPES], ids=lambda d: str(d)[6:]
)


def truth(gate: str, x: Tensor) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.asarray(GATES[gate][1](x.double().numpy())))


@EACH_GATE
def test_float32(gate: str) -> None:
    """Every 4099th of all float32 numbers (4099 is prime), NaN and infinities among them."""
    bits = torch.arange(-(2**31), 2**31, 4099).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.linspace(-20, 20, 100_001)])
    assert_within_ulps(GATES[gate][0](x), truth(gate, x), GATES[gate][2])


@EACH_HALF_TYPE
@EACH_GATE
def test_half_types(gate: str, dtype: torch.dtype) -> None:
    """All 65536 numbers: the float64 result rounded once, but for ties that float32 breaks."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    y, exact = GATES[gate][0](x), truth(gate, x)
    assert_within_ulps(y, exact, 0.51)
    # torch rounds float64 to half types through float32, which ulps_off's "same" allows for.
    rounded = exact.to(dtype)
    differs = (y != rounded) & ~(y.isnan() & rounded.isnan())
    assert int(differs.sum()) <= 64


@EACH_GATE
def test_float64(gate: str) -> None:
    """Against NumPy's float64, which has an error of its own of up to 1 ulp."""
    x = torch.cat([torch.linspace(-750, 750, 100_001, dtype=torch.float64),
                   torch.randn(100_000, dtype=torch.float64),
                   torch.randn(10_000, dtype=torch.float64) * 1e-5,
                   torch.randn(10_000, dtype=torch.float64) * 1e-310])  # fmt: skip
    assert_within_ulps(GATES[gate][0](x), truth(gate, x), 4)


@EACH_GATE
@EACH_DTYPE
def test_the_place_in_a_vector_does_not_matter(gate: str, dtype: torch.dtype) -> None:
    """Bit for bit the same alone, in the vectorised part of a loop and in its rest."""
    x = (torch.randn(67) * 8).to(dtype)
    whole = GATES[gate][0](x)
    assert torch.equal(whole, torch.stack([GATES[gate][0](value) for value in x]))
    assert torch.equal(whole[3:40], GATES[gate][0](x[3:40]))
    strided = torch.randn(67, 3).to(dtype)
    strided[:, 1] = x
    assert torch.equal(whole, GATES[gate][0](strided[:, 1]))


@EACH_HALF_TYPE
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_products_of_half_types(dtype: torch.dtype, offset: int) -> None:
    """Each number times another: the product in float32, rounded once, and both gradients."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    a = numbers[offset:].clone().requires_grad_()
    b = numbers[torch.randperm(len(numbers))][offset:].requires_grad_()
    dy = numbers[torch.randperm(len(numbers))][offset:]
    y = F.multiply(a, b)
    y.backward(dy)
    for got, (u, v) in ((y, (a, b)), (a.grad, (dy, b)), (b.grad, (dy, a))):
        assert got is not None
        wanted = (u.float() * v.float()).to(dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(0), wanted.nan_to_num(0))


@EACH_HALF_TYPE
@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 520])
def test_half_types_of_each_length(dtype: torch.dtype, n: int) -> None:
    """Also where some of a vector are left, of one output and of two."""
    a, b, dy = torch.randn(3, n).to(dtype)
    assert torch.equal(F.relu(a), torch.relu(a))
    assert torch.equal(F.multiply(a, b), a * b)
    da, db = torch.ops.torchbp.multiply_backward(dy, a, b)
    assert torch.equal(da, dy * b)
    assert torch.equal(db, dy * a)


@EACH_HALF_TYPE
def test_nan_of_every_bit_stays_nan(dtype: torch.dtype) -> None:
    """Rounded like a number, it would be -0."""
    (nan,) = struct.unpack("d", b"\xff" * 7 + b"\x7f")
    assert F.scale(torch.ones(37, dtype=dtype), nan).isnan().all()
