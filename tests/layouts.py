"""Shapes and layouts that hypothesis draws tensors with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["LAYOUTS", "broadcast_pairs", "laid_out", "normal", "seeds", "shapes", "sizes"]

sizes = st.sampled_from([0, 1, 1, 2, 2, 3, 5])
shapes = st.lists(sizes, max_size=4).map(tuple)
seeds = st.integers(0, 2**16)

#: How a tensor lies in memory; of numbers all are alike.
LAYOUTS = ("plain", "transposed", "strided", "expanded", "offset", "sliced")


def laid_out(layout: str, shape: tuple[int, ...], values: Callable[..., Tensor]) -> Tensor:
    """A tensor of this shape and layout, from values(*shape)."""
    if layout == "transposed" and shape:
        return values(*shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
    if layout == "strided" and shape:
        return values(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "expanded" and shape:
        return values(1, *shape[1:]).expand(shape)
    if layout == "offset" and shape:
        return values(shape[0] + 1, *shape[1:])[1:]
    if layout == "sliced" and shape:
        return values(*shape[:-1], shape[-1] + 3)[..., 1 : shape[-1] + 1]
    return values(*shape)


@st.composite
def broadcast_pairs(draw: st.DrawFn, fit: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast: mostly, unless they have to `fit`."""
    full = draw(shapes)
    if not fit and draw(st.integers(0, 5)) == 0:
        return full, draw(shapes)

    def part() -> tuple[int, ...]:
        kept = full[draw(st.integers(0, len(full))) :]
        return tuple(1 if draw(st.booleans()) and draw(st.booleans()) else size for size in kept)

    return part(), part()


def normal(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A source of normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return values
