"""gradcheck that says why: torch's own check, and where it fails, the tested cause."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import gradcheck as torch_gradcheck
from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError

from torchbp.graph.calling import check_function, name_of
from torchbp.graph.text import dtype_name

from .case import Case, Tolerance
from .hypotheses import hypotheses
from .probe import Call, Point, Probe, as_tuple, calls_of, cloned_saves, functions_of, real
from .report import Cause, Checked, Report, checked, unique
from .slips import slips
from .watch import Attached, Widths, first_not_finite, watched

__all__ = ["GradcheckError", "gradcheck"]


class GradcheckError(TorchGradcheckError):
    """A gradient is wrong.

    Attributes:
        report: a `Report`: where, by how much, and why.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class _Options:
    """What the caller asked for."""

    eps: float
    tolerance: Tolerance
    nondet_tol: float
    strict: bool
    kinks: Literal["raise", "skip"]
    double: bool
    torch: dict[str, Any]


def gradcheck(
    func: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_batched_forward_grad: bool = False,
    check_forward_ad: bool = False,
    check_backward_ad: bool = True,
    fast_mode: bool = False,
    masked: bool | None = None,
    check_double_backward: bool = True,
    strict: bool = False,
    kinks: Literal["raise", "skip"] = "raise",
) -> bool:
    """Check a gradient against central differences, and say what is wrong with it.

    What `torch.autograd.gradcheck` checks is checked by it, with its arguments. Beyond that: the
    backward must leave the incoming gradient as it is, be linear in it, and double backward must be
    right wherever it does not raise; one random direction is looked at, so that a passing call
    costs about what torch's does.

    A cause is named only if it was tested: the fault undone, the gradient passes, at these inputs
    and at others. A custom Function inside of a larger function is looked at by itself.

    Args:
        func: takes the inputs and returns a tensor, or a tuple or list of them.
        inputs: a tensor, or a tuple of arguments; the tensors that require grad are checked. They
            should be float64, and have the same values afterwards.
        eps, atol, rtol, raise_exception, nondet_tol, check_undefined_grad, check_grad_dtypes,
            check_batched_grad, check_batched_forward_grad, check_forward_ad, check_backward_ad,
            fast_mode, masked: as in `torch.autograd.gradcheck`.
        check_double_backward: check the gradient of the gradient too, unless differentiating twice
            raises an error, as `once_differentiable` makes it. For each element of it, use
            `torch.autograd.gradgradcheck`.
        strict: a gradient that is larger than its operand is an error, even if autograd would sum
            it to the operand's shape silently.
        kinks: "raise" if the function is not differentiable between x - eps and x + eps; "skip"
            leaves the elements out where that is so, and warns.

    Returns:
        True if all is right; False if not and `raise_exception` is False.

    Raises:
        GradcheckError: something is wrong; a `torch.autograd.gradcheck.GradcheckError`, whose
            `report` has the cause, its name one of `torchbp.testing.CAUSES`.
        TypeError: `func` cannot be called.
        ValueError: no input requires grad, or `kinks` is neither "raise" nor "skip".

    What `func` or its backward raises is passed on.

    Example:
        >>> import torch
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     def backward(ctx, grad_output):
        ...         return grad_output
        >>> x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        >>> try:
        ...     gradcheck(Double.apply, x)
        ... except GradcheckError as error:
        ...     print(error.report.cause, error.report.factor)
        wrong-factor 0.5
    """
    check_function("gradcheck", func)
    if kinks not in ("raise", "skip"):
        raise ValueError(f'gradcheck: kinks wants "raise" or "skip", got {kinks!r}')
    options = _Options(
        eps,
        Tolerance(atol, rtol),
        nondet_tol,
        strict,
        kinks,
        check_double_backward and check_backward_ad,
        {
            "eps": eps,
            "atol": atol,
            "rtol": rtol,
            "nondet_tol": nondet_tol,
            "check_undefined_grad": check_undefined_grad,
            "check_grad_dtypes": check_grad_dtypes,
            "check_batched_grad": check_batched_grad,
            "check_batched_forward_grad": check_batched_forward_grad,
            "check_forward_ad": check_forward_ad,
            "check_backward_ad": check_backward_ad,
            "fast_mode": fast_mode,
            "masked": masked,
        },
    )
    given = as_tuple(inputs)
    if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
        raise ValueError(
            "gradcheck: inputs wants at least one tensor that requires grad, got "
            + (", ".join(type(value).__name__ for value in given) or "none")
        )
    probe = Probe(func, given, eps)
    try:
        report = _examined(probe, options)
    finally:
        probe.restore()
    if report is None:
        return True
    if not raise_exception:
        return False
    raise GradcheckError(report)


