"""CrossEntropyLoss: torch.nn's in everything but the kernel."""

# ruff: noqa: E501  (tables: one row a line)
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compare import assert_same
from torchbp.nn import CrossEntropyLoss

N, C = 5, 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"ignore_index": 2},
    {"weight": torch.tensor([1.0, 0.5, 2.0, 0.0])},
    {"weight": torch.tensor([1.0, 0.5, 2.0, 3.0]), "label_smoothing": 0.2, "ignore_index": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradient(options: dict[str, Any]) -> None:
    ours, theirs = (
        CrossEntropyLoss(**options).double(),
        torch.nn.CrossEntropyLoss(**options).double(),
    )
    input = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    targets = [torch.randint(C, (N,))]
    if "ignore_index" not in options:
        targets.append(torch.randn(N, C, dtype=torch.float64).softmax(1))
    for target in targets:
        for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            pairs: list[Any] = [
                (f(input, target), grad(f, input, target)) for f in (module, theirs)
            ]
            assert_same(*pairs)


def grad(loss: torch.nn.Module, input: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(loss(input, target).sum(), input)[0]


def test_is_the_twin() -> None:
    weight = torch.rand(C)
    ours, theirs = CrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.double().state_dict()["weight"].dtype == torch.float64


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: CrossEntropyLoss()(torch.ones(2, 3), torch.tensor([0, 3])), IndexError, "got 3 at position 1"),
    (lambda: CrossEntropyLoss()(torch.ones(2, 3), [0, 1]), TypeError, "target wants a torch.Tensor, got list"),
    (lambda: CrossEntropyLoss(torch.ones(2))(torch.ones(2, 3), torch.tensor([0, 1])), ValueError, "weight wants shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
