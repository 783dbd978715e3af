"""Gradients of a shape that autograd refuses: in the wrong order, or transposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Tolerance
from .probe import Probe, as_tuple, functions_of, replaced, wanted_shapes
from .report import Cause
from .watch import Grads

__all__ = ["mended"]

Shapes = list[tuple[int, ...] | None]
Fix = Callable[[Grads, Shapes, Grads], Grads]


def _exchanged(made: Grads, wanted: Shapes, upstream: Grads) -> Grads:
    """The gradients in the order in which their shapes fit."""
    left = [grad for grad in made if grad is not None]
    fitting: list[Tensor | None] = []
    for grad, shape in zip(made, wanted, strict=True):
        if grad is None:
            fitting.append(None)
            continue
        found = next((k for k, other in enumerate(left) if tuple(other.shape) == shape), None)
        fitting.append(grad if found is None else left.pop(found))
    return tuple(fitting)


def _transposed(made: Grads, wanted: Shapes, upstream: Grads) -> Grads:
    """The gradients with their last two dimensions exchanged where that fits."""
    return tuple(
        grad
        if grad is None or tuple(grad.shape) == shape or grad.dim() < 2
        else grad.transpose(-1, -2)
        for grad, shape in zip(made, wanted, strict=True)
    )


def _summed(made: Grads, wanted: Shapes, upstream: Grads) -> Grads:
    """In the place of gradients that are refused the gradient itself, or the upstream, summed over
    all dimensions but those of the operand."""
    fitting = []
    for grad, shape in zip(made, wanted, strict=True):
        if grad is None or shape is None or tuple(grad.shape) == shape or len(shape) > 1:
            fitting.append(grad)
            continue
        sums = [
            total for one in (grad, *upstream) if one is not None for total in _sums(one, shape)
        ]
        fitting.append(sums[0] if sums else grad)
    return tuple(fitting)


def _sums(grad: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """The sums of a gradient that have this shape, of one dimension or none."""
    if not shape:
        return [grad.sum()]
    kept = [dim for dim in range(grad.dim()) if (grad.shape[dim],) == shape and grad.dim() > 1]
    return [grad.sum([other for other in range(grad.dim()) if other != dim]) for dim in kept]


_FIXES: tuple[tuple[str, str, Fix], ...] = (
    ("swapped-operands", "the gradients are returned in the wrong order", _exchanged),
    ("transposed", "a gradient is transposed", _transposed),
    ("batch-sum-missing", "a gradient is not summed over the batch", _summed),
)


def mended(probe: Probe, tolerance: Tolerance) -> list[Cause]:
    """The causes whose fix, applied to what each custom Function returns, makes the check pass."""
    numeric = probe.numeric()
    found = []
    for name, what, fix in _FIXES:
        outputs = probe.outputs()

        def mending(
            function: Any, method: Callable[..., Any], fix: Fix = fix
        ) -> Callable[..., Any]:
            def mend(ctx: Any, *grads: Any) -> Any:
                made = as_tuple(method(ctx, *grads))
                return fix(made, wanted_shapes(ctx), grads)

            return mend

        try:
            with replaced(functions_of(outputs), "backward", mending):
                rows = [
                    probe.vjp(row, outputs, retain=True)
                    for row in torch.eye(probe.size, dtype=torch.float64)
                ]
        except RuntimeError:
            continue
        analytic = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        if all(map(tolerance.fits, analytic, numeric)):
            found.append(
                Cause(name, f"{what}, of shapes that autograd refuses; put right it passes")
            )
    return found
