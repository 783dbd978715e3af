"""From a check that fails to its cause: the hypotheses in their order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck as torch_gradcheck
from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError

from torchbp.graph.calling import name_of
from torchbp.graph.text import dtype_name

from .beyond import double_backward, forward_mode, not_linear
from .case import Case, Options, report_of
from .circumstances import (
    attached_of,
    is_wide,
    kink_of,
    kinks_of,
    noise_of,
    non_finite,
    saved_modified,
    unsteady_backward,
    unsteady_forward,
    upstream_ignored,
)
from .hypotheses import hypotheses, patterns
from .probe import Call, Point, Probe, calls_of
from .report import Cause, Report, unique
from .shapes import mended
from .slips import slips
from .terms import missing
from .watch import watched

__all__ = ["examined"]


def examined(probe: Probe, options: Options) -> Report | None:
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
        try:
            return _diagnosed(probe, options, seen, error)
        except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError) as stopped:
            # What torch found must not be lost to a function that cannot be run otherwise.
            text = f"torch says: {error}. The diagnosis ended with {stopped!r}"
            return Report(name_of(probe.fn), "gradient", (), (*seen, Cause("unknown", text)))
    if backward:
        report = not_linear(probe, options)
        if report is None and options.double:
            report = double_backward(probe, options)
        if report is not None:
            return report
    if options.torch["check_forward_ad"]:
        error = _torch_says(probe, options, forward=True)
        if error is not None:
            return forward_mode(probe, options, error)
    return None


def _torch_says(probe: Probe, options: Options, forward: bool) -> RuntimeError | None:
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


def _by_torch(probe: Probe, options: Options) -> Report | None:
    """For layouts that have no diagnosis here."""
    try:
        torch_gradcheck(probe.fn, probe.args, **options.torch)
    except TorchGradcheckError as error:
        text = f"there is no diagnosis for this layout. torch says: {error}"
        return Report(name_of(probe.fn), "gradient", (), (Cause("unknown", text),))
    return None


def _diagnosed(
    probe: Probe, options: Options, seen: list[Cause], error: RuntimeError | None
) -> Report | None:
    """Why the gradient is wrong."""
    notes: list[str] = []
    if error is not None and any(not is_wide(leaf) for leaf in probe.leaves):
        return _low_precision(probe, options, error)
    unsteady = unsteady_forward(probe, options)
    if unsteady is not None:
        return report_of(probe, options, None, [unsteady, *seen])
    saved = saved_modified(probe, options)
    if saved is not None:
        return report_of(probe, options, None, [saved, *seen])
    unsteady = unsteady_backward(probe, options)
    if unsteady is not None:
        return report_of(probe, options, None, [unsteady, *seen])
    if error is not None and "returned an invalid gradient" in str(error):
        return report_of(probe, options, None, refused_shapes(probe, options, error))
    if seen and (error is None or any(cause.name == "gradient-modified" for cause in seen)):
        return report_of(probe, options, None, seen)
    point = probe.point()
    if not point.finite:
        return report_of(probe, options, point, [non_finite(probe, point)])
    noise = noise_of(probe, options, point)
    if noise is not None:
        return report_of(probe, options, point, [noise])
    ignored = upstream_ignored(probe, options, point)
    if ignored is not None:
        return report_of(probe, options, point, [ignored])

    kinks = kinks_of(probe, options, point)
    found, left = explained(probe, options, point, kinks)
    lone = [i for i, kink in enumerate(kinks) if bool(kink.any())]
    if lone:
        kink = kink_of(probe, point, kinks)
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
    return report_of(probe, options, point, [*found, *seen], notes, left)


def explained(
    probe: Probe, options: Options, point: Point, kinks: Sequence[Tensor], call: Call | None = None
) -> tuple[list[Cause], dict[int, str]]:
    """The causes that hold, best first; of each input that is wrong the cause."""
    case = Case.of(probe, options.tolerance, point, kinks)
    bad = case.bad
    if not bad:
        return [], {}
    attached = attached_of(case)
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
    """All causes that hold for one input, best first."""
    found = hypotheses(case, i)
    if call is not None:
        found += slips(case, call, i)
    return unique(found or patterns(case, i) or missing(case, i))


def _call(probe: Probe) -> Call | None:
    """The function as a call of a custom Function, if it is one and no more."""
    calls = calls_of(probe, alone=True)
    return calls[0] if len(calls) == 1 else None


def _inside(probe: Probe, options: Options) -> tuple[list[Cause], list[str]] | None:
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
        ignored = upstream_ignored(alone, options, point)
        if ignored is not None:
            found = [ignored]
        else:
            kinks = kinks_of(alone, options, point)
            found, left = explained(alone, options, point, kinks, call)
            if not left:
                continue
        return found, [
            f"It is {call.function.__name__} that is wrong, number {number + 1} of "
            f"{len(calls)} custom Functions called: its inputs are named as of its own."
        ]
    return None


def _low_precision(probe: Probe, options: Options, error: RuntimeError) -> Report:
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
        found = examined(wide, replace(options, double=False))
    except (RuntimeError, TypeError) as refused:
        reason = str(refused).strip().partition("\n")[0]
        text = f"{why}. In float64 the function raises: {reason}. Check it in float64"
        return report_of(probe, options, None, [Cause("low-precision", text)])
    if found is None:
        text = f"{why}. With the same numbers in float64 it passes"
        return report_of(probe, options, None, [Cause("low-precision", text)])
    note = f"The inputs are {dtypes}; it was checked with the same numbers in float64."
    return replace(found, notes=(note, *found.notes))


def refused_shapes(probe: Probe, options: Options, error: RuntimeError) -> list[Cause]:
    """Gradients of impossible shapes: transposed, or in another order."""
    found = mended(probe, options.tolerance)
    said = str(error).strip().partition("\n")[0]
    return found or [Cause("unknown", f"autograd says: {said}")]
