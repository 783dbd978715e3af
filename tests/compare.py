"""How close is close: errors against a float64 reference, in ulps or as a relative norm."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_close_in_norm", "assert_same", "assert_within_ulps", "ulp", "ulps_off"]


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance, in float64, between neighbouring numbers of `dtype` at each value."""
    info = torch.finfo(dtype)
    size = value.double().abs().clamp(info.tiny, info.max)
    _, exponent = torch.frexp(size)
    return torch.ldexp(torch.full_like(size, info.eps), exponent - 1)


def ulps_off(ours: Tensor, exact: Tensor, size: Tensor | None = None) -> Tensor:
    """|ours - exact| in ulps of ours.dtype at `exact`, or at `size` where that is larger.

    0 where both are the same infinity or NaN, or where exact is past the range and ours infinite;
    infinite where only one is NaN.
    """
    exact = exact.double()
    at = exact if size is None else torch.maximum(exact.abs(), size.double().abs())
    off = (ours.double() - exact).abs() / ulp(at, ours.dtype)
    same = (ours == exact.to(ours.dtype)) | (ours.isnan() & exact.isnan())
    return torch.where(same, 0.0, off.nan_to_num(nan=torch.inf, posinf=torch.inf))


def assert_within_ulps(
    ours: Tensor, exact: Tensor, ulps: float, size: Tensor | None = None
) -> None:
    """Assert |ours - exact| <= ulps, element by element, and equal shapes."""
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    if ours.numel() == 0:
        return
    off = ulps_off(ours, exact, size).reshape(-1)
    worst = int(off.argmax())
    assert off[worst] <= ulps, (
        f"element {worst}: {ours.reshape(-1)[worst].item()!r} is {off[worst].item():.3g} ulps off "
        f"{exact.reshape(-1)[worst].item()!r}, {ulps} allowed"
    )


def assert_close_in_norm(ours: Tensor, exact: Tensor, theirs: Tensor, factor: float = 2.0) -> None:
    """Assert that the relative norm of the error is small: at most `factor` times PyTorch's own
    error in the same dtype, plus rounding.
    """
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    assert torch.equal(ours.isnan(), exact.isnan()), "NaN in other places"
    eps = torch.finfo(ours.dtype).eps
    number = ~exact.isnan()
    exact, ours, theirs = (t.double()[number] for t in (exact, ours, theirs))
    size = torch.linalg.vector_norm(exact)
    error = torch.linalg.vector_norm(ours - exact)
    # In float64 the reference is no better than what is compared with it.
    rounding = 16 if eps < 1e-10 else 2
    allowed = factor * torch.linalg.vector_norm(theirs - exact) + rounding * eps * size
    assert error <= allowed, f"relative error {error / size:.3g}, allowed {allowed / size:.3g}"


def assert_same(ours: object, wanted: object, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    """Assert equality to rounding in float64, of tensors or nested tuples of them."""
    torch.testing.assert_close(ours, wanted, rtol=rtol, atol=atol, equal_nan=True)
