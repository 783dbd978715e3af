"""Fuzzing: whatever is passed, torchbp does what its torch twin does, or says what it wants.

Hypothesis draws calls with any shapes, dtypes, strides and options. Either both succeed and agree, in
values, shape, dtype and gradients; or torchbp raises TypeError, ValueError or IndexError. It may refuse
what torch takes only where its documentation says so (another dtype, a parameter that is no number, a
vector for linear's weight), and it never takes what torch refuses.
"""

# ruff: noqa: E501
from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchbp.functional as F
from tests.layouts import LAYOUTS, broadcast_pairs, laid_out, normal, seeds, shapes, sizes

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ANY_DTYPE = (*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64)
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

floats = st.sampled_from(FLOATS)
Draw = Callable[[Any], Any]
#: mostly one dtype for all tensors of a call, sometimes each its own
dtypes_of_a_call = st.one_of(floats, floats, floats, st.none())
layouts = st.sampled_from(["plain", *LAYOUTS])


def tensor(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """A tensor of random strides; `dtype` None: of a random dtype."""
    values = normal(draw(seeds), dtype or draw(st.sampled_from(ANY_DTYPE)))
    return laid_out(draw(layouts), shape, values)


def leaves(inputs: list[Any], requires_grad: bool) -> list[Any]:
    """The inputs as separate leaves of the same strides."""
    return [
        value.detach().requires_grad_(requires_grad and value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for value in inputs
    ]


def run(function: Callable[..., Tensor], inputs: list[Any]) -> tuple[Tensor, list[Tensor | None]]:
    """(output, gradients)."""
    y = function(*inputs)
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    if not (tensors and y.requires_grad):
        return y.detach(), []
    return y.detach(), list(torch.autograd.grad(y, tensors, torch.ones_like(y), allow_unused=True))


Refuses = Callable[[list[Any]], bool]


def no_reason(inputs: list[Any]) -> bool:
    return False


def other_dtypes(inputs: list[Any]) -> bool:
    """Documented: all tensors of one floating dtype."""
    dtypes = {value.dtype for value in inputs if isinstance(value, Tensor)}
    return len(dtypes) > 1 or not dtypes <= set(FLOATS)


def check(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: list[Any],
    requires_grad: bool,
    may_refuse: Refuses = no_reason,
) -> None:
    mine = wanted = error = complaint = None
    try:
        mine = run(ours, leaves(inputs, requires_grad))
    except (TypeError, ValueError, IndexError) as e:
        error = e
    try:
        wanted = run(theirs, leaves(inputs, requires_grad))
    except Exception as e:
        complaint = e
    if mine is None:
        assert re.search(" wants? | has no gradient", str(error)), error
        assert wanted is None or may_refuse(inputs), f"torch takes it; torchbp: {error}"
        return
    assert wanted is not None, f"torchbp takes it; torch: {complaint}"
    compare(*mine, *wanted)


def compare(y: Tensor, grads: Any, wanted: Tensor, wanted_grads: Any) -> None:
    """Equal to within a few roundings of the dtype."""
    # What torch rounds between its two operations, and sums in half precision, ours does not.
    rounding = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
    assert len(grads) == len(wanted_grads)
    for a, b in zip([y, *grads], [wanted, *wanted_grads], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            tolerance = rounding[a.dtype]
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


UNARY: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "exp": (F.exp, torch.exp),
    "reciprocal": (F.reciprocal, torch.reciprocal),
    "relu": (F.relu, torch.relu),
    "sigmoid": (F.sigmoid, torch.sigmoid),
    "tanh": (F.tanh, torch.tanh),
}
WITH_NUMBER: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "leaky_relu": (F.leaky_relu, TF.leaky_relu),
    "elu": (F.elu, TF.elu),
    "scale": (F.scale, lambda x, a: x * a),
    "shift": (F.shift, lambda x, c: x + c),
}
BINARY: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "add": (F.add, torch.add),
    "multiply": (F.multiply, torch.mul),
    "maximum": (F.maximum, torch.maximum),
}


@pytest.mark.parametrize(("ours", "theirs"), UNARY.values(), ids=UNARY)
@FUZZ
@given(data=st.data())
def test_unary(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], data: st.DataObject
) -> None:
    x = tensor(data.draw, data.draw(shapes), data.draw(dtypes_of_a_call))
    check(ours, theirs, [x], data.draw(st.booleans()), other_dtypes)


