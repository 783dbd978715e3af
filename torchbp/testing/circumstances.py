"""Causes that do not lie in a formula: what differs between runs, what is changed in place, where
numbers end, and where the gradient is kept out. Each is seen by running the function in other
circumstances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchbp.graph.text import dtype_name

from .case import Case, Options, Tolerance
from .probe import Point, Probe, cloned_saves, functions_of, nodes_of, real
from .report import Cause
from .watch import Attached, Widths, first_not_finite

__all__ = [
    "attached_of",
    "is_wide",
    "kink_of",
    "kinks_of",
    "noise_of",
    "non_finite",
    "saved_modified",
    "unsteady_backward",
    "unsteady_forward",
    "upstream_ignored",
]


def is_wide(leaf: Tensor) -> bool:
    return leaf.dtype in (torch.float64, torch.complex128)


def unsteady_forward(probe: Probe, options: Options) -> Cause | None:
    """Two forward runs that differ."""
    probe.seeded = False
    try:
        first = probe.value()
        changed = [
            name
            for name, leaf, start in zip(probe.names, probe.leaves, probe.start, strict=True)
            if not torch.equal(real(leaf), real(start))
        ]
        second = probe.value()
    finally:
        probe.seeded = True
        probe.restore()
    if first.shape == second.shape and _near(first, second, options.nondet_tol):
        return None
    if changed:
        text = f"each run changes {', '.join(changed)} in place, so that two runs differ"
        return Cause("nondeterministic", text)
    again = _near(probe.value(), probe.value(), options.nondet_tol)
    why = (
        "with the same random state before each run they do not: it draws random numbers"
        if again
        else "with the same random state too: it depends on something that each run changes"
    )
    return Cause("nondeterministic", f"two runs at the same inputs differ; {why}")


def unsteady_backward(probe: Probe, options: Options) -> Cause | None:
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


def _near(first: Tensor, second: Tensor, tolerance: float) -> bool:
    first, second = first.nan_to_num(), second.nan_to_num()
    return not first.numel() or float((first - second).abs().max()) <= tolerance


def saved_modified(probe: Probe, options: Options) -> Cause | None:
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


def non_finite(probe: Probe, point: Point) -> Cause:
    where = first_not_finite(probe)
    if where is None:
        side = "numeric" if any(not n.isfinite().all() for n in point.numeric) else "analytic"
        where = (
            "the function is finite at the inputs, and not at x - eps or x + eps"
            if side == "numeric"
            else "it shows with one element of the upstream set alone"
        )
    return Cause("non-finite", where)


def noise_of(probe: Probe, options: Options, point: Point) -> Cause | None:
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


def upstream_ignored(probe: Probe, options: Options, point: Point) -> Cause | None:
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


def kinks_of(probe: Probe, options: Options, point: Point) -> list[Tensor]:
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


def kink_of(probe: Probe, point: Point, kinks: Sequence[Tensor]) -> Cause:
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


def attached_of(case: Case) -> Cause | None:
    """The gradient passes where nothing keeps it out; or all that autograd sees is torch's own."""
    with Attached() as mode:
        outputs = case.probe.outputs()
    if not mode.met:
        return None
    said = " and ".join(mode.met)
    if all(_passes_attached(case, point) for point in case.points):
        return Cause("cut", f"{said} keeps the gradient out; without it passes")
    names = {type(node).__name__ for node in nodes_of(outputs)}
    if functions_of(outputs) or any("Cpp" in name for name in names):
        return None
    return Cause(
        "cut",
        f"{said} keeps the gradient out: autograd sees torch's own operations alone, whose "
        "gradients are right, and the output changes by another way",
    )


def _passes_attached(case: Case, point: Point) -> bool:
    case.probe.set(point.values)
    try:
        with Attached():
            outputs = case.probe.outputs()
        units = torch.eye(case.probe.size, dtype=torch.float64)
        rows = [case.probe.vjp(unit, outputs, retain=True) for unit in units]
    except (RuntimeError, TypeError):
        return False
    finally:
        case.probe.restore()
    whole = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    if point is case.points[0]:
        whole = [
            torch.where(kink, numeric, matrix)
            for kink, numeric, matrix in zip(case.kinks, point.numeric, whole, strict=True)
        ]
    return all(map(case.tolerance.fits, whole, point.numeric))