# ---- what is checked


def _examined(probe: Probe, options: _Options) -> Report | None:
    """The report of what is wrong; None if nothing is."""
    if not probe.dense:
        return _by_torch(probe, options)
    backward = options.torch["check_backward_ad"]
    seen: list[Cause] = []
    if backward:
        with suppress(RuntimeError):  # it will be met again
            seen = watched(probe, options.strict)
        probe.restore()
    error = _torch_says(probe, options, forward=False) if backward else None
    if error is not None or seen:
        return _diagnosed(probe, options, seen, error)
    if backward:
        report = _not_linear(probe, options)
        if report is None and options.double:
            report = _double_backward(probe, options)
        if report is not None:
            return report
    if options.torch["check_forward_ad"]:
        error = _torch_says(probe, options, forward=True)
        if error is not None:
            return _forward(probe, options, error)
    return None


def _torch_says(probe: Probe, options: _Options, forward: bool) -> RuntimeError | None:
    """What torch's gradcheck finds in backward mode alone, or in forward mode alone."""
    given = dict(options.torch)
    if forward:
        given |= {"check_backward_ad": False, "check_batched_grad": False}
    else:
        given |= {"check_forward_ad": False, "check_batched_forward_grad": False}
    try:
        torch_gradcheck(probe.fn, probe.args, **given)
    except TorchGradcheckError as error:
        return error
    except RuntimeError as error:
        known = ("modified by an inplace operation", "returned an invalid gradient")
        if not any(text in str(error) for text in known):
            raise
        return error
    finally:
        probe.restore()
    return None


def _by_torch(probe: Probe, options: _Options) -> Report | None:
    """For layouts that have no diagnosis here."""
    try:
        torch_gradcheck(probe.fn, probe.args, **options.torch)
    except TorchGradcheckError as error:
        text = f"there is no diagnosis for this layout. torch says: {error}"
        return Report(name_of(probe.fn), "gradient", (), (Cause("unknown", text),))
    return None


# ---- the diagnosis


def _diagnosed(
    probe: Probe, options: _Options, seen: list[Cause], error: RuntimeError | None
) -> Report | None:
    """Why the gradient is wrong."""
    notes: list[str] = []
    if error is not None and any(not _is_wide(leaf) for leaf in probe.leaves):
        return _low_precision(probe, options, error)
    unsteady = _unsteady(probe, options)
    if unsteady is not None:
        return _report(probe, options, None, [unsteady, *seen])
    saved = _saved_modified(probe, options)
    if saved is not None:
        return _report(probe, options, None, [saved, *seen])
    unsteady = _unsteady_backward(probe, options)
    if unsteady is not None:
        return _report(probe, options, None, [unsteady, *seen])
    if error is not None and "returned an invalid gradient" in str(error):
        return _report(probe, options, None, _of_shape(probe, options, error))
    try:
        point = probe.point()
    except RuntimeError:
        if seen:
            return _report(probe, options, None, seen)
        raise
    if seen:
        return _report(probe, options, point, seen)
    if not point.finite:
        return _report(probe, options, point, [_non_finite(probe, point)])
    noise = _noise(probe, options, point)
    if noise is not None:
        return _report(probe, options, point, [noise])
    ignored = _upstream_ignored(probe, options, point)
    if ignored is not None:
        return _report(probe, options, point, [ignored])

    kinks = _kinks(probe, options, point)
    found, left = _explained(probe, options, point, kinks)
    lone = [i for i, kink in enumerate(kinks) if bool(kink.any())]
    if lone:
        kink = _kink(probe, point, kinks)
        if not left:
            if options.kinks == "skip":
                warnings.warn(f"gradcheck: left out: {kink.text}", stacklevel=5)
                return None
            found = [kink]
        elif options.kinks == "raise":
            found = [*found, kink]
    if not left and not lone:
        said = str(error)
        text = (
            f"each element of the gradient is right; torch says: {said.strip()}"
            if options.torch["fast_mode"] is False
            else "each element of the gradient is right, and torch's fast mode, which compares "
            f"random projections, fails: {said.strip()}"
        )
        found = [Cause("unknown", text)]
    inner = _inside(probe, options) if left else None
    if inner is not None:
        found, notes = inner
    return _report(probe, options, point, found, notes, left)


