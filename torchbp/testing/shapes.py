"""Gradients of a shape that autograd refuses: in the wrong order, or transposed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .case import Tolerance
from .probe import Probe, nodes_of
from .report import Cause
from .watch import Grads, _wanted

__all__ = ["mended"]

Fix = Callable[[Grads, list[tuple[int, ...] | None]], Grads]


def _exchanged(made: Grads, wanted: list[tuple[int, ...] | None]) -> Grads:
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


def _transposed(made: Grads, wanted: list[tuple[int, ...] | None]) -> Grads:
    """The gradients with their last two dimensions exchanged where that fits."""
    return tuple(
        grad
        if grad is None or tuple(grad.shape) == shape or grad.dim() < 2
        else grad.transpose(-1, -2)
        for grad, shape in zip(made, wanted, strict=True)
    )


def _summed(made: Grads, wanted: list[tuple[int, ...] | None]) -> Grads:
    """The gradients summed over the dimensions that the operands lack, or have one of."""
    fitting = []
    for grad, shape in zip(made, wanted, strict=True):
        if grad is None or shape is None or grad.dim() <= len(shape):
            fitting.append(grad)
        else:
            extra = tuple(range(grad.dim() - len(shape)))
            fitting.append(grad.sum(extra))
    return tuple(fitting)


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
        handles = []
        for node in nodes_of(outputs):
            if not isinstance(node, BackwardCFunction):
                continue
            wanted = [_wanted(*following) for following in node.next_functions]

            def apply(
                made: Grads,
                grads: Grads,
                fix: Fix = fix,
                wanted: list[tuple[int, ...] | None] = wanted,
            ) -> Grads:
                return fix(made, wanted)

            handles.append(node.register_hook(apply))
        try:
            rows = [
                probe.vjp(row, outputs, retain=True)
                for row in torch.eye(probe.size, dtype=torch.float64)
            ]
        except RuntimeError:
            continue
        finally:
            for handle in handles:
                handle.remove()
        analytic = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        if all(map(tolerance.fits, analytic, numeric)):
            found.append(
                Cause(name, f"{what}, of shapes that autograd refuses; put right it passes")
            )
    return found
