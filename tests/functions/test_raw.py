"""The checks in csrc: what the raw operations refuse, below the checks of torchbp.functions.

The Functions run the same operations and explain in Python what these refuse, so that a check which
is missing here would read or write memory that is not the tensor's. Each call is one right call
(tried as well) with one argument changed. The message names the operation and the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from torchbp.functions.table import ROWS

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
INDICES = torch.tensor([0, 2])


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


ELSEWHERE = torch.ones(2, 3, device="meta")
WHOLE = torch.ones(2, 3, dtype=torch.int64)
DOUBLE = torch.ones(2, 3, dtype=torch.float64)


def call(op: str, *args: Any) -> Any:
    """The kernel itself: whatever the devices of the tensors are, the CPU's."""
    return getattr(torch.ops.torchbp_kernels, op).default.redispatch(CPU, *args)


@dataclass(frozen=True)
class Right:
    """A right call: operation and arguments."""

    op: str
    arguments: tuple[tuple[str, Any], ...]


def right(op: str, **arguments: Any) -> Right:
    return Right(op, tuple(arguments.items()))


@dataclass(frozen=True)
class Wrong:
    call: Right
    changed: tuple[tuple[str, Any], ...]
    message: str

    def __str__(self) -> str:
        return f"{self.call.op}-{'-'.join(name for name, _ in self.changed)}-{self.message}"


def wrong(call: Right, message: str, **changed: Any) -> Wrong:
    assert changed.keys() <= dict(call.arguments).keys()
    return Wrong(call, tuple(changed.items()), message)


X = ones(2, 3)
LINEAR = right("linear", x=X, weight=ones(4, 3), bias=ones(4), activation="relu", parameter=0.0)
LINEAR_BACKWARD = right(
    "linear_backward", dy=ones(2, 4), x=X, weight=ones(4, 3), saved=ones(2, 4), activation="relu",
    parameter=0.0, need_x=True, need_weight=True, need_bias=True,
)  # fmt: skip
MLP = right("mlp", x=X, weights=[ones(4, 3), ones(2, 4)], biases=[ones(4), ones(2)],
            activation="relu", parameter=0.0)  # fmt: skip
MLP_BACKWARD = right(
    "mlp_backward", dy=ones(2, 2), x=X, weights=[ones(4, 3), ones(2, 4)], saved=[ones(2, 4)],
    activation="relu", parameter=0.0, need_x=True, need_weights=[1, 1], need_biases=[1, 1],
)  # fmt: skip
#: With what mlp saved laid out as our own products leave it.
OWN_BACKWARD = Right(
    "mlp_backward",
    tuple(
        (name, [ones(4, 2).T] if name == "saved" else value)
        for name, value in MLP_BACKWARD.arguments
    ),
)
#: In float64 the layers run one by one, on PyTorch's products.
WIDE_MLP = right("mlp", x=DOUBLE, weights=[ones(4, 3).double(), ones(2, 4).double()],
                 biases=[ones(4).double(), ones(2).double()], activation="relu",
                 parameter=0.0)  # fmt: skip
