"""torchbp.functional over the table of operations: every dtype, layout and special value against
PyTorch's own operations and their autograd.

Elementwise results are held to the ulp. Half types compute in float32, so that what they give is
the float64 result rounded once (0.5 ulp, and a little for what float32 lost). Products and
reductions are held to PyTorch's own error in the same dtype, measured against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isfinite

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import torchbp.functional as F
from tests.compare import assert_close_in_norm, assert_same, assert_within_ulps, ulps_off
from tests.ops import (
    CASES,
    DTYPES,
    OPS,
    Case,
    Input,
    Op,
    ce_case,
    classes,
    l2_penalty_case,
    linear_case,
    maxout_case,
    probabilities,
)

#: What an elementwise result may be off, in ulps of its dtype. float64 is compared with PyTorch's
#: float64 and not with the truth, so that there the errors of both add up.
ULPS = {torch.float64: 4, torch.float32: 3, torch.bfloat16: 0.51, torch.float16: 0.51}

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)
EACH_OP = pytest.mark.parametrize("op", OPS.values(), ids=str)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
ELEMENTWISE = pytest.mark.parametrize("op", [op for op in OPS.values() if op.elementwise], ids=str)
UNARY = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.elementwise and len(op.main_case.inputs) == 1], ids=str
)
BINARY = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.elementwise and len(op.main_case.inputs) == 2], ids=str
)


def leaves(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """The differentiable inputs, made to require grad (without a copy: the layout matters)."""
    return [inputs[i].detach_().requires_grad_() for i in case.differentiable]


def run(
    function: Callable[..., Tensor],
    case: Case,
    inputs: list[Tensor],
    upstream: Tensor | Callable[[Tensor], Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(output, gradients) for an upstream gradient, or for one made from the output."""
    inputs = [tensor.detach() for tensor in inputs]
    free = leaves(case, inputs)
    y = function(*inputs)
    dy = upstream(y) if callable(upstream) else upstream.to(y.dtype)
    return y.detach(), torch.autograd.grad(y, free, dy)


def widened(inputs: list[Tensor]) -> list[Tensor]:
    """The same numbers in float64."""
    return [t.double() if t.is_floating_point() else t for t in inputs]


def compare(case: Case, dtype: torch.dtype, inputs: list[Tensor], upstream: Tensor) -> None:
    """Forward and backward against PyTorch, with the tolerances that the docstring above gives."""
    y, grads = run(case.ours, case, inputs, upstream)
    torch_y, torch_grads = run(case.reference, case, inputs, upstream)
    exact_y, exact_grads = run(case.reference, case, widened(inputs), upstream.double())
    assert y.dtype == dtype
    if OPS[case.op].elementwise:
        assert_within_ulps(y, exact_y, ULPS[dtype])
    else:
        assert_close_in_norm(y, exact_y, torch_y)
    for ours, theirs, exact in zip(grads, torch_grads, exact_grads, strict=True):
        assert ours.dtype == dtype
        assert_close_in_norm(ours, exact, theirs)
        if OPS[case.op].elementwise and ours.shape == y.shape:
            size = upstream if OPS[case.op].cancels else None
            assert_within_ulps(ours, theirs, 4, size)


@EACH_DTYPE
@EACH_CASE
def test_forward_and_backward(case: Case, dtype: torch.dtype) -> None:
    inputs = case.make(dtype)
    upstream = torch.randn_like(case.reference(*inputs))
    compare(case, dtype, inputs, upstream)


# ---- layouts -------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    backwards = list(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


