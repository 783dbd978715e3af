"""Error analysis that runs: numbers that carry a bound on their rounding error.

A `Bounded` is a value in float64 and the most by which the same computation in a dtype, with its
operands rounded on the way, may differ from it. Each operation adds what its operands' errors
become and what it rounds itself: u |result| for one rounding, gamma_k = k u / (1 - k u) times the
product or sum of the absolute values for k of them in any order (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, chapters 2 and 3), and a few ulps for exp, expm1, tanh and log. A
comparison that the errors leave open takes both branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["WORDS", "Bounded", "Truth", "exact", "where"]

#: The most ulps by which the words of csrc/math.h are off.
ULPS = {"exp": 1.0, "expm1": 2.0, "tanh": 2.0, "log": 2.0}
#: In float64, where the reference is off as well.
ULPS_FLOAT64 = {"exp": 3.0, "expm1": 4.0, "tanh": 4.0, "log": 4.0}


def unit(dtype: torch.dtype) -> float:
    """What one rounding may change, relatively: in `dtype`, and in the float64 reference."""
    return torch.finfo(dtype).eps / 2 + 2.0**-53


def least(dtype: torch.dtype) -> float:
    """What it may change where the result is subnormal."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


@dataclass(frozen=True)
class Truth:
    """A comparison: whether it holds, and whether rounding errors cannot change that."""

    holds: Tensor
    sure: Tensor

    def __or__(self, other: Truth) -> Truth:
        sure = (self.sure & other.sure) | (self.holds & self.sure) | (other.holds & other.sure)
        return Truth(self.holds | other.holds, sure)