WIDE_BACKWARD = right(
    "mlp_backward", dy=ones(2, 2).double(), x=DOUBLE,
    weights=[ones(4, 3).double(), ones(2, 4).double()], saved=[ones(2, 4).double()],
    activation="relu", parameter=0.0, need_x=True, need_weights=[1, 1], need_biases=[1, 1],
)  # fmt: skip
#: An activation whose gradient reads its input.
TWO_SAVED = right(
    "mlp_backward", dy=ones(2, 2), x=X, weights=[ones(4, 3), ones(2, 4)],
    saved=[ones(2, 4), ones(2, 4)], activation="elu", parameter=1.0, need_x=True,
    need_weights=[1, 1], need_biases=[1, 1],
)  # fmt: skip
OPTIONS = {"ignore_index": -100, "reduction": 1, "label_smoothing": 0.0}
CE = right("softmax_ce", input=X, target=INDICES, weight=ones(3), **OPTIONS)
CE_SOFT = right("softmax_ce", input=X, target=ones(2, 3), weight=None, **OPTIONS)
CE_GRADIENT = right("softmax_ce_with_gradient", input=X, target=INDICES, weight=None, **OPTIONS)
CE_BACKWARD = right(
    "softmax_ce_backward", dloss=ones(), input=X, target=ones(2, 3), weight=None, lse=ones(2),
    total=ones(), **OPTIONS, need_input=True, need_target=True,
)  # fmt: skip
INDEX_BACKWARD = right(
    "softmax_ce_backward", dloss=ones(), input=X, target=INDICES, weight=None, lse=ones(2),
    total=ones(), **OPTIONS, need_input=True, need_target=False,
)  # fmt: skip
BYTES = torch.zeros(2, 3, dtype=torch.uint8)
PIECES = right("max_pieces", z=ones(2, 5, 3))
PIECES_BACKWARD = right("max_pieces_backward", dy=ones(2, 3), index=BYTES, pieces=2)
PENALTY = right("l2_penalty", tensors=[X, ones(4)])

FLOATING = "wants dtype float64, float32, bfloat16 or float16"
OTHER = "has another dtype than the first argument"
DEVICE = "is on another device than the first argument"


def of_rows() -> list[Wrong]:
    """Each row's forward and gradient."""
    found = []
    for row in ROWS.values():
        extra = {row.parameter: 0.5} if row.parameter else {}
        if len(row.inputs) == 1:
            found.append(wrong(right(row.name, x=X, **extra), f"x {FLOATING}", x=WHOLE))
            saved = {} if not row.saves else {"saved": X}
            backward = right(f"{row.name}_backward", dy=X, **saved, **extra)
            first = "dy" if saved else "x"
            found.append(wrong(backward, f"{first} {FLOATING}", dy=WHOLE))
            if saved:
                found += [
                    wrong(backward, f"saved {OTHER}", saved=DOUBLE),
                    wrong(backward, f"saved {DEVICE}", saved=ELSEWHERE),
                    wrong(backward, r"saved wants shape \(2, 3\), got \(3\)", saved=ones(3)),
                    wrong(backward, r"saved wants shape \(2, 3\), got \(2, 4\)", saved=ones(2, 4)),
                ]
            continue
        found += [
            wrong(right(row.name, a=X, b=X), f"a {FLOATING}", a=WHOLE),
            wrong(right(row.name, a=X, b=X), f"b {OTHER}", b=DOUBLE),
            wrong(right(row.name, a=X, b=X), f"b {DEVICE}", b=ELSEWHERE),
            wrong(right(row.name, a=X, b=ones(3)), r"shapes \(2, 3\) and \(2\) do not", b=ones(2)),
            wrong(right(row.name, a=X, b=X), r"shapes \(2\) and \(2, 3\) do not", a=ones(2)),
        ]
        for suffix in ("backward", "backward_a", "backward_b"):
            backward = right(f"{row.name}_{suffix}", dy=X, a=X, b=ones(3))
            found += [
                wrong(backward, f"dy {FLOATING}", dy=WHOLE, a=WHOLE, b=WHOLE),
                wrong(backward, f"a {OTHER}", a=DOUBLE),
                wrong(backward, f"b {OTHER}", b=DOUBLE),
                wrong(backward, f"a {DEVICE}", a=ELSEWHERE),
                wrong(backward, f"b {DEVICE}", b=ELSEWHERE),
                wrong(backward, r"dy wants shape \(2, 3\), got \(3\)", dy=ones(3)),
                wrong(backward, r"dy wants shape \(2, 3\), got \(3\)", dy=ones(3), b=ones(2, 3)),
                wrong(backward, r"dy wants shape \(3\), got \(2, 3\)", a=ones(3)),
                wrong(backward, "do not broadcast", b=ones(2)),
            ]
    return found


