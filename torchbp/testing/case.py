"""What a hypothesis is tested on: a function whose gradient is wrong, at several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .probe import Point, Probe

__all__ = ["Case", "Tolerance"]


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
class Case:
    """A function, both Jacobians at the given inputs and at others, and where they differ.

    Attributes:
        points: the given inputs first; at each both Jacobians are finite.
        kinks: of each input the elements of the Jacobian at the given inputs that are left out.
    """

    probe: Probe
    tolerance: Tolerance
    points: Sequence[Point]
    kinks: Sequence[Tensor]

    @classmethod
    def of(cls, probe: Probe, tolerance: Tolerance, first: Point, kinks: Sequence[Tensor]) -> Case:
        """With the other inputs at which the function can be run."""
        analytic = [
            torch.where(kink, n, a)
            for kink, a, n in zip(kinks, first.analytic, first.numeric, strict=True)
        ]
        points = [Point(first.values, analytic, first.numeric, first.missing)]
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