def _explained(
    probe: Probe, options: _Options, point: Point, kinks: Sequence[Tensor], call: Call | None = None
) -> tuple[list[Cause], dict[int, str]]:
    """The causes that hold, best first; of each input that is wrong the cause."""
    case = Case.of(probe, options.tolerance, point, kinks)
    bad = case.bad
    if not bad:
        return [], {}
    attached = _attached(case)
    if attached is not None:
        return [attached], dict.fromkeys(bad, attached.name)
    call = call or _call(probe)
    of_each = {i: _of_input(case, call, i) for i in bad}
    names = {i: [cause.name for cause in causes] for i, causes in of_each.items()}
    common = [name for name in names[bad[0]] if all(name in others for others in names.values())]
    if not common:
        common = list(dict.fromkeys(n[0] for n in names.values() if n))
    found = [cause for name in common for i in bad for cause in of_each[i] if cause.name == name]
    left = {i: next((n for n in common if n in names[i]), "unknown") for i in bad}
    if "unknown" in left.values():
        unexplained = ", ".join(probe.names[i] for i, name in left.items() if name == "unknown")
        found.insert(
            0,
            Cause(
                "unknown",
                f"no hypothesis mends the gradient of {unexplained}; see the pattern below",
            ),
        )
    return list(dict.fromkeys(found)), left


def _of_input(case: Case, call: Call | None, i: int) -> list[Cause]:
    found = hypotheses(case, i)
    if call is not None:
        masks = [cause for cause in found if cause.name == "wrong-mask"]
        rest = [cause for cause in found if cause.name != "wrong-mask"]
        found = [*rest, *slips(case, call, i), *masks]
    return unique(found)


def _call(probe: Probe) -> Call | None:
    """The function as a call of a custom Function, if it is one and no more."""
    calls = calls_of(probe, alone=True)
    return calls[0] if len(calls) == 1 else None


def _inside(probe: Probe, options: _Options) -> tuple[list[Cause], list[str]] | None:
    """The causes in the first custom Function that is wrong by itself, and which that is."""
    calls = calls_of(probe)
    for number, call in enumerate(calls[:20]):
        if not any(isinstance(x, Tensor) and x.requires_grad for x in call.inputs):
            continue
        apply: Callable[..., Any] = call.function.apply  # type: ignore[attr-defined]
        alone = Probe(apply, call.inputs, options.eps)
        point = alone.point()
        if not point.finite or all(map(options.tolerance.fits, point.analytic, point.numeric)):
            continue
        ignored = _upstream_ignored(alone, options, point)
        if ignored is not None:
            found = [ignored]
        else:
            kinks = _kinks(alone, options, point)
            found, left = _explained(alone, options, point, kinks, call)
            if not left:
                continue
        return found, [
            f"It is {call.function.__name__} that is wrong, number {number + 1} of "
            f"{len(calls)} custom Functions called: its inputs are named as of its own."
        ]
    return None


def _report(
    probe: Probe,
    options: _Options,
    point: Point | None,
    found: Sequence[Cause],
    notes: Sequence[str] = (),
    causes: dict[int, str] | None = None,
    of: str = "gradient",
    name: str | None = None,
) -> Report:
    outputs = [
        (
            "y" if len(probe.shapes) == 1 else f"y{number}",
            shape if is_real else (*shape, 2),
        )
        for number, (shape, is_real) in enumerate(
            zip(probe.shapes, probe.outputs_real, strict=True)
        )
    ]
    if point is None:
        try:
            point = probe.point()
        except RuntimeError:
            probe.restore()
    each: list[Checked] = []
    if point is not None:
        for i, leaf in enumerate(probe.leaves):
            a, n = point.analytic[i], point.numeric[i]
            wrong = options.tolerance.wrong(a, n)
            one = checked(probe.names[i], leaf, a, n, wrong, outputs)
            each.append(
                replace(one, cause=(causes or {}).get(i, found[0].name if one.count else None))
            )
    return Report(name or name_of(probe.fn), of, tuple(each), tuple(found), tuple(notes))


# ---- the circumstances


def _is_wide(leaf: Tensor) -> bool:
    return leaf.dtype in (torch.float64, torch.complex128)