def sliced(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, and not from its beginning."""
    if x.dim() == 0:
        return x.new_empty(3).copy_(x)[1]
    storage = x.new_zeros([2 * size + 3 for size in x.shape])
    inside = storage[tuple(slice(3, None, 2) for _ in x.shape)]
    return inside.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """Stride 0 along the first dimension, which repeats its first element."""
    return x if x.dim() == 0 or x.shape[0] == 0 else x[:1].expand_as(x)


def offset(x: Tensor) -> Tensor:
    """Contiguous, but not aligned as an allocation is."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS = (transposed, sliced, expanded, offset)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@EACH_CASE
def test_layouts(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = [layout(tensor) for tensor in case.make()]
    plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
    y, grads = run(case.ours, case, inputs, torch.ones_like)
    wanted, wanted_grads = run(case.reference, case, plain, torch.ones_like)
    assert_same(y, wanted)
    assert_same(grads, wanted_grads)
    if OPS[case.op].elementwise and y.numel():  # PyTorch itself has several for empty ones
        theirs, _ = run(case.reference, case, inputs, torch.ones_like)
        assert y.stride() == theirs.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@EACH_CASE
def test_layouts_of_the_upstream_gradient(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = case.make()
    upstream = layout(torch.randn_like(case.reference(*inputs)))
    y, grads = run(case.ours, case, inputs, upstream)
    wanted, wanted_grads = run(case.reference, case, inputs, upstream)
    assert_same(y, wanted)
    assert_same(grads, wanted_grads)


@EACH_CASE
def test_backward_from_a_sum(case: Case) -> None:
    """.sum() sends a gradient of stride 0 upstream."""
    ours, reference, inputs = case.split()
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert_same(
        torch.autograd.grad(ours(*inputs).sum(), inputs),
        torch.autograd.grad(reference(*inputs).sum(), inputs),
    )


@ELEMENTWISE
def test_channels_last(op: Op) -> None:
    case = op.main_case
    inputs = [
        torch.rand(2, 3, 4, 5).add(0.1).to(memory_format=torch.channels_last) for _ in case.inputs
    ]
    y, grads = run(case.ours, case, inputs, torch.ones_like)
    wanted, wanted_grads = run(case.reference, case, inputs, torch.ones_like)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.stride() == wanted.stride()
    assert_same(y, wanted, 1e-6, 1e-6)
    assert_same(grads, wanted_grads, 1e-6, 1e-6)


@BINARY
def test_layouts_that_differ(op: Op) -> None:
    """Two layouts at once, one of them broadcast: the walk over shapes has to sort dimensions."""
    case = op.main_case
    a = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    for b in (
        torch.randn(5, 2, 3, 4, dtype=torch.float64).permute(3, 2, 1, 0),
        torch.randn(3, 1, 5, dtype=torch.float64),
        torch.randn(4, 1, 2, 1, dtype=torch.float64),
        torch.randn(4, 3, 2, 10, dtype=torch.float64)[..., ::2],
    ):
        for layout in (torch.clone, transposed, lambda x: x.to(memory_format=torch.channels_last)):
            inputs = [layout(a), b]
            y, grads = run(case.ours, case, inputs, lambda y: torch.cos(y))
            wanted, wanted_grads = run(case.reference, case, inputs, lambda y: torch.cos(y))
            assert_same(y, wanted)
            assert_same(grads, wanted_grads)


@EACH_CASE
def test_inputs_stay_as_they_were(case: Case) -> None:
    inputs = case.make()
    free = leaves(case, inputs)
    y = case.ours(*inputs)
    upstream = torch.randn_like(y)
    tensors = [*inputs, upstream]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    with torch.no_grad():
        case.ours(*inputs)
    kept = y.detach().clone()
    torch.autograd.grad(y, free, upstream, retain_graph=True)
    torch.autograd.grad(y, free, upstream, create_graph=True)
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version
    assert torch.equal(kept, y) or kept.isnan().any()


# ---- special values ------------------------------------------------------------------------------


def specials(dtype: torch.dtype) -> Tensor:
    """NaN, infinities, zeros of both signs, subnormals, huge, small and ordinary values."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    positive = [
        0.0, least, info.tiny / 2, info.tiny, 1e-4, 0.5, 1.0, 1.5, 10.0, 15.0, 19.0, 87.5, 88.8,
        89.5, 100.0, 103.5, 104.5, 700.0, 709.5, 745.5, 1e4, info.max / 3, info.max, torch.inf,
    ]  # fmt: skip
    values = torch.tensor([*positive, torch.nan], dtype=torch.float64)
    return torch.cat([values, -values]).to(dtype)


def check_specials(case: Case, inputs: list[Tensor], dy: Tensor) -> None:
    """As PyTorch has it in the same dtype, or right to the ulp (and what the rounding of a saved
    subnormal costs) where PyTorch is not: its float32 sigmoid underflows early, its half gradient
    of reciprocal overflows in between.
    """
    y, grads = run(case.ours, case, inputs, dy)
    torch_y, torch_grads = run(case.reference, case, inputs, dy)
    exact_y, exact_grads = run(case.reference, case, [t.double() for t in inputs], dy.double())
    sizes = [None] + [dy if OPS[case.op].cancels else None] * len(grads)
    for ours, theirs, exact, size in zip(
        (y, *grads), (torch_y, *torch_grads), (exact_y, *exact_grads), sizes, strict=True
    ):
        fine = (ulps_off(ours, theirs, size) <= 4) | (ulps_off(ours, exact, size) <= 2)
        assert bool(fine.all()), describe(ours, theirs, inputs, dy, fine)


def describe(ours: Tensor, theirs: Tensor, inputs: list[Tensor], dy: Tensor, fine: Tensor) -> str:
    """The first elements that are wrong."""
    lines = [
        f"inputs {[t.reshape(-1)[i].item() for t in inputs]}, dy {dy[i].item()}: "
        f"{ours[i].item()!r}, torch has {theirs[i].item()!r}"
        for i in (~fine).nonzero().flatten().tolist()
    ]
    return f"{len(lines)} differ:\n" + "\n".join(lines[:12])


#: The cases that call a gate in its different ways, on inputs of one shape.
EACH_CALL = pytest.mark.parametrize(
    "case",
    [
        case
        for op in OPS.values()
        if op.elementwise
        for case in op.cases
        if "matri" in case.name and len({given.shape for given in case.inputs}) == 1
    ],
    ids=str,
)


@EACH_DTYPE
@EACH_CALL
def test_special_values(case: Case, dtype: torch.dtype) -> None:
    """Every combination of special values, with ordinary and special upstream gradients."""
    values = specials(dtype)
    if case.op == "elu":  # see test_elu_of_nan
        values = values[~values.isnan()]
    upstream = torch.tensor([1.0, -2.5, 0.0, torch.inf, torch.nan], dtype=dtype)
    grids = torch.meshgrid(*[values] * len(case.inputs), upstream, indexing="ij")
    *inputs, dy = (grid.flatten() for grid in grids)
    check_specials(case, inputs, dy)


@EACH_DTYPE
def test_elu_of_nan(dtype: torch.dtype) -> None:
    """NaN forward and backward. PyTorch's backward has NaN or 1 there, depending on whether the
    element fell into the vectorised part of its loop.
    """
    x = torch.full((100,), torch.nan, dtype=dtype, requires_grad=True)
    y = F.elu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().all()
    assert grad.isnan().all()


@EACH_DTYPE
@EACH_CALL
def test_signs_of_zeros(case: Case, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0], dtype=dtype)
    inputs = [g.flatten() for g in torch.meshgrid(*[values] * len(case.inputs), indexing="ij")]
    y, wanted = case.ours(*inputs), case.reference(*inputs)
    if case.op == "maximum":  # both are right, and torch has one or the other
        return
    assert_same(y, wanted)
    assert torch.equal(y.signbit(), wanted.signbit())


@EACH_DTYPE
def test_ties_of_maximum(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 0.0, -0.0, torch.inf, -torch.inf, 2.0], dtype=dtype)
    b = torch.tensor([1.0, -0.0, 0.0, torch.inf, -torch.inf, 3.0], dtype=dtype)
    case = OPS["maximum"].main_case
    _, (da, db) = run(case.ours, case, [a, b], torch.ones_like)
    half = [0.5] * 5
    assert da.tolist() == [*half, 0.0]
    assert db.tolist() == [*half, 1.0]


PRODUCTS = pytest.mark.parametrize(
    "case",
    [
        case
        for op in OPS.values()
        if not op.elementwise
        for case in op.cases
        if all(0 < size < 10 for given in case.inputs for size in given.shape)
        and all(given.ignored is None for given in case.inputs)  # see test_nan_in_ignored_rows
    ],
    ids=str,
)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
@EACH_DTYPE
@PRODUCTS
def test_special_values_in_products(case: Case, dtype: torch.dtype, value: float) -> None:
    """One bad element of each input in turn: NaN and infinities come out where PyTorch has them."""
    for position in case.differentiable:
        inputs = case.make(dtype)
        if not isfinite(value) and "elu" in case.name.split():
            continue  # some z is NaN: see test_elu_of_nan
        inputs[position].view(-1)[inputs[position].numel() // 2] = value
        y, grads = run(case.ours, case, inputs, torch.ones_like)
        torch_y, torch_grads = run(case.reference, case, inputs, torch.ones_like)
        exact_y, exact_grads = run(case.reference, case, widened(inputs), torch.ones_like)
        for ours, theirs, exact in zip(
            (y, *grads), (torch_y, *torch_grads), (exact_y, *exact_grads), strict=True
        ):
            if dtype.itemsize > 2 or case.op != "mlp":
                rtol = 2e-2 if dtype.itemsize == 2 else 1e-4
                torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=rtol, atol=2e-2)
                continue
            number = theirs.isfinite()  # roundings of several layers may add up otherwise
            assert torch.equal(ours[~number].nan_to_num(), theirs[~number].nan_to_num())
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert_close_in_norm(ours[number], exact[number], theirs[number])


@pytest.mark.parametrize("again", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_in_ignored_rows(smoothing: float, again: bool) -> None:
    """Ignored rows count nothing, whatever is in them. (PyTorch's gradient has NaN there.)"""
    input = torch.randn(4, 3, dtype=torch.float64)
    input[1] = torch.nan
    input.requires_grad_()
    target = torch.tensor([0, -100, 2, 1])
    loss = F.cross_entropy(input, target, label_smoothing=smoothing)
    assert_same(loss, TF.cross_entropy(input, target, label_smoothing=smoothing))
    (grad,) = torch.autograd.grad(loss, input, create_graph=again)
    assert torch.equal(grad[1], torch.zeros(3, dtype=torch.float64))
    assert grad.isfinite().all()


# ---- autocast ------------------------------------------------------------------------------------

AUTOCAST_DTYPE = {
    "linear": torch.bfloat16, "matmul": torch.bfloat16, "mlp": torch.bfloat16,
    "maxout": torch.bfloat16, "cross_entropy": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize("op", [OPS[name] for name in AUTOCAST_DTYPE], ids=str)
def test_autocast(op: Op) -> None:
    """PyTorch's dtypes and, to the rounding of a bfloat16, its values; gradients in the dtype of
    the inputs.
    """
    for case in op.cases:
        given = torch.bfloat16 if op.name == "cross_entropy" else torch.float32
        inputs = case.make(given)
        results = []
        for function in (case.ours, case.reference):
            free = leaves(case, inputs)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = function(*inputs)
            results.append([y, *torch.autograd.grad(y, free, torch.ones_like(y))])
        assert results[0][0].dtype == AUTOCAST_DTYPE[op.name]
        y, grads = run(case.reference, case, widened(inputs), torch.ones_like)
        for mine, theirs, exact in zip(*results, (y, *grads), strict=True):
            assert mine.dtype == theirs.dtype
            rounded = AUTOCAST_DTYPE[op.name] if mine.dtype == torch.float32 else mine.dtype
            assert_close_in_norm(mine.to(rounded), exact, theirs)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.elementwise], ids=str)
def test_gates_under_autocast_keep_their_dtype(op: Op) -> None:
    for dtype in DTYPES:
        inputs = op.main_case.make(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert op.main_case.ours(*inputs).dtype == dtype


@BINARY
def test_two_inputs_under_autocast_promote(op: Op) -> None:
    """What a linear layer gave and a parameter meet in the wider dtype; outside it is an error."""
    a = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op.main_case.ours(a, b)
    assert_same(y, op.main_case.reference(a, b), 1e-6, 1e-6)
    y.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (y.dtype, a.grad.dtype, b.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    with pytest.raises(
        TypeError, match=f"{op.name}: b wants the dtype of a, bfloat16, got float32"
    ):
        op.main_case.ours(a, b)


def test_float64_stays_float64_under_autocast() -> None:
    case = linear_case("float64", (5, 3), 4, activation="tanh")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.ours(*case.make()).dtype == torch.float64


# ---- frozen inputs -------------------------------------------------------------------------------


@EACH_CASE
def test_nothing_requires_grad_unless_an_input_does(case: Case) -> None:
    inputs = case.make()
    assert not case.ours(*inputs).requires_grad
    free = leaves(case, inputs)
    assert case.ours(*inputs).requires_grad
    with torch.no_grad():
        assert not case.ours(*inputs).requires_grad
    free[0].requires_grad_(False)
    assert case.ours(*inputs).requires_grad == (len(free) > 1)


# ---- threads -------------------------------------------------------------------------------------

BIG = 3 * 32768 + 77  # several grains of work, and a rest
MANY_THREADS = [
    *(replace(op.main_case, name="big", inputs=(Input((BIG,)),) * len(op.main_case.inputs))
      for op in OPS.values() if op.elementwise),
    ce_case("classes", (1500, 100), classes(1500, high=100)),
    ce_case("probabilities", (1500, 100), probabilities(1500, 100), weighted=True),
    ce_case("sum", (1500, 100), classes(1500, high=100), reduction="sum"),
    ce_case("one row", (1, 150_000), classes(1, high=150_000)),
    maxout_case("wide", (300, 8), 3, 200),
    l2_penalty_case("big", (BIG,), (BIG,)),
]  # fmt: skip


@pytest.mark.parametrize("case", MANY_THREADS, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    """Bit for bit; and more than one grain of work is right."""
    if case.op == "multiply":
        case = replace(case, inputs=(Input((1500, 100)), Input((100,))))  # and broadcast
    inputs = case.make(torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, grads = run(case.ours, case, inputs, torch.ones_like)
            results.append([y, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, more in zip(results[0], other, strict=True):
            assert torch.equal(one, more) or one.isnan().any()
    exact, exact_grads = run(case.reference, case, widened(inputs), torch.ones_like)
    for mine, wanted in zip(results[0], [exact, *exact_grads], strict=True):
        error = torch.linalg.vector_norm(mine.double() - wanted) / torch.linalg.vector_norm(wanted)
        assert error < 1e-5


@pytest.mark.parametrize("length", [1, 67])
def test_the_maximum_of_two_zeros_is_the_second(length: int) -> None:
    """As max of x86's vectors has it, and so PyTorch; of equals only zeros can be told apart."""
    zero = torch.zeros(length)
    assert not F.maximum(-zero, zero).signbit().any()
    assert F.maximum(zero, -zero).signbit().all()


@pytest.mark.parametrize("length", [1, 67])
@pytest.mark.parametrize("alpha", [1.5, -2.0])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_elu_at_its_kink(zero: float, alpha: float, length: int) -> None:
    """At 0 as PyTorch has it; the second order but for the sign of its zero."""
    results = []
    for elu in (F.elu, TF.elu):
        x = torch.full((length,), zero, dtype=torch.double, requires_grad=True)
        y = elu(x, alpha)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (dxx,) = torch.autograd.grad(dx.sum(), x)
        results.append([y, dx, dxx])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(*(own[:2] for own in results), strict=True):
        assert torch.equal(ours.signbit(), theirs.signbit())
