"""The causes that show in the Jacobians alone: each is claimed only if the gradient with the fault
undone passes, at the given inputs and at others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from torchbp.graph.text import dims

from .case import Case
from .probe import Probe
from .report import Cause

__all__ = ["hypotheses", "patterns"]

Hypothesis = Callable[[Case, int], Cause | None]


def hypotheses(case: Case, i: int) -> list[Cause]:
    """All causes that hold for the gradient of input `i`, best first."""
    return _holding(_FIRST, case, i)


def patterns(case: Case, i: int) -> list[Cause]:
    """Those that fit whatever has elements in the wrong places: for where no other holds."""
    return _holding((overwritten, mask), case, i)


def _holding(tried: Sequence[Hypothesis], case: Case, i: int) -> list[Cause]:
    found = (hypothesis(case, i) for hypothesis in tried)
    return [cause for cause in found if cause is not None]


def _zero(matrices: list[Tensor]) -> bool:
    return not any(bool(matrix.any()) for matrix in matrices)


def swapped(case: Case, i: int) -> Cause | None:
    name = case.probe.names[i]
    for k in case.bad:
        if k == i or case.probe.leaves[k].shape != case.probe.leaves[i].shape:
            continue
        if case.everywhere(case.analytic(k), i) and case.everywhere(case.analytic(i), k):
            return Cause(
                "swapped-operands",
                f"{name} gets the gradient of {case.probe.names[k]}, and "
                f"{case.probe.names[k]} that of {name}; exchanged they pass",
            )
    return None


def wrong_input(case: Case, i: int) -> Cause | None:
    name = case.probe.names[i]
    for k, other in enumerate(case.probe.names):
        if k == i:
            continue
        mine, theirs = case.analytic(i), case.analytic(k)
        if not _zero(mine) and case.everywhere(mine, k):
            return Cause("wrong-input", f"{name} gets what is the gradient of {other}")
        if _zero(mine) and k in case.bad and case.everywhere(theirs, i):
            return Cause("wrong-input", f"the gradient of {name} is returned for {other}")
    return None


def cut(case: Case, i: int) -> Cause | None:
    if not _zero(case.analytic(i)):
        return None
    what = "None" if i in case.points[0].missing else "zero"
    return Cause(
        "cut",
        f"the gradient of {case.probe.names[i]} is {what} whatever the upstream and the inputs, "
        "and the output depends on it: a detach, a no_grad, or a backward that returns "
        f"{'None' if what == 'None' else 'zeros'}",
    )


def of_outputs(case: Case, i: int) -> Cause | None:
    """Some of several outputs hand nothing back."""
    mended, lost = [], set(range(len(case.probe.sizes)))
    slices = _rows(case.probe)
    for a in case.analytic(i):
        lost &= {k for k in lost if not bool(a[slices[k]].any())}
    if not lost or len(lost) == len(slices):
        return None
    for a, n in zip(case.analytic(i), case.numeric(i), strict=True):
        mended.append(a.clone())
        for k in lost:
            mended[-1][slices[k]] = n[slices[k]]
    if not case.everywhere(mended, i):
        return None
    which = ", ".join(map(str, sorted(lost)))
    return Cause(
        "overwritten",
        f"{case.probe.names[i]} is used by several outputs, and nothing of the upstream of output "
        f"{which} arrives; with that added it passes. Accumulate instead of assigning",
    )


def _rows(probe: Probe) -> list[slice]:
    ends = list(itertools.accumulate(probe.sizes))
    return [slice(end - size, end) for end, size in zip(ends, probe.sizes, strict=True)]


def scaled(case: Case, i: int) -> Cause | None:
    """A constant factor, or the wrong sign."""
    factor = _factor(case, i)
    if factor is None:
        return None
    name = case.probe.names[i]
    if abs(factor + 1) < 1e-3:
        return Cause("wrong-sign", f"the gradient of {name} negated passes", -1.0)
    fraction = Fraction(factor).limit_denominator(1000)
    exact = float(fraction) == factor and fraction.denominator > 1
    said = f"{factor:.6g}" + (f" = {fraction}" if exact else "")
    return Cause(
        "wrong-factor",
        f"the gradient of {name} is {said} times the right one; divided by that it passes"
        + _size(case, i, factor),
        factor,
    )


def _factor(case: Case, i: int) -> float | None:
    """c, where the gradient is c times the right one at all points."""
    analytic, numeric = case.analytic(i), case.numeric(i)
    dots = sum(float((a * n).sum()) for a, n in zip(analytic, numeric, strict=True))
    norms = sum(float((n * n).sum()) for n in numeric)
    if not norms or not dots:
        return None
    factor = dots / norms
    # Twice over: undone, and done to the right one, so that a tiny gradient proves nothing.
    done = all(case.tolerance.fits(a, factor * n) for a, n in zip(analytic, numeric, strict=True))
    if not done or not case.everywhere([a / factor for a in analytic], i):
        return None
    simple = Fraction(factor).limit_denominator(1000)
    if simple and abs(float(simple) / factor - 1) < 1e-6:
        factor = float(simple)  # without the rounding of the differences
    return None if abs(factor - 1) < 1e-9 else factor


def _size(case: Case, i: int, factor: float) -> str:
    """What number of the shapes the factor is, and whether it follows the batch."""
    probe = case.probe
    whole = factor if factor >= 1 else 1 / factor
    if whole < 1.5 or abs(whole - round(whole)) > 1e-4 * whole:
        return ""
    larger = _larger_batch(case, i)
    if larger is not None and abs(larger / factor - 0.5) < 1e-3:
        return ". With twice the rows it halves: it is 1/N, N the number of rows or elements"
    if larger is not None and abs(larger / factor - 2) < 1e-3:
        return ". With twice the rows it doubles: it is the number of rows or elements"
    for index, leaf in enumerate(probe.leaves):
        for what, size in (("number of elements", leaf.numel()), *(
            (f"size of dimension {dim}", n) for dim, n in enumerate(leaf.shape)
        )):  # fmt: skip
            if larger is None and size == round(whole) and size > 2:
                return f". {size} is the {what} of {probe.names[index]}"
    return ""


def _larger_batch(case: Case, i: int) -> float | None:
    """The factor with each tensor of as many rows as the first input twice as long."""
    probe = case.probe
    rows = next((leaf.shape[0] for leaf in probe.leaves if leaf.dim()), None)
    if rows is None:
        return None

    def grown(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != rows:
            return value
        more = torch.cat([value.detach(), value.detach()])
        return more.requires_grad_(value.requires_grad)

    try:
        bigger = Probe(probe.fn, [grown(value) for value in probe.args], probe.eps)
        first = bigger.point()
    except (RuntimeError, ValueError, TypeError, IndexError):  # not inputs of this function
        return None
    return _factor(Case(bigger, case.tolerance, [first], []), i)


def transposed(case: Case, i: int) -> Cause | None:
    """The gradient as a matrix transposed, the upstream, or an operand in its formula."""
    leaf, name = case.probe.leaves[i], case.probe.names[i]
    if leaf.is_complex() or len(case.probe.sizes) != 1:
        return None
    shape, output = tuple(leaf.shape), case.probe.shapes[0]
    if len(shape) >= 2:
        rows, columns = shape[-2:]

        def as_matrix(matrix: Tensor, there: tuple[int, int]) -> Tensor:
            split = matrix.reshape(len(matrix), -1, *there)
            return split.transpose(-1, -2).reshape(matrix.shape)

        for there in ((columns, rows), (rows, columns)):
            if case.everywhere([as_matrix(m, there) for m in case.analytic(i)], i):
                return Cause("transposed", f"the gradient of {name} transposed passes")
    square = all(m.shape[0] == m.shape[1] for m in case.numeric(i))
    if square and case.everywhere([m.t() for m in case.analytic(i)], i):
        return Cause(
            "transposed",
            f"an operand in the gradient of {name} is transposed: with the Jacobian transposed "
            "it passes",
        )
    if len(output) == 2 and output[0] == output[1] and len(shape) >= 2:
        mended = [m.reshape(*output, -1).transpose(0, 1).reshape(m.shape) for m in case.analytic(i)]
        if case.everywhere(mended, i):
            return Cause(
                "transposed",
                f"the upstream in the gradient of {name} is transposed; undone it passes",
            )
    return None


def batch_sum(case: Case, i: int) -> Cause | None:
    """Only one slice of the upstream arrives, or it is summed over another dimension."""
    if len(case.probe.sizes) != 1:
        return None
    output, name = case.probe.shapes[0], case.probe.names[i]
    if not case.probe.outputs_real[0]:
        return None
    for dim in range(len(output)):
        if output[dim] < 2:
            continue
        cubes = [
            (a.reshape(*output, -1).movedim(dim, 0), n.reshape(*output, -1).movedim(dim, 0))
            for a, n in zip(case.analytic(i), case.numeric(i), strict=True)
        ]
        for there in range(output[dim]):
            kept = all(
                case.tolerance.fits(a[there], n[there])
                and n[there].any()
                and not a[:there].any()
                and not a[there + 1 :].any()
                for a, n in cubes
            )
            if kept:
                return Cause(
                    "batch-sum-missing",
                    f"only index {there} of dimension {dim} of the upstream {dims(output)} "
                    f"reaches {name}: it passes for that one alone, and for the sum over all the "
                    "others are to be added",
                )
    if case.probe.leaves[i].numel() == 1:
        arrived = [(a != 0).any(1).nonzero().flatten().tolist() for a in case.analytic(i)]
        if len(arrived[0]) == 1 and all(rows == arrived[0] for rows in arrived):
            (row,) = arrived[0]
            pairs = zip(case.analytic(i), case.numeric(i), strict=True)
            if all(case.tolerance.fits(a[row], n[row]) for a, n in pairs):
                return Cause(
                    "batch-sum-missing",
                    f"of the upstream {dims(output)} only element {row} reaches {name}: it passes "
                    "for that one alone, and for the sum over all the others are to be added",
                )
    if case.probe.leaves[i].dim() > 1:
        return None
    for one, two in itertools.combinations(range(len(output)), 2):
        if output[one] != output[two]:
            continue
        mended = [
            a.reshape(*output, -1).transpose(one, two).reshape(a.shape) for a in case.analytic(i)
        ]
        if case.everywhere(mended, i):
            return Cause(
                "batch-sum-missing",
                f"the gradient of {name} is the sum over dimension {one} of the upstream, and "
                f"should be that over dimension {two}, or the other way round; exchanged it passes",
            )
    return None


def overwritten(case: Case, i: int) -> Cause | None:
    """An element that is used several times has the gradient of one use alone."""
    shared = False
    for a, n in zip(case.analytic(i), case.numeric(i), strict=True):
        wrong = case.tolerance.wrong(a, n)
        if bool((a != 0)[wrong].any()):
            return None
        uses = (n.abs() > case.tolerance.atol).sum(0)
        left = (a != 0).sum(0)
        lossy = wrong.any(0)
        if bool((left[lossy] != 1).any()) or bool((uses[lossy] < 2).any()):
            return None
        shared |= bool(lossy.any())
    if not shared or not bool((case.analytic(i)[0] != 0).any()):
        return None
    return Cause(
        "overwritten",
        f"elements of {case.probe.names[i]} that are used several times have the gradient of one "
        "use alone; with those of the others added they pass. Add to it (+=, index_add) instead "
        "of assigning",
    )


def mask(case: Case, i: int) -> Cause | None:
    """The right numbers at the wrong elements."""
    name = case.probe.names[i]
    pairs = list(zip(case.analytic(i), case.numeric(i), strict=True))
    if all(_other_elements(case, a, n) for a, n in pairs):
        what = "is zero where it belongs or not zero where it does not"
    elif all(_permuted(case, a, n) for a, n in pairs):
        what = "has the right numbers at other elements"
    elif all(_other_branch(case, a, n) for a, n in pairs):
        what = "takes another branch's slope"
    else:
        return None
    return Cause(
        "wrong-mask",
        f"the gradient of {name} {what}, at these inputs and at others; with the mask mended it "
        "passes",
    )


def _other_elements(case: Case, a: Tensor, n: Tensor) -> bool:
    """Each row has one element, and what is wrong is zero on one side."""
    single = bool(((n != 0).sum(1) <= 1).all()) and bool(((a != 0).sum(1) <= 1).all())
    wrong = case.tolerance.wrong(a, n)
    return single and bool(((a == 0) ^ (n.abs() < case.tolerance.atol))[wrong].all())


def _permuted(case: Case, a: Tensor, n: Tensor) -> bool:
    return case.tolerance.fits(a.sort(1).values, n.sort(1).values)


def _other_branch(case: Case, a: Tensor, n: Tensor) -> bool:
    """Elementwise with few slopes, each wrong one being that of another element."""
    if bool(((n.abs() > case.tolerance.atol).sum(1) > 1).any()):
        return False
    slopes = n[n.abs() > case.tolerance.atol].mul(1e6).round().unique() / 1e6
    if not 1 < len(slopes) <= 3:
        return False
    wrong = a[case.tolerance.wrong(a, n)]
    return all(bool(torch.isclose(slopes, v, rtol=1e-4, atol=1e-5).any()) for v in wrong)


_FIRST: tuple[Hypothesis, ...] = (
    swapped,
    scaled,
    transposed,
    batch_sum,
    wrong_input,
    cut,
    of_outputs,
)
