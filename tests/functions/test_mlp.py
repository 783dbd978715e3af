"""MLP as torchbp.functional records it in plain eager mode, with y as its only output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchbp.functional as F
from tests.compare import assert_same
from tests.peers import subsets

TF = torch.nn.functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "elu": TF.elu}


class Problem:
    """A network of three layers in float64, the same by PyTorch, and an upstream gradient.

    The first weight is the second one too, so that its gradient is the sum of two.
    """

    def __init__(self, activation: str, bias: bool = True) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

        self.activation = activation
        self.x, self.dy = randn(5, 4), randn(5, 3)
        tied = randn(4, 4)
        self.weights = [tied, tied, randn(3, 4)]
        self.biases = [randn(4), randn(4), randn(3)] if bias else []
        self.leaves = [self.x, tied, self.weights[2], *self.biases]

    def train_alone(self, free: tuple[int, ...]) -> None:
        """Some of the parameters, the weights first; they are not tied any more."""
        self.weights[0] = self.weights[0].detach().clone()
        parameters = [*self.weights, *self.biases]
        self.leaves = [parameters[i] for i in free]
        for parameter in (self.x, *parameters):
            parameter.requires_grad_(any(parameter is leaf for leaf in self.leaves))

    def ours(self) -> Tensor:
        return F.mlp(self.x, self.weights, self.biases, self.activation)

    def theirs(self) -> Tensor:
        h = self.x
        for i, weight in enumerate(self.weights):
            h = ACTIVATIONS[self.activation](h) if i else h
            h = TF.linear(h, weight, self.biases[i] if self.biases else None)
        return h

    def gradients(self, y: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy, create_graph=create_graph)


def kept_by(problem: Problem) -> list[tuple[int, ...]]:
    """The shapes of what is saved for backward."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.ours()
    return shapes


def assert_all_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_of_the_gradient(activation: str, bias: bool) -> None:
    """With respect to everything, the upstream gradient too; the graph stays for another one."""
    problem = Problem(activation, bias)
    both = []
    for y in (problem.ours(), problem.theirs()):
        for _ in range(2):
            grads = problem.gradients(y, create_graph=True)
            once = sum((g.square().sum() for g in grads), y.new_zeros(()))
            # The last bias is in no gradient.
            twice = torch.autograd.grad(
                once, [*problem.leaves, problem.dy], retain_graph=True, materialize_grads=True
            )
            both.append((*grads, *twice))
    for ours in both[:2]:
        assert_all_same(ours, both[2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_frozen_parameters(activation: str, bias: bool) -> None:
    """Whichever they are: below the first layer that is trained, backward has nothing to do."""
    for free in subsets(6 if bias else 3):
        problem = Problem(activation, bias)
        problem.train_alone(free)
        assert_all_same(problem.gradients(problem.ours()), problem.gradients(problem.theirs()))
        both = []
        for y in (problem.ours(), problem.theirs()):
            grads = problem.gradients(y, create_graph=True)
            once = sum((g.square().sum() for g in grads), y.new_zeros(()))
            both.append(torch.autograd.grad(once, problem.leaves, materialize_grads=True))
        assert_all_same(*both)


@pytest.mark.parametrize(("free", "shapes"), [
    ((0,), [(5, 4), (4, 4), (3, 4), *[(5, 4)] * 4]),  # all but the first weight
    ((1,), [(5, 4), (3, 4), *[(5, 4)] * 2]),  # h of the first layer, and z and h of the second
    ((2,), [(5, 4)]),
    ((5,), [(5, 4)]),
])  # fmt: skip
def test_nothing_is_kept_of_frozen_layers(
    free: tuple[int, ...], shapes: list[tuple[int, ...]]
) -> None:
    problem = Problem("elu")
    problem.train_alone(free)
    assert kept_by(problem) == shapes


def test_batched_upstream_gradients() -> None:
    problem = Problem("tanh")
    dys = torch.randn(3, 5, 3, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(y, problem.leaves, dys, is_grads_batched=True)
        for y in (problem.ours(), problem.theirs())
    )
    assert_all_same(ours, theirs)


def test_changed_weights_are_noticed() -> None:
    problem = Problem("tanh")
    y = problem.ours()
    with torch.no_grad():
        problem.weights[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changed_biases_do_not_matter() -> None:
    """As in PyTorch, which saves none; but the gradient's own gradient would take them for old."""
    problem = Problem("tanh")
    before = problem.gradients(problem.ours())
    y = problem.ours()
    with torch.no_grad():
        problem.biases[0].add_(1)
    assert_all_same(torch.autograd.grad(y, problem.leaves, problem.dy, retain_graph=True), before)
    with pytest.raises(RuntimeError, match="mlp: a bias, or the first weight, was changed"):
        problem.gradients(y, create_graph=True)


def test_hidden_layers_go_with_the_graph() -> None:
    """They are saved tensors: hooks see them, and a second backward finds them gone."""
    problem = Problem("elu")
    # x, the weights, and of each hidden layer z and h.
    assert kept_by(problem) == [(5, 4), (4, 4), (4, 4), (3, 4), *[(5, 4)] * 4]
    y = problem.ours()
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "MLPBackward"
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