def unlike_first(good: Right, name: str, shape: tuple[int, ...]) -> list[Wrong]:
    """An argument of another dtype, or on another device, than the first one."""
    return [
        wrong(good, f"{name} {OTHER}", **{name: ones(*shape).double()}),
        wrong(good, f"{name} {DEVICE}", **{name: torch.ones(*shape, device="meta")}),
    ]


OF_LINEAR = [
    wrong(LINEAR, f"x {FLOATING}", x=WHOLE),
    wrong(LINEAR, r"weight wants shape \(out_features, in_features\)", weight=ones(3)),
    wrong(LINEAR, r"weight wants shape \(out_features, in_features\)", weight=ones(4, 3, 1)),
    wrong(LINEAR, r"x wants shape \(..., 3\), got \(\)", x=ones()),
    wrong(LINEAR, r"x wants shape \(..., 3\), got \(2, 4\)", x=ones(2, 4)),
    wrong(LINEAR, r"bias wants shape \(4\), got \(3\)", bias=ones(3)),
    wrong(LINEAR, r"bias wants shape \(4\), got \(4, 1\)", bias=ones(4, 1)),
    *unlike_first(LINEAR, "weight", (4, 3)),
    *unlike_first(LINEAR, "bias", (4,)),
    wrong(LINEAR_BACKWARD, f"dy {FLOATING}", dy=ones(2, 4).long()),
    wrong(LINEAR_BACKWARD, r"dy wants shape \(..., out_features\), got a number", dy=ones()),
    wrong(LINEAR_BACKWARD, r"x wants shape \(2, 3\), got \(\)", x=ones()),
    wrong(LINEAR_BACKWARD, r"x wants shape \(2, 3\), got \(2, 4\)", x=ones(2, 4)),
    wrong(LINEAR_BACKWARD, r"x wants shape \(2, 3\), got \(1, 3\)", x=ones(1, 3)),
    *(
        wrong(LINEAR_BACKWARD, r"weight wants shape \(4, in_features\)", weight=ones(*shape))
        for shape in ((4,), (4, 3, 1), (3, 3))
    ),
    *(
        wrong(LINEAR_BACKWARD, rf"saved wants shape \(2, 4\), got \({text}\)", saved=ones(*shape))
        for shape, text in (((1, 4), "1, 4"), ((2, 3), "2, 3"), ((4,), "4"))
    ),
    *unlike_first(LINEAR_BACKWARD, "x", (2, 3)),
    *unlike_first(LINEAR_BACKWARD, "weight", (4, 3)),
    *unlike_first(LINEAR_BACKWARD, "saved", (2, 4)),
    # What is read may not be missing; what is not is looked at all the same.
    *(
        wrong(LINEAR_BACKWARD, f"{name} wants a tensor for what is asked, got None", **{name: None})
        for name in ("x", "weight", "saved")
    ),
    wrong(LINEAR_BACKWARD, r"x wants shape \(2, 5\), got \(1, 5\)", x=ones(1, 5), weight=None,
          need_x=False),
    wrong(LINEAR_BACKWARD, r"x wants shape \(2, 4\), got \(\)", x=ones(), weight=None,
          need_x=False),
    wrong(LINEAR_BACKWARD, f"x {OTHER}", x=DOUBLE, need_weight=False),
    wrong(LINEAR_BACKWARD, r"weight wants shape \(4, in_features\)", weight=ones(3, 3),
          need_x=False),
    *(
        wrong(good, "activation wants the name of a unary gate", activation=name)
        for good in (LINEAR, LINEAR_BACKWARD)
        for name in ("no such", "scale")
    ),
]  # fmt: skip


