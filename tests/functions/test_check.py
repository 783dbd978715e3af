"""Bad input: functions and Functions raise what Python users expect, and say what they want.

A message reads `OP: ARGUMENT wants ..., got ...`. No RuntimeError, KeyError or AttributeError
escapes, whether the call is recorded for backward, not recorded, or compiled.
"""
# ruff: noqa: E501  (tables: one row a line)

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import torchbp.functional as F
from tests.compare import assert_same
from torchbp import functions
from torchbp.functions import check
from torchbp.functions.products import ACTIVATIONS

INT = torch.int64


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


#: Good arguments, of which each row of the tables below replaces one.
GOOD: dict[str, dict[str, Any]] = {
    **{name: {"x": ones(2, 3)} for name in ("exp", "reciprocal", "relu", "sigmoid", "tanh")},
    "leaky_relu": {"x": ones(2, 3), "negative_slope": 0.1},
    "elu": {"x": ones(2, 3), "alpha": 1.0},
    "scale": {"x": ones(2, 3), "a": 2.0},
    "shift": {"x": ones(2, 3), "c": 2.0},
    **{name: {"a": ones(2, 3), "b": ones(3)} for name in ("add", "multiply", "maximum")},
    "matmul": {"x": ones(2, 3), "w": ones(3, 4)},
    "linear": {"x": ones(2, 3), "weight": ones(4, 3), "bias": ones(4), "activation": "relu"},
    "maxout": {"x": ones(2, 3), "weight": ones(2, 4, 3), "bias": ones(2, 4)},
    "mlp": {
        "x": ones(2, 3), "weights": [ones(4, 3), ones(5, 4)], "biases": [ones(4), ones(5)],
        "activation": "elu",
    },
    "cross_entropy": {
        "input": ones(2, 3), "target": torch.tensor([0, 2]), "weight": ones(3),
        "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1,
    },
    "l2_penalty": {"tensors": [ones(2, 3), ones(4)]},
}  # fmt: skip

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": functions.Exp.apply,
    "reciprocal": functions.Reciprocal.apply,
    "relu": functions.ReLU.apply,
    "sigmoid": functions.Sigmoid.apply,
    "tanh": functions.Tanh.apply,
    "leaky_relu": functions.LeakyReLU.apply,
    "elu": functions.ELU.apply,
    "scale": functions.Scale.apply,
    "shift": functions.Shift.apply,
    "add": functions.Add.apply,
    "multiply": functions.Multiply.apply,
    "maximum": functions.Maximum.apply,
    "matmul": functions.MatMul.apply,
    "linear": functions.Linear.apply,
    "maxout": functions.Maxout.apply,
    "mlp": lambda x, weights, biases, activation: functions.MLP.apply(
        x, len(weights), activation, *weights, *biases
    ),
    "cross_entropy": functions.SoftmaxCE.apply,
    "l2_penalty": lambda tensors: functions.L2Penalty.apply(*tensors),
}


@dataclass(frozen=True, eq=False)
class Bad:
    """One bad call: `OP` with one argument replaced by a `value` has to raise `error`."""

    op: str
    argument: str
    value: Any
    error: type[Exception]
    #: what follows "OP: ", as a regular expression
    message: str
    label: str
    #: also through Function.apply: False where torch.nn.functional's own rules are meant
    apply: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.label}"

    def arguments(self) -> dict[str, Any]:
        good = GOOD[self.op]
        name, _, index = self.argument.rstrip("]").partition("[")
        value = self.value
        if index:
            value = list(good[name])
            value[int(index)] = self.value
        return {**good, name: value}


NOT_TAKEN = (torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)


