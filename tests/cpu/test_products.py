"""csrc/cpu/gemm.h and network.h: linear and mlp in float32 and in half types, at awkward sizes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import torchbp
import torchbp.functional as F
from tests.compare import assert_close_in_norm
from tests.machine import cpu_flags

# (n, in, out): one tile, many, blocks of K, panels cut off, more unfinished tiles than are held,
# panels that end in half a vector, rows too far apart to be read in place, one example, nothing at
# all.
SIZES = [
    (32, 64, 64), (8, 3, 5), (70, 300, 33), (129, 513, 31), (64, 1, 1), (65, 1030, 17),
    (530, 300, 260), (200, 40, 100), (40, 40, 40), (18, 260, 24), (7, 5, 3),
    (1, 20, 30), (0, 4, 3), (64, 0, 3), (64, 3, 0),
]  # fmt: skip
LAYOUTS = ["plain", "transposed", "strided"]

# Half types, and what a machine that multiplies them as such is known by.
HALF_TYPES = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}
EACH_HALF_TYPE = pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
# Pairs along k that are whole and that are not; one example, one feature, nothing to add up.
SIZES_IN_PAIRS = [
    (70, 300, 33), (71, 301, 34), (129, 1031, 31), (64, 1, 1), (65, 1030, 17), (67, 3, 257),
    (531, 300, 260), (200, 41, 100), (8, 64, 64), (9, 3, 5), (1, 20, 30), (0, 4, 3), (65, 0, 3),
    (65, 3, 0),
]  # fmt: skip


def laid_out(layout: str, *shape: int) -> Tensor:
    if layout == "transposed":
        return torch.randn(shape[1], shape[0]).T
    return (
        torch.randn(shape[0], 2 * shape[1])[:, ::2] if layout == "strided" else torch.randn(shape)
    )


def gradients(run: Any, *leaves: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients, for an upstream gradient of `dtype` that the seed determines."""
    y = run(*leaves)
    torch.manual_seed(1)
    upstream = torch.randn(y.shape).to(dtype).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def check(ours: Any, theirs: Any, *leaves: Tensor) -> None:
    """Both in the dtype of the leaves against theirs in float64."""
    dtype = leaves[0].dtype
    of_ours = gradients(ours, *_leaves(*leaves), dtype=dtype)
    of_theirs = gradients(theirs, *_leaves(*leaves), dtype=dtype)
    exact = gradients(theirs, *_leaves(*(leaf.double() for leaf in leaves)), dtype=dtype)
    for mine, wanted, peer in zip(of_ours, exact, of_theirs, strict=True):
        # One sum over k in one order has a larger error than a sum in parts; 4 covers k = 1030.
        assert_close_in_norm(mine, wanted, peer, factor=4.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "elu"])
def test_linear(size: tuple[int, int, int], layout: str, activation: str | None) -> None:
    n, features_in, features_out = size
    f: Any = {None: lambda z: z, "relu": torch.relu, "elu": torch.nn.functional.elu}[activation]
    check(
        lambda x, w, b: F.linear(x, w, b, activation),
        lambda x, w, b: f(torch.nn.functional.linear(x, w, b)),
        laid_out(layout, n, features_in),
        laid_out(layout, features_out, features_in),
        torch.randn(features_out),
    )


@EACH_HALF_TYPE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size", [(70, 300, 33), (8, 3, 5), (7, 5, 3), (0, 4, 3), (9, 0, 3)], ids=str
)
@pytest.mark.parametrize("activation", [None, "elu"])
def test_linear_in_half_types(
    size: tuple[int, int, int], layout: str, activation: str | None, dtype: torch.dtype
) -> None:
    n, features_in, features_out = size
    check(
        lambda x, w, b: F.linear(x, w, b, activation),
        lambda x, w, b: (torch.nn.functional.elu if activation else torch.clone)(
            torch.nn.functional.linear(x, w, b)
        ),
        laid_out(layout, n, features_in).to(dtype),
        laid_out(layout, features_out, features_in).to(dtype),
        torch.randn(features_out).to(dtype),
    )


