"""Operations of torchbp.functional beside PyTorch's, and each choice of some of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torchbp.functional as F

__all__ = ["CASES", "Case", "subsets"]

TF = torch.nn.functional


class Case(NamedTuple):
    """An operation, the same by PyTorch, and the shapes of its inputs."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.name


def layers(x: Tensor, *parameters: Tensor) -> Tensor:
    """An MLP of two layers, by PyTorch."""
    first, second, *biases = parameters
    b1, b2 = biases or (None, None)
    return TF.linear(torch.tanh(TF.linear(x, first, b1)), second, b2)


def network(x: Tensor, *parameters: Tensor) -> Tensor:
    return F.mlp(x, parameters[:2], parameters[2:], "tanh")


def fused(name: str) -> Case:
    f: Any = getattr(TF, name)
    return Case(
        f"linear with {name}",
        lambda x, w, b: F.linear(x, w, b, name),
        lambda x, w, b: f(TF.linear(x, w, b)),
        ((5, 3), (4, 3), (4,)),
    )


CASES = [
    Case("add", F.add, torch.add, ((5, 3), (5, 3))),
    Case("multiply", F.multiply, torch.mul, ((5, 3), (5, 3))),
    Case("multiply, broadcast", F.multiply, torch.mul, ((5, 1), (2, 1, 3))),
    Case("multiply by a number", F.multiply, torch.mul, ((5, 3), ())),
    Case("maximum", F.maximum, torch.maximum, ((5, 3), (3,))),
    Case("matmul", F.matmul, torch.matmul, ((5, 3), (3, 4))),
    Case("matmul of batches", F.matmul, torch.matmul, ((6, 5, 3), (6, 3, 4))),
    Case("matmul of a batch", F.matmul, torch.matmul, ((6, 5, 3), (3, 4))),
    Case("matmul of vectors", F.matmul, torch.matmul, ((3,), (3,))),
    Case("linear", F.linear, TF.linear, ((5, 3), (4, 3), (4,))),
    Case("linear without bias", F.linear, TF.linear, ((5, 3), (4, 3))),
    Case("linear of a cube", F.linear, TF.linear, ((2, 5, 3), (4, 3), (4,))),
    Case("linear of a vector", F.linear, TF.linear, ((3,), (4, 3), (4,))),
    *map(fused, ("relu", "leaky_relu", "elu", "sigmoid", "tanh")),
    Case(
        "maxout",
        F.maxout,
        lambda x, w, b: (torch.einsum("ni,poi->npo", x, w) + b).amax(1),
        ((5, 3), (2, 4, 3), (2, 4)),
    ),
    Case("mlp", network, layers, ((5, 3), (4, 3), (2, 4), (4,), (2,))),
    Case("mlp of a cube", network, layers, ((2, 5, 3), (4, 3), (2, 4), (4,), (2,))),
    Case("mlp without biases", network, layers, ((5, 3), (4, 3), (2, 4))),
    Case(
        "l2_penalty",
        lambda *tensors: F.l2_penalty(tensors),
        lambda *tensors: sum((t.square().sum() for t in tensors), torch.zeros(()).double()),
        ((5, 3), (4,)),
    ),
    *(
        Case(name, getattr(F, name), getattr(TF, name, None) or getattr(torch, name), ((5, 3),))
        for name in ("exp", "reciprocal", "relu", "leaky_relu", "elu", "sigmoid", "tanh")
    ),
]


def subsets(count: int) -> chain[tuple[int, ...]]:
    """Each choice of some of `count` inputs."""
    return chain.from_iterable(combinations(range(count), k) for k in range(1, count + 1))