def of_tensors() -> list[Bad]:
    """What no tensor argument takes, for every one of them."""
    rows: list[Bad] = []
    dtypes = "wants dtype float64, float32, bfloat16 or float16, got"
    classes = re.escape("wants class indices (int64) or class probabilities (float32), got")
    for op, good in GOOD.items():
        first = next(iter(good))
        for name, value in good.items():
            tensors = {name: value} if isinstance(value, Tensor) else {}
            if isinstance(value, list):
                tensors = {f"{name}[{i}]": part for i, part in enumerate(value)}
                first = "tensors[0]" if op == "l2_penalty" else first
            for argument, tensor in tensors.items():
                who = re.escape(argument)
                optional = argument == "bias" or (op, argument) == ("cross_entropy", "weight")
                values: list[tuple[str, Any, type[Exception], str]] = [
                    ("list", [1.0], TypeError, "wants a torch.Tensor, got list$"),
                    ("number", 1.0, TypeError, "wants a torch.Tensor, got float$"),
                    ("sparse", tensor.to_sparse(), ValueError, "wants a dense tensor, got layout"),
                    (
                        "nested",
                        nested(tensor),
                        ValueError,
                        "wants a dense tensor, got a nested one$",
                    ),
                ]
                if not optional:
                    values.append(("None", None, TypeError, "wants a torch.Tensor, got NoneType$"))
                for dtype in NOT_TAKEN:
                    name = str(dtype)[6:]
                    if argument != "target":
                        values.append((name, tensor.to(dtype), TypeError, f"{dtypes} {name}$"))
                    elif not dtype.is_floating_point:
                        values.append((name, tensor.to(dtype), TypeError, f"{classes} {name}$"))
                if argument != first:
                    text = f"wants the device of {re.escape(first)}, cpu, got meta$"
                    values.append(("meta", tensor.to("meta"), ValueError, text))
                if argument not in (first, "target"):
                    text = f"wants the dtype of {re.escape(first)}, float32, got float64$"
                    values.append(("float64", tensor.double(), TypeError, text))
                rows += [
                    Bad(op, argument, value, error, f"{who} {text}", label)
                    for label, value, error, text in values
                ]
    return rows


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor])


NUMBERS = [
    ("leaky_relu", "negative_slope"), ("elu", "alpha"), ("scale", "a"), ("shift", "c"),
    ("cross_entropy", "label_smoothing"),
]  # fmt: skip


def of_numbers() -> list[Bad]:
    rows = []
    for op, name in NUMBERS:
        for label, value, got in (
            ("str", "a", "str"), ("None", None, "NoneType"), ("complex", 1j, "complex"),
            ("bool", True, "bool"), ("tensor", ones(), "Tensor"), ("list", [1.0], "list"),
        ):  # fmt: skip
            rows.append(Bad(op, name, value, TypeError, f"{name} wants a number, got {got}", label))
        text = f"{name} wants a number within float64"
        rows.append(Bad(op, name, 10**400, ValueError, text, "too large"))
    return rows


def bad(
    op: str, argument: str, value: Any, error: type[Exception], message: str, apply: bool = True
) -> Bad:
    label = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:30]
    return Bad(op, argument, value, error, re.escape(message), label, apply=apply)