def _low_precision(probe: Probe, options: _Options, error: RuntimeError) -> Report:
    """Inputs in which a difference of eps has no digits: checked in float64 instead."""
    dtypes = ", ".join(dict.fromkeys(dtype_name(leaf.dtype) for leaf in probe.leaves))
    why = f"the inputs are {dtypes}: a difference of eps = {options.eps:g} is lost in rounding"

    def widened(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        wide = value.detach().to(torch.complex128 if value.is_complex() else torch.float64)
        return wide.requires_grad_(value.requires_grad)

    try:
        wide = Probe(probe.fn, [widened(value) for value in probe.args], options.eps)
        examined = _examined(wide, replace(options, double=False))
    except (RuntimeError, TypeError) as refused:
        reason = str(refused).strip().partition("\n")[0]
        text = f"{why}. In float64 the function raises: {reason}. Check it in float64"
        return _report(probe, options, None, [Cause("low-precision", text)])
    if examined is None:
        text = f"{why}. With the same numbers in float64 it passes"
        return _report(probe, options, None, [Cause("low-precision", text)])
    note = f"The inputs are {dtypes}; it was checked with the same numbers in float64."
    return replace(examined, notes=(note, *examined.notes))


def _unsteady(probe: Probe, options: _Options) -> Cause | None:
    """Two forward runs that differ."""
    probe.seeded = False
    try:
        first, second = probe.value(), probe.value()
    finally:
        probe.seeded = True
        probe.restore()
    if first.shape == second.shape and _near(first, second, options.nondet_tol):
        return None
    again = _near(probe.value(), probe.value(), options.nondet_tol)
    why = (
        "with the same random state before each run they do not: it draws random numbers"
        if again
        else "with the same random state too: it depends on something that each run changes"
    )
    return Cause("nondeterministic", f"two runs at the same inputs differ; {why}")


def _near(first: Tensor, second: Tensor, tolerance: float) -> bool:
    first, second = first.nan_to_num(), second.nan_to_num()
    return not first.numel() or float((first - second).abs().max()) <= tolerance


def _unsteady_backward(probe: Probe, options: _Options) -> Cause | None:
    """Two backward runs from new that differ."""
    upstream = probe.upstream(0)
    try:
        probe.seeded = False
        once, again = probe.vjp(upstream), probe.vjp(upstream)
        probe.seeded = True
        outputs = probe.outputs()
        if any(output.requires_grad for output in outputs):
            one, two = (probe.vjp(upstream, outputs, retain=True) for _ in range(2))
        else:
            one, two = once, once
    except RuntimeError:
        return None
    finally:
        probe.seeded = True
        probe.restore()
    for what, a, b in (("", once, again), (" through one graph", one, two)):
        if not all(map(_near, a, b, [options.nondet_tol] * len(a))):
            return Cause(
                "nondeterministic",
                f"two backward runs{what} at the same inputs and upstream differ, and the "
                "forward runs do not",
            )
    return None


def _saved_modified(probe: Probe, options: _Options) -> Cause | None:
    """A gradient that is another one where copies of the saved tensors are kept."""
    upstream = probe.upstream(0)
    fix = "with copies kept instead it"
    outputs = probe.outputs()
    functions = functions_of(outputs)
    if not any(output.requires_grad for output in outputs):
        return None
    try:
        first = probe.vjp(upstream, outputs, retain=True)
        changed = not all(map(torch.equal, map(real, probe.leaves), map(real, probe.start)))
        second = probe.vjp(upstream, outputs, retain=True)
        raised = ""
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            return None
        raised, changed = " (autograd saw it and raised)", False
        first = second = []
    finally:
        probe.restore()
    try:
        with cloned_saves(functions):
            outputs = probe.outputs()
            copies = probe.vjp(upstream, outputs, retain=True)
            probe.restore()
            later = probe.vjp(upstream, outputs, retain=True)
    except RuntimeError:
        return None
    finally:
        probe.restore()

    def equal(one: list[Tensor], two: list[Tensor]) -> bool:
        return len(one) == len(two) and all(
            torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)
            for a, b in zip(one, two, strict=True)
        )

    if not equal(copies, later):
        return None  # not saved by save_for_backward, or random
    if changed:
        return Cause(
            "saved-tensor-modified",
            f"backward changes an input in place{raised}; {fix} leaves it as it is",
        )
    if raised or not equal(first, second):
        when = "by backward itself, or between forward and backward"
    elif not equal(first, copies):
        when = "after it was kept and before backward"
    else:
        return None
    with cloned_saves(functions):
        try:
            passes = all(map(options.tolerance.fits, probe.analytic()[0], probe.numeric()))
        except RuntimeError:
            passes = False
        finally:
            probe.restore()
    tested = "passes" if passes else "gives the same each time, and yet another gradient"
    return Cause(
        "saved-tensor-modified",
        f"a tensor that is kept for backward is changed in place {when}{raised}; {fix} {tested}",
    )