@dataclass(frozen=True)
class Bounded:
    """value +- error, of a computation in `dtype` (half types compute in float32).

    Attributes:
        value: what it is in float64.
        error: the most by which it may differ: of value's shape, or one that broadcasts to it.
        dtype: what it is kept in.
    """

    value: Tensor
    error: Tensor
    dtype: torch.dtype

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def mT(self) -> Bounded:
        return self._with(self.value.mT, self.error.mT)

    @property
    def most(self) -> Tensor:
        """The largest size that it can have."""
        return self.value.abs() + self.error

    def _with(self, value: Tensor, error: Tensor) -> Bounded:
        return Bounded(value, error, self.dtype)

    def _of(self, other: Bounded | float) -> Bounded:
        if isinstance(other, Bounded):
            return other
        value = torch.tensor(float(other), dtype=torch.float64)
        return self._with(value, torch.zeros_like(value))

    def rounded(self, dtype: torch.dtype | None = None, roundings: float = 1.0) -> Bounded:
        """After one rounding, or several, to a dtype: that which it computes in, if not given."""
        to = dtype or self.compute
        k = roundings * unit(to)
        error = self.error + k / (1 - k) * self.most + roundings * least(to)
        # What is exact stays so. In float64 any value looks exact: only whole ones are.
        kept = self.value.to(to).double() == self.value
        if to == torch.float64:
            kept &= self.value == self.value.round()
        return self._with(self.value, torch.where(kept & (self.error == 0), 0.0, error))

    def stored(self) -> Bounded:
        """As it is kept: rounded to the dtype; past its range anything may be there."""
        kept = self.rounded(self.dtype)
        past = kept.most > torch.finfo(self.dtype).max
        return self._with(kept.value, torch.where(past, torch.inf, kept.error))

    def __neg__(self) -> Bounded:
        return self._with(-self.value, self.error)

    def __abs__(self) -> Bounded:
        return self._with(self.value.abs(), self.error)

    def __add__(self, other: Bounded | float) -> Bounded:
        b = self._of(other)
        return self._with(self.value + b.value, self.error + b.error).rounded()

    def __sub__(self, other: Bounded | float) -> Bounded:
        return self + -self._of(other)

    def __mul__(self, other: Bounded | float) -> Bounded:
        b = self._of(other)
        error = self.value.abs() * b.error + self.error * b.most
        return self._with(self.value * b.value, error).rounded()

    def __truediv__(self, other: Bounded | float) -> Bounded:
        b = self._of(other)
        value = self.value / b.value
        error = (self.error + value.abs() * b.error) / (b.value.abs() - b.error).clamp(min=0)
        return self._with(value, error).rounded()

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: float) -> Bounded:
        return self._of(other) - self

    def __rtruediv__(self, other: float) -> Bounded:
        return self._of(other) / self

    def _compared(self, other: Bounded | float, compare: Callable[..., Tensor]) -> Truth:
        b = self._of(other)
        error = self.error + b.error
        sure = ((self.value - b.value).abs() > error) | (error == 0)
        return Truth(compare(self.value, b.value), sure)

    def __lt__(self, other: Bounded | float) -> Truth:
        return self._compared(other, torch.lt)

    def __le__(self, other: Bounded | float) -> Truth:
        return self._compared(other, torch.le)

    def __gt__(self, other: Bounded | float) -> Truth:
        return self._compared(other, torch.gt)

    def __ge__(self, other: Bounded | float) -> Truth:
        return self._compared(other, torch.ge)

    def __eq__(self, other: object) -> Truth:  # type: ignore[override]
        assert isinstance(other, (Bounded, float, int))
        return self._compared(other, torch.eq)

    __hash__ = None  # type: ignore[assignment]

    def word(self, name: str, value: Tensor, error: Tensor) -> Bounded:
        """A word of csrc/math.h of a number with this error."""
        ulps = (ULPS_FLOAT64 if self.dtype == torch.float64 else ULPS)[name]
        return self._with(value, error).rounded(roundings=2 * ulps)  # an ulp is up to 2 u

    def exp(self, flushed: bool = False) -> Bounded:
        """e^x; `flushed`: subnormal results may be 0."""
        y = self.value.exp()
        result = self.word("exp", y, y * self.error.expm1())
        lost = torch.finfo(self.compute).tiny if flushed else 0.0
        return self._with(y, result.error + lost)

    def expm1(self) -> Bounded:
        return self.word("expm1", self.value.expm1(), self.value.exp() * self.error.expm1())

    def tanh(self) -> Bounded:
        slope = 1 - (self.value.abs() - self.error).clamp(min=0).tanh().square()
        return self.word("tanh", self.value.tanh(), self.error * slope)

    def log(self) -> Bounded:
        return self.word("log", self.value.log(), -torch.log1p(-(self.error / self.value)))

    def matmul(self, other: Bounded) -> Bounded:
        """torch.matmul, its sums in any order."""
        most, of_other = self.most, other.most
        error = self.value.abs() @ other.error + self.error @ of_other
        k = self.value.shape[-1]
        rounding = k * unit(self.compute) / (1 - k * unit(self.compute))
        error = error + rounding * (most @ of_other) + k * least(self.compute)
        return self._with(self.value @ other.value, error)

    def sum(self, dims: tuple[int, ...], keepdim: bool = False) -> Bounded:
        """The sum over dimensions, in any order."""
        if not dims:
            return self
        value = self.value.sum(dims, keepdim)
        k = self.value.numel() // max(value.numel(), 1)
        rounding = k * unit(self.compute) / (1 - k * unit(self.compute))
        error = self.error + rounding * self.most * float(k > 1)
        return self._with(value, error.expand(self.shape).sum(dims, keepdim))

    def sum_to(self, shape: torch.Size) -> Bounded:
        """Summed over the dimensions along which an input of this shape was broadcast, and kept."""
        added = len(self.shape) - len(shape)
        dims = [
            d
            for d in range(len(self.shape))
            if d < added or (shape[d - added] == 1 and self.shape[d] != 1)
        ]
        if not dims:
            return self
        total = self.sum(tuple(dims), keepdim=True).stored()
        return total.reshape(*shape)

    def largest(self, dim: int) -> Bounded:
        """The maximum over a dimension."""
        low = (self.value - self.error).amax(dim)
        high = (self.value + self.error).amax(dim)
        value = self.value.amax(dim)
        return self._with(value, torch.maximum(high - value, value - low))

    def reshape(self, *shape: int) -> Bounded:
        return self._with(self.value.reshape(shape), self.error.expand(self.shape).reshape(shape))


def exact(value: Tensor, dtype: torch.dtype | None = None) -> Bounded:
    """A tensor of a dtype, as it is; or of a number that is converted to it."""
    given = Bounded(value.double(), torch.zeros_like(value, dtype=torch.float64), value.dtype)
    return given if dtype is None else Bounded(given.value, given.error, dtype).rounded()


def where(condition: Truth, a: Bounded | float, b: Bounded | float) -> Bounded:
    """One of two; either, where rounding errors may change which."""
    one = a if isinstance(a, Bounded) else b
    assert isinstance(one, Bounded)
    a, b = one._of(a), one._of(b)
    value = torch.where(condition.holds, a.value, b.value)
    own = torch.where(condition.holds, a.error, b.error)
    either = torch.maximum((a.value - value).abs() + a.error, (b.value - value).abs() + b.error)
    return Bounded(value, torch.where(condition.sure, own, either), one.dtype)


def isnan(x: Bounded) -> Truth:
    return Truth(x.value.isnan(), torch.ones_like(x.value, dtype=torch.bool))


#: The words of the table of gates, for `Row.evaluate`.
WORDS: Mapping[str, Callable[..., Any]] = {
    "where": where,
    "abs": abs,
    "exp": Bounded.exp,
    "expm1": Bounded.expm1,
    "tanh": Bounded.tanh,
    "isnan": isnan,
}