OF_SHAPES = [
    *(
        bad(op, "b", ones(*shape), ValueError, f"a and b want shapes that broadcast, got (2, 3) and {shape}")
        for op in ("add", "multiply", "maximum")
        for shape in ((2,), (0,), (3, 3), (2, 1, 4))
    ),
    bad("matmul", "w", ones(2, 3), ValueError, "x and w want shapes (..., N, D) and (..., D, M), got (2, 3) and (2, 3)"),
    bad("matmul", "w", ones(), ValueError, "x and w want shapes (..., N, D) and (..., D, M), got (2, 3) and ()"),
    bad("matmul", "w", ones(4), ValueError, "x and w want shapes (..., N, D) and (..., D, M), got (2, 3) and (4,)", apply=False),
    bad("matmul", "x", ones(4), ValueError, "x and w want shapes (..., N, D) and (..., D, M), got (4,) and (3, 4)", apply=False),
    bad("linear", "x", ones(), ValueError, "x wants shape (..., 3) for weight of shape (4, 3), got ()"),
    bad("linear", "x", ones(2, 4), ValueError, "x wants shape (..., 3) for weight of shape (4, 3), got (2, 4)"),
    bad("linear", "weight", ones(3), ValueError, "weight wants shape (out_features, in_features), got (3,)"),
    bad("linear", "weight", ones(1, 4, 3), ValueError, "weight wants shape (out_features, in_features), got (1, 4, 3)"),
    bad("linear", "bias", ones(3), ValueError, "bias wants shape (4,), got (3,)"),
    bad("linear", "bias", ones(1), ValueError, "bias wants shape (4,), got (1,)"),
    bad("linear", "bias", ones(), ValueError, "bias wants shape (4,), got ()"),
    bad("maxout", "x", ones(), ValueError, "x wants shape (..., 3) for weight of shape (2, 4, 3), got ()"),
    bad("maxout", "x", ones(3, 2), ValueError, "x wants shape (..., 3) for weight of shape (2, 4, 3), got (3, 2)"),
    bad("maxout", "weight", ones(4, 3), ValueError, "weight wants shape (pieces, out_features, in_features), got (4, 3)"),
    bad("maxout", "weight", ones(0, 4, 3), ValueError, "weight wants 1 to 256 pieces, got 0"),
    bad("maxout", "weight", ones(257, 4, 3), ValueError, "weight wants 1 to 256 pieces, got 257"),
    bad("maxout", "bias", ones(4, 2), ValueError, "bias wants shape (2, 4), got (4, 2)"),
    bad("maxout", "bias", ones(8), ValueError, "bias wants shape (2, 4), got (8,)"),
    bad("mlp", "x", ones(), ValueError, "x wants shape (..., 3) for weights[0] of shape (4, 3), got ()"),
    bad("mlp", "x", ones(2, 4), ValueError, "x wants shape (..., 3) for weights[0] of shape (4, 3), got (2, 4)"),
    bad("mlp", "weights[0]", ones(4), ValueError, "weights[0] wants shape (out_features, in_features), got (4,)"),
    bad("mlp", "biases[1]", ones(4), ValueError, "biases[1] wants shape (5,), got (4,)"),
    bad("mlp", "weights", [], ValueError, "weights wants at least one matrix, got none"),
    bad("mlp", "biases", [ones(4)], ValueError, "biases wants none or 2 tensors, got 1"),
    bad("mlp", "biases", [ones(4), ones(5), ones(5)], ValueError, "biases wants none or 2 tensors, got 3"),
    bad("mlp", "weights", ones(4, 3), TypeError, "weights wants a list of torch.Tensor, got Tensor", apply=False),
    bad("mlp", "weights", None, TypeError, "weights wants a list of torch.Tensor, got NoneType", apply=False),
    bad("mlp", "biases", ones(2, 4), TypeError, "biases wants a list of torch.Tensor, got Tensor", apply=False),
    bad("l2_penalty", "tensors", [], ValueError, "tensors wants at least one tensor, got none"),
    bad("l2_penalty", "tensors", 1.0, TypeError, "tensors wants a list of torch.Tensor, got float", apply=False),
    bad("l2_penalty", "tensors", None, TypeError, "tensors wants a list of torch.Tensor, got NoneType", apply=False),
]  # fmt: skip

NAMES = "one of " + ", ".join(map(repr, ACTIVATIONS))
OF_NAMES = [
    *(
        row
        for op in ("linear", "mlp")
        for row in (
            bad(op, "activation", "reluu", ValueError, f"activation wants {NAMES}, got 'reluu'"),
            bad(op, "activation", "exp", ValueError, f"activation wants {NAMES}, got 'exp'"),
            bad(op, "activation", 1, TypeError, f"activation wants {NAMES}, got int"),
            bad(op, "activation", torch.relu, TypeError, f"activation wants {NAMES}, got builtin"),
            bad(op, "activation", ["relu"], TypeError, f"activation wants {NAMES}, got list"),
        )
    ),
    bad("cross_entropy", "reduction", "avg", ValueError, "reduction wants one of 'none', 'mean', 'sum', got 'avg'"),
    bad("cross_entropy", "reduction", None, TypeError, "reduction wants one of 'none', 'mean', 'sum', got NoneType"),
    bad("cross_entropy", "reduction", 1, TypeError, "reduction wants one of 'none', 'mean', 'sum', got int"),
]  # fmt: skip