OF_MLP = [
    wrong(MLP, "weights wants at least one matrix", weights=[], biases=[]),
    wrong(MLP, "biases wants none or 2, got 1", biases=[ones(4)]),
    wrong(MLP, "biases wants none or 2, got 3", biases=[ones(4), ones(2), ones(2)]),
    wrong(MLP, f"x {FLOATING}", x=WHOLE),
    wrong(MLP, f"x {FLOATING}", x=torch.tensor(1)),
    wrong(MLP, r"x wants shape \(..., in_features\), got a number", x=ones()),
    wrong(MLP, "activation wants the name of a unary gate", activation="no such"),
    *(
        row
        for good in (MLP, WIDE_MLP)
        for dtype in (dict(good.arguments)["x"].dtype,)
        for row in (
            wrong(good, r"x wants shape \(..., 3\), got \(2, 4\)", x=ones(2, 4).to(dtype)),
            wrong(good, r"weight wants shape \(out_features, in_features\)",
                  weights=[ones(4, 3).to(dtype), ones(4).to(dtype)]),
            wrong(good, r"x wants shape \(..., 5\), got \(2, 4\)",
                  weights=[ones(4, 3).to(dtype), ones(2, 5).to(dtype)]),
            wrong(good, r"bias wants shape \(2\), got \(3\)",
                  biases=[ones(4).to(dtype), ones(3).to(dtype)]),
            wrong(good, f"weight {OTHER}", weights=[ones(4, 3).to(dtype), ones(2, 4).half()]),
        )
    ),
    *(
        row
        for good in (MLP_BACKWARD, OWN_BACKWARD, WIDE_BACKWARD)
        for own in (dict(good.arguments),)
        for dtype, other in ((own["x"].dtype, torch.float16),)
        for row in (
            wrong(good, f"x {FLOATING}", x=WHOLE),
            wrong(good, f"dy {OTHER}", dy=ones(2, 2).to(other)),
            wrong(good, f"dy {DEVICE}", dy=torch.ones(2, 2, device="meta", dtype=dtype)),
            wrong(good, r"dy wants shape \(2, 2\), got \(2, 3\)", dy=ones(2, 3).to(dtype)),
            wrong(good, r"dy wants shape \(2, 2\), got \(3, 2\)", dy=ones(3, 2).to(dtype)),
            wrong(good, f"saved {OTHER}", saved=[ones(2, 4).to(other)]),
            wrong(good, f"saved {DEVICE}", saved=[torch.ones(2, 4, device="meta", dtype=dtype)]),
            wrong(good, r"saved wants shape \(2, 4\), got \(2, 5\)",
                  saved=[ones(5, 2).T.to(dtype)]),
            wrong(good, r"saved wants shape \(2, 4\), got \(1, 4\)", saved=[ones(1, 4).to(dtype)]),
            wrong(good, r"weight wants shape \(out_features, in_features\)",
                  weights=[ones(4, 3).to(dtype), ones(4).to(dtype)]),
            wrong(good, r"x wants shape \(..., 2\), got \(2, 3\)",
                  weights=[ones(4, 2).to(dtype), ones(2, 4).to(dtype)]),
            wrong(good, r"x wants shape \(..., 5\), got \(2, 4\)",
                  weights=[ones(4, 3).to(dtype), ones(2, 5).to(dtype)]),
            wrong(good, f"weight {OTHER}", weights=[ones(4, 3).to(dtype), ones(2, 4).to(other)]),
        )
    ),
    wrong(TWO_SAVED, r"saved wants shape \(2, 4\), got \(2, 3\)", saved=[ones(2, 3), ones(2, 4)]),
    wrong(TWO_SAVED, r"saved wants shape \(2, 4\), got \(1, 4\)", saved=[ones(2, 4), ones(1, 4)]),
    wrong(MLP_BACKWARD, "wants what mlp returned", saved=[]),
    wrong(MLP_BACKWARD, "wants what mlp returned", saved=[ones(2, 4), ones(2, 4)]),
    wrong(MLP_BACKWARD, "wants what mlp returned", weights=[], saved=[], need_weights=[],
          need_biases=[]),
    wrong(MLP_BACKWARD, "wants what mlp returned", need_weights=[1]),
    wrong(MLP_BACKWARD, "wants what mlp returned", need_weights=[1, 1, 1]),
    wrong(MLP_BACKWARD, "wants what mlp returned", need_biases=[1]),
    wrong(MLP_BACKWARD, "wants what mlp returned", need_biases=[1, 1, 1]),
    wrong(MLP_BACKWARD, "activation wants the name of a unary gate", activation="no such"),
]  # fmt: skip