def _of_shape(probe: Probe, options: _Options, error: RuntimeError) -> list[Cause]:
    """Gradients of impossible shapes: transposed, or in another order."""
    from .shapes import mended

    found = mended(probe, options.tolerance)
    said = str(error).strip().partition("\n")[0]
    return found or [Cause("unknown", f"autograd says: {said}")]


def _non_finite(probe: Probe, point: Point) -> Cause:
    where = first_not_finite(probe)
    if where is None:
        side = "numeric" if any(not n.isfinite().all() for n in point.numeric) else "analytic"
        where = (
            "the function is finite at the inputs, and not at x - eps or x + eps"
            if side == "numeric"
            else "it shows with one element of the upstream set alone"
        )
    return Cause("non-finite", where)


def _noise(probe: Probe, options: _Options, point: Point) -> Cause | None:
    """Differences that depend on the step as only rounding makes them; a larger step agrees."""
    with Widths() as widths:
        probe.outputs()
    narrow = widths.narrowest
    finer = probe.numeric(options.eps / 2)
    if narrow is torch.float64 and all(map(options.tolerance.fits, finer, point.numeric)):
        return None
    # The error of a difference is the rounding over the step, and the step squared.
    rounding = max(torch.finfo(narrow).eps, torch.finfo(torch.float32).eps)
    error = 4 * rounding ** (2 / 3)
    coarse = Tolerance(error, error)
    for step in (rounding ** (1 / 3), 2 * rounding ** (1 / 3)):
        if all(map(coarse.fits, point.analytic, probe.numeric(step))):
            if all(map(coarse.fits, point.analytic, point.numeric)):
                return None
            what = "less than float64" if narrow is torch.float64 else dtype_name(narrow)
            return Cause(
                "low-precision",
                f"something inside computes in {what}: differences at eps = {options.eps:g} are "
                f"lost in its rounding, and at a step of {step:.2g} the gradient passes",
            )
    return None


def _upstream_ignored(probe: Probe, options: _Options, point: Point) -> Cause | None:
    """The same gradient whatever the upstream."""
    if not probe.size:
        return None
    ones = torch.ones(probe.size, dtype=torch.float64)
    first, second, right = (probe.vjp(v) for v in (probe.upstream(0), probe.upstream(1), ones))
    names = [
        name
        for name, a, b in zip(probe.names, first, second, strict=True)
        if torch.equal(a, b) and bool(a.any())
    ]
    if not names:
        return None
    whole = all(
        options.tolerance.fits(grad, ones @ numeric)
        for grad, numeric, name in zip(right, point.numeric, probe.names, strict=True)
        if name in names
    )
    more = (
        "it is the right one for an upstream of ones: multiplied by the upstream it passes"
        if whole
        else "for an upstream of ones it is not right either: there is another fault"
    )
    return Cause(
        "upstream-ignored",
        f"the gradient of {', '.join(names)} is the same for every upstream gradient; {more}",
    )


def _kinks(probe: Probe, options: _Options, point: Point) -> list[Tensor]:
    """Of each input the wrong elements at which the slopes to both sides differ, and the gradient
    is one of those between."""
    wrong = [
        options.tolerance.wrong(a, n) for a, n in zip(point.analytic, point.numeric, strict=True)
    ]
    if not any(bool(w.any()) for w in wrong):
        return wrong
    base = probe.value().cpu()[:, None]
    atol, rtol = options.tolerance.atol, options.tolerance.rtol
    made = []
    for w, a, (plus, minus) in zip(wrong, point.analytic, probe.shifted(options.eps), strict=True):
        right, left = (plus - base) / options.eps, (base - minus) / options.eps
        low, high = torch.minimum(left, right), torch.maximum(left, right)
        allowed = 10 * atol + rtol * torch.maximum(low.abs(), high.abs())
        # Of a smooth function the two differ by eps times its curvature.
        apart = high - low > allowed
        between = (a >= low - allowed) & (a <= high + allowed)
        made.append(w & apart & between)
    if not any(bool(k.any()) for k in made):
        return made
    # A kink shows at a smaller step as well, or is not between x - step and x + step any more;
    # great curvature shrinks with the step.
    step = options.eps / 8
    for kink, (plus, minus), a in zip(made, probe.shifted(step), point.analytic, strict=True):
        right, left = (plus - base) / step, (base - minus) / step
        apart = (right - left).abs() > 10 * atol + rtol * right.abs()
        gone = ~options.tolerance.wrong(a, (right + left) / 2)
        kink &= apart | gone
    return made


