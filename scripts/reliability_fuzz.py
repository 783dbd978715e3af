"""The figure "fuzz" of scripts/reliability.py: every operation, called in ways that hypothesis
draws, against PyTorch in float64, to a bound from error analysis.

    python -m scripts.reliability_fuzz CASE     # one case, as a failure prints it: JSON
    python -m scripts.reliability_fuzz PIECE    # a piece of the figure, each case printed first
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import Tensor

import torchbp
import torchbp.functional as F
from scripts.reliability_accuracy import levels
from scripts.reliability_bounds import WORDS, Bounded, Truth, exact, where
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.layouts import LAYOUTS, broadcast_pairs, laid_out, seeds, shapes, sizes
from tests.ops import (
    ACTIVATIONS,
    DTYPES,
    OPS,
    Case,
    Input,
    ce_case,
    classes,
    l2_penalty_case,
    linear_case,
    matmul_case,
    maxout_case,
    mlp_case,
    run,
)
from torchbp import ROWS
from torchbp.functions.gate import GATES
from torchbp.graph.text import dtype_name

__all__ = ["Fuzz", "check", "main"]

CASES = 100_000
BLOCK = 500  # cases of a piece
THREADS = (1, 2, 4)

#: A case, in JSON's types: the operation, how it is called, and how its tensors are made.
Given = dict[str, Any]

# ---- What is drawn -------------------------------------------------------------------------------

#: Sizes that need blocks, panels and rests of the kernels, and several threads.
LARGE_SHAPES = ((1037,), (3 * 32768 + 77,), (257, 300), (2, 150, 331), (129, 1, 17), (70, 1500))
LARGE_SIZES = (8, 9, 17, 64, 65, 129, 300)
LARGE_CLASSES = (10, 32, 33, 128, 129, 1037, 2500)

#: How large the numbers are: all that they are multiplied by, or whole numbers from -2 to 2.
VALUES = {"normal": 1.0, "whole": 1.0, "small": 2.0**-8, "large": 8.0}

hidden = st.sampled_from([name for name in ACTIVATIONS if name])
rarely = st.integers(0, 15).map(lambda n: n == 15)


@st.composite
def some_shape(draw: st.DrawFn) -> tuple[int, ...]:
    return draw(st.sampled_from(LARGE_SHAPES)) if draw(rarely) else draw(shapes)


@st.composite
def some_sizes(draw: st.DrawFn, count: int) -> list[int]:
    """Sizes of the sides of products: small, or any of them large."""
    one = st.sampled_from(LARGE_SIZES) | sizes if draw(rarely) else sizes
    return [draw(one) for _ in range(count)]


@st.composite
def of_gate(draw: st.DrawFn, name: str) -> Given:
    row = ROWS[name]
    if len(row.inputs) == 1:
        given: Given = {"shapes": [draw(some_shape())]}
    elif draw(rarely):
        full = draw(st.sampled_from(LARGE_SHAPES))
        part = [1 if draw(st.booleans()) else size for size in full]
        given = {"shapes": draw(st.permutations([full, part[draw(st.integers(0, len(part))) :]]))}
    else:
        given = {"shapes": draw(broadcast_pairs(fit=True))}
    if row.parameter is not None:
        given["parameter"] = draw(st.sampled_from([1.0, 0.0, 0.1, -1.7, 3.0]))
    return given


@st.composite
def of_matmul(draw: st.DrawFn) -> Given:
    n, d, m = draw(some_sizes(3))
    a, b = draw(broadcast_pairs(fit=True))
    kind = draw(st.sampled_from(["matrices", "row", "column", "vectors"]))
    x = [d] if kind in ("row", "vectors") else [*a[:2], n, d]
    w = [d] if kind in ("column", "vectors") else [*b[:2], d, m]
    if kind == "matrices" and len(a) > 2 and len(b) > 2:  # cut at the front, they may not fit
        x, w = [*a[-2:], n, d], [*b[-2:], d, m]
    elif kind == "matrices":
        x, w = [*a, n, d], [*b[-len(a) :], d, m] if len(a) < len(b) else [*b, d, m]
    return {"x": x, "w": w}


@st.composite
def of_linear(draw: st.DrawFn) -> Given:
    n, size_in, out = draw(some_sizes(3))
    leading = draw(st.sampled_from([[n], [n], [], [2, n], [n, 1, 3]]))
    name = draw(st.sampled_from(list(ACTIVATIONS)))
    bias = draw(st.booleans())
    return {"x": [*leading, size_in], "out": out, "bias": bias, "activation": name}


@st.composite
def of_maxout(draw: st.DrawFn) -> Given:
    n, size_in, out = draw(some_sizes(3))
    leading = draw(st.sampled_from([[n], [], [2, n]]))
    pieces = draw(st.sampled_from([1, 2, 3, 5]))
    # PyTorch's reference cannot reshape what has no element, nor take its largest.
    return {
        "x": [*leading, size_in], "pieces": pieces, "out": max(out, 1), "bias": draw(st.booleans())
    }  # fmt: skip


@st.composite
def of_mlp(draw: st.DrawFn) -> Given:
    n, size_in, *widths = draw(some_sizes(draw(st.integers(3, 5))))
    leading = draw(st.sampled_from([[n], [n], [], [2, n]]))
    bias = draw(st.booleans())
    return {"x": [*leading, size_in], "sizes": widths, "activation": draw(hidden), "bias": bias}


@st.composite
def of_cross_entropy(draw: st.DrawFn) -> Given:
    (n,) = draw(some_sizes(1))
    count = draw(st.sampled_from([1, 2, 3, 5]) | st.sampled_from(LARGE_CLASSES))
    shape = draw(
        st.sampled_from([[n, count], [n, count], [count], [n, count, 2], [2, count, 3, n]])
    )
    soft = draw(st.booleans())
    ignored = None if soft else draw(st.sampled_from([None, -100, 0, 7]))
    return {
        "input": shape, "soft": soft, "weighted": draw(st.booleans()), "ignored": ignored,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }  # fmt: skip


@st.composite
def of_l2_penalty(draw: st.DrawFn) -> Given:
    return {"shapes": draw(st.lists(some_shape(), min_size=1, max_size=4))}


ARGUMENTS: dict[str, Callable[[], st.SearchStrategy[Given]]] = {
    "matmul": of_matmul, "linear": of_linear, "maxout": of_maxout, "mlp": of_mlp,
    "cross_entropy": of_cross_entropy, "l2_penalty": of_l2_penalty,
}  # fmt: skip


@st.composite
def calls(draw: st.DrawFn, op: str) -> Given:
    """A case of an operation."""
    own = draw(of_gate(op) if op in ROWS else ARGUMENTS[op]())
    given = {"op": op, **own}
    case = case_of(given)
    layouts = st.sampled_from(LAYOUTS)
    free = case.differentiable
    given["dtype"] = dtype_name(draw(st.sampled_from(DTYPES)))
    given["threads"] = draw(st.sampled_from(THREADS))
    given["values"] = draw(st.sampled_from(list(VALUES)))
    given["layouts"] = [draw(layouts) for _ in case.inputs]
    given["upstream"] = draw(layouts)
    given["free"] = draw(st.sets(st.sampled_from(free)).map(sorted) | st.just(free))
    given["seed"] = draw(seeds)
    return json.loads(json.dumps(given))  # type: ignore[no-any-return]


# ---- From a case to tensors ----------------------------------------------------------------------


def case_of(given: Given) -> Case:
    """What is called, its float64 reference out of PyTorch, and its inputs."""
    op = given["op"]
    if op in ROWS:
        parameter = (given["parameter"],) if "parameter" in given else ()
        ours, formula = getattr(F, op), GATES[op].formula
        return Case(
            op, "fuzz",
            lambda *inputs: ours(*inputs, *parameter),
            lambda *inputs: formula(*inputs, *parameter),
            tuple(Input(tuple(shape)) for shape in given["shapes"]),
        )  # fmt: skip
    if op == "matmul":
        return matmul_case("fuzz", tuple(given["x"]), tuple(given["w"]))
    if op == "linear":
        return linear_case(
            "fuzz", tuple(given["x"]), given["out"], given["bias"], given["activation"]
        )
    if op == "maxout":
        return maxout_case("fuzz", tuple(given["x"]), given["pieces"], given["out"], given["bias"])
    if op == "mlp":
        return mlp_case(
            "fuzz", tuple(given["x"]), given["sizes"], given["activation"], given["bias"]
        )
    if op == "l2_penalty":
        return l2_penalty_case("fuzz", *map(tuple, given["shapes"]))
    shape = tuple(given["input"])
    count, rows = (shape[0], ()) if len(shape) == 1 else (shape[1], shape[:1] + shape[2:])
    ignored = given["ignored"]
    target = Input(shape) if given["soft"] else classes(*rows, high=count, ignored=ignored)
    return ce_case(
        "fuzz", shape, target, given["weighted"],
        reduction=given["reduction"], label_smoothing=given["label_smoothing"],
        **({} if ignored is None else {"ignore_index": ignored}),
    )  # fmt: skip


def made(wanted: Input, layout: str, values: str, dtype: torch.dtype, source: Any) -> Tensor:
    """A tensor as an input wants it."""

    def fill(*shape: int) -> Tensor:
        if wanted.kind == "classes":
            indices = torch.randint(wanted.high, shape, generator=source)
            if wanted.ignored is not None:
                indices.view(-1)[::3] = wanted.ignored
            return indices
        if values == "whole":
            x = torch.randint(-2, 3, shape, generator=source).double()
        else:
            x = VALUES[values] * torch.randn(shape, generator=source, dtype=torch.float64)
        return (x.abs() + 0.5 if wanted.kind == "positive" else x).to(dtype)

    return laid_out(layout, wanted.shape, fill)


# ---- What rounding may do to each operation ------------------------------------------------------


def through(name: str | None, z: Bounded) -> tuple[Bounded, Callable[[Bounded], Bounded]]:
    """(f(z) as it is kept, upstream -> gradient) of an activation."""
    if name is None:
        return z, lambda dy: dy
    return gate(name, [z], *GATES[name]._defaults)


def gate(
    name: str, inputs: list[Bounded], *parameter: float
) -> tuple[Bounded, Callable[[Bounded], Bounded]]:
    """A gate with one input, from the text of its row."""
    row = ROWS[name]
    known: dict[str, Any] = dict(zip(row.inputs, inputs, strict=True))
    if row.parameter is not None:
        number = torch.tensor(parameter[0], dtype=torch.float64)
        known[row.parameter] = exact(number, inputs[0].dtype)
    y = row.evaluate("forward", words=WORDS, **known).stored()

    def gradient(dy: Bounded) -> Bounded:
        dx: Bounded = row.evaluate("dx", words=WORDS, **{**known, "y": y, "dy": dy})
        return dx.stored()

    return y, gradient


def of_gate_bounded(given: Given, inputs: list[Bounded], dy: Bounded) -> Iterator[Bounded]:
    op = given["op"]
    if len(inputs) == 1:
        parameter = (given["parameter"],) if "parameter" in given else ()
        y, gradient = gate(op, inputs, *parameter)
        yield y
        yield gradient(dy)
        return
    a, b = inputs
    yield ROWS[op].evaluate("forward", words=WORDS, a=a, b=b).stored()
    for column, x in (("da", a), ("db", b)):
        dx = ROWS[op].evaluate(column, words=WORDS, a=a, b=b, dy=dy)
        yield dx.stored().sum_to(x.shape)


def of_matmul_bounded(given: Given, inputs: list[Bounded], dy: Bounded) -> Iterator[Bounded]:
    x, w = inputs
    rows = x.reshape(1, *x.shape) if len(x.shape) == 1 else x
    columns = w.reshape(*w.shape, 1) if len(w.shape) == 1 else w
    y = rows.matmul(columns).stored()
    dy = dy.reshape(*y.shape)
    yield y.reshape(*dy.shape)
    yield dy.matmul(columns.mT).stored().sum_to(rows.shape).reshape(*x.shape)
    yield rows.mT.matmul(dy).stored().sum_to(columns.shape).reshape(*w.shape)


def affine(x: Bounded, weight: Bounded, bias: Bounded | None) -> Bounded:
    z = x.matmul(weight.mT)
    return (z if bias is None else z.rounded() + bias).stored()


def affine_gradients(dz: Bounded, x: Bounded, weight: Bounded) -> tuple[Bounded, Bounded, Bounded]:
    return dz.matmul(weight).stored(), dz.mT.matmul(x).stored(), dz.sum((0,)).stored()


def rows_of(x: Bounded) -> Bounded:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def of_layers(
    activation: str | None, last: str | None, inputs: list[Bounded], layers: int, dy: Bounded
) -> Iterator[Bounded]:
    """Linear layers: an activation between them, another behind the last."""
    x, weights, biases = inputs[0], inputs[1 : 1 + layers], inputs[1 + layers :]
    h, kept = rows_of(x), []
    for i, weight in enumerate(weights):
        z = affine(h, weight, biases[i] if biases else None)
        y, gradient = through(last if i + 1 == layers else activation, z)
        kept.append((h, weight, gradient))
        h = y
    yield h
    dz = rows_of(dy)
    of_weights: list[Bounded] = []
    of_biases: list[Bounded] = []
    for below, weight, gradient in reversed(kept):
        dz, of_weight, of_bias = affine_gradients(gradient(dz), below, weight)
        of_weights.insert(0, of_weight)
        of_biases.insert(0, of_bias)
    yield from (dz, *of_weights, *(of_biases if biases else ()))


def of_linear_bounded(given: Given, inputs: list[Bounded], dy: Bounded) -> Iterator[Bounded]:
    return of_layers(None, given["activation"], inputs, 1, dy)


def of_mlp_bounded(given: Given, inputs: list[Bounded], dy: Bounded) -> Iterator[Bounded]:
    return of_layers(given["activation"], None, inputs, len(given["sizes"]), dy)


def of_maxout_bounded(given: Given, inputs: list[Bounded], dy: Bounded) -> Iterator[Bounded]:
    x, weight, *bias = inputs
    pieces, out, size_in = weight.shape
    flat = weight.reshape(pieces * out, size_in)
    rows = rows_of(x)
    z = affine(rows, flat, bias[0].reshape(pieces * out) if bias else None)
    z = z.reshape(rows.shape[0], pieces, out)
    yield z.largest(1)
    # It wins if it is larger than all pieces before it and no less than those behind it.
    dy = rows_of(dy)
    shape = rows.shape[0], pieces, pieces, out
    one = Bounded(z.value.unsqueeze(2).expand(shape), z.error.unsqueeze(2).expand(shape), z.dtype)
    all_ = Bounded(z.value.unsqueeze(1).expand(shape), z.error.unsqueeze(1).expand(shape), z.dtype)
    behind = torch.ones(pieces, pieces, dtype=torch.bool).triu().unsqueeze(-1)
    above, level = one > all_, one >= all_
    beats = torch.where(behind, level.holds, above.holds)
    sure = torch.where(behind, level.sure, above.sure)
    sure |= torch.eye(pieces, dtype=torch.bool).unsqueeze(-1)
    loses_surely = (~beats & sure).any(2)
    won = Truth(beats.all(2), sure.all(2) | loses_surely)
    spread = Bounded(dy.value.unsqueeze(1), dy.error.unsqueeze(1), dy.dtype)
    dz = where(won, spread, 0).reshape(rows.shape[0], pieces * out)
    dx, of_weight, of_bias = affine_gradients(dz, rows, flat)
    yield from (dx, of_weight, *([of_bias] if bias else ()))


def of_cross_entropy_bounded(given: Given, inputs: list[Bounded], dy: Bounded) -> Iterator[Bounded]:
    """csrc/softmax_ce.h, with as many roundings as any of its kernels has."""
    x, target, *weight = inputs
    side = min(1, len(x.shape) - 1)  # that of the classes
    moved, count = x.value.movedim(side, -1).shape, x.shape[side]

    def rows(t: Bounded) -> Bounded:
        """[N, C] of [N, C, ...] or [C]."""
        last = Bounded(t.value.movedim(side, -1), t.error.movedim(side, -1), t.dtype)
        return last.reshape(math.prod(moved[:-1]), count)

    def back(t: Bounded) -> Bounded:
        """The shape of the input again."""
        last = t.reshape(*moved)
        return Bounded(last.value.movedim(-1, side), last.error.movedim(-1, side), t.dtype)

    def of_rows(t: Bounded) -> Bounded:
        """0 for rows that count nothing."""
        gone = ignored.reshape(-1, *[1] * (len(t.shape) - 1)).expand(t.shape)
        return where(Truth(gone, torch.ones_like(gone)), 0.0, t)

    x, dtype = rows(x), x.dtype
    smoothing = torch.tensor(given["label_smoothing"], dtype=torch.float64)
    keep, each = exact(1 - smoothing, dtype), exact(smoothing / count, dtype)
    w = weight[0] if weight else exact(torch.ones(count, dtype=dtype))
    ignored = torch.zeros(x.shape[0], dtype=torch.bool)
    if given["soft"]:
        soft, hot = w * (keep * rows(target) + each), w * 0.0
        counted = exact(torch.tensor(float(x.shape[0]), dtype=torch.float64), dtype)
    else:
        indices = target.value.reshape(-1).long()
        ignored = indices == (-100 if given["ignored"] is None else given["ignored"])
        of_class = (torch.arange(count) == indices.unsqueeze(1)).to(dtype)
        soft, hot = w * each, exact(of_class) * w * keep
        counted = of_rows((exact(of_class) * w).sum((1,))).sum((0,))
    wq = soft + hot

    largest = x.value.amax(1, keepdim=True)
    shift = Bounded(largest, torch.zeros_like(largest), dtype)
    e = (x - shift).exp(flushed=True)
    total = e.sum((1,), keepdim=True)
    below = (shift - x) + total.log()
    losses = of_rows((wq * below).sum((1,)).rounded())
    mean, none = given["reduction"] == "mean", given["reduction"] == "none"
    divisor = counted.rounded() if mean else exact(torch.ones((), dtype=dtype))
    yield losses.stored() if none else (losses.sum((0,)) / divisor).stored()

    def gradient(g: Bounded) -> Bounded:
        mass = wq.sum((1,), keepdim=True)
        p = (e * (g * mass) / total).rounded(roundings=3)
        # PyTorch's float64 has exp of the logarithm, whose rounding becomes relative to it.
        of_logarithm = 2.0**-52 * (below.most + total.log().most) * p.most
        p = Bounded(p.value, p.error + of_logarithm, dtype)
        dx = p - g * soft - g * hot
        return of_rows(dx).stored()

    upstream = dy.reshape(-1, 1)
    if none or (given["soft"] and 1 in given["free"]):
        dx = gradient(upstream / divisor)
    else:  # that of the loss itself is kept first
        dx = (gradient(1 / divisor.reshape(1, 1)) * upstream).stored()
    lse = (shift + total.log()).rounded()
    yield back(dx)
    if given["soft"]:
        yield back(((upstream / divisor) * keep * w * (lse - x)).stored())


def of_l2_penalty_bounded(given: Given, inputs: list[Bounded], dy: Bounded) -> Iterator[Bounded]:
    squares = [(x * x).sum(tuple(range(len(x.shape)))).rounded() for x in inputs]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    yield total.stored()
    twice = (dy * 2.0).stored()
    yield from ((x * twice).stored() for x in inputs)


BOUNDED: dict[str, Callable[[Given, list[Bounded], Bounded], Iterator[Bounded]]] = {
    **dict.fromkeys(ROWS, of_gate_bounded),
    "matmul": of_matmul_bounded, "linear": of_linear_bounded, "maxout": of_maxout_bounded,
    "mlp": of_mlp_bounded, "cross_entropy": of_cross_entropy_bounded,
    "l2_penalty": of_l2_penalty_bounded,
}  # fmt: skip


# ---- One case ------------------------------------------------------------------------------------


class Tally:
    """What was compared."""

    def __init__(self) -> None:
        self.cases = self.numbers = self.open = 0
        self.share = 0.0

    def add(self, off: Tensor, allowed: Tensor) -> None:
        bounded = allowed.isfinite()
        self.numbers += off.numel()
        self.open += int((~bounded).sum())
        shares = off[bounded] / allowed[bounded]
        if shares.numel():
            self.share = max(self.share, float(shares.nan_to_num(nan=0.0, posinf=0.0).max()))


def compared(name: str, got: Tensor, truth: Tensor, bound: Bounded, tally: Tally) -> str:
    """What is wrong, if anything is."""
    if got.shape != truth.shape:
        return f"{name} has shape {list(got.shape)}, wanted {list(truth.shape)}"
    if got.dtype != bound.dtype:
        return f"{name} has dtype {dtype_name(got.dtype)}, wanted {dtype_name(bound.dtype)}"
    allowed = bound.error.expand(bound.shape).reshape(truth.shape)
    centre = bound.value.reshape(truth.shape)
    off = (got.double() - truth).abs()
    unbounded = ~allowed.isfinite()
    wrong = ~(off <= allowed) & ~unbounded
    # The bound is that of the reference, computed in another way.
    wrong |= ~((centre - truth).abs() <= allowed) & ~unbounded
    wrong |= truth.isnan() & ~got.isnan() & (allowed != torch.inf)
    tally.add(off, allowed)
    if not bool(wrong.any()):
        return ""
    place = wrong.nonzero()[0].tolist()
    at = tuple(place)
    return (
        f"{name}{place or ''} is {got[at].item():.9g} instead of {truth[at].item():.9g}, "
        f"by {off[at].item():.2g} where {allowed[at].item():.2g} are allowed"
    )


def check(given: Given, tally: Tally) -> str:
    """What is wrong with a case, if anything is."""
    case, dtype, free = case_of(given), getattr(torch, given["dtype"]), given["free"]
    source = torch.Generator().manual_seed(given["seed"])
    inputs = [
        made(wanted, layout, given["values"], dtype, source)
        for wanted, layout in zip(case.inputs, given["layouts"], strict=True)
    ]
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    shape = case.reference(*wide).shape
    upstream = made(Input(tuple(shape)), given["upstream"], given["values"], dtype, source)
    wanted, *of_wanted = run(case.reference, wide, upstream.double(), free)
    torch.set_num_threads(given["threads"])
    try:
        y, *grads = run(case.ours, inputs, upstream, free)
    except Exception as error:
        return f"raises {type(error).__name__}: {error}".splitlines()[0]
    finally:
        torch.set_num_threads(1)
    tally.cases += 1
    bounds = BOUNDED[given["op"]](given, [exact(x) for x in inputs], exact(upstream))
    wrong = compared("the output", y, wanted, next(bounds), tally)
    if not wrong and free:
        of_inputs = dict(zip(case.differentiable, bounds, strict=True))
        for i, grad, truth in zip(free, grads, of_wanted, strict=True):
            wrong = wrong or compared(f"gradient {i}", grad, truth, of_inputs[i], tally)
    return wrong


def command(given: Given) -> str:
    """What runs a case again."""
    return (
        f"TORCHBP_CPU={torchbp.cpu_level()} python -m scripts.reliability_fuzz "
        f"'{json.dumps(given)}'"
    )


class MismatchError(Exception):
    """A case that is wrong, and how."""


def fuzz(piece: Piece, tally: Tally, tell: Callable[[Given], None] = lambda given: None) -> str:
    """Draw the cases of a piece. A line on the smallest that is wrong, if one is."""
    seen = ""

    @seed(piece["seed"])
    @settings(
        max_examples=piece["cases"], database=None, deadline=None, print_blob=False,
        report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls(piece["op"]))
    def holds(given: Given) -> None:
        nonlocal seen
        tell(given)
        wrong = check(given, tally)
        if wrong:
            seen = f"{given['op']} in {given['dtype']}: {wrong}: {command(given)}"
            raise MismatchError(seen)

    try:
        holds()
    except MismatchError as error:
        return str(error)
    except Flaky:
        return f"not always: {seen}"
    return ""


class Fuzz(Figure):
    name = "fuzz"
    title = "Fuzz"
    claim = (
        f"{CASES:,} calls that hypothesis draws, of every operation at every SIMD level: shapes "
        "(sizes 0 and 1, several blocks of every kernel), broadcasting, layouts of the inputs and "
        "of the upstream gradient (transposed, strided, expanded, sliced, with an offset), dtypes, "
        "options, inputs that want no gradient, 1, 2 and 4 threads. Output and gradients differ "
        "from PyTorch's in float64 by no more than rounding may cause, by an error analysis that "
        "runs along with each call (`scripts/reliability_bounds.py`)."
    )
    unit = "calls"
    sample = 0.005
    sources = (
        "scripts/reliability_bounds.py",
        "scripts/reliability_fuzz.py",
        "tests/layouts.py",
        "tests/ops.py",
        "torchbp/functional.py",
        "torchbp/functions/*.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        tried = levels()
        each = -(-CASES // (len(tried) * len(OPS)))
        blocks = -(-each // BLOCK)
        cases = BLOCK if fraction == 1 else max(5, round(each * fraction))
        return [
            {"op": op, "level": level, "seed": i * blocks + block, "cases": cases}
            for i, level in enumerate(tried)
            for op in OPS
            for block in range(blocks if fraction == 1 else 1)
        ]

    def size(self, piece: Piece) -> int:
        return int(piece["cases"])

    def measure(self, piece: Piece) -> Result:
        tally = Tally()
        wrong = fuzz(piece, tally)
        return {**vars(tally), "failures": [wrong] if wrong else []}

    def tables(self, measured: Measured) -> list[str]:
        head = ["operation", "calls", "numbers", "largest error / bound", "without a bound"]
        rows = []
        for op in OPS:
            own = [result for piece, result in measured if piece["op"] == op]
            if not own:
                continue
            numbers = sum(result["numbers"] for result in own)
            unbounded = sum(result["open"] for result in own) / max(numbers, 1)
            rows.append(
                [
                    code(op),
                    f"{sum(result['cases'] for result in own):,}",
                    f"{numbers:,}",
                    f"{max(result['share'] for result in own):.2f}",
                    f"{unbounded:.2%}",
                ]
            )
        return [
            table(head, rows),
            "Without a bound are results next to or past the range of the dtype, and what follows "
            "from them.",
        ]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    given = json.loads(arguments[0])
    if "cases" in given:
        wrong = fuzz(given, Tally(), lambda case: print(command(case), flush=True))
    else:
        wrong = check(given, Tally())
    print(wrong or "right")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