def of_cross_entropy() -> list[Wrong]:
    found = []
    for good in (CE, CE_SOFT, CE_GRADIENT, CE_BACKWARD, INDEX_BACKWARD):
        own = dict(good.arguments)
        soft = own["target"].is_floating_point()
        found += [
            wrong(good, f"input {FLOATING}", input=WHOLE),
            wrong(good, r"input wants shape \(N, C\), got \(2, 3, 1\)", input=ones(2, 3, 1)),
            wrong(good, r"input wants shape \(N, C\), got \(3\)", input=ones(3)),
            wrong(good, "reduction wants", reduction=3),
            wrong(good, "reduction wants", reduction=-1),
            wrong(good, f"target {OTHER}", target=DOUBLE),
            wrong(good, f"target {DEVICE}", target=own["target"].to("meta")),
            wrong(good, f"weight {OTHER}", weight=ones(3).double()),
            wrong(good, f"weight {DEVICE}", weight=torch.ones(3, device="meta")),
            wrong(good, r"weight wants shape \(3\), got \(2\)", weight=ones(2)),
            wrong(good, r"weight wants shape \(3\), got \(1, 3\)", weight=ones(1, 3)),
        ]
        found += [
            wrong(good, r"target wants shape \(2, 3\), got \(2\)", target=ones(2)),
            wrong(good, r"target wants shape \(2, 3\), got \(3, 2\)", target=ones(3, 2)),
            wrong(good, r"target wants shape \(2\), got \(3\)",
                  target=torch.zeros(3, dtype=torch.int64)),
            wrong(good, r"target wants shape \(2\), got \(2, 1\)", target=INDICES.unsqueeze(1)),
        ] if good.op != "softmax_ce_backward" or soft else []  # fmt: skip
    for good in (CE, CE_GRADIENT):
        for bad, row in ((3, 1), (-1, 1), (2**40, 1)):
            target = torch.tensor([0, bad])
            found.append(wrong(good, f"target {bad} in row {row} is out of range", target=target))
        found.append(wrong(good, "target 7 in row 0 is out of range", target=torch.tensor([7, 0])))
    found.append(wrong(CE_GRADIENT, r"reduction wants 1 \(mean\) or 2 \(sum\), got 0", reduction=0))
    good = CE_BACKWARD
    found += [
        wrong(good, f"dloss {OTHER}", dloss=ones().double()),
        wrong(good, f"dloss {DEVICE}", dloss=torch.ones((), device="meta")),
        wrong(good, r"dloss wants shape \(\), got \(2\)", dloss=ones(2)),
        wrong(good, r"dloss wants shape \(2\), got \(\)", reduction=0),
        wrong(good, r"lse wants shape \(2\), got \(3\)", lse=ones(3)),
        wrong(good, f"lse {DEVICE}", lse=torch.ones(2, device="meta")),
        wrong(good, f"total {DEVICE}", total=torch.ones((), device="meta")),
        wrong(good, "lse and total want what softmax_ce returned", lse=ones(2).double()),
        wrong(good, "lse and total want what softmax_ce returned", total=ones().double()),
        wrong(good, "lse and total want what softmax_ce returned", total=ones(2)),
        wrong(INDEX_BACKWARD, "class indices have no gradient", need_target=True),
    ]
    return found


