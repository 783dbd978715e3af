"""The figure "malformed" of scripts/reliability.py: calls with one wrong argument, or with too few
or too many, generated.
"""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

import torchbp.functional as F
from scripts.reliability_determinism import same_bits
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.ops import DTYPES
from torchbp.graph.text import dtype_name

__all__ = ["Malformed"]

CALLS = 10_000
BLOCK = 100  # calls of a piece

Draw = random.Random
Maker = Callable[[Draw, Any], Any]


def full(*shape: int) -> Maker:
    """A tensor of this shape in the dtype of the call."""
    return lambda draw, dtype: torch.full(shape, 0.5, dtype=dtype)


def constant(value: Any) -> Maker:
    return lambda draw, dtype: value


#: What is never a tensor of floating numbers, whatever the dtype.
NO_TENSOR: list[Maker] = [
    *map(constant, ("text", b"text", 1.5, 3, [1.0], (), {}, object(), float, 1j, True)),
    lambda draw, dtype: np.ones((2, 3)),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.int64),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.bool),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.uint8),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.int8),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.uint16),
    lambda draw, dtype: torch.ones(2, 3).to(torch.float8_e4m3fn),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.complex32),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.complex64),
    lambda draw, dtype: torch.ones(2, 3, dtype=torch.complex128),
    lambda draw, dtype: torch.ones(2, 3, dtype=dtype).to_sparse(),
    lambda draw, dtype: torch.ones(2, 3, dtype=dtype).to_sparse_csr(),
    lambda draw, dtype: torch.ones(2, 3).to_mkldnn(),
    lambda draw, dtype: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8),
    lambda draw, dtype: torch.nested.nested_tensor([torch.ones(3, dtype=dtype)] * 2),
    lambda draw, dtype: [torch.ones(2, 3, dtype=dtype)],
    lambda draw, dtype: iter([torch.ones(2, 3, dtype=dtype)]),
]  # fmt: skip
REQUIRED = [*NO_TENSOR, constant(None)]
NO_NUMBER: list[Maker] = [*map(constant, ("1", None, [1.0], 1j, True, {}, float, 10**400, b"1"))]
NO_NAME: list[Maker] = [*map(constant, ("", "ReLU", "no such", b"relu", 3, 1.5, [], {}, True))]
NO_INTEGER: list[Maker] = [*map(constant, (1.5, "1", None, [], True, 1j))]


def other_dtype(*shape: int) -> Maker:
    def make(draw: Draw, dtype: Any) -> Tensor:
        return torch.ones(shape, dtype=draw.choice([d for d in DTYPES if d != dtype]))

    return make


def elsewhere(*shape: int) -> Maker:
    """A tensor on another device than the others."""
    return lambda draw, dtype: torch.ones(shape, dtype=dtype, device="meta")


def apart(*shape: int) -> list[Maker]:
    """A tensor that does not go with the others."""
    return [other_dtype(*shape), elsewhere(*shape)]


def with_gradient(*shape: int) -> Maker:
    """For an argument that has none."""
    return lambda draw, dtype: torch.ones(shape, dtype=dtype, requires_grad=True)


class Call:
    """An operation, a right value for each argument, and wrong ones."""

    def __init__(self, op: str, **arguments: tuple[Maker, list[Maker]]) -> None:
        self.op = op
        self.right = {name: right for name, (right, _) in arguments.items()}
        self.wrong = {name: wrong for name, (_, wrong) in arguments.items()}
        self.function: Callable[..., Tensor] = getattr(F, op)


def one(name: str, parameter: str | None = None) -> Call:
    given: dict[str, Any] = {"x": (full(2, 3), REQUIRED)}
    if parameter:
        given[parameter] = (constant(0.5), [*NO_NUMBER, full(2)])
    return Call(name, **given)


def two(name: str) -> Call:
    wrong = [*REQUIRED, full(4), full(2, 4), full(3, 3), full(2, 2, 2), *apart(2, 3)]
    return Call(name, a=(full(2, 3), wrong), b=(full(2, 3), wrong))


def target_of(draw: Draw, dtype: Any) -> Tensor:
    return torch.tensor([0, 2])


def classes(*values: int) -> Maker:
    return lambda draw, dtype: torch.tensor(values)


def listed(*shapes: tuple[int, ...]) -> Maker:
    return lambda draw, dtype: [torch.full(shape, 0.5, dtype=dtype) for shape in shapes]


