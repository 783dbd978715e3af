"""torchbp.functions.table: every row of csrc/gates.h is proved, and is what the binary computes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchbp
from tests.compare import assert_within_ulps
from tests.proofs import changed, prove
from torchbp import ROWS
from torchbp.functions.gate import GATES
from torchbp.functions.table import Row

ROOT = Path(__file__).parents[2]
GATES_H = ROOT / "csrc" / "gates.h"
UNARY = {name: row for name, row in ROWS.items() if len(row.inputs) == 1}
BINARY = {name: row for name, row in ROWS.items() if len(row.inputs) == 2}

# ---- the proof -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_row_is_proved(row: Row) -> None:
    prove(row)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (changed("exp", dx="dy"), "exp, column dx"),
        (changed("exp", dxx="0"), "exp, column dxx"),
        (changed("reciprocal", dx="dy * (y * y)"), "reciprocal, column dx"),
        (changed("scale", forward="x + a"), "scale, column dx"),
        (changed("relu", dx="dy"), "relu, column dx"),
        (changed("relu", dx="where(y < 0, 0, dy)"), "relu, column dx"),
        (
            changed("leaky_relu", dx="where(x > 0, negative_slope * dy, dy)"),
            "leaky_relu, column dx",
        ),
        (changed("elu", dx="where(x <= 0, dy * exp(x), dy)"), "elu, column dx"),
        (changed("elu", dxx="where(x <= 0, 0, dy * (alpha * exp(x)))"), "elu, column dxx"),
        (changed("sigmoid", dx="dy * (1 - y)"), "sigmoid, column dx"),
        (changed("sigmoid", forward="1 / (1 + exp(-abs(x)))"), "sigmoid, column dx"),
        (changed("tanh", dxx="2 * dy * y"), "tanh, column dxx"),
        (changed("add", db="-dy"), "add, column db"),
        (changed("multiply", da="dy * a", db="dy * b"), "multiply, column da"),
        (changed("multiply", dab="0"), "multiply, column dab"),
        (changed("multiply", dbb="dy"), "multiply, column dbb"),
        (changed("maximum", forward="where(a < b, a, b)"), "maximum, column da"),
        (changed("relu", forward="where(x < 1, 0, x)"), "is x < 1 true"),
    ],
)
def test_prover_refuses_a_wrong_row(row: Row, complaint: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        prove(row)


def test_prover_refuses_a_column_that_reads_what_is_not_saved() -> None:
    with pytest.raises(NameError, match="'x' is not defined"):
        prove(changed("tanh", dx="dy * (1 - tanh(x) * tanh(x))"))


def test_every_row_has_its_columns() -> None:
    for row in UNARY.values():
        assert set(row.columns) == {"forward", "dx", "dxx"}
    for row in BINARY.values():
        assert set(row.columns) == {"forward", "da", "db", "daa", "dab", "dbb"}


# ---- the text ------------------------------------------------------------------------------------


UNARY_FIELDS = ("name", "parameter", "forward", "saves", "dx", "dxx")
BINARY_FIELDS = ("name", "forward", "saves", "da", "db", "daa", "dab", "dbb")


def rows_of(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows in lines of C++: field -> text, spaced as the preprocessor's # spaces it."""
    rows = []
    for row in re.findall(r"^ *ROW\((.*)\) *\\?$", text, flags=re.MULTILINE):
        cells, depth = [""], 0
        for character in row:
            depth += (character == "(") - (character == ")")
            if character == "," and depth == 0:
                cells.append("")
            else:
                cells[-1] += character
        rows.append(dict(zip(fields, (" ".join(c.split()) for c in cells), strict=True)))
    return rows


def test_binary_was_compiled_from_this_gates_h() -> None:
    unary, binary = GATES_H.read_text().split("#define TORCHBP_BINARY_GATES")
    in_file = [
        *({"inputs": "x", **row} for row in rows_of(unary, UNARY_FIELDS)),
        *({"inputs": "a, b", "parameter": "none", **row} for row in rows_of(binary, BINARY_FIELDS)),
    ]
    assert torchbp._C.rows() == in_file, "stale binary: run make build"


def test_row_worked_through_in_contributing_is_proved() -> None:
    (row,) = rows_of((ROOT / "CONTRIBUTING.md").read_text(), UNARY_FIELDS)
    prove(Row.parse({"inputs": "x", **row}))


# ---- the numbers ---------------------------------------------------------------------------------

#: A value for each parameter that a row may have, none of them the default.
PARAMETERS = {"a": -1.7, "c": 0.3, "negative_slope": 0.1, "alpha": 1.3}

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-300, -1e-300, 30.0, -30.0, 800.0, -800.0]
NOT_FINITE = [torch.inf, -torch.inf, torch.nan]

#: How far, in ulps, a few float64 operations and two exponentials (1 ulp each) may lead two ways of
#: computing a column apart.
ULPS = 8


def samples(*more: float) -> Tensor:
    return torch.cat([torch.tensor([*SPECIAL, *more], dtype=torch.float64), torch.randn(200) * 3])