OF_CROSS_ENTROPY = [
    bad("cross_entropy", "input", ones(), ValueError, "input wants shape (C,), (N, C) or (N, C, ...), got ()", apply=False),
    bad("cross_entropy", "input", ones(2, 3, 4), ValueError, "target wants shape (2, 4) as class indices for input of shape (2, 3, 4), got (2,)", apply=False),
    bad("cross_entropy", "target", torch.tensor(0), ValueError, "target wants shape (2,) as class indices for input of shape (2, 3), got ()", apply=False),
    bad("cross_entropy", "target", torch.zeros(3, dtype=INT), ValueError, "target wants shape (2,) as class indices for input of shape (2, 3), got (3,)", apply=False),
    bad("cross_entropy", "target", torch.zeros(2, 3, dtype=INT), ValueError, "target wants shape (2,) as class indices for input of shape (2, 3), got (2, 3)", apply=False),
    bad("cross_entropy", "target", ones(2), ValueError, "target wants shape (2, 3) as class probabilities for input of shape (2, 3), got (2,)", apply=False),
    bad("cross_entropy", "target", ones(3, 2), ValueError, "target wants shape (2, 3) as class probabilities for input of shape (2, 3), got (3, 2)", apply=False),
    bad("cross_entropy", "target", torch.zeros(3, dtype=INT), ValueError, "target wants shape (2,"),
    bad("cross_entropy", "target", ones(2), ValueError, "target wants shape (2, 3)"),
    bad("cross_entropy", "target", ones(2, 3).double(), TypeError, "target wants the dtype of input, float32, got float64"),
    bad("cross_entropy", "weight", ones(2), ValueError, "weight wants shape (3,), got (2,)"),
    bad("cross_entropy", "weight", ones(1, 3), ValueError, "weight wants shape (3,), got (1, 3)"),
    bad("cross_entropy", "weight", ones(), ValueError, "weight wants shape (3,), got ()"),
    bad("cross_entropy", "label_smoothing", 1.5, ValueError, "label_smoothing wants 0 to 1, got 1.5"),
    bad("cross_entropy", "label_smoothing", -0.1, ValueError, "label_smoothing wants 0 to 1, got -0.1"),
    bad("cross_entropy", "label_smoothing", torch.nan, ValueError, "label_smoothing wants 0 to 1, got nan"),
    bad("cross_entropy", "ignore_index", 1.0, TypeError, "ignore_index wants an int, got float"),
    bad("cross_entropy", "ignore_index", None, TypeError, "ignore_index wants an int, got NoneType"),
    bad("cross_entropy", "ignore_index", True, TypeError, "ignore_index wants an int, got bool"),
    bad("cross_entropy", "ignore_index", 2**70, ValueError, "ignore_index wants"),
]  # fmt: skip

ROWS = [*of_tensors(), *of_numbers(), *OF_SHAPES, *OF_NAMES, *OF_CROSS_ENTROPY]