OTHERS = [
    wrong(PIECES, f"z {FLOATING}", z=torch.ones(2, 5, 3, dtype=torch.int64)),
    *(
        wrong(PIECES, r"z wants shape \(..., pieces, out\) with 1 to 256 pieces", z=ones(*shape))
        for shape in ((), (3,), (2, 0, 3), (2, 257, 3))
    ),
    wrong(PIECES_BACKWARD, f"dy {FLOATING}", dy=WHOLE),
    wrong(PIECES_BACKWARD, r"index wants shape \(2, 3\), got \(3\)", index=BYTES[0]),
    wrong(PIECES_BACKWARD, r"index wants shape \(2, 3\), got \(2, 2\)", index=BYTES[:, :2]),
    wrong(PIECES_BACKWARD, f"index {DEVICE}", index=BYTES.to("meta")),
    wrong(PIECES_BACKWARD, "index wants what max_pieces returned", index=BYTES.int()),
    wrong(PIECES_BACKWARD, "index wants what max_pieces returned", dy=ones(), index=BYTES[0, 0]),
    wrong(PIECES_BACKWARD, "pieces wants 1 to 256, got 0", pieces=0),
    wrong(PIECES_BACKWARD, "pieces wants 1 to 256, got -1", pieces=-1),
    wrong(PIECES_BACKWARD, "pieces wants 1 to 256, got 257", pieces=257),
    wrong(PENALTY, "tensors wants at least one tensor", tensors=[]),
    wrong(PENALTY, rf"tensors\[0\] {FLOATING}", tensors=[WHOLE]),
    wrong(PENALTY, f"tensors {OTHER}", tensors=[X, DOUBLE]),
    wrong(PENALTY, f"tensors {DEVICE}", tensors=[X, ELSEWHERE]),
]

WRONG = [
    *of_rows(), *OF_LINEAR, *OF_MLP, *of_cross_entropy(),
    *OTHERS,
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_refused(case: Wrong) -> None:
    given = dict(case.call.arguments)
    call(case.call.op, *given.values())
    given.update(case.changed)
    # The three of the loss share what refuses a reduction or a target.
    name = "softmax_ce" if case.call.op.startswith("softmax_ce") else case.call.op
    with pytest.raises(RuntimeError, match=f"torchbp::{name}.*: .*{case.message}"):
        call(case.call.op, *given.values())


EDGES: list[Callable[[], Any]] = [
    lambda: call("max_pieces", ones(1, 3)),
    lambda: call("max_pieces", ones(256, 3)),
    lambda: call("max_pieces", ones(3, 1)),
    lambda: call("max_pieces_backward", ones(3), BYTES[0], 1),
    lambda: call("max_pieces_backward", ones(3), BYTES[0], 256),
    lambda: call("linear", ones(3), ones(4, 3), None, "none", 0.0),
    lambda: call("mlp", ones(3), [ones(4, 3)], [], "relu", 0.0),
    lambda: call("mlp_backward", ones(2, 4), X, [ones(4, 3)], [], "relu", 0.0, True, [1], []),
    lambda: call("softmax_ce", X, INDICES, None, -100, 0, 0.0),
    lambda: call("softmax_ce", X, INDICES, None, -100, 2, 0.0),
    lambda: call("softmax_ce_with_gradient", X, INDICES, None, -100, 2, 0.0),
    lambda: call("add", ones(1, 3), ones(2, 1)),
    lambda: call("add", ones(2, 1), ones(3)),
    lambda: call("add_backward", ones(2, 3), ones(1, 3), ones(2, 1)),
    lambda: call("multiply_backward", X, X, X),
    lambda: call("l2_penalty", [X]),
]


@pytest.mark.parametrize("edge", EDGES)
def test_just_within(edge: Callable[[], Any]) -> None:
    """The last that is allowed, next to what is refused."""
    edge()
