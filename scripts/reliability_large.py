"""The figure "large" of scripts/reliability.py: tensors of more than 2^31 elements, through every
kind of kernel, forward and backward.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as TF
from torch import Tensor

import torchbp.functional as F
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.compare import ulp
from tests.machine import free_memory

__all__ = ["KINDS", "Large"]

#: A block, and how many numbers behind 2^31 there are.
BLOCK = 2**20
BEYOND = 2**24
ELEMENTS = 2**31 + BEYOND
EVERY = 64  # of the blocks before the last BEYOND numbers, which are all compared

GIB = 2**30
NEEDED = 14 * GIB

#: What is compared: its name, what torchbp gave, what it should be in float64, what it may be off.
Compared = tuple[str, Tensor, Tensor, Tensor]


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers, other ones in every block."""
    source = torch.Generator().manual_seed(0)
    base = torch.randn(BLOCK, generator=source).to(dtype)
    x = torch.empty(shape, dtype=dtype)
    for k, block in enumerate(x.view(-1).split(BLOCK)):
        block.copy_(base.roll(k)[: len(block)])
    return x


def places(n: int, size: int) -> list[slice]:
    """The rows to compare, of n rows of this size: a part of the first, all of the last."""
    each = max(1, BLOCK // size)
    return [
        slice(first, min(first + each, n))
        for number, first in enumerate(range(0, n, each))
        if number % EVERY == 0 or (n - first) * size <= BEYOND + BLOCK
    ]


def same(name: str, got: Tensor, wanted: Tensor) -> Compared:
    """To one rounding of the dtype of what torchbp gave."""
    wide = wanted.double()
    return name, got, wide, 0.51 * ulp(wide, got.dtype)


def emptied(y: Tensor) -> None:
    """Give back the memory of a result whose gradient is still wanted. Of one that leaves it to the
    next result, which none is that is larger than all that is kept, it cannot be."""
    storage = y.untyped_storage()
    if storage.resizable():
        storage.resize_(0)


def elementwise(n: int) -> Iterator[Compared]:
    """relu of bfloat16."""
    x = filled(torch.bfloat16, n).requires_grad_()
    y = F.relu(x)
    for at in places(n, 1):
        yield same("the output", y[at], x[at].relu())
    dy = torch.full((), 3.0, dtype=x.dtype).expand(n)
    (dx,) = torch.autograd.grad(y, x, dy)
    for at in places(n, 1):
        yield same("the gradient", dx[at], 3.0 * (x[at] > 0))


def broadcast(n: int) -> Iterator[Compared]:
    """A matrix times a row, of bfloat16."""
    columns = 1024
    x = filled(torch.bfloat16, n // columns, columns).requires_grad_()
    row = filled(torch.bfloat16, columns).requires_grad_()
    y = F.multiply(x, row)
    for at in places(*x.shape):
        yield same("the output", y[at], x[at].double() * row.double())
    emptied(y)
    dy = torch.full((), 2.0, dtype=x.dtype).expand_as(x)  # products with it are exact
    dx, of_row = torch.autograd.grad(y, (x, row), dy)
    for at in places(*x.shape):
        yield same("the gradient of the matrix", dx[at], (2.0 * row).double().expand(x[at].shape))
    wanted, size = torch.zeros(2, columns, dtype=torch.float64)
    for block in x.detach().split(BLOCK // columns):
        wanted += 2.0 * block.double().sum(0)
        size += 2.0 * block.double().abs().sum(0)
    # PyTorch's sum, in float32 and parts.
    off = ulp(wanted, row.dtype) + 20 * 2.0**-24 * size
    yield "the gradient of the row", of_row, wanted, off


def cross_entropy(n: int, classes: int) -> Iterator[Compared]:
    """The sum over all rows, of bfloat16."""
    x = filled(torch.bfloat16, n // classes, classes).requires_grad_()
    target = torch.arange(x.shape[0]).mul_(7919).remainder_(classes)
    loss = F.cross_entropy(x, target, reduction="sum")
    wanted = 0.0
    for at in torch.arange(x.shape[0]).split(max(1, BLOCK // classes)):
        rows = slice(int(at[0]), int(at[-1]) + 1)
        wanted += float(
            TF.cross_entropy(x.detach()[rows].float(), target[rows], reduction="sum").double()
        )
    yield same("the loss", loss, torch.tensor(wanted))
    (dx,) = torch.autograd.grad(loss, x)
    for at in places(*x.shape):
        p = x[at].double().softmax(1)
        p[torch.arange(len(p)), target[at]] -= 1
        name, got, p, off = same("the gradient", dx[at], p)
        yield name, got, p, off + 1e-6  # of 1 - p, in float32


def reduction(n: int) -> Iterator[Compared]:
    """l2_penalty of bfloat16."""
    x = filled(torch.bfloat16, n).requires_grad_()
    y = F.l2_penalty([x])
    wanted = sum(block.double().square().sum() for block in x.detach().split(BLOCK))
    assert isinstance(wanted, Tensor)
    yield same("the output", y, wanted)
    (dx,) = torch.autograd.grad(y, x)
    for at in places(n, 1):
        yield same("the gradient", dx[at], 2.0 * x[at].double())


def linear_input(n: int) -> Iterator[Compared]:
    """linear of many numbers to few, of float32: it reads them twice."""
    features, out = 64, 2
    x = filled(torch.float32, n // features, features)
    weight = filled(torch.float32, out, features).requires_grad_()
    dy = filled(torch.float32, x.shape[0], out)
    y = F.linear(x, weight)
    for at in places(*x.shape):
        size = x[at].double().abs() @ weight.double().abs().mT
        yield "the output", y[at], x[at].double() @ weight.double().mT, 64 * 2.0**-24 * size
    (of_weight,) = torch.autograd.grad(y, weight, dy)
    wanted = torch.zeros(out, features, dtype=torch.float64)
    for part, upstream in zip(x.split(BLOCK // features), dy.split(BLOCK // features), strict=True):
        wanted += upstream.double().mT @ part.double()
    # The blocks are alike, and so is what each loses to a sum in float32 of a hundred thousand of
    # them: PyTorch has as much. Without the last numbers a 128th would be missing.
    off = torch.full_like(wanted, 2.0**-10 * float(wanted.abs().max()))
    yield "the gradient of the weight", of_weight, wanted, off


def linear_output(n: int) -> Iterator[Compared]:
    """linear of few numbers to many, of float32."""
    features, out = 2, 64
    x = filled(torch.float32, n // out, features)
    weight = filled(torch.float32, out, features)
    y = F.linear(x, weight)
    for at in places(*y.shape):
        size = x[at].double().abs() @ weight.double().abs().mT
        yield "the output", y[at], x[at].double() @ weight.double().mT, 3 * 2.0**-24 * size


def linear_gradient(n: int) -> Iterator[Compared]:
    """The gradient of linear's input, of float32; the input is one row, expanded."""
    features, out = 64, 2
    x = filled(torch.float32, 1, features).expand(n // features, features).requires_grad_()
    weight = filled(torch.float32, out, features)
    dy = filled(torch.float32, x.shape[0], out)
    (dx,) = torch.autograd.grad(F.linear(x, weight), x, dy)
    for at in places(*x.shape):
        size = dy[at].double().abs() @ weight.double().abs()
        yield "the gradient", dx[at], dy[at].double() @ weight.double(), 3 * 2.0**-24 * size


KINDS: dict[str, Callable[[int], Iterator[Compared]]] = {
    "relu": elementwise,
    "multiply, matrix and row": broadcast,
    "l2_penalty": reduction,
    "cross_entropy, 10 classes": lambda n: cross_entropy(n, 10),
    "cross_entropy, 1000 classes": lambda n: cross_entropy(n, 1000),
    "linear, large input": linear_input,
    "linear, large output": linear_output,
    "linear, large gradient": linear_gradient,
}


class Large(Figure):
    name = "large"
    title = "Large index"
    claim = (
        f"An operation of every kind of kernel on 2^31 + 2^{BEYOND.bit_length() - 1} elements, "
        "forward and backward, in bfloat16 (linear in float32, as it depends on the machine whose "
        "products half types take): "
        f"the last 2^{BEYOND.bit_length() - 1} and a {EVERY}th of the others are right to a "
        f"rounding of the dtype, against PyTorch in float64, and sums over all of them are."
    )
    unit = "elements"
    sample = 5e-4
    sources = ("scripts/reliability_large.py", "tests/compare.py", "torchbp/functions/*.py")

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        return [{"kind": kind, "elements": round(ELEMENTS * fraction)} for kind in KINDS]

    def size(self, piece: Piece) -> int:
        return int(piece["elements"])

    def obstacle(self, piece: Piece | None = None) -> str | None:
        free = free_memory()
        if free >= NEEDED:
            return None
        return f"it needs {NEEDED // GIB} GiB of free memory, {free / GIB:.1f} are there"

    def measure(self, piece: Piece) -> Result:
        compared = 0
        worst, wrong = 0.0, ""
        # One at a time, however many processes there are.
        with open(Path(tempfile.gettempdir()) / "torchbp-large-index", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            for name, got, wanted, allowed in KINDS[piece["kind"]](piece["elements"]):
                share = (
                    (got.detach().double() - wanted.detach()).abs() / allowed.detach()
                ).nan_to_num()
                compared += share.numel()
                worst = max(worst, float(share.max()))
                if not bool((share <= 1).all()) and not wrong:
                    wrong = (
                        f"{piece['kind']}: {name} is {float(share.max()):.3g} times as far off as "
                        f"it may be in {int((share > 1).sum()):,} of {share.numel():,} numbers"
                    )
        return {"compared": compared, "share": worst, "failures": [wrong] if wrong else []}

    def tables(self, measured: Measured) -> list[str]:
        rows = [
            [
                code(piece["kind"].split(",")[0]) + "".join(piece["kind"].partition(",")[1:]),
                f"{piece['elements']:,}",
                f"{result['compared']:,}",
                f"{result['share']:.2f}",
            ]
            for piece, result in measured
        ]
        return [table(["operation", "elements", "compared", "largest error / allowed"], rows)]
