"""Checks of arguments, in one message style: `OP: ARGUMENT wants ..., got ...`.

They run after an operation has failed, to say in Python's terms why (the stable ABI can only raise
RuntimeError), and before one that is being compiled. So a call that is right pays nothing.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "broadcastable",
    "choice",
    "floating",
    "integer",
    "like",
    "number",
    "shape",
    "tensor",
    "tensors",
]

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _name(value: Any) -> str:
    return type(value).__name__


def tensor(op: str, argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it is a strided one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} wants a torch.Tensor, got {_name(value)}")
    if value.is_nested:
        raise ValueError(f"{op}: {argument} wants a dense tensor, got a nested one")
    if value.layout is not torch.strided:
        raise ValueError(f"{op}: {argument} wants a dense tensor, got layout {value.layout}")


def floating(op: str, argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is a tensor of a floating dtype that has kernels."""
    tensor(op, argument, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {argument} wants dtype float64, float32, bfloat16 or float16, "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )


def like(op: str, argument: str, value: Any, first: str, other: Tensor) -> None:
    """Raise TypeError for another dtype than `other`'s, ValueError for another device."""
    floating(op, argument, value)
    if value.dtype != other.dtype:
        raise TypeError(
            f"{op}: {argument} wants the dtype of {first}, "
            f"{str(other.dtype).removeprefix('torch.')}, "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )
    device(op, argument, value, first, other)


def device(op: str, argument: str, value: Tensor, first: str, other: Tensor) -> None:
    """Raise ValueError for another device than `other`'s."""
    if value.device != other.device:
        raise ValueError(
            f"{op}: {argument} wants the device of {first}, {other.device}, got {value.device}"
        )


def shape(op: str, argument: str, value: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the shape matches; a string in `wanted` stands for any size."""
    right = value.dim() == len(wanted) and all(
        isinstance(size, str) or size == own for size, own in zip(wanted, value.shape, strict=True)
    )
    if not right:
        text = ", ".join(str(size) for size in wanted) + ("," if len(wanted) == 1 else "")
        raise ValueError(f"{op}: {argument} wants shape ({text}), got {tuple(value.shape)}")


def broadcastable(op: str, first: str, a: Tensor, second: str, b: Tensor, last: int = 0) -> None:
    """Raise ValueError unless the shapes of the two broadcast, but for their `last` dimensions."""
    # Not torch.broadcast_shapes: its RuntimeError cannot be caught in what torch.compile traces.
    ends = list(zip(reversed(a.shape), reversed(b.shape), strict=False))[last:]
    if not all(m == n or m == 1 or n == 1 for m, n in ends):
        raise ValueError(
            f"{op}: {first} and {second} want shapes that broadcast, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def number(op: str, argument: str, value: Any) -> float:
    """`value` as a float; raise TypeError unless it is a real number."""
    if type(value) is float:
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(
                f"{op}: {argument} wants a number within float64, got {value}"
            ) from None
    hint = ": a gradient for it needs multiply or add" if isinstance(value, Tensor) else ""
    raise TypeError(f"{op}: {argument} wants a number, got {_name(value)}{hint}")


def integer(op: str, argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is an int."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {argument} wants an int, got {_name(value)}")


def choice(op: str, argument: str, value: Any, wanted: tuple[str, ...]) -> None:
    """Raise TypeError unless `value` is a string, ValueError unless it is one of `wanted`."""
    names = ", ".join(map(repr, wanted))
    if not isinstance(value, str):
        raise TypeError(f"{op}: {argument} wants one of {names}, got {_name(value)}")
    if value not in wanted:
        raise ValueError(f"{op}: {argument} wants one of {names}, got {value!r}")


def tensors(op: str, argument: str, values: Any) -> None:
    """Raise TypeError unless `values` is a list or tuple of floating tensors of one kind."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{op}: {argument} wants a list of torch.Tensor, got {_name(values)}")
    for i, value in enumerate(values):
        like(op, f"{argument}[{i}]", value, f"{argument}[0]", values[0])