def rounding_of(sums: int, size: Tensor) -> Tensor:
    """By how much float32 sums of `sums` numbers, whose absolute values add up to `size`, may be
    off in any order.
    """
    return sums * 2.0**-24 / (1 - sums * 2.0**-24) * size


def assert_rounded_once(ours: Tensor, exact: Tensor, size: Tensor, sums: int) -> None:
    """Assert that sums of `sums` exact products, whose absolute values add up to `size`, were had
    in float32, a rounding each, and rounded to bfloat16 at the end.
    """
    assert ours.shape == exact.shape
    off = (ours.double() - exact).abs()
    in_float32 = rounding_of(sums, size)
    allowed = in_float32 + 2.0**-8 * (exact.abs() + in_float32)
    assert bool((off <= allowed).all()), f"{(off / allowed).max():.3g} of what is allowed"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES_IN_PAIRS, ids=str)
def test_linear_in_bfloat16_is_rounded_once(size: tuple[int, int, int], layout: str) -> None:
    """Element by element. Where the library rounds between product and activation, it rounds to
    what the activations here leave as it is, or is compared with that.
    """
    n, features_in, features_out = size
    ops: Any = torch.ops.torchbp_kernels
    x, dy = laid_out(layout, n, features_in), laid_out(layout, n, features_out)
    w, b = laid_out(layout, features_out, features_in), torch.randn(features_out)
    x, dy, w, b = (t.bfloat16() for t in (x, dy, w, b))
    rows, columns, upstream = x.double(), w.double(), dy.double()
    exact = rows @ columns.mT + b.double()
    total = rows.abs() @ columns.mT.abs() + b.double().abs()
    y, _ = ops.linear(x, w, b, "relu", 0.0)  # saves y
    assert_rounded_once(y, exact.relu(), total, features_in + 2)
    y, z = ops.linear(x, w, b, "elu", 1.0)  # saves z
    assert_rounded_once(z, exact, total, features_in + 2)
    # As if of the z that is not rounded, or of z as the library leaves it: its slope is 1 at most.
    off = (y.double() - torch.nn.functional.elu(exact)).abs()
    assert bool((off <= 2.0**-8 * (y.double().abs() + exact.abs()) + 2.0**-14 * total).all())
    nothing = x.new_empty(0)
    dx, dw, db = ops.linear_backward(dy, x, w, nothing, "none", 0.0, True, True, True)
    size_of_x = upstream.abs() @ columns.abs()
    assert_rounded_once(dx, upstream @ columns, size_of_x, features_out + 1)
    assert_rounded_once(dw, upstream.mT @ rows, upstream.mT.abs() @ rows.abs(), n + 1)
    assert_rounded_once(db, upstream.sum(0), upstream.abs().sum(0), n + 1)


def assert_within_rounding(ours: Tensor, exact: Tensor, size: Tensor, sums: int) -> None:
    """Assert that float32 sums of `sums` products, whose absolute values add up to `size`, are off
    by no more than sums in any order may be, element by element.
    """
    assert ours.shape == exact.shape
    off = (ours.double() - exact).abs()
    allowed = rounding_of(sums, size)
    assert bool((off <= allowed).all()), f"{(off / allowed).max():.3g} of what is allowed"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size",
    [(70, 100, 1), (67, 37, 2), (130, 304, 3), (101, 1040, 4), (64, 6, 4), (65, 3, 1), (9, 530, 2),
     (1, 1040, 300), (2, 300, 530), (3, 1040, 33), (5, 530, 300), (8, 300, 1031), (13, 1040, 37),
     (16, 515, 530), (24, 300, 700), (25, 700, 300), (63, 1040, 40), (24, 520, 20)],
    ids=str,
)  # fmt: skip
def test_few_outputs_or_examples(size: tuple[int, int, int], layout: str) -> None:
    n, features_in, features_out = size
    ops: Any = torch.ops.torchbp_kernels
    x, dy = laid_out(layout, n, features_in), laid_out(layout, n, features_out)
    w, b = laid_out(layout, features_out, features_in), torch.randn(features_out)
    exact = x.double() @ w.double().mT + b.double()
    total = x.double().abs() @ w.double().abs().mT + b.double().abs()
    y, _ = ops.linear(x, w, b, "none", 0.0)
    assert_within_rounding(y, exact, total, features_in + 1)
    y, z = ops.linear(x, w, b, "leaky_relu", 0.25)
    assert_within_rounding(z, exact, total, features_in + 1)
    wanted = torch.nn.functional.leaky_relu(z, 0.25)
    assert torch.equal(y, wanted)  # a quarter is exact
    dx, dw, db = ops.linear_backward(dy, x, w, None, "none", 0.0, True, True, True)
    upstream = dy.double()
    assert_within_rounding(
        dx, upstream @ w.double(), upstream.abs() @ w.double().abs(), features_out
    )
    assert_within_rounding(dw, upstream.mT @ x.double(), upstream.mT.abs() @ x.double().abs(), n)
    assert_within_rounding(db, upstream.sum(0), upstream.abs().sum(0), n)


