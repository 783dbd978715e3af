"""What a Function keeps for backward: of its inputs and its output, what PyTorch's operation keeps.

Neither memory nor a change in place before backward may tell the two apart, whichever of the
inputs require grad. cross_entropy alone is left out: it keeps the logits, where PyTorch keeps a
copy of their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import torchbp
import torchbp.functional as F
from tests.compare import assert_same
from tests.peers import CASES, Case, subsets

FREE = [
    pytest.param(case, free, id=f"{case}-{''.join(map(str, free))}")
    for case in CASES
    for free in subsets(len(case.shapes))
]


class Run(NamedTuple):
    """Leaves, the inputs computed from them, and the output."""

    leaves: list[Tensor]
    inputs: list[Tensor]
    y: Tensor

    def gradients(self, **options: Any) -> list[Tensor]:
        upstream = torch.linspace(-1, 1, self.y.numel(), dtype=self.y.dtype).view_as(self.y)
        free = [leaf for leaf in self.leaves if leaf.requires_grad]
        return list(torch.autograd.grad(self.y, free, upstream, **options))

    def kept(self, saved: set[int]) -> set[str]:
        """Which of the inputs and the output share memory with what was saved."""
        named = {f"input {i}": t for i, t in enumerate(self.inputs)} | {"output": self.y}
        return {name for name, t in named.items() if t.untyped_storage().data_ptr() in saved}


def run(f: Callable[..., Tensor], case: Case, free: tuple[int, ...]) -> Run:
    torch.manual_seed(0)
    leaves = [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in case.shapes]
    for i in free:
        leaves[i].requires_grad_()
    inputs = [leaf.clone() for leaf in leaves]  # what may be changed in place
    return Run(leaves, inputs, f(*inputs))


def run_and_record(f: Callable[..., Tensor], case: Case, free: tuple[int, ...]) -> set[str]:
    """Which inputs, and whether the output, are kept."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)  # alive until all is compared, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        done = run(f, case, free)
    return done.kept({tensor.untyped_storage().data_ptr() for tensor in saved})


@pytest.mark.parametrize(("case", "free"), FREE)
def test_no_more_is_kept_than_by_pytorch(case: Case, free: tuple[int, ...]) -> None:
    ours, theirs = (run_and_record(f, case, free) for f in (case.ours, case.theirs))
    if case.name.startswith("mlp") and 1 not in free and {0, 3} & {*free}:
        theirs |= {"input 0"}  # from which a second derivative computes the hidden layers again
    assert ours <= theirs


@pytest.mark.parametrize(("case", "free"), FREE)
def test_what_is_not_kept_may_change(case: Case, free: tuple[int, ...]) -> None:
    """A change in place is noticed where it matters, and else changes no gradient."""
    wanted = run(case.theirs, case, free).gradients()
    for which in range(len(case.shapes) + 1):
        name = "output" if which == len(case.shapes) else f"input {which}"
        done = run(case.ours, case, free)
        (*done.inputs, done.y)[which].add_(1)
        if name in run_and_record(case.ours, case, free):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                done.gradients()
            continue
        for mine, theirs in zip(done.gradients(), wanted, strict=True):
            assert_same(mine, theirs)


class Residual(nn.Module):
    """Layers whose results are changed in place, as residual networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu_()
        z = self.second(y)
        z += y
        tail = self.tail(z)
        tail *= 0.5
        tail += z
        return tail


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4)], ids=str)
def test_a_converted_model_may_change_results(shape: tuple[int, ...]) -> None:
    model = Residual().double()
    converted = torchbp.convert(model)
    assert isinstance(converted.first, torchbp.nn.Linear)
    assert isinstance(converted.tail, torchbp.nn.MLP)
    x = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(converted(x).square().sum(), list(converted.parameters()))
    for mine, theirs in zip(got, wanted, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize(("case", "free"), FREE)
def test_gradients_and_theirs(case: Case, free: tuple[int, ...]) -> None:
    """First and second order, in float64, with some of the inputs frozen."""
    orders = []
    for f in (case.ours, case.theirs):
        done = run(f, case, free)
        first = done.gradients(create_graph=True)
        once = sum((g.square().sum() for g in first), done.y.sum() * 0)
        again = [leaf for leaf in done.leaves if leaf.requires_grad]
        second = torch.autograd.grad(once, again, materialize_grads=True)
        orders.append([*first, *second])
    for mine, theirs in zip(*orders, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("free", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("name", ["add", "multiply", "maximum", "matmul"])
def test_gradients_have_the_shapes_of_the_inputs(name: str, free: tuple[int, ...]) -> None:
    """As backward returns them: the engine would sum up what is too large, and nobody notice."""
    shapes = ((2, 1, 5, 3), (6, 3, 4)) if name == "matmul" else ((5, 1), (2, 1, 3))
    inputs = [torch.rand(shape, requires_grad=i in free) for i, shape in enumerate(shapes)]
    y = getattr(F, name)(*inputs)
    for record in (False, True):
        with torch.set_grad_enabled(record):
            grads = y.grad_fn.apply(torch.ones_like(y))
        for i, grad in enumerate(grads):
            assert (grad is not None) == (i in free)
            assert grad is None or grad.shape == shapes[i]