def _kink(probe: Probe, point: Point, kinks: Sequence[Tensor]) -> Cause:
    places = []
    for name, leaf, value, kink in zip(probe.names, probe.leaves, point.values, kinks, strict=True):
        shape = (*leaf.shape, 2) if leaf.is_complex() else tuple(leaf.shape)
        numbers = real(value)
        for j in kink.any(0).nonzero().flatten().tolist():
            index = [int(k) for k in torch.unravel_index(torch.tensor(j), shape)] if shape else []
            places.append(f"{name}{index or ''} = {float(numbers[j]):.6g}")
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return Cause(
        "kink",
        f"the slopes to the left and to the right differ at {', '.join(places[:8])}{more}, and "
        "the gradient is one of those between; without these elements it passes. Take inputs away "
        'from the kink, or kinks="skip"',
    )


def _attached(case: Case) -> Cause | None:
    """The gradient passes where nothing keeps it out."""
    met: list[str] = []
    for point in case.points:
        case.probe.set(point.values)
        try:
            with Attached() as mode:
                outputs = case.probe.outputs()
            rows = [
                case.probe.vjp(row, outputs, retain=True)
                for row in torch.eye(case.probe.size, dtype=torch.float64)
            ]
        except (RuntimeError, TypeError):
            return None
        finally:
            case.probe.restore()
        if not mode.met:
            return None
        met = mode.met
        whole = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        if point is case.points[0] and any(bool(k.any()) for k in case.kinks):
            continue
        if not all(map(case.tolerance.fits, whole, point.numeric)):
            return None
    return Cause("cut", f"{' and '.join(met)} keeps the gradient out; without it passes")


# ---- beyond torch's check


def _direction(probe: Probe, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            leaf.shape,
            generator=generator,
            dtype=torch.complex128 if leaf.is_complex() else torch.float64,
        ).to(leaf.device, leaf.dtype)
        for leaf in probe.leaves
    ]


def _not_linear(probe: Probe, options: _Options) -> Report | None:
    """A gradient that is right for each element of the upstream alone, and not for all at once."""
    upstream = probe.upstream(3)
    outputs = probe.outputs()
    if not probe.size or not any(output.requires_grad for output in outputs):
        return None
    once, twice = probe.vjp(upstream, outputs, retain=True), probe.vjp(2 * upstream, outputs)
    close = [
        torch.allclose(2 * a, b, rtol=max(1e-6, options.tolerance.rtol), atol=1e-6, equal_nan=True)
        for a, b in zip(once, twice, strict=True)
    ]
    if all(close):
        return None
    names = ", ".join(n for n, fine in zip(probe.names, close, strict=True) if not fine)
    text = (
        f"the gradient of {names} is not linear in the upstream gradient: twice the upstream does "
        "not give twice the gradient. With a one at one element of the upstream and zeros "
        "elsewhere it is right"
    )
    return _report(probe, options, None, [Cause("unknown", text)])


