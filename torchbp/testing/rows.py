"""The checks of check_function, one function each.

A check returns what is to be said of it, and raises `Failed`, `NotApplicable`, or, of a feature
that the function refuses, `Unsupported` or the very error. What is right comes from elsewhere than
from what is checked: from the function called plainly, from differences, or from the reference.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from torchbp.graph.calling import captured
from torchbp.graph.text import dims, dtype_name, duration, size

from .beyond import double_backward
from .case import Options, Tolerance
from .gradcheck import GradcheckError, gradcheck
from .probe import Probe
from .report import Report
from .subject import (
    Failed,
    NotApplicable,
    Ran,
    Subject,
    Unsupported,
    difference,
    drawn,
    first_line,
    is_number,
    outputs_in,
    plainly,
    run,
    upstream_of,
    widened,
)

__all__ = ["ROWS", "Check"]

#: Between differences at `_STEP` and derivatives: the tolerances of gradcheck.
_DIFFERENCES = Tolerance(1e-5, 1e-3)
_STEP = 1e-6
#: Calls after which something that stays is a leak.
_CALLS = 8


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: what it is called.
        text: what it checks.
        run: does it.
        feature: the function may refuse it by a clear error.
    """

    name: str
    text: str
    run: Callable[[Subject], str | None]
    feature: bool


#: The checks by name, in the order in which they run.
ROWS: dict[str, Check] = {}


def _row(
    name: str, text: str, feature: bool = True
) -> Callable[[Callable[[Subject], str | None]], Callable[[Subject], str | None]]:
    def register(check: Callable[[Subject], str | None]) -> Callable[[Subject], str | None]:
        ROWS[name] = Check(name, text, check, feature)
        return check

    return register


# ---- gradients


def _wants_gradient(s: Subject, wide: bool = True) -> None:
    if not s.where:
        raise NotApplicable("no input is a floating tensor")
    if wide and s.narrow is not None:
        raise Unsupported(f"differences want float64, in which it raises {s.narrow}")


def _gradchecked(s: Subject, **options: Any) -> None:
    try:
        gradcheck(
            s.seeded,
            s.leaves(),
            nondet_tol=s.settings.nondet_tol,
            kinks=s.settings.kinks,
            check_double_backward=False,
            **options,
        )
    except GradcheckError as error:
        raise Failed(_said(error.report), error.report) from error


def _said(report: Report) -> str:
    return f"{report.cause}: {report.found[0].text}"


@_row("gradient", "backward against central differences, by torchbp.testing.gradcheck", False)
def _gradient(s: Subject) -> str | None:
    _wants_gradient(s)
    _gradchecked(s)
    return None


@_row("double-backward", "the gradient of the gradient against differences of the gradient")
def _double(s: Subject) -> str | None:
    _wants_gradient(s)
    s.truth()
    leaves = s.leaves()
    made = [y for y in outputs_in(s.seeded(*leaves)) if y.requires_grad]
    upstream = [v.requires_grad_() for v in upstream_of(made)]
    wanted = [leaves[i] for i in s.where]
    # Copies of the upstream: no leaf comes from a later operation.
    found = torch.autograd.grad(
        made, wanted, [v.clone() for v in upstream], create_graph=True, allow_unused=True
    )
    grads = [g for g in found if g is not None]
    attached = [g for g in grads if g.requires_grad]
    if len(attached) < len(grads):
        # Fine for what does not change at all, as the zero of a step function.
        moved = s.leaves(s.other(1))
        ups = [v * 1.5 - 0.25 for v in upstream_of([y.detach() for y in made])]
        others = run(s.seeded, moved, ups).grads
        lost = [
            s.names[i]
            for i, g, other in zip(s.where, found, others, strict=True)
            if g is not None and not g.requires_grad
            if difference("", g, other, s.tolerance)
        ]
        if lost:
            raise Failed(
                f"the gradient of {', '.join(lost)} is a constant for autograd, without an error: "
                "a second derivative loses it. Use operations that autograd sees, or "
                "once_differentiable"
            )
    if not attached:
        raise NotApplicable("no gradient depends on anything")
    # What it refuses is raised here. Not by autograd.grad: that looks at what leads to the inputs
    # alone, and once_differentiable's node, which raises, leads nowhere.
    torch.autograd.backward(attached, [drawn(g, 7) for g in attached])
    if any(is_number(x) and x.is_complex() for x in [*wanted, *made]):
        try:
            torch.autograd.gradgradcheck(s.seeded, s.leaves(), nondet_tol=s.settings.nondet_tol)
        except TorchGradcheckError as error:
            raise Failed(first_line(error)) from error
        return None
    probe = Probe(s.seeded, s.leaves(), _STEP)
    options = Options(_STEP, _DIFFERENCES, s.settings.nondet_tol, False, s.settings.kinks, True, {})
    report = double_backward(probe, options)
    if report is not None:
        raise Failed(_said(report), report)
    return None


@_row("forward-mode", "the tangents of torch.autograd.forward_ad against central differences")
def _forward_mode(s: Subject) -> str | None:
    _wants_gradient(s)
    _gradchecked(s, check_backward_ad=False, check_forward_ad=True)
    return None