MALFORMED: dict[str, Call] = {
    call.op: call
    for call in (
        one("exp"), one("reciprocal"), one("relu"), one("sigmoid"), one("tanh"),
        one("scale", "a"), one("shift", "c"), one("leaky_relu", "negative_slope"),
        one("elu", "alpha"),
        two("add"), two("multiply"), two("maximum"),
        Call(
            "matmul",
            x=(full(2, 3), [*REQUIRED, full(), full(4), full(2, 4), *apart(2, 3)]),
            w=(full(3, 2), [*REQUIRED, full(), full(4), full(4, 3), *apart(3, 2)]),
        ),
        Call(
            "linear",
            x=(full(2, 3), [*REQUIRED, full(), full(2), full(2, 4), *apart(2, 3)]),
            weight=(full(4, 3), [*REQUIRED, full(), full(3), full(4, 2), full(4, 3, 1),
                                 *apart(4, 3)]),
            bias=(full(4), [*NO_TENSOR, full(), full(3), full(4, 1), *apart(4)]),
            activation=(constant("relu"), NO_NAME),
        ),
        Call(
            "maxout",
            x=(full(2, 3), [*REQUIRED, full(), full(2), full(2, 4), *apart(2, 3)]),
            weight=(full(2, 4, 3), [*REQUIRED, full(), full(4, 3), full(2, 4, 2),
                                    *apart(2, 4, 3)]),
            bias=(full(2, 4), [*NO_TENSOR, full(), full(4), full(4, 2), *apart(2, 4)]),
        ),
        Call(
            "cross_entropy",
            input=(full(2, 3), [*REQUIRED, full(), full(4), full(2, 3, 2), full(3, 3),
                                      elsewhere(2, 3)]),
            target=(target_of, [
                *map(constant, ("text", None, 1.5, [0, 2], {}, True)),
                classes(0), classes(0, 3), classes(0, -1), classes(0, 1, 2),
                lambda draw, dtype: torch.ones(2, dtype=torch.bool),
                full(2), full(3, 2), full(2, 3, 1), elsewhere(2, 3),
                lambda draw, dtype: torch.tensor([0, 2], device="meta"),
                lambda draw, dtype: torch.tensor([0, 2], dtype=torch.int32),
                lambda draw, dtype: torch.tensor([0, 2]).to_sparse(),
            ]),
            weight=(full(3), [
                *NO_TENSOR, full(), full(2), full(2, 3), *apart(3), with_gradient(3),
            ]),
            ignore_index=(constant(-100), NO_INTEGER),
            reduction=(constant("mean"), [*NO_NAME, constant("average"), constant(None)]),
            label_smoothing=(constant(0.1), [*NO_NUMBER, constant(-0.1), constant(1.5),
                                             constant(float("nan"))]),
        ),
        Call(
            "mlp",
            x=(full(2, 3), [*REQUIRED, full(), full(2), full(2, 4), *apart(2, 3)]),
            weights=(listed((4, 3), (2, 4)), [
                *map(constant, ("text", 1.5, {}, None, [], [None], ["text"])), full(2, 3),
                listed((4, 3), (2, 3)), listed((4, 3), (2,)),
                listed((4, 2), (2, 4)), listed((4, 3)), listed((4, 3), (2, 4), (2, 2)),
                lambda draw, dtype: [torch.ones(4, 3, dtype=dtype).to_sparse()] * 2,
                lambda draw, dtype: [torch.ones(4, 3, dtype=dtype), elsewhere(2, 4)(draw, dtype)],
            ]),
            biases=(listed((4,), (2,)), [
                *map(constant, ("text", 1.5, {}, [None, "text"], ["text", "text"])), full(2, 3),
                listed((4,)), listed((4,), (3,)), listed((4, 1), (2,)),
            ]),
            activation=(constant("tanh"), [*NO_NAME, constant(None)]),
        ),
        Call("l2_penalty", tensors=(listed((2, 3), (4,)), [
            *map(constant, ("text", 1.5, {}, None, [], [None], ["text"], [1.5])),
            lambda draw, dtype: [torch.ones(3, dtype=dtype), elsewhere(3)(draw, dtype)],
            lambda draw, dtype: [torch.ones(3, dtype=dtype), other_dtype(3)(draw, dtype)],
            lambda draw, dtype: [torch.ones(2, 3, dtype=dtype).to_sparse()],
            lambda draw, dtype: [torch.nested.nested_tensor([torch.ones(3, dtype=dtype)])],
        ])),
    )
}  # fmt: skip


