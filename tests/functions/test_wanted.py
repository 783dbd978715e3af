"""Which gradients a backward computes: those that it was asked for, as PyTorch's operations do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchbp.functional as F
from tests.compare import assert_same
from tests.peers import CASES, subsets
from torchbp.functions import gate


@pytest.fixture(autouse=True)
def _ask_for_small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MANY", 0)


class Flags(TorchDispatchMode):
    """Records what the fused gradients are told to compute."""

    seen: list[Any]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchbp" and func._opname in ("linear_backward", "mlp_backward"):
            self.seen = list(args[-3:])
        return func(*args, **(kwargs or {}))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


PRODUCTS = {
    case.name: case
    for case in CASES
    if case.name in ("matmul", "linear", "linear with elu", "maxout", "mlp")
}


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "computed"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_asked_for_is_right(name: str, leaves: bool) -> None:
    """By autograd.grad, also of the gradient, and by backward with `inputs`."""
    _, ours, theirs, shapes = PRODUCTS[name]
    inputs = [randn(*shape) for shape in shapes]
    at = inputs if leaves else [t * 1 for t in inputs]
    mine, wanted = ours(*at), theirs(*at)
    for which in subsets(len(shapes)):
        asked = [at[i] for i in which]
        first, second = (
            torch.autograd.grad(y.square().sum(), asked, create_graph=True) for y in (mine, wanted)
        )
        plain = torch.autograd.grad(mine.square().sum(), asked, retain_graph=True)
        again, and_again = (
            torch.autograd.grad(
                sum((g.square().sum() for g in grads), mine.sum() * 0), asked, retain_graph=True
            )
            for grads in (first, second)
        )
        for one, other in zip(
            (*first, *plain, *again), (*second, *second, *and_again), strict=True
        ):
            assert_same(one, other)
    for i in range(len(shapes)):
        mine.sum().backward(inputs=[inputs[i]], retain_graph=True)
        (gradient,) = torch.autograd.grad(wanted.sum(), inputs[i], retain_graph=True)
        assert_same(inputs[i].grad, gradient)
        assert [t.grad is None for t in inputs[i + 1 :]] == [True] * (len(shapes) - i - 1)


def of_linear(ask: Callable[[Tensor, list[Tensor]], Any], free: str = "xwb") -> list[bool]:
    x, w, b = inputs = [randn(5, 3), randn(4, 3), randn(4)]
    for name, tensor in zip("xwb", inputs, strict=True):
        tensor.requires_grad_(name in free)
    with Flags() as flags:
        ask(F.linear(x, w, b, "relu").sum(), inputs)
    return flags.seen


def test_the_kernel_is_told() -> None:
    def grad(*which: int) -> Callable[[Tensor, list[Tensor]], Any]:
        return lambda y, inputs: torch.autograd.grad(y, [inputs[i] for i in which])

    assert of_linear(grad(0)) == [True, False, False]
    assert of_linear(grad(1)) == [False, True, False]
    assert of_linear(grad(0, 2)) == [True, False, True]
    assert of_linear(grad(0, 1, 2)) == [True, True, True]
    assert of_linear(lambda y, _: y.backward()) == [True, True, True]
    assert of_linear(lambda y, _: y.backward(), "xb") == [True, False, True]
    assert of_linear(lambda y, inputs: y.backward(inputs=inputs[1:])) == [False, True, True]
    assert of_linear(grad(1), "wb") == [False, True, True]  # without x nobody looks


def test_small_products_do_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MANY", 5 * 4)
    assert of_linear(lambda y, inputs: torch.autograd.grad(y, inputs[0])) == [True, False, False]
    monkeypatch.setattr(gate, "MANY", 5 * 4 + 1)
    assert of_linear(lambda y, inputs: torch.autograd.grad(y, inputs[0])) == [True, True, True]


def test_mlp_is_told() -> None:
    x, w1, w2, b1, b2 = [randn(*s) for s in ((5, 3), (4, 3), (2, 4), (4,), (2,))]
    with Flags() as flags:
        y = F.mlp(x, [w1, w2], [b1, b2], "tanh")
        torch.autograd.grad(y.sum(), x)
    assert flags.seen == [True, [False, False], [False, False]]
    with Flags() as flags:
        y = F.mlp(x, [w1, w2], [b1, b2], "tanh")
        torch.autograd.grad(y.sum(), [w2, b1])
    assert flags.seen == [False, [False, True], [True, False]]
    with Flags() as flags:
        F.mlp(x, [w1, w2], activation="tanh").sum().backward()
    assert flags.seen == [True, [True, True], []]


@pytest.mark.parametrize("record", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_around_backward_rounds_nothing(name: str, record: bool) -> None:
    """It has had its turn in forward, which here ran without."""
    _, ours, _, shapes = PRODUCTS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y = ours(*inputs)
    upstream = torch.randn(y.shape)
    wanted = torch.autograd.grad(y, inputs, upstream, create_graph=record, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(y, inputs, upstream, create_graph=record)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)
