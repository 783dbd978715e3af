"""What a hypothesis is tested on: a function whose gradient is wrong, at several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchbp.graph.calling import name_of

from .probe import Point, Probe
from .report import Cause, Checked, Report, checked

__all__ = ["Case", "Options", "Tolerance", "report_of"]


@dataclass(frozen=True)
class Tolerance:
    """|analytic - numeric| <= atol + rtol |numeric|, as torch's gradcheck has it."""

    atol: float
    rtol: float

    def wrong(self, analytic: Tensor, numeric: Tensor) -> Tensor:
        """Where they differ."""
        return ~torch.isclose(analytic, numeric, rtol=self.rtol, atol=self.atol)

    def fits(self, analytic: Tensor, numeric: Tensor) -> bool:
        return analytic.shape == numeric.shape and not bool(self.wrong(analytic, numeric).any())


@dataclass(frozen=True)
class Options:
    """What the caller asked for."""

    eps: float
    tolerance: Tolerance
    nondet_tol: float
    strict: bool
    kinks: Literal["raise", "skip"]
    double: bool
    torch: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A function, both Jacobians at the given inputs and at others, and where they differ.

    Attributes:
        points: the given inputs first; at each both Jacobians are finite.
        kinks: of each input the elements of the Jacobian at the given inputs that are left out;
            they are zero on both sides.
    """

    probe: Probe
    tolerance: Tolerance
    points: Sequence[Point]
    kinks: Sequence[Tensor]

    @classmethod
    def of(cls, probe: Probe, tolerance: Tolerance, first: Point, kinks: Sequence[Tensor]) -> Case:
        """With the other inputs at which the function can be run."""
        analytic, numeric = (
            [m.masked_fill(kink, 0) for kink, m in zip(kinks, side, strict=True)]
            for side in (first.analytic, first.numeric)
        )
        points = [Point(first.values, analytic, numeric, first.missing)]
        for values in probe.other_values():
            try:
                point = probe.point(values)
            except (RuntimeError, ValueError, ArithmeticError):  # not inputs of this function
                continue
            # No numbers are known there, or another kink is near: the steps tell.
            if point.finite and not _noisy(probe, tolerance, point):
                points.append(point)
        return cls(probe, tolerance, points, kinks)

    @property
    def smooth(self) -> Sequence[Point]:
        """The points at which no element is left out."""
        return self.points[1:] if any(bool(kink.any()) for kink in self.kinks) else self.points

    @property
    def bad(self) -> list[int]:
        """The inputs whose gradient is wrong."""
        first = self.points[0]
        return [
            i
            for i, (a, n) in enumerate(zip(first.analytic, first.numeric, strict=True))
            if not self.tolerance.fits(a, n)
        ]

    def everywhere(self, mended: Sequence[Tensor], i: int) -> bool:
        """Whether these, one for each point, are the right Jacobians of an input."""
        return all(
            self.tolerance.fits(matrix, point.numeric[i])
            for matrix, point in zip(mended, self.points, strict=True)
        )

    def analytic(self, i: int) -> list[Tensor]:
        return [point.analytic[i] for point in self.points]

    def numeric(self, i: int) -> list[Tensor]:
        return [point.numeric[i] for point in self.points]


def _noisy(probe: Probe, tolerance: Tolerance, point: Point) -> bool:
    probe.set(point.values)
    try:
        finer = probe.numeric(probe.eps / 2)
    finally:
        probe.restore()
    return any(not tolerance.fits(one, two) for one, two in zip(finer, point.numeric, strict=True))


def report_of(
    probe: Probe,
    options: Options,
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