def _double_backward(probe: Probe, options: _Options) -> Report | None:
    """The gradient of the gradient in a random direction; each element if that is wrong."""
    if not all(map(_is_wide, probe.leaves)) or not probe.size:
        return None
    if not all(dtype.is_floating_point and dtype is torch.float64 for dtype in probe.dtypes):
        return None
    if any(leaf.is_complex() for leaf in probe.leaves):
        return None
    count = len(probe.leaves)
    outputs = probe.outputs()
    upstream = [part.requires_grad_() for part in probe.split(probe.upstream(4), outputs)]
    if not any(output.requires_grad for output in outputs):
        return None
    args = probe.args

    def gradient(*given: Any) -> tuple[Tensor, ...]:
        made = as_tuple(probe.fn(*given[: len(args)]))
        chosen = [made[i] for i in probe.chosen]
        pairs = [(y, v) for y, v in zip(chosen, given[len(args) :], strict=True) if y.requires_grad]
        leaves = [x for x in given[: len(args)] if isinstance(x, Tensor) and x.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            leaves,
            [v for _, v in pairs],
            create_graph=True,
            allow_unused=True,
        )
        return tuple(g for g in found if g is not None)

    names = [*probe.all_names, *(f"upstream{n or ''}" for n in range(len(upstream)))]
    try:
        second = Probe(gradient, [*args, *upstream], options.eps, names)
        analytic = second.vjp(second.upstream(5))
    except (RuntimeError, NotImplementedError):
        return None  # it says so itself
    finally:
        probe.restore()
    direction = _direction(second, 6)
    weights = second.upstream(5)
    sides = []
    for sign in (1, -1):
        second.set(
            [x + sign * options.eps * d for x, d in zip(second.start, direction, strict=True)]
        )
        try:
            sides.append(second.value())
        except RuntimeError:
            return None
        finally:
            second.restore()
    numeric = float(weights @ (sides[0] - sides[1])) / (2 * options.eps)
    along = sum(float(a @ real(d)) for a, d in zip(analytic, direction, strict=True))
    size = options.tolerance.atol * second.size**0.5 + options.tolerance.rtol * abs(numeric)
    if not abs(along - numeric) > size:  # or not a number: there is a pole near by
        return None
    point = second.point()
    wrong = [
        options.tolerance.wrong(a, n) for a, n in zip(point.analytic, point.numeric, strict=True)
    ]
    kinks = _kinks(second, options, point)
    if not point.finite or not any(bool((w & ~k).any()) for w, k in zip(wrong, kinks, strict=True)):
        return None
    if _noise(second, options, point) is not None:
        return None
    lost = all(not bool(a.any()) for a in point.analytic[:count])
    what = (
        "it is zero, without an error: backward computes with numbers that autograd cannot see "
        "through. If it is to be differentiated once only, mark it once_differentiable"
        if lost
        else "the gradient itself is right, and its derivative by autograd is not that by "
        "differences: does backward use a tensor computed in forward that is not an output, or "
        "a custom Function of its own?"
    )
    return _report(
        second,
        options,
        point,
        [Cause("double-backward-wrong", what)],
        of="double backward",
        name=name_of(probe.fn),
    )


def _forward(probe: Probe, options: _Options, error: RuntimeError) -> Report:
    """What forward mode gives, against the differences."""
    from torch.autograd import forward_ad

    columns: list[Tensor] = []
    dropped = False
    for number, leaf in enumerate(probe.leaves):
        width = real(leaf).numel()
        made = []
        for j in range(width):
            flat = torch.zeros(width, dtype=torch.float64)
            flat[j] = 1
            shape = (*leaf.shape, 2) if leaf.is_complex() else leaf.shape
            unit = flat.reshape(shape)
            tangent = (torch.view_as_complex(unit) if leaf.is_complex() else unit).to(leaf)
            with forward_ad.dual_level(), torch.random.fork_rng():
                torch.manual_seed(0)
                dual = forward_ad.make_dual(leaf.detach(), tangent)
                place = probe.where[number]
                args = [dual if i == place else x for i, x in enumerate(probe.args)]
                outputs = [as_tuple(probe.fn(*args))[i] for i in probe.chosen]
                parts = []
                for y in outputs:
                    found = forward_ad.unpack_dual(y).tangent
                    dropped |= found is None
                    parts.append(real(torch.zeros_like(y) if found is None else found))
                made.append(torch.cat(parts).cpu())
        empty = torch.zeros(probe.size, 0, dtype=torch.float64)
        columns.append(torch.stack(made, 1) if made else empty)
    point = probe.point()
    point = replace(point, analytic=columns)
    wrong = not all(map(options.tolerance.fits, columns, point.numeric))
    if not wrong:
        said = str(error).strip()
        cause = Cause("tangent-wrong", f"each tangent is right alone; torch says: {said}")
    elif dropped and not any(bool(c.any()) for c in columns):
        cause = Cause(
            "tangent-wrong",
            "the tangent is dropped, without an error: the output passes for a constant",
        )
    else:
        cause = Cause(
            "tangent-wrong",
            "the tangents of forward mode (jvp) are not those of central differences; backward "
            "passes with the same differences",
        )
    return _report(probe, options, point, [cause], of="forward mode")
