"""What proves a derivative: a row of the table against SymPy, an operation against differences.

A row's columns are text: SymPy differentiates the forward column, and the gradient columns have to
be equal to what it gives, for all numbers at once. What is not a row is compared with central
differences, each element of its Jacobian alone, and so is its gradient's own Jacobian.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from tests.ops import CASES, Case
from torchbp.functions.table import ROWS, Row

__all__ = [
    "MODES", "NOT_COMPARABLE", "SMALL", "TOLERANCE", "Compared", "Equation", "Side", "changed",
    "compare", "compare_case", "equations", "prove",
]  # fmt: skip

# ---- rows ----------------------------------------------------------------------------------------

x, y, a, b, dy = sympy.symbols("x y a b dy", real=True)
p = sympy.Symbol("p", positive=True)

Side = Mapping[sympy.Symbol, Any]

#: The sides of every kink: where the inputs stand to 0, or to each other. On one of them every
#: comparison of a row is decided; a row with another kink needs another side here.
SIDES: dict[int, list[Side]] = {1: [{x: p}, {x: -p}], 2: [{a: b + p}, {a: b - p}]}


@dataclass(frozen=True)
class Equation:
    """What a column is on one side of every kink, and what it should be."""

    row: str
    column: str
    side: Side
    got: Any
    wanted: Any

    @property
    def holds(self) -> bool:
        return bool(sympy.simplify(self.got - self.wanted) == 0)

    def __str__(self) -> str:
        relation = "=" if self.holds else "!="
        where = f"{self.row}, column {self.column}, where {self.side}"
        return f"{where}: {self.got} {relation} {self.wanted}"


def sympy_words(side: Side) -> dict[str, Callable[..., Any]]:
    """What the words of a row mean on symbols that stay on one side of every kink."""

    def decide(condition: Any) -> bool:
        decided = sympy.sympify(condition).subs(side)
        assert decided in (sympy.true, sympy.false), f"is {condition} true where {side}?"
        return bool(decided)

    return {
        "where": lambda condition, yes, no: yes if decide(condition) else no,
        "abs": lambda value: value if decide(value >= 0) else -value,
        "exp": sympy.exp,
        "expm1": lambda value: sympy.exp(value) - 1,
        "tanh": sympy.tanh,
        "isnan": lambda value: sympy.false,
    }


def equations(row: Row) -> Iterator[Equation]:
    """What makes a row right: each gradient column is dy times the derivative of the forward
    column, each second-order column the derivative of a gradient column by a saved tensor.

    A column is given nothing but what the row saves, so that it cannot read anything else.

    Raises:
        AssertionError: a comparison of the row has another kink than those of `SIDES`.
        NameError: a column reads what is not saved.
    """
    inputs = {"x": x} if row.inputs == ("x",) else {"a": a, "b": b}
    parameter = {} if row.parameter is None else {row.parameter: sympy.Symbol("k", real=True)}
    saved = {name: {**inputs, "y": y}[name] for name in row.saves}
    for side in SIDES[len(inputs)]:
        words = sympy_words(side)
        forward = sympy.sympify(row.evaluate("forward", words=words, **inputs, **parameter))
        # Where a column asks about y, the answer is that of the forward column.
        words = sympy_words({**side, y: forward.subs(side)})

        def column(name: str, words: Any = words) -> Any:
            return sympy.sympify(row.evaluate(name, words=words, dy=dy, **saved, **parameter))

        for name, symbol in inputs.items():
            first = column(f"d{name}")
            wanted = dy * sympy.diff(forward, symbol)
            yield Equation(row.name, f"d{name}", side, first.subs(y, forward), wanted)
            for with_respect_to in inputs:
                of = saved.get("y", saved.get(with_respect_to))
                wanted = 0 if of is None else sympy.diff(first, of)
                # d(da)/db and d(db)/da are one column.
                second = "d" + "".join(sorted(name + with_respect_to))
                yield Equation(row.name, second, side, column(second), wanted)


def prove(row: Row) -> None:
    """Assert all `equations` of a row."""
    for equation in equations(row):
        assert equation.holds, str(equation)


def changed(name: str, **columns: str) -> Row:
    """A copy of a row of the table with other columns."""
    row = ROWS[name]
    saves = {(): "nothing", row.inputs: "inputs"}.get(row.saves, *row.saves[:1])
    about = {"name": name, "inputs": ", ".join(row.inputs), "saves": saves}
    return Row.parse({**about, "parameter": row.parameter or "none", **row.columns, **columns})


# ---- operations ----------------------------------------------------------------------------------

#: The largest difference from central differences, relative to numbers above 1. Those are good to
#: about 1e-9, as they take 1e-6 steps; PyTorch's own tolerances, 1e-5 and 1e-3, let an error of a
#: thousandth pass.
TOLERANCE = 1e-6

#: Central differences take no time where no input has more of any dimension.
SMALL = [case for case in CASES if max((0, *(n for i in case.inputs for n in i.shape))) <= 6]

#: A call that cannot be compared -> why.
NOT_COMPARABLE = {"cross_entropy-no rows mean": "the mean of no rows is NaN, as in PyTorch"}

#: What is checked -> torch's check and what it is told. Each is slow mode, the whole Jacobian; the
#: batched checks compare vmap with one call after another.
MODES: Mapping[str, tuple[Callable[..., bool], Mapping[str, bool]]] = {
    "gradcheck": (torch.autograd.gradcheck, {"check_batched_grad": True}),
    "forward mode": (
        torch.autograd.gradcheck,
        {
            "check_backward_ad": False,
            "check_forward_ad": True,
            "check_batched_forward_grad": True,
        },
    ),
    "gradgradcheck": (torch.autograd.gradgradcheck, {"check_batched_grad": True}),
    "forward over backward": (
        torch.autograd.gradgradcheck,
        {
            "check_rev_over_rev": False,
            "check_fwd_over_rev": True,
            "check_undefined_grad": False,  # which is of the other direction
        },
    ),
}


@dataclass
class Compared:
    """What a check has compared.

    Attributes:
        elements: the elements of the Jacobians.
        worst: the largest difference, relative to numbers above 1.
    """

    elements: int = 0
    worst: float = 0.0


@contextmanager
def watched() -> Iterator[Compared]:
    """Look on while torch's slow mode compares Jacobians."""
    module: Any = importlib.import_module("torch.autograd.gradcheck")  # the name is the function's
    real, seen = module._allclose_with_type_promotion, Compared()

    def look(analytic: Tensor, numeric: Tensor, rtol: float, atol: float) -> bool:
        seen.elements += numeric.numel()
        if numeric.numel():
            error = (analytic - numeric).abs() / numeric.abs().clamp(min=1)
            seen.worst = max(seen.worst, error.max().item())
        return bool(real(analytic, numeric, rtol, atol))

    module._allclose_with_type_promotion = look
    try:
        yield seen
    finally:
        module._allclose_with_type_promotion = real


def compare(function: Callable[..., Any], inputs: Sequence[Tensor], mode: str) -> Compared:
    """Run one of `MODES` on a function of float64 tensors.

    Raises:
        torch.autograd.gradcheck.GradcheckError: a derivative is wrong, or not there.
        AssertionError: not each element of the Jacobian was compared.
    """
    check, options = MODES[mode]
    variables = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    least = function(*variables).numel() * sum(tensor.numel() for tensor in inputs)
    with watched() as seen:
        check(function, variables, fast_mode=False, atol=TOLERANCE, rtol=TOLERANCE, **options)
    assert seen.elements >= least, f"compared {seen.elements:,} of {least:,} elements"
    return seen


def compare_case(case: Case, mode: str) -> Compared:
    """`compare` for a call of the table of operations."""
    ours, _, inputs = case.split()
    return compare(ours, inputs, mode)