@contextmanager
def silent() -> Iterator[None]:
    """Without PyTorch's warnings that nested, sparse and complex half tensors are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


#: A call with wrong arguments altogether: (how, positional, by name, what the message names).
Given = tuple[str, list[Any], dict[str, Any], set[str]]


def missing(call: Call, right: dict[str, Any], draw: Draw) -> Given:
    """Without an argument that has no default."""
    parameters = inspect.signature(call.function).parameters.values()
    name = draw.choice([p.name for p in parameters if p.default is p.empty])
    return f"no {name}", [], {other: right[other] for other in right if other != name}, {name}


def too_many(call: Call, right: dict[str, Any], draw: Draw) -> Given:
    return "one too many", [*right.values(), draw.choice(NO_NAME)(draw, None)], {}, {"positional"}


def unknown(call: Call, right: dict[str, Any], draw: Draw) -> Given:
    name = draw.choice(["inplace", "out", "dtype", "size_average", "X", "input_"])
    return f"{name}=None", [], {**right, name: None}, {name}


def twice(call: Call, right: dict[str, Any], draw: Draw) -> Given:
    name = next(iter(right))
    return f"{name} twice", [right[name]], right, {name}


Structure = Callable[[Call, dict[str, Any], Draw], Given]
STRUCTURES: list[Structure] = [missing, too_many, unknown, twice]


def malformed(call: Call, right: dict[str, Any], draw: Draw, dtype: Any) -> Given:
    """Right arguments with one that is wrong: mostly in its value."""
    if draw.random() < 0.1:
        return draw.choice(STRUCTURES)(call, right, draw)
    name = draw.choice(list(call.wrong))
    value = draw.choice(call.wrong[name])(draw, dtype)
    return f"{name}={describe(value)}", [], {**right, name: value}, set(right)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        size = "nested" if value.is_nested else list(value.shape)
        return f"<{dtype_name(value.dtype)} {size} {value.layout} {value.device}>"
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)[:40]


def told(call: Call, error: Exception, names: set[str]) -> bool:
    """Whether a message names the operation and one of these."""
    text = str(error)
    return call.op in text and re.search(rf"\b({'|'.join(names)})\b", text) is not None


class Malformed(Figure):
    name = "malformed"
    title = "Malformed calls"
    claim = (
        f"{CALLS:,} calls with one wrong argument (no tensor, another dtype, shape, device or "
        "layout, sparse, quantized, nested, complex, another name or number), or one that is "
        "missing, unknown, given twice or too many, in processes of their own: each raises "
        "TypeError, ValueError, IndexError or RuntimeError, naming the operation and an argument "
        "(of two that do not fit, either; of too many, none); no process dies of it; and the same "
        "call with right arguments then gives the same bits."
    )
    unit = "calls"
    sample = 0.3
    sources = (
        "scripts/reliability_malformed.py",
        "torchbp/functional.py",
        "torchbp/functions/*.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        return [{"seed": seed} for seed in range(max(1, round(CALLS * fraction) // BLOCK))]

    def size(self, piece: Piece) -> int:
        return BLOCK

    @silent()
    def measure(self, piece: Piece) -> Result:
        draw = random.Random(piece["seed"])
        wrong: list[str] = []
        raised: dict[str, int] = {}
        for _ in range(BLOCK):
            call = MALFORMED[draw.choice(list(MALFORMED))]
            dtype = draw.choice(DTYPES)
            right = {name: make(draw, dtype) for name, make in call.right.items()}
            first = next(iter(right.values()))
            if isinstance(first, Tensor):
                first.requires_grad_(draw.random() < 0.5)
            before = call.function(**right).detach()
            how, positional, by_name, names = malformed(call, right, draw, dtype)
            about = f"{call.op} in {dtype_name(dtype)}, seed {piece['seed']}: {how}"
            try:
                call.function(*positional, **by_name)
            except (TypeError, ValueError, IndexError, RuntimeError) as error:
                kind = type(error).__name__
                raised[kind] = raised.get(kind, 0) + 1
                if not told(call, error, names):
                    wrong.append(f"{about}: {kind}: {str(error).splitlines()[0][:120]}")
            except Exception as error:
                wrong.append(f"{about}: {type(error).__name__}: {error}")
            else:
                wrong.append(f"{about}: is taken")
            if not same_bits(before, call.function(**right).detach()):
                wrong.append(f"{about}: the next call gives something else")
        return {"raised": raised, "failures": wrong}

    def tables(self, measured: Measured) -> list[str]:
        total: dict[str, int] = {}
        for _, result in measured:
            for kind, times in result["raised"].items():
                total[kind] = total.get(kind, 0) + times
        rows = [[code(kind), f"{times:,}"] for kind, times in sorted(total.items())]
        return [table(["raised", "calls"], rows)]