# ---- transforms


def _batch(s: Subject) -> list[list[Any]]:
    return [s.other(number) for number in range(3)]


@_row("vmap", "torch.vmap of the function and of its gradient against a loop of plain calls")
def _vmap(s: Subject) -> str | None:
    _no_chance(s)
    if not s.tensors:
        raise NotApplicable("no input is a tensor")
    batch = _batch(s)
    singles = [[i] for i in s.where] if len(s.where) > 1 else []
    for batched in [s.where or s.tensors, *singles]:
        samples = [
            [x if i in batched else s.args[i] for i, x in enumerate(sample)] for sample in batch
        ]
        wanted = [s.truth(sample) for sample in samples]
        outputs = [torch.stack(ys) for ys in zip(*(w.outputs for w in wanted), strict=True)]
        for dim in (0, -1):
            when = f"over dimension {dim} of {', '.join(s.names[i] for i in batched)}"
            dims_in = tuple(dim if i in batched else None for i in range(len(s.args)))
            stacked = s.leaves(
                [
                    torch.stack([sample[i] for sample in samples], dim) if i in batched else x
                    for i, x in enumerate(s.args)
                ]
            )
            torch.manual_seed(s.settings.seed)
            made = outputs_in(torch.vmap(_listed(s.fn), dims_in, randomness="same")(*stacked))
            for y, right in zip(made, outputs, strict=True):
                text = difference("y", y, right, s.tolerance)
                if text:
                    raise Failed(f"{when}: {text}")
            _vmapped_gradients(s, stacked, dims_in, made, wanted, when)
    return None