def test_every_column_can_be_evaluated_first_thing_in_a_process() -> None:
    code = """if True:
        import torch, torchbp
        one = torch.ones(3)
        names = dict(x=one, y=one, a=one, b=one, dy=one, c=1.0, negative_slope=0.1, alpha=1.0)
        for row in torchbp.ROWS.values():
            for column in row.columns:
                row.evaluate(column, **names)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def parameter_of(row: Row) -> tuple[float, ...]:
    return () if row.parameter is None else (PARAMETERS[row.parameter],)


def evaluate(row: Row, column: str, **values: Tensor) -> Tensor:
    """A column on tensors; one that is a number alone becomes a tensor too."""
    named: dict[str, Any] = {**values}
    if row.parameter is not None:
        named[row.parameter] = PARAMETERS[row.parameter]
    value = row.evaluate(column, **named)
    return torch.as_tensor(value, dtype=torch.float64).expand(next(iter(values.values())).shape)


def kernel(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.torchbp, name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("row", UNARY.values(), ids=UNARY)
def test_unary_row_is_what_the_kernels_compute(row: Row) -> None:
    x = samples(*NOT_FINITE)
    y = kernel(row.name)(x, *parameter_of(row))
    assert_within_ulps(y, evaluate(row, "forward", x=x), ULPS)
    dy = torch.randn_like(x)
    saved = {name: {"x": x, "y": y}[name] for name in row.saves}
    dx = kernel(f"{row.name}_backward")(dy, *saved.values(), *parameter_of(row))
    # 1 - y y of a y next to 1 is a rounding error, and one rounding less where it is fused.
    assert_within_ulps(dx, evaluate(row, "dx", dy=dy, **saved), ULPS, size=dy)


@pytest.mark.parametrize("row", UNARY.values(), ids=UNARY)
def test_unary_row_is_what_torch_computes(row: Row) -> None:
    x = samples(*NOT_FINITE).requires_grad_()
    twin = GATES[row.name].formula(x, *parameter_of(row))
    assert_within_ulps(evaluate(row, "forward", x=x).detach(), twin.detach(), ULPS)
    dy = torch.randn_like(x)
    (wanted,) = torch.autograd.grad(twin, x, dy, create_graph=True)
    # From torch's own y: of a y next to 1, sigmoid's 1 - y keeps only the rounding error.
    saved = {name: {"x": x, "y": twin}[name].detach() for name in row.saves}
    dx, wanted = evaluate(row, "dx", dy=dy, **saved), wanted.detach()
    if row.name == "elu":  # torch's own answer to NaN is NaN or dy, by the length of the tensor
        dx, wanted, dy = (value[~x.isnan()] for value in (dx, wanted, dy))
    assert_within_ulps(dx, wanted, ULPS, size=dy)


@pytest.mark.parametrize("row", UNARY.values(), ids=UNARY)
def test_second_order_of_a_unary_row_is_what_torch_computes(row: Row) -> None:
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    y = GATES[row.name].formula(x, *parameter_of(row))
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    # Of a constant local gradient, torch's dx may depend on x in name alone, or not at all.
    wanted = torch.zeros_like(x)
    if dx.requires_grad:
        (wanted,) = torch.autograd.grad(
            dx.sum(), x, allow_unused=True, materialize_grads=True, retain_graph=True
        )
    saved = {name: {"x": x, "y": y}[name].detach() for name in row.saves}
    second = evaluate(row, "dxx", dy=dy, **saved)
    if row.saves == ("y",):  # the column is d(dx)/dy: the chain rule leads on to x
        (local,) = torch.autograd.grad(y.sum(), x)
        second = second * local
    assert_within_ulps(second, wanted, ULPS, size=dy)


@pytest.mark.parametrize("row", BINARY.values(), ids=BINARY)
def test_binary_row_is_what_the_kernels_and_torch_compute(row: Row) -> None:
    # Every pair of special values, ties and NaN among them.
    special = torch.tensor([*SPECIAL[:8], *NOT_FINITE], dtype=torch.float64)
    a, b = (
        pair.reshape(-1).requires_grad_()
        for pair in torch.meshgrid(special, special, indexing="ij")
    )
    dy = torch.randn_like(a)
    y = evaluate(row, "forward", a=a, b=b).detach()
    torch.testing.assert_close(kernel(row.name)(a, b).detach(), y, rtol=0, atol=0, equal_nan=True)
    twin = GATES[row.name].formula(a, b)
    torch.testing.assert_close(twin.detach(), y, rtol=0, atol=0, equal_nan=True)

    rows = tuple(evaluate(row, column, dy=dy, a=a, b=b).detach() for column in ("da", "db"))
    of_torch = torch.autograd.grad(twin, (a, b), dy)
    torch.testing.assert_close(of_torch, rows, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        both = kernel(f"{row.name}_backward")(dy, a, b)
        single = tuple(kernel(f"{row.name}_backward_{which}")(dy, a, b) for which in "ab")
    torch.testing.assert_close(both, rows, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(single, rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("row", BINARY.values(), ids=BINARY)
def test_second_order_of_a_binary_row_is_what_torch_and_the_gate_compute(row: Row) -> None:
    a, b = torch.randn(2, 50, dtype=torch.float64).requires_grad_().unbind()
    dy = torch.randn(50, dtype=torch.float64, requires_grad=True)
    columns = {
        name: evaluate(row, name, dy=dy, a=a, b=b).detach() for name in ("daa", "dab", "dbb")
    }
    for function in (GATES[row.name].formula, GATES[row.name].apply):
        da, db = torch.autograd.grad(function(a, b), (a, b), dy, create_graph=True)
        for first, names in ((da, ("daa", "dab")), (db, ("dab", "dbb"))):
            seconds = torch.autograd.grad(
                first.sum(), (a, b), allow_unused=True, materialize_grads=True, retain_graph=True
            )
            for second, name in zip(seconds, names, strict=True):
                torch.testing.assert_close(second, columns[name], rtol=0, atol=0)