numbers = st.one_of(
    st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0, 3, 1]), st.sampled_from(["a", None, 1j, [1.0], True])
)


@pytest.mark.parametrize(("ours", "theirs"), WITH_NUMBER.values(), ids=WITH_NUMBER)
@FUZZ
@given(data=st.data())
def test_with_number(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], data: st.DataObject
) -> None:
    x = tensor(data.draw, data.draw(shapes), data.draw(dtypes_of_a_call))
    number = data.draw(numbers)

    def may_refuse(inputs: list[Any]) -> bool:
        return other_dtypes(inputs) or isinstance(number, str | bool | complex | list)

    check(ours, theirs, [x, number], data.draw(st.booleans()), may_refuse)


@pytest.mark.parametrize(("ours", "theirs"), BINARY.values(), ids=BINARY)
@FUZZ
@given(data=st.data())
def test_binary(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], data: st.DataObject
) -> None:
    dtype = data.draw(dtypes_of_a_call)
    inputs = [tensor(data.draw, shape, dtype) for shape in data.draw(broadcast_pairs())]
    check(ours, theirs, inputs, data.draw(st.booleans()), other_dtypes)


@FUZZ
@given(data=st.data())
def test_matmul(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(floats)
    a, b = draw(broadcast_pairs())
    n, d, m = draw(sizes), draw(sizes), draw(sizes)
    left, right = draw(
        st.sampled_from(
            [
                ((n, d), (d, m)),
                ((d,), (d, m)),
                ((n, d), (d,)),
                ((d,), (d,)),
                ((), (d,)),
                ((n, d), (n, d)),
            ]
        )
    )
    pair = [a[:2] * (len(left) > 1) + left, b[:2] * (len(right) > 1) + right]
    check(
        F.matmul,
        torch.matmul,
        [tensor(draw, shape, dtype) for shape in pair],
        draw(st.booleans()),
        other_dtypes,
    )


ACTIVATIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    None: lambda z: z, "relu": torch.relu, "leaky_relu": TF.leaky_relu, "elu": TF.elu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip


def wrong(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape`, or one time in eight another."""
    return draw(shapes) if draw(st.integers(0, 7)) == 0 else shape


@FUZZ
@given(data=st.data())
def test_linear(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes_of_a_call)
    size_in, size_out, activation = (
        draw(sizes),
        draw(sizes),
        draw(st.sampled_from(list(ACTIVATIONS))),
    )
    x = tensor(draw, wrong(draw, (*draw(shapes)[:3], size_in)), dtype)
    weight = tensor(draw, wrong(draw, (size_out, size_in)), dtype)
    bias = tensor(draw, wrong(draw, (size_out,)), dtype) if draw(st.booleans()) else None

    def may_refuse(inputs: list[Any]) -> bool:  # documented: weight [out, in], bias [out]
        return (
            other_dtypes(inputs)
            or weight.dim() != 2
            or (bias is not None and bias.shape != weight.shape[:1])
        )

    check(
        lambda x, weight, bias: F.linear(x, weight, bias, activation),
        lambda *inputs: ACTIVATIONS[activation](TF.linear(*inputs)),
        [x, weight, bias], draw(st.booleans()), may_refuse,
    )  # fmt: skip


@FUZZ
@given(data=st.data())
def test_mlp(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes_of_a_call)
    widths = draw(st.lists(sizes, min_size=2, max_size=4))
    layers = len(widths) - 1
    activation = draw(st.sampled_from([name for name in ACTIVATIONS if name]))
    x = tensor(draw, wrong(draw, (*draw(shapes)[:2], widths[0])), dtype)
    weights = [tensor(draw, wrong(draw, (widths[i + 1], widths[i])), dtype) for i in range(layers)]
    biases = [tensor(draw, wrong(draw, (widths[i + 1],)), dtype) for i in range(layers)]
    biases = biases if draw(st.booleans()) else []

    def theirs(x: Tensor, *parameters: Tensor) -> Tensor:
        for i in range(layers):
            bias = parameters[layers + i] if biases else None
            x = TF.linear(ACTIVATIONS[activation](x) if i else x, parameters[i], bias)
        return x

    def may_refuse(inputs: list[Any]) -> bool:
        return (
            other_dtypes(inputs)
            or any(weight.dim() != 2 for weight in weights)
            or any(b.shape != w.shape[:1] for b, w in zip(biases, weights, strict=False))
        )

    check(
        lambda x, *rest: F.mlp(x, rest[:layers], rest[layers:], activation),
        theirs, [x, *weights, *biases], draw(st.booleans()), may_refuse,
    )  # fmt: skip


@FUZZ
@given(data=st.data())
def test_maxout(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(floats)
    size_in, size_out, pieces = draw(sizes), draw(sizes), draw(sizes)
    x = tensor(draw, wrong(draw, (*draw(shapes)[:3], size_in)), dtype)
    weight = tensor(draw, wrong(draw, (pieces, size_out, size_in)), dtype)
    bias = tensor(draw, (pieces, size_out), dtype) if draw(st.booleans()) else None

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        p, out, _ = weight.shape
        z = TF.linear(x, weight.reshape(p * out, -1), None if bias is None else bias.reshape(-1))
        return z.unflatten(-1, (p, out)).max(-2).values

    # With no element in x W^T torch's reshape is ambiguous, its max undefined.
    def may_refuse(inputs: list[Any]) -> bool:
        return weight.dim() != 3 or 0 in weight.shape

    if weight.dim() == 3 and 0 in weight.shape[1:]:
        return
    # The backward of an empty batch has a test of its own, below.
    check(F.maxout, theirs, [x, weight, bias], draw(st.booleans()) and x.numel() > 0, may_refuse)


@FUZZ
@given(data=st.data())
def test_l2_penalty(data: st.DataObject) -> None:
    dtype = data.draw(floats)
    parts = [
        tensor(data.draw, shape, dtype)
        for shape in data.draw(st.lists(shapes, min_size=1, max_size=4))
    ]
    check(
        lambda *parts: F.l2_penalty(parts),
        lambda *parts: torch.stack([part.double().square().sum() for part in parts]).sum().to(dtype),
        parts, data.draw(st.booleans()),
    )  # fmt: skip


@FUZZ
@given(data=st.data())
def test_cross_entropy(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(floats)
    classes, rows = draw(st.sampled_from([1, 2, 3, 5])), draw(sizes)
    rest = draw(st.sampled_from([(), (), (2,), (3, 1), (0,)]))
    shape = (classes,) if draw(st.integers(0, 5)) == 0 else (rows, classes, *rest)
    shape = wrong(draw, shape)
    if not shape or (0 in shape[:1] + shape[1:2] and classes_of(shape) == 0):
        return  # no classes: has a test of its own
    input = tensor(draw, shape, dtype)
    of_rows = shape[:-1] if len(shape) == 1 else shape[:1] + shape[2:]
    ignore_index = draw(st.sampled_from([-100, -100, 0, 1, -1, 7]))
    as_probabilities = draw(st.integers(0, 2)) == 0
    if as_probabilities:
        target = tensor(draw, wrong(draw, shape), dtype)
        ignore_index = -100  # torch refuses any other with probabilities
    else:
        allowed = [
            *range(max(1, classes_of(shape))),
            *([ignore_index] * 2),
            *([99] * (draw(st.integers(0, 9)) == 0)),
        ]
        values = draw(
            st.lists(
                st.sampled_from(allowed), min_size=math.prod(of_rows), max_size=math.prod(of_rows)
            )
        )
        target = torch.tensor(values, dtype=torch.int64).reshape(of_rows)
    weight = (
        tensor(draw, wrong(draw, (classes_of(shape),)), dtype).abs()
        if draw(st.booleans())
        else None
    )
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }

    def theirs(input: Tensor) -> Tensor:  # half types in float32, as ours are
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        given: list[Any] = [
            t if t is None or t.dtype == torch.int64 else t.to(wide) for t in (target, weight)
        ]
        return TF.cross_entropy(input.to(wide), *given, **options).to(dtype)

    check(
        lambda input: F.cross_entropy(input, target, weight, **options),
        theirs, [input], draw(st.booleans()),
        lambda inputs: target.shape != (shape if as_probabilities else of_rows),
    )  # fmt: skip


def classes_of(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


# ---- corners that hypothesis rarely draws -------------------------------------------------------


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def maxout(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...i,poi->...po", x, weight).max(-2).values


CE, TCE = F.cross_entropy, TF.cross_entropy
CORNERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Any]]] = {
    "no rows, mean": (CE, TCE, [zeros(0, 3), index()]),
    "no rows of probabilities": (CE, TCE, [zeros(0, 3), zeros(0, 3)]),
    "all ignored": (CE, TCE, [zeros(2, 3), index(-100, -100)]),
    "one class": (CE, TCE, [zeros(2, 1), index(0, 0)]),
    "no pixels": (CE, TCE, [zeros(2, 3, 0), zeros(2, 0, dtype=torch.int64)]),
    "no classes, all ignored": (CE, TCE, [zeros(2, 0), index(-100, -100)]),
    "no classes, image": (
        CE, TCE, [zeros(2, 0, 3), zeros(2, 0, 3)]),
    "no features": (F.linear, TF.linear, [zeros(2, 0), zeros(4, 0), torch.ones(4)]),
    "no outputs": (F.linear, TF.linear, [zeros(2, 3), zeros(0, 3), zeros(0)]),
    "16 dimensions": (F.add, torch.add, [zeros(*[1, 2] * 8), zeros(*[2, 1] * 8)]),
    "large broadcast": (F.multiply, torch.mul, [torch.ones(1).expand(3, 10**6), torch.rand(3, 1)]),
    "negative bit": (F.multiply, torch.mul, [torch.complex(torch.rand(3), torch.rand(3)).conj().imag, torch.rand(3)]),
    "negative bit of a row": (F.linear, TF.linear, [torch.complex(torch.rand(2, 3), torch.rand(2, 3)).conj().imag] * 2),
    "parameters": (F.linear, TF.linear, [torch.rand(2, 3), torch.nn.Parameter(torch.rand(4, 3))]),
    "the same twice": (F.multiply, torch.mul, [x := torch.rand(3), x]),
    "maxout of no rows": (F.maxout, maxout, [zeros(0, 3), torch.ones(2, 4, 3)]),
    "maxout of no columns": (F.maxout, maxout, [zeros(2, 3), torch.ones(2, 0, 3)]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "inputs"),
    [pytest.param(*row, id=name) for name, row in CORNERS.items()],
)
def test_corners(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Any]
) -> None:
    check(ours, theirs, inputs, False)
    check(ours, theirs, inputs, True)
    with torch.no_grad():
        check(ours, theirs, inputs, True)
    with torch.inference_mode():
        check(ours, theirs, [t.clone() for t in inputs], False)


def test_no_classes_of_probabilities() -> None:
    """In a process of its own, as it may end it."""
    code = "import torch, torchbp; torchbp.functional.cross_entropy(torch.zeros(2, 0), torch.zeros(2, 0))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_ignore_index_of_probabilities() -> None:
    input, target = torch.rand(2, 3), torch.rand(2, 3)
    with pytest.raises(RuntimeError, match="ignore_index"):
        TCE(input, target, ignore_index=1)
    with pytest.raises(ValueError, match=r"^cross_entropy: ignore_index"):
        CE(input, target, ignore_index=1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_matmul_of_other_dtypes(dtype: torch.dtype) -> None:
    for shape in ((2, 2), (0, 2, 2)):
        with pytest.raises(TypeError, match=r"^matmul: x wants dtype float64"):
            F.matmul(zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype))


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, True), "sigmoid": (F.sigmoid, True), "tanh": (F.tanh, True),
    "exp": (F.exp, True), "elu": (F.elu, False), "leaky_relu": (F.leaky_relu, False),
    "multiply": (lambda x: F.multiply(x, x), False),
    "maximum": (lambda x: F.maximum(x, 1 - x), False),
    "matmul": (lambda x: F.matmul(x, torch.ones(3, 2, requires_grad=True)), False),
    "linear": (lambda x: F.linear(x, torch.ones(2, 3, requires_grad=True)), False),
    "linear relu": (lambda x: F.linear(x, torch.ones(2, 3), activation="relu"), True),
    "maxout": (lambda x: F.maxout(x, torch.ones(2, 2, 3, requires_grad=True)), False),
    "mlp": (lambda x: F.mlp(x, [torch.ones(2, 3, requires_grad=True)]), False),
    "cross_entropy": (lambda x: CE(x, index(0, 1)), False),
    "l2_penalty": (F.l2_penalty, False),
}  # fmt: skip


@pytest.mark.parametrize(("function", "of_output"), IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_saved_may_not_be_changed(
    function: Callable[[Tensor], Tensor], of_output: bool
) -> None:
    x = torch.rand(2, 3, requires_grad=True) * 1
    y = function(x)
    with torch.no_grad():
        (y if of_output else x).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_subclass_stays() -> None:
    class Tagged(Tensor):
        pass

    x = torch.rand(2, 3).as_subclass(Tagged)
    for y in (F.relu(x), F.add(x, x), F.linear(x, x), F.matmul(x, x.mT)):
        assert type(y) is Tagged
