"""Slips in the chain rule: the forward of a custom Function differentiated by autograd with one
term left out, one factor left out, or one mask turned round. A slip that gives exactly what the
backward gives names the fault, and undoing it mends the gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchbp.graph.operations import canonical, pattern_of

from .case import Case
from .probe import Call, Probe, takes_context
from .report import Cause, unique

__all__ = ["slips"]

#: Calls and slips that are tried at most.
_CALLS, _SLIPS = 40, 120
_SUMS = ("add", "sub", "cat", "stack")
_MASKS = ("where",)


class _Context:
    """Stands for the `ctx` of a forward that is run outside of its Function."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs

    def save_for_backward(self, *tensors: Any) -> None: ...
    def save_for_forward(self, *tensors: Any) -> None: ...
    def mark_dirty(self, *tensors: Any) -> None: ...
    def mark_non_differentiable(self, *tensors: Any) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def _opened(function: Any) -> Callable[..., Any]:
    """The forward of a Function as a function of its own, which autograd differentiates."""

    def forward(*args: Any) -> Any:
        if not takes_context(function):
            return function.forward(*args)
        needs = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
        return function.forward(_Context(needs), *args)

    return forward


@dataclass(frozen=True)
class _Slip:
    """What to do wrong: at which call, and with which of its tensors; -1 is the result.

    kind: "drop" (no gradient to this operand), "identity" (a local gradient of one), "mask" (the
    condition turned round).
    """

    call: int
    operand: int
    kind: str


@dataclass
class _Met:
    """A call that gradients pass: its operation, and of its operands the shapes."""

    operation: str
    result: tuple[int, ...]
    operands: list[tuple[int, tuple[int, ...], bool]]  # position, shape, an input itself


class _Slipping(TorchFunctionMode):
    """Runs the forward with a slip, or with none and notes the calls."""

    def __init__(self, slip: _Slip | None, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.slip, self.inputs = slip, {id(x) for x in inputs}
        self.met: list[_Met] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        flat, spec = tree_flatten((args, kwargs))
        passing = [
            (position, leaf)
            for position, leaf in enumerate(flat)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if name in ("__get__", "__set__", "detach") or not passing:
            return func(*args, **kwargs)
        here = len(self.met)
        slip = self.slip if self.slip is not None and self.slip.call == here else None
        if slip is not None and slip.kind == "drop" and slip.operand < len(flat):
            flat[slip.operand] = flat[slip.operand].detach()
            args, kwargs = tree_unflatten(flat, spec)
        made = func(*args, **kwargs)
        if not isinstance(made, Tensor) or not (made.requires_grad or slip is not None):
            return made
        operands = [(p, tuple(x.shape), id(x) in self.inputs) for p, x in passing]
        self.met.append(_Met(canonical(name), tuple(made.shape), operands))
        if slip is not None and slip.kind == "identity":
            through = flat[slip.operand]
            return through + (made - through).detach()
        if slip is not None and slip.kind == "mask":
            condition, *branches = args
            other = func(~condition, *branches, **kwargs)
            return other + (made - other).detach()
        return made


def slips(case: Case, call: Call, i: int) -> list[Cause]:
    """The causes that a slip in the forward of this call explains for input `i`."""
    probe = case.probe
    opened = Probe(_opened(call.function), probe.args, probe.eps, None)
    opened.seeded = probe.seeded
    if not _right(case, opened, i):
        return []
    with _Slipping(None, opened.leaves) as mode:
        opened.outputs()
    tried = itertools.islice(_candidates(mode.met), _SLIPS)
    found = [_cause(case, mode.met, slip, i) for slip in tried if _explains(case, opened, slip, i)]
    # A branch of a sum that is lost says more than the operand at its beginning.
    order = ("wrong-mask", "overwritten", "missing-term")
    found.sort(key=lambda cause: order.index(cause.name))
    return unique(found)


def _right(case: Case, opened: Probe, i: int) -> bool:
    """Whether autograd through the opened forward gives what the differences do."""
    if opened.size != case.probe.size or not case.smooth:
        return False
    upstream = opened.upstream(0)
    for point in case.smooth:
        grad = _gradient(opened, point.values, upstream, None)
        if grad is None or not case.tolerance.fits(grad[i], upstream @ point.numeric[i]):
            return False
    return True


def _gradient(
    opened: Probe, values: Sequence[Tensor], upstream: Tensor, slip: _Slip | None
) -> list[Tensor] | None:
    opened.set(values)
    try:
        with _Slipping(slip, opened.leaves):
            outputs = opened.outputs()
        return opened.vjp(upstream, outputs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    finally:
        opened.restore()


def _candidates(met: Sequence[_Met]) -> Iterator[_Slip]:
    for number, call in enumerate(met[:_CALLS]):
        if call.operation in _MASKS:
            yield _Slip(number, -1, "mask")
        for position, shape, _ in call.operands:
            if shape == call.result:
                yield _Slip(number, position, "identity")
            yield _Slip(number, position, "drop")


def _explains(case: Case, opened: Probe, slip: _Slip, i: int) -> bool:
    """Whether the slip gives what the backward gives: both by autograd, so to rounding."""
    for seed, point in enumerate(case.smooth):
        upstream = opened.upstream(seed)
        grad = _gradient(opened, point.values, upstream, slip)
        if grad is None:
            return False
        given = upstream @ point.analytic[i]
        size = float(given.abs().max()) if given.numel() else 0.0
        if not bool(((grad[i] - given).abs() <= 1e-9 + 1e-7 * size).all()):
            return False
    return True


def _cause(case: Case, met: Sequence[_Met], slip: _Slip, i: int) -> Cause:
    name, call = case.probe.names[i], met[slip.call]
    tested = "Autograd through the forward with that left out gives the same, and with it passes"
    if slip.kind == "mask":
        return Cause(
            "wrong-mask",
            f"the condition of `{call.operation}` is turned round in the gradient of {name}; "
            "turned back it passes",
        )
    if slip.kind == "identity" and pattern_of(call.operation, 2) in ("mask", "router"):
        return Cause(
            "wrong-mask",
            f"the gradient of {name} passes `{call.operation}` everywhere, without its mask. "
            f"{tested}",
        )
    if slip.kind == "identity":
        return Cause(
            "missing-term",
            f"the gradient of {name} lacks the factor of `{call.operation}`, the chain rule cut "
            f"short. {tested}",
        )
    shapes = {shape for _, shape, _ in call.operands}
    uses = sum(itself for one in met for _, _, itself in one.operands)
    direct = next(itself for position, _, itself in call.operands if position == slip.operand)
    branch = call.operation in _SUMS and len(call.operands) > 1 and len(shapes) == 1
    product = pattern_of(call.operation, 2) == "transpose-and-multiply"
    if branch or (direct and uses > 1 and product):
        return Cause(
            "overwritten",
            f"{name} is used more than once, and the gradient through the use at "
            f"`{call.operation}` is lost; with it added it passes. Accumulate instead of assigning",
        )
    return Cause(
        "missing-term",
        f"the gradient of {name} lacks the term through an operand of `{call.operation}`. {tested}",
    )