def _listed(fn: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    return lambda *args: outputs_in(fn(*args))


def _vmapped_gradients(
    s: Subject,
    stacked: Sequence[Any],
    dims_in: Sequence[int | None],
    made: Sequence[Tensor],
    wanted: Sequence[Ran],
    when: str,
) -> None:
    """The gradients through a vmap by autograd."""
    live = [y for y in made if y.requires_grad]
    if not live:
        if any(grad is not None for grad in wanted[0].grads):
            raise Failed(f"{when}: the output is a constant for autograd")
        return
    # One upstream for all samples, as for each alone.
    upstream = [drawn(y[0], 100 + k).expand_as(y) for k, y in enumerate(made) if y.requires_grad]
    leaves = [stacked[i] for i in s.where]
    grads = torch.autograd.grad(live, leaves, upstream, allow_unused=True)
    for k, (i, grad) in enumerate(zip(s.where, grads, strict=True)):
        parts = [w.grads[k] for w in wanted]
        if all(part is None for part in parts):
            continue
        each = [torch.zeros_like(s.args[i]) if part is None else part for part in parts]
        dim = dims_in[i]
        right = torch.stack(each).sum(0) if dim is None else torch.stack(each, dim)
        text = difference(f"the gradient of {s.names[i]}", grad, right, s.tolerance)
        if text:
            raise Failed(f"{when}: {text}")


def _weighted(s: Subject, truth: Ran) -> Callable[..., Tensor]:
    """The outputs with their upstream as one number."""
    upstream = upstream_of(truth.outputs)

    def number(*args: Any) -> Tensor:
        pairs = zip(outputs_in(s.fn(*args)), upstream, strict=True)
        return sum(((y * v.conj()).real.sum() for y, v in pairs), torch.zeros(()))

    return number


def _transform(s: Subject) -> tuple[list[Any], tuple[int, ...], Ran]:
    _wants_gradient(s, wide=False)
    if any(is_number(x) and x.is_complex() for x in s.args):
        raise NotApplicable("complex inputs: what it returns is the conjugate by convention")
    # Fresh tensors: torch.func differentiates by itself.
    plain = [x.detach() if isinstance(x, Tensor) else x for x in s.leaves()]
    truth = s.truth()
    torch.manual_seed(s.settings.seed)
    return plain, tuple(s.where), truth


def _no_chance(s: Subject) -> None:
    """For what calls the function in another order, or lays memory out otherwise."""
    if s.is_random:
        raise NotApplicable("it draws random numbers, and here others than in a plain call")


def _expect(s: Subject, grads: Sequence[Tensor | None], truth: Ran) -> None:
    for i, grad, right in zip(s.where, grads, truth.grads, strict=True):
        text = difference(f"the gradient of {s.names[i]}", grad, right, s.tolerance)
        if text:
            raise Failed(text)


@_row("func.grad", "torch.func.grad against a plain backward")
def _func_grad(s: Subject) -> str | None:
    args, where, truth = _transform(s)
    _expect(s, torch.func.grad(_weighted(s, truth), where)(*args), truth)
    return None


def _free(s: Subject, args: Sequence[Any]) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """The function of the differentiable inputs alone, returning a list, and these inputs."""

    def free(*leaves: Tensor) -> list[Tensor]:
        full = list(args)
        for i, leaf in zip(s.where, leaves, strict=True):
            full[i] = leaf
        return outputs_in(s.fn(*full))

    return free, [args[i] for i in s.where]


@_row("func.vjp", "torch.func.vjp against a plain backward")
def _func_vjp(s: Subject) -> str | None:
    args, _, truth = _transform(s)
    free, leaves = _free(s, args)
    pair: Any = torch.func.vjp(free, *leaves)
    made, pull = pair
    grads = pull(upstream_of(made))
    s.same(Ran([y.detach() for y in made], truth.names, list(grads)), truth, "vjp")
    return None


@_row("func.jvp", "torch.func.jvp against central differences of plain calls")
def _func_jvp(s: Subject) -> str | None:
    _wants_gradient(s)
    args, _, truth = _transform(s)
    free, leaves = _free(s, args)
    tangents = [drawn(x, 20 + k) for k, x in enumerate(leaves)]
    torch.manual_seed(s.settings.seed)
    pair: Any = torch.func.jvp(free, tuple(leaves), tuple(tangents))
    made, found = pair
    with plainly():
        up, down = (
            _values(s, free, [x + sign * _STEP * t for x, t in zip(leaves, tangents, strict=True)])
            for sign in (1, -1)
        )
    for k, name in enumerate(truth.names):
        y, dy, a, b, right = made[k], found[k], up[k], down[k], truth.outputs[k]
        slope = (a - b) / (2 * _STEP) if truth.live[k] else torch.zeros_like(y)
        text = difference(name, y, right, s.tolerance) or difference(
            f"the tangent of {name}", dy, slope, _DIFFERENCES
        )
        if text:
            raise Failed(text)
    return None


def _values(s: Subject, free: Callable[..., Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(s.settings.seed)
    with torch.no_grad():
        return [y.detach().clone() for y in free(*leaves)]


@_row("func.jacrev", "torch.func.jacrev, which is vmap of the backward, against plain backwards")
def _func_jacrev(s: Subject) -> str | None:
    _no_chance(s)
    args, where, truth = _transform(s)
    found = torch.func.jacrev(_listed(s.fn), where)(*args)
    leaves = s.leaves()
    with plainly():
        torch.manual_seed(s.settings.seed)
        made = outputs_in(s.fn(*leaves))
    for name, y, blocks in zip(truth.names, made, found, strict=True):
        units = torch.eye(y.numel(), dtype=y.dtype, device=y.device).reshape(-1, *y.shape)
        rows: list[Sequence[Tensor | None]] = []
        with plainly():
            for unit in units:
                wanted = [leaves[i] for i in where]
                rows.append(
                    torch.autograd.grad(y, wanted, unit, retain_graph=True, allow_unused=True)
                    if y.requires_grad
                    else [None] * len(wanted)
                )
        for k, (i, block) in enumerate(zip(where, blocks, strict=True)):
            each = [torch.zeros_like(leaves[i]) if r[k] is None else r[k] for r in rows]
            shape = (*y.shape, *leaves[i].shape)
            right = torch.stack(each).reshape(shape) if each else y.new_zeros(shape)  # type: ignore[arg-type]
            text = difference(f"d {name} / d {s.names[i]}", block, right, s.tolerance)
            if text:
                raise Failed(text)
    return None


@_row("func.hessian", "torch.func.hessian against central differences of plain backwards")
def _func_hessian(s: Subject) -> str | None:
    _no_chance(s)
    _wants_gradient(s)
    args, where, truth = _transform(s)
    found = torch.func.hessian(_weighted(s, truth), where)(*args)
    with plainly():
        directions = [drawn(s.args[i], 40 + k) for k, i in enumerate(where)]
        sides = []
        for sign in (1, -1):
            moved = list(s.args)
            for i, d in zip(where, directions, strict=True):
                moved[i] = moved[i] + sign * _STEP * d
            sides.append(s.run(s.leaves(moved)).grads)
    for k, i in enumerate(where):
        up, down = sides[0][k], sides[1][k]
        right = None if up is None or down is None else (up - down) / (2 * _STEP)
        product = torch.zeros_like(s.args[i])
        for block, d in zip(found[k], directions, strict=True):
            product = product + (
                block.reshape(-1, max(1, d.numel()))[:, : d.numel()] @ d.flatten()
            ).reshape(product.shape)
        text = difference(f"Hessian times vector for {s.names[i]}", product, right, _DIFFERENCES)
        if text:
            raise Failed(text)
    return None


# ---- compilers


def _compiled_runs(s: Subject, fullgraph: bool) -> None:
    """Raise Failed unless compiled is as plain."""
    torch._dynamo.reset()
    fn = s.fn

    def call(*args: Any) -> Any:
        return fn(*args)

    compiled: Any = torch.compile(call, backend=s.settings.backend, fullgraph=fullgraph)
    for number in range(3):
        args = s.other(number)
        s.same(s.run(s.leaves(args), compiled), s.truth(args), f"at inputs number {number + 1}")


@_row("compile", "torch.compile, forward and backward, against plain calls at several inputs")
def _compile(s: Subject) -> str | None:
    try:
        _compiled_runs(s, fullgraph=True)
        return None
    except Failed:
        raise
    except Exception as error:
        refused = first_line(error)
    finally:
        torch._dynamo.reset()
    try:
        _compiled_runs(s, fullgraph=False)
    finally:
        torch._dynamo.reset()
    raise Unsupported(f"fullgraph=True raises {refused}; with graph breaks it is right")


@_row("compile-func", "torch.compile of torch.func.vjp and of torch.vmap, against plain calls")
def _compile_func(s: Subject) -> str | None:
    _no_chance(s)
    args, _, truth = _transform(s)
    free, leaves = _free(s, args)

    def pulled(*given: Tensor) -> Any:
        pair: Any = torch.func.vjp(free, *given)
        made, pull = pair
        return made, pull(upstream)

    upstream = upstream_of(truth.outputs)
    batch = [[s.args[i] for i in s.where], [s.other(1)[i] for i in s.where]]
    stacked = [torch.stack(parts) for parts in zip(*batch, strict=True)]
    second = s.truth(s.other(1))
    done = []
    refused = ""
    for what, transformed, given in (
        ("vjp", pulled, leaves),
        ("vmap of vjp", torch.vmap(pulled), stacked),
    ):
        torch._dynamo.reset()
        try:
            torch.manual_seed(s.settings.seed)
            made, grads = torch.compile(transformed, backend=s.settings.backend)(*given)
        except Exception as error:
            refused = refused or f"{what}: {first_line(error)}"
            continue
        finally:
            torch._dynamo.reset()
        right = truth
        if what != "vjp":
            right = Ran(
                [torch.stack(ys) for ys in zip(truth.outputs, second.outputs, strict=True)],
                truth.names,
                [
                    None if a is None or b is None else torch.stack([a, b])
                    for a, b in zip(truth.grads, second.grads, strict=True)
                ],
            )
        s.same(Ran([y.detach() for y in made], truth.names, list(grads)), right, what)
        done.append(what)
    if refused:
        raise Unsupported(refused)
    return None


class _Whole(Module):
    """A function as a module, as torch.export wants it."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> list[Tensor]:
        return outputs_in(self.fn(*args))


@_row("export", "torch.export.export, forward, against plain calls at several inputs")
def _export(s: Subject) -> str | None:
    if not s.tensors:
        raise NotApplicable("no input is a tensor")
    plain = [x.detach() if isinstance(x, Tensor) else x for x in s.leaves()]
    exported = torch.export.export(_Whole(s.fn), tuple(plain)).module()
    for number in range(2):
        args = s.other(number)
        truth = s.truth(args)
        torch.manual_seed(s.settings.seed)
        made = exported(*args)
        for name, y, right in zip(truth.names, made, truth.outputs, strict=True):
            text = difference(name, y, right, s.tolerance)
            if text:
                raise Failed(f"at inputs number {number + 1}: {text}")
    return None


@_row("opcheck", "torch.library.opcheck, of a registered operation", False)
def _opcheck(s: Subject) -> str | None:
    op: Any = s.original
    if isinstance(op, torch._ops.OpOverloadPacket):
        overloads = op.overloads()
        op = getattr(op, overloads[0]) if len(overloads) == 1 else op.default
    if not isinstance(op, (torch._ops.OpOverload, torch._library.custom_ops.CustomOpDef)):
        raise NotApplicable("no registered operation")
    said = torch.library.opcheck(op, tuple(s.leaves()), raise_exception=False)
    wrong = {name: result for name, result in said.items() if result != "SUCCESS"}
    if wrong:
        name, error = next(iter(wrong.items()))
        text = first_line(error, 300) if isinstance(error, Exception) else str(error)
        raise Failed(f"{', '.join(wrong)}: {text}" if len(wrong) > 1 else f"{name}: {text}")
    return None


# ---- number types


def _narrowed(s: Subject, dtype: torch.dtype) -> list[Any]:
    """The arguments in a dtype, rounded if they are wider."""
    if s.narrow is not None:
        raise Unsupported(f"it wants other inputs than float64: {s.narrow}")
    if not s.where:
        raise NotApplicable("no input is a floating tensor")
    if any(is_number(x) and x.is_complex() for x in s.args):
        raise NotApplicable("complex inputs")
    made = [x.to(dtype) if is_number(x) else x for x in s.args]
    if not all(bool(x.isfinite().all()) for x in made if is_number(x)):
        raise NotApplicable(f"inputs that {dtype_name(dtype)} does not hold")
    return made


class _Rounding(TorchDispatchMode):
    """Gives each number that an operation makes a relative error of up to eps, by chance."""

    def __init__(self, eps: float, seed: int) -> None:
        super().__init__()
        self.eps, self.generator, self.largest = eps, torch.Generator().manual_seed(seed), 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return made  # views, and what is changed in place

        def rounded(value: Any) -> Any:
            if not is_number(value) or value.layout is not torch.strided or value.is_meta:
                return value
            if value._is_zerotensor():  # has no memory: torch crashes when it is multiplied here
                return value
            if value.numel():
                self.largest = max(self.largest, float(value.abs().nan_to_num(0.0, 0.0).max()))
            noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
            return value * (1 + self.eps * (2 * noise - 1).to(value))

        return tree_map(rounded, made)


def _allowed(
    s: Subject, wide: Sequence[Any], truth: Ran, dtype: torch.dtype, upstream: Sequence[Tensor]
) -> list[Tensor]:
    """How far off results may be that are computed in a dtype.

    What errors of its precision in inputs, upstream and each operation do is measured, in float64.
    """
    limits = torch.finfo(dtype)
    eps = limits.eps
    spread = [torch.zeros_like(t) for t in _tensors(truth)]
    for seed in (200, 300, 400):

        def shaken(x: Tensor, number: int, seed: int = seed) -> Tensor:
            return x * (1 + eps * drawn(x, seed + number).clamp(-2, 2))

        moved = [shaken(x, i) if is_number(x) else x for i, x in enumerate(wide)]
        ups = [shaken(v, 50 + k) for k, v in enumerate(upstream)]
        leaves = s.leaves(moved)
        with plainly(), _Rounding(eps, seed) as rounding:
            other = s.run(leaves, upstream=ups)
        if rounding.largest > limits.max:
            raise NotApplicable(
                f"numbers up to {rounding.largest:.2g} arise, more than {dtype_name(dtype)} holds"
            )
        for total, a, b in zip(spread, _tensors(other), _tensors(truth), strict=True):
            torch.maximum(total, (a - b).abs().nan_to_num(), out=total)
    made = []
    for t, far in zip(_tensors(truth), spread, strict=True):
        finite = t[t.isfinite()].abs()
        top = float(finite.max()) if finite.numel() else 0.0
        reach = float(far.max()) if far.numel() else 0.0
        made.append(8 * far + 4 * reach + 4 * eps * top + 4 * limits.tiny)
    return made


def _tensors(ran: Ran) -> list[Tensor]:
    """Outputs and gradients; a gradient that is None is a zero."""
    return [*ran.outputs, *(torch.zeros(()).double() if g is None else g for g in ran.grads)]


def _widely(
    s: Subject, args: Sequence[Any], got: Ran
) -> tuple[Sequence[Any], Sequence[Tensor], Ran]:
    """The same arguments and upstream in float64, and what the function makes of them there."""
    wide = [widened(x) for x in args]
    upstream = [widened(v) for v in upstream_of(got.outputs)]
    with plainly():
        return wide, upstream, s.run(s.leaves(wide), upstream=upstream)


def _in_dtype(dtype: torch.dtype) -> Callable[[Subject], str | None]:
    def check(s: Subject) -> str | None:
        args = _narrowed(s, dtype)
        got = s.run(s.leaves(args))
        wide, upstream, truth = _widely(s, args, got)
        constants = {x.dtype for x in captured(s.original).values() if isinstance(x, Tensor)}
        wider = any(torch.promote_types(kind, dtype) is not dtype for kind in constants)
        for name, y, right in zip(got.names, got.outputs, truth.outputs, strict=False):
            if y.dtype is not dtype and right.dtype is torch.float64 and not wider:
                raise Failed(f"{name} is {dtype_name(y.dtype)} for {dtype_name(dtype)} inputs")
        found = s.differences(got, truth, _allowed(s, wide, truth, dtype, upstream))
        if found:
            raise Failed(f"against float64 at the same numbers: {found[0]}")
        return None

    return check


@_row("float64", "runs in float64, returns it, and does not compute in less")
def _float64(s: Subject) -> str | None:
    args = _narrowed(s, torch.float64)
    got = s.truth(args)
    for name, y in zip(got.names, got.outputs, strict=True):
        if y.dtype is not torch.float64 and not y.is_complex():
            raise Failed(f"{name} is {dtype_name(y.dtype)} for float64 inputs")
    # Moved by less than float32 can tell, the output moves by what the gradient says.
    step = 2.0**-30
    for i in s.where:
        moved = list(args)
        moved[i] = moved[i] + step * drawn(moved[i], 60 + i).sign() * moved[i].abs().clamp(min=1e-3)
        other = s.truth(moved)
        if all(torch.equal(a, b) for a, b in zip(got.outputs, other.outputs, strict=True)):
            grad = got.grads[s.where.index(i)]
            along = (grad * (moved[i] - args[i])).abs().sum() if grad is not None else None
            scale = sum(float(y.abs().sum()) for y in got.outputs)
            if along is not None and float(along) > 1e-11 * max(scale, 1e-3):
                raise Failed(
                    f"the output does not change when {s.names[i]} changes by 1e-9 of itself: "
                    "something computes in less than float64"
                )
    return None


for _dtype in (torch.float32, torch.float16, torch.bfloat16):
    _row(
        dtype_name(_dtype),
        f"forward and backward in {dtype_name(_dtype)} against float64 at the same numbers",
    )(_in_dtype(_dtype))


@_row("autocast", "under autocast to bfloat16, backward outside, against float64")
def _autocast(s: Subject) -> str | None:
    args = _narrowed(s, torch.float32)
    device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")

    def cast(*given: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return s.fn(*given)

    leaves = s.leaves(args)
    got = s.run(leaves, cast)
    for i, grad in zip(s.where, got.grads, strict=True):
        if grad is not None and grad.dtype is not torch.float32:
            raise Failed(f"the gradient of {s.names[i]} is {dtype_name(grad.dtype)}")
    wide, upstream, truth = _widely(s, args, got)
    found = s.differences(got, truth, _allowed(s, wide, truth, torch.bfloat16, upstream))
    if found:
        raise Failed(f"against float64 at the same numbers: {found[0]}")
    kinds = ", ".join(dict.fromkeys(dtype_name(y.dtype) for y in got.outputs))
    return f"the output is {kinds}"


# ---- memory layouts


def _transposed(x: Tensor) -> Tensor:
    """The same values, the last dimension the outermost in memory."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def _gappy(x: Tensor) -> Tensor:
    """The same values as every second element of memory, nan between them."""
    if not is_number(x):
        room = x.new_zeros((*x.shape, 2)) if x.dtype is torch.bool else x.new_ones((*x.shape, 2))
    else:
        room = x.new_full((*x.shape, 2), torch.nan)
    room[..., 1] = x
    return room[..., 1]


@_row("strided", "inputs and upstream gradients that are not contiguous, against contiguous ones")
def _strided(s: Subject) -> str | None:
    _no_chance(s)
    if not s.tensors:
        raise NotApplicable("no input is a tensor")
    truth = s.truth()
    for kind, lay in (("transposed in memory", _transposed), ("every second element", _gappy)):
        for i in s.tensors:
            args = [lay(x) if j == i else x for j, x in enumerate(s.leaves())]
            got = s.run(s.marked(args))
            s.same(got, truth, f"{s.names[i]} {kind}")
        upstream = [lay(v) for v in upstream_of(truth.outputs)]
        s.same(s.run(s.leaves(), upstream=upstream), truth, f"the upstream gradient {kind}")
    return None


@_row("expanded", "inputs and upstream gradients of stride 0, as of expand and sum")
def _expanded(s: Subject) -> str | None:
    if not s.where:
        raise NotApplicable("no input is a floating tensor")
    truth = s.truth()
    for i in s.where:
        x = s.args[i]
        for dim in range(x.dim()):
            if x.shape[dim] < 2:
                continue
            wide = x.narrow(dim, 0, 1).expand_as(x)
            args = [wide if j == i else y for j, y in enumerate(s.args)]
            try:
                right = s.truth(args)  # copies, contiguous
            except Failed:
                continue  # not inputs of this function
            got = s.run(s.marked([wide if j == i else y for j, y in enumerate(s.leaves())]))
            s.same(got, right, f"{s.names[i]} expanded along dimension {dim}")
    one = [torch.full_like(y, 0.75) for y in truth.outputs]
    flat = [v.new_full((), 0.75).expand(v.shape) for v in one]
    with plainly():
        right = s.run(s.leaves(), upstream=one)
    s.same(s.run(s.leaves(), upstream=flat), right, "the upstream gradient expanded")
    return None


@_row("empty", "a first dimension of size 0: gradients that are sums over nothing, and numbers")
def _empty(s: Subject) -> str | None:
    sized = [i for i in s.tensors if i < s.count and s.args[i].dim()]
    if not sized:
        raise NotApplicable("no input has a dimension")
    length = s.args[sized[0]].shape[0]
    alike = tuple(i for i in sized if s.args[i].shape[0] == length)
    refused: Exception | None = None
    for cut in dict.fromkeys([alike, (sized[0],)]):
        args = [x[:0] if i in cut else x for i, x in enumerate(s.args)]
        try:
            with _uninitialized_is_nan():
                got = s.run(s.leaves(args))
        except Exception as error:
            refused = refused or error
            continue
        _nothing(s, args, got)
        names = ", ".join(s.names[i] for i in cut)
        return f"{names} empty: y is {', '.join(dims(y.shape) for y in got.outputs)}"
    assert refused is not None
    raise refused


def _nothing(s: Subject, args: Sequence[Any], got: Ran) -> None:
    """Check what a function gives for an empty input."""
    if s.settings.reference is not None:
        right = s.run(s.leaves(args), _referred(s))
        s.same(got, right, "against the reference")
    for k, (i, grad) in enumerate(zip(s.where, got.grads, strict=True)):
        x, name = args[i], f"the gradient of {s.names[i]}"
        if all(not y.numel() for y in got.outputs):
            right_grad = torch.zeros_like(x)
            text = difference(f"{name}, of an empty output,", grad, right_grad, s.tolerance)
        elif x.numel() and s.narrow is None and all(bool(y.isfinite().all()) for y in got.outputs):
            step = _STEP * drawn(x, 70 + k)
            sides = [
                s.truth([x + sign * step if j == i else y for j, y in enumerate(args)])
                for sign in (1, -1)
            ]
            along = sum(
                (v * (a - b)).sum()
                for v, a, b in zip(
                    upstream_of(got.outputs), sides[0].outputs, sides[1].outputs, strict=True
                )
            )
            slope = torch.zeros_like(x) if grad is None else grad
            text = difference(
                f"{name} along a direction",
                (slope * step).sum() / _STEP,
                torch.as_tensor(along) / (2 * _STEP),
                _DIFFERENCES,
            )
        else:
            text = None
        if text:
            raise Failed(text)


@contextmanager
def _uninitialized_is_nan() -> Iterator[None]:
    """With nan, or the largest integer, wherever `torch.empty` leaves what was there."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


# ---- what is asked for, and what is left alone


@_row("frozen", "each input frozen in turn, and all: the other gradients stay as they are", False)
def _frozen(s: Subject) -> str | None:
    truth = s.truth()
    for k, i in enumerate(s.where):
        rest = [j for j in s.where if j != i]
        if not rest:
            continue
        right = Ran(truth.outputs, truth.names, [g for m, g in enumerate(truth.grads) if m != k])
        with plainly(f"with {s.names[i]} frozen"):
            got = s.run(s.leaves(frozen=[i]))
        s.same(got, right, f"{s.names[i]} frozen", rest)
    nothing = Ran(truth.outputs, truth.names, [])
    for name, mode in (
        ("with all frozen", torch.enable_grad),
        ("under no_grad", torch.no_grad),
        ("under inference_mode", torch.inference_mode),
    ):
        with plainly(name), mode():
            got = s.run(s.leaves(frozen=s.where))
        s.same(got, nothing, name, [])
    return None


@_row("determinism", "bit for bit the same with the same random state, in fresh memory too", False)
def _determinism(s: Subject) -> str | None:
    first = s.truth()
    exact = Tolerance(s.settings.nondet_tol, 0.0)

    def again(when: str, allowed: Tolerance) -> None:
        found = s.differences(s.truth(), first, allowed)
        if found:
            why = found[0].replace(" is wrong in ", " differs in ").partition(":")[0]
            raise Failed(f"{when} {why}")

    for _ in range(5):
        again("in another run", exact)
    with _uninitialized_is_nan():
        # Asked for determinism, torch may sum in another order.
        again("with nan in the place of uninitialised memory", s.tolerance)
    return "it draws random numbers" if s.is_random else None


@_row("mutation", "inputs, upstream gradients and parameters are left as they are", False)
def _mutation(s: Subject) -> str | None:
    held: list[tuple[str, Tensor, Tensor, int]] = []

    def watch(name: str, x: Tensor) -> None:
        held.append((name, x, x.detach().clone(), x._version))

    def look(when: str) -> None:
        for name, x, copy, version in held:
            if not torch.equal(x.detach().nan_to_num(), copy.nan_to_num()):
                raise Failed(f"{when} changes {name} in place")
            if x._version != version:
                raise Failed(f"{when} writes to {name} in place")

    leaves = s.leaves()
    for i in s.tensors:
        watch(s.names[i], leaves[i])
    with plainly():
        torch.manual_seed(s.settings.seed)
        made = outputs_in(s.fn(*leaves))
    look("forward")
    live = [y for y in made if y.requires_grad]
    if live and s.where:
        upstream = upstream_of(live)
        for k, v in enumerate(upstream):
            watch("the upstream gradient" + (f" {k}" if len(live) > 1 else ""), v)
        # An output handed on is changed by nobody else; that the backward changes it is caught too.
        for y in live:
            watch("the output", y)
        with plainly():
            torch.autograd.grad(live, [leaves[i] for i in s.where], upstream, allow_unused=True)
        look("backward")
    return None


@_row(
    "later-changes", "an input or output changed in place before backward: an error, or no matter"
)
def _later(s: Subject) -> str | None:
    _wants_gradient(s, wide=False)
    truth = s.truth()
    for what in ("input", "output"):
        for k in range(len(s.where) if what == "input" else len(truth.outputs)):
            leaves = s.leaves()
            given = [x.clone() if i in s.where else x for i, x in enumerate(leaves)]
            with plainly():
                torch.manual_seed(s.settings.seed)
                made = outputs_in(s.fn(*given))
            changed = given[s.where[k]] if what == "input" else made[k]
            live = [y for y in made if y.requires_grad]
            if not live:
                continue
            upstream = [v for v, y in zip(upstream_of(made), made, strict=True) if y.requires_grad]
            wanted = [leaves[i] for i in s.where]
            try:
                with torch.no_grad():
                    changed.mul_(-1.5).sub_(0.25)
                grads = torch.autograd.grad(live, wanted, upstream, allow_unused=True)
            except RuntimeError as error:
                if what == "output" and " is a view " in str(error):
                    raise Unsupported(
                        f"the output {truth.names[k]} is a view, which nobody may change in place: "
                        "return a tensor of its own"
                    ) from error
                continue
            name = s.names[s.where[k]] if what == "input" else truth.names[k]
            found = s.differences(Ran(truth.outputs, truth.names, list(grads)), truth)
            if found:
                raise Failed(
                    f"backward uses the {what} {name} as it is changed after the call, without an "
                    f"error: it is kept outside of save_for_backward. {found[0]}"
                )
    return None


# ---- memory and time


def allocations(run: Callable[[], object]) -> list[int]:
    """The bytes taken (positive) and given back (negative) by the CPU allocator, in order."""
    from torch.autograd import (  # type: ignore[attr-defined]
        ProfilerConfig,
        ProfilerState,
        _disable_profiler_legacy,
        _enable_profiler_legacy,
    )

    options = torch._C._profiler._ExperimentalConfig()
    _enable_profiler_legacy(
        ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, options)
    )
    try:
        run()
    finally:
        records = _disable_profiler_legacy()
    return [
        event.cpu_memory_usage()
        for thread in records
        for event in thread
        if str(event.kind()) == "memory_alloc"
    ]


@_row(
    "leak", "no reference cycle keeps saved tensors, and nothing grows over repeated calls", False
)
def _leak(s: Subject) -> str | None:
    _on_cpu(s)
    leaves = s.leaves()

    def calls() -> None:
        for _ in range(_CALLS):
            with plainly():
                s.run(leaves)

    def calls_without_backward() -> None:
        for _ in range(_CALLS):
            with plainly():
                torch.manual_seed(s.settings.seed)
                s.fn(*leaves)

    for what, repeat in (("", calls), (" without a backward", calls_without_backward)):
        repeat()
        with _nothing_collected():
            left = sum(allocations(repeat))
            collected = -sum(allocations(gc.collect))
            before = len(gc.get_objects())
            repeat()
            gc.collect()
            more = len(gc.get_objects()) - before
        if left >= _CALLS and collected < left // 2:
            raise Failed(
                f"{_CALLS} calls{what} keep {size(left)} that nothing gives back: something holds "
                "on to tensors"
            )
        if left >= _CALLS:
            raise Failed(
                f"{_CALLS} calls{what} keep {size(left)} until the garbage collector runs: a "
                "reference cycle, as of an output kept on ctx outside of save_for_backward"
            )
        if more >= _CALLS:
            raise Failed(f"{_CALLS} calls{what} leave {more} Python objects behind")
    return None


def _on_cpu(s: Subject) -> None:
    if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in s.args):
        raise NotApplicable("only the allocator of the CPU is looked at")


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without the garbage collector, but where it is called; what was there is not looked at."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def _referred(s: Subject) -> Callable[..., Any]:
    """The reference as a function of all arguments; parameters go to a module by their names."""
    reference = s.settings.reference
    if reference is None:
        raise NotApplicable("no reference is given")
    if isinstance(reference, Module) and s.module is not None:
        other = Subject(reference, s.given[: s.count], s.settings)
        if other.names[other.count :] == s.names[s.count :]:
            return other.fn  # type: ignore[no-any-return]
    given: Callable[..., Any] = reference
    return lambda *args: given(*args[: s.count])


@_row("reference", "forward and gradients against the reference", False)
def _reference(s: Subject) -> str | None:
    reference = _referred(s)
    got = s.truth()
    with plainly("the reference, called plainly,"):
        right = s.run(s.leaves(), reference)
    if len(got.outputs) == len(right.outputs):
        for name, y, other in zip(got.names, got.outputs, right.outputs, strict=True):
            if y.dtype is not other.dtype:
                raise Failed(
                    f"{name} is {dtype_name(y.dtype)}, and {dtype_name(other.dtype)} is right"
                )
    keep = [k for k, i in enumerate(s.where) if i < s.count or right.grads[k] is not None]
    got.grads[:], right.grads[:] = ([r.grads[k] for k in keep] for r in (got, right))
    s.same(got, right, "against the reference", [s.where[k] for k in keep])
    return None


def _both(s: Subject) -> list[Callable[[], object]]:
    """A forward and backward of function and reference at the inputs as they were given."""
    leaves = s.leaves(s.given)
    wanted = [leaves[i] for i in s.where]

    def calls(fn: Callable[..., Any]) -> Callable[[], object]:
        upstream = upstream_of([y for y in outputs_in(fn(*leaves)) if y.requires_grad])

        def call() -> object:
            made = fn(*leaves)
            ys = [made] if isinstance(made, Tensor) else outputs_in(made)
            live = [y for y in ys if y.requires_grad]
            return live and torch.autograd.grad(live, wanted, upstream, allow_unused=True)

        return call

    return [calls(s.fn), calls(_referred(s))]


def _judged(what: str, ratio: float, limit: float | None, text: str) -> str:
    if limit is not None and ratio > limit:
        raise Failed(f"{text}, more than {limit:g} times as much {what}")
    return text


@_row("speed", "the time of forward and backward over that of the reference", False)
def _speed(s: Subject) -> str | None:
    _referred(s)
    both = _both(s)
    times: list[list[float]] = [[], []]
    for call in both:
        call()
    begun = perf_counter()
    while len(times[0]) < 5 or (perf_counter() - begun < 0.25 and len(times[0]) < 200):
        for k, call in enumerate(both):
            start = perf_counter()
            call()
            times[k].append(perf_counter() - start)
    ours, theirs = map(median, times)
    text = f"{ours / theirs:.2f} times the reference's: {duration(ours)} for {duration(theirs)}"
    return _judged("time", ours / theirs, s.settings.max_time, text)


@_row("memory", "the most memory that forward and backward take over that of the reference", False)
def _memory(s: Subject) -> str | None:
    _referred(s)
    _on_cpu(s)
    peaks = []
    for call in _both(s):
        call()
        level = top = 0
        for change in allocations(call):
            level += change
            top = max(top, level)
        peaks.append(top)
    ours, theirs = peaks
    if not theirs:
        raise NotApplicable("the reference takes no memory of its own")
    text = f"{ours / theirs:.2f} times the reference's: {size(ours)} for {size(theirs)}"
    return _judged("memory", ours / theirs, s.settings.max_memory, text)