def requiring_grad(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with the first tensor requiring grad."""
    name = next(iter(arguments))
    value = arguments[name]
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        if value[0].is_floating_point():
            value = [value[0].clone().requires_grad_(), *value[1:]]
    elif isinstance(value, Tensor) and value.is_floating_point():
        value = value.clone().requires_grad_()
    return {**arguments, name: value}


#: Products with a vector, which torchbp.functional lays out as a matrix.
VECTORS = [((), (3,)), ((3,), ()), ((3, 2), (3,)), ((2, 3), (2,)), ((2,), (3, 2)), ((3,), (2, 3)),
           ((3,), (2,))]  # fmt: skip


@pytest.mark.parametrize("shapes", VECTORS, ids=str)
def test_vectors_that_do_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """The message has the shapes as they were given."""
    x, w = map(torch.ones, shapes)
    wanted = "matmul: x and w want shapes (..., N, D) and (..., D, M), "
    with pytest.raises(ValueError, match=re.escape(f"{wanted}got {shapes[0]} and {shapes[1]}")):
        F.matmul(x, w)


HALF = ones(2, 3) / 2  # class probabilities

#: What a Function's own check refuses, where torchbp.functional or the kernel refuses it as well.
DIRECT: list[tuple[Callable[..., None], tuple[Any, ...], type[Exception], str]] = [
    (functions.Exp.check, (ones(2), 1.0), TypeError, "exp: wants x, got 2 arguments"),
    (functions.Scale.check, (ones(2), "a"), TypeError, "scale: a wants a number, got str"),
    (functions.L2Penalty.check, (ones(2), 1.0), TypeError, "wants a torch.Tensor, got float"),
    (check.tensors, ("op", "list", 1.0), TypeError, "op: list wants a list of torch.Tensor"),
    (check.tensors, ("op", "list", [ones(2).long()]), TypeError, r"op: list\[0\] wants dtype"),
    (check.tensors, ("op", "list", [ones(2), ones(2).half()]), TypeError, r"the dtype of list\[0\]"),
    (functions.MLP.check, (ones(2, 3), 1.0, "relu", ones(4, 3)), TypeError, "mlp: layers wants an"),
    (functions.MLP.check, (ones(2, 3), 2, "relu", ones(4, 3)), ValueError, "mlp: biases wants none"),
    (functions.MLP.check, (ones(2, 3).long(), 1, "relu", ones(4, 3)), TypeError, "mlp: x wants dtype"),
    (functions.MLP.check, (1.0, 1, "relu", ones(4, 3)), TypeError, "mlp: x wants a torch.Tensor"),
    (functions.MatMul.check, (ones(3), ones(3, 4)), ValueError, "matmul: x and w want shapes"),
    (functions.MatMul.check, (ones(2, 3), ones(3)), ValueError, "matmul: x and w want shapes"),
    (functions.MatMul.check, (ones(), ones(3, 4)), ValueError, "matmul: x and w want shapes"),
    (functions.MatMul.check, (ones(2, 2, 3), ones(5, 3, 4)), ValueError, "shapes that broadcast"),
    (functions.Maxout.check, (ones(2, 3), ones(0, 4, 3)), ValueError, "wants 1 to 256 pieces"),
    (functions.Maxout.check, (ones(2, 3), ones(257, 4, 3)), ValueError, "wants 1 to 256 pieces"),
    (functions.SoftmaxCE.check, (ones(2, 3, 4), HALF), ValueError, r"input wants shape \(N, C\)"),
    (functions.SoftmaxCE.check, (ones(2, 3), HALF, None, 0), ValueError, "got 0 with class prob"),
    (functions.SoftmaxCE.check, (ones(2, 3), HALF, None, 2**63), ValueError, "wants an int64"),
    (functions.SoftmaxCE.check, (ones(2, 3), HALF, None, -(2**63) - 1), ValueError, "an int64"),
    (functions.SoftmaxCE.check, (ones(2, 3), HALF, ones(3).requires_grad_()), ValueError,
     "weight has no gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "error", "message"), DIRECT)
def test_check_of_a_function(
    function: Callable[..., None], arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


INDICES = torch.tensor([0, 2])
WITHIN: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    (functions.MatMul.check, (ones(2, 3), ones(3, 4))),
    (functions.MatMul.check, (ones(2, 2, 3), ones(1, 3, 4))),
    (functions.Maxout.check, (ones(2, 3), ones(1, 4, 3))),
    (functions.Maxout.check, (ones(2, 3), ones(256, 4, 3))),
    (functions.MLP.check, (ones(2, 3), 1, "relu", ones(4, 3))),
    (functions.MLP.check, (ones(2, 3), 1, "relu", ones(4, 3), ones(4))),
    (functions.SoftmaxCE.check, (ones(2, 3), INDICES, ones(3), 2**63 - 1, "sum", 1.0)),
    (functions.SoftmaxCE.check, (ones(2, 3), INDICES, None, -(2**63), "none", 0.0)),
    (functions.SoftmaxCE.check, (ones(2, 3), HALF, ones(3), -1, "mean", 0.5)),
]


@pytest.mark.parametrize(("function", "arguments"), WITHIN)
def test_check_lets_pass(function: Callable[..., None], arguments: Any) -> None:
    """The last that is allowed."""
    function(*arguments)


def raises(row: Bad, call: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (its exact type is asserted below)
        call()
    assert type(caught.value) is row.error, f"{type(caught.value).__name__}: {caught.value}"
    assert re.match(f"{row.op}: {row.message}", str(caught.value)), caught.value


def each(rows: list[Bad]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=list(map(str, rows)))


@each(ROWS)
def test_functional(row: Bad) -> None:
    function = getattr(F, row.op)
    raises(row, lambda: function(**row.arguments()))
    raises(row, lambda: function(**requiring_grad(row.arguments())))


@each([row for row in ROWS if row.apply])
def test_apply(row: Bad) -> None:
    function = FUNCTIONS[row.op]
    raises(row, lambda: function(*row.arguments().values()))
    raises(row, lambda: function(*requiring_grad(row.arguments()).values()))


# One of a kind: compiling is slow.
COMPILED = [
    row for row in ROWS
    if row.label in ("list", "int32", "float64", "str")
    or (row.apply and row in (*OF_SHAPES, *OF_NAMES, *OF_CROSS_ENTROPY) and "(2," in row.message)
]  # fmt: skip


@each(COMPILED)
def test_compiled(row: Bad) -> None:
    torch._dynamo.reset()
    arguments = row.arguments()
    function = torch.compile(getattr(F, row.op), backend="eager")
    raises(row, lambda: function(**arguments))


CLASSES = [
    ([0, 3], -100, "got 3 at position 1"),
    ([-1, 0], -100, "got -1 at position 0"),
    ([-100, 0], 0, "got -100 at position 0"),
    ([7, 7], 2, "got 7 at position 0"),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("target", "ignore_index", "got"), CLASSES)
def test_class_index_out_of_range(
    target: list[int], ignore_index: int, got: str, requires_grad: bool
) -> None:
    input = torch.zeros(2, 3, requires_grad=requires_grad)
    text = rf"^cross_entropy: target wants class indices from 0 to 2 \(or ignore_index .*\), {got}$"
    for reduction in ("mean", "sum", "none"):
        with pytest.raises(IndexError, match=text):
            F.cross_entropy(
                input, torch.tensor(target), ignore_index=ignore_index, reduction=reduction
            )


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 2**40])
def test_ignored_class_may_be_out_of_range(ignore_index: int) -> None:
    input, target = torch.randn(3, 3), torch.tensor([0, ignore_index, 2])
    ours = F.cross_entropy(input, target, ignore_index=ignore_index)
    assert_same(ours, torch.nn.functional.cross_entropy(input[::2], target[::2]), 1e-6, 1e-6)


def test_weight_that_requires_grad() -> None:
    weight = torch.ones(3, requires_grad=True)
    for input in (torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)):
        with pytest.raises(ValueError, match=r"^cross_entropy: weight has no gradient"):
            F.cross_entropy(input, torch.tensor([0, 1]), weight)


def test_numbers_of_other_types_are_numbers() -> None:
    for value in (2, numpy.float32(2), numpy.int64(2), Fraction(2)):
        assert check.number("scale", "a", value) == 2.0
        assert torch.equal(F.scale(ones(3), value), 2 * ones(3))  # type: ignore[arg-type]
    check.integer("op", "n", numpy.int64(3))


@pytest.mark.parametrize(
    ("shapes", "broadcast"),
    [(((2, 3), (3,)), True), (((), (2, 0)), True), (((0,), (1,)), True), (((2, 1), (1, 0)), True),
     (((0,), (2,)), False), (((2, 3), (2,)), False), (((3, 2), (2, 2)), False)],
)  # fmt: skip
def test_broadcastable(shapes: tuple[tuple[int, ...], tuple[int, ...]], broadcast: bool) -> None:
    a, b = map(torch.empty, shapes)
    if broadcast:
        torch.broadcast_shapes(*shapes)
        check.broadcastable("add", "a", a, "b", b)
    else:
        with pytest.raises(RuntimeError):
            torch.broadcast_shapes(*shapes)
        with pytest.raises(ValueError, match=r"^add: a and b want shapes that broadcast"):
            check.broadcastable("add", "a", a, "b", b)