@pytest.mark.parametrize("n", [256, 257, 1103])
@pytest.mark.parametrize("features_in", [16, 520, 1040])
def test_gradients_of_few_outputs_are_those_of_many(n: int, features_in: int) -> None:
    """To the bit: where rows make up one tile, the examples are read where they lie, in blocks of
    their own, and every element is still one sum over them in one order."""
    x, dy = torch.randn(n, features_in), torch.randn(n, 40)
    needs = "none", 0.0, False, True, True
    ops: Any = torch.ops.torchbp_kernels
    _, many, _ = ops.linear_backward(dy, x, None, None, *needs)
    for outputs in range(1, 8):
        few = dy[:, :outputs].contiguous()
        _, dw, _ = ops.linear_backward(few, x, None, None, *needs)
        assert torch.equal(dw, many[:outputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("size", [(70, 33, 20), (9, 5, 4), (3, 5, 4), (0, 4, 3)], ids=str)
def test_what_no_gradient_reads_may_be_missing(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """The rest is the same, to the bit, as if it were there."""
    n, features_in, features_out = size
    ops: Any = torch.ops.torchbp_kernels
    x, dy = torch.randn(n, features_in).to(dtype), torch.randn(n, features_out).to(dtype)
    w, y = torch.randn(features_out, features_in).to(dtype), torch.rand_like(dy)
    whole = ops.linear_backward(dy, x, w, y, "tanh", 0.0, True, True, True)
    for given in ((x, None), (None, w), (x, w)):
        needs = given[1] is not None, given[0] is not None, True
        parts = ops.linear_backward(dy, *given, y, "tanh", 0.0, *needs)
        for part, wanted, need in zip(parts, whole, needs, strict=True):
            assert torch.equal(part, wanted) if need else part.numel() == 0
    plain = ops.linear_backward(dy, x, w, y, "none", 0.0, True, True, True)
    for part, wanted in zip(
        ops.linear_backward(dy, x, w, None, "none", 0.0, True, True, True), plain, strict=True
    ):
        assert torch.equal(part, wanted)
    nothing = ops.linear_backward(dy, None, None, None, "none", 0.0, False, False, True)
    assert [part.numel() for part in nothing] == [0, 0, features_out]
    assert_close_in_norm(nothing[2], dy.double().sum(0), dy.sum(0))


@EACH_HALF_TYPE
def test_half_types_are_float32_rounded_once(dtype: torch.dtype) -> None:
    """To the bit, where no instruction multiplies them."""
    flags = cpu_flags()
    if "sse2" not in flags or (torchbp.cpu_level() == "avx512" and HALF_TYPES[dtype] in flags):
        pytest.skip(f"this machine multiplies {dtype} as such")
    x, w, b = (torch.randn(*shape).to(dtype) for shape in [(40, 70), (30, 70), (30,)])
    for activation in (None, "tanh", "elu"):
        y = F.linear(x, w, b, activation)
        assert torch.equal(y, F.linear(x.float(), w.float(), b.float(), activation).to(dtype))
    half = gradients(F.linear, *_leaves(x, w, b), dtype=dtype)
    wide = gradients(F.linear, *_leaves(x.float(), w.float(), b.float()), dtype=dtype)
    for mine, wanted in zip(half, wide, strict=True):
        assert torch.equal(mine, wanted.to(dtype))
    last = torch.randn(9, 30).to(dtype)
    assert torch.equal(
        F.mlp(x, [w, last], [], "tanh"), F.linear(F.linear(x, w, None, "tanh"), last)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["tanh", "leaky_relu"])
@pytest.mark.parametrize(
    "sizes",
    [*((n, 37, 300, 16, 5) for n in (0, 1, 3, 15, 24, 32, 40, 130)),
     *((n, 20, 530, 270, 3) for n in (1, 6, 24, 600))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(sizes: tuple[int, ...], activation: str, layout: str, bias: bool) -> None:
    n, *features = sizes
    weights = [laid_out(layout, o, i) / i**0.5 for i, o in pairwise(features)]
    biases = [torch.randn(o) for o in features[1:]] if bias else []
    f: Any = {"tanh": torch.tanh, "leaky_relu": torch.nn.functional.leaky_relu}[activation]

    def theirs(x: Tensor, *parameters: Tensor) -> Tensor:
        for i in range(len(weights)):
            b = parameters[len(weights) + i] if bias else None
            x = torch.nn.functional.linear(x if i == 0 else f(x), parameters[i], b)
        return x

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        return F.mlp(x, parameters[: len(weights)], parameters[len(weights) :], activation)

    check(ours, theirs, laid_out(layout, n, features[0]), *weights, *biases)


@pytest.mark.parametrize("needs", [(0,), (1,), (2, 5), (3,), (6,), ()])
def test_mlp_gradients_that_are_wanted(needs: tuple[int, ...]) -> None:
    """Those that are not wanted are not computed, and the others do not change."""
    leaves = [torch.randn(9, 6), torch.randn(7, 6), torch.randn(8, 7), torch.randn(4, 8)]
    leaves += [torch.randn(7), torch.randn(8), torch.randn(4)]

    def run(wanted: tuple[int, ...]) -> list[Tensor | None]:
        inputs = [leaf.clone().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        y = F.mlp(inputs[0], inputs[1:4], inputs[4:])
        if wanted:
            y.square().sum().backward()
        return [leaf.grad for leaf in inputs]

    every = run(tuple(range(7)))
    for i, grad in enumerate(run(needs)):
        assert (grad is None) == (i not in needs)
        if grad is not None:
            assert torch.equal(grad, every[i])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (131, 701, 150),
        (300, 64, 333),
        (530, 300, 260),
        (1030, 2064, 3),
        (3, 1040, 701),
        (23, 530, 401),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_nothing(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and "amx_bf16" in cpu_flags():
        pytest.skip("products of bfloat16 are left to the library on this machine")
    n, features_in, features_out = size
    x, w = torch.randn(n, features_in).to(dtype), torch.randn(features_out, features_in).to(dtype)
    b, last = torch.randn(features_out).to(dtype), torch.randn(10, features_out).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                gradients(lambda x, w, b: F.linear(x, w, b, "relu"), *_leaves(x, w, b))
                + gradients(
                    lambda x, w, last, b: F.mlp(x, [w, last], [b, b.repeat(4)[:10]]),
                    *_leaves(x, w, last, b),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("outputs", [51, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(
    dtype: torch.dtype, outputs: int
) -> None:
    """Sums over an odd number too, whose last has no neighbour."""
    x, w = torch.randn(71, 21), torch.randn(outputs, 21)
    x[3, 4], w[1, 1], x[70, 20], w[-1, 20] = torch.nan, torch.inf, -torch.inf, torch.inf
    ours = gradients(F.linear, *_leaves(x.to(dtype), w.to(dtype)), dtype=dtype)
    wanted = gradients(
        torch.nn.functional.linear,
        *_leaves(x.to(dtype).double(), w.to(dtype).double()),
        dtype=dtype,
    )
    for mine, exact in zip(ours, wanted, strict=True):
        assert torch.equal(mine.isnan(), exact.isnan())
        assert torch.equal(mine.isinf(), exact.isinf())


def test_a_batch_of_an_expanded_row() -> None:
    row, w = torch.randn(1, 30), torch.randn(12, 30)
    assert torch.equal(F.linear(row.expand(70, 30), w), F.linear(row.repeat(70, 1), w))
