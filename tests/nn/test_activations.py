"""The activation modules: torch.nn's in everything but the kernel."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchbp
from tests.compare import assert_same

PAIRS = [
    (torchbp.nn.ReLU, torch.nn.ReLU, ()),
    (torchbp.nn.LeakyReLU, torch.nn.LeakyReLU, ()),
    (torchbp.nn.LeakyReLU, torch.nn.LeakyReLU, (0.1,)),
    (torchbp.nn.ELU, torch.nn.ELU, ()),
    (torchbp.nn.ELU, torch.nn.ELU, (0.5,)),
    (torchbp.nn.Sigmoid, torch.nn.Sigmoid, ()),
    (torchbp.nn.Tanh, torch.nn.Tanh, ()),
]
EACH = pytest.mark.parametrize(("own", "twin", "arguments"), PAIRS)
Kind = Callable[..., torch.nn.Module]


@EACH
def test_output_and_gradient(own: Kind, twin: Kind, arguments: tuple[float, ...]) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 3, dtype=torch.float64)
    ours, theirs = own(*arguments), twin(*arguments)
    assert_same(ours(x), theirs(x))
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        grads: list[Any] = [torch.autograd.grad(f(x), x, dy) for f in (module, theirs)]
        assert_same(*grads)


@EACH
def test_is_the_twin(own: Kind, twin: Kind, arguments: tuple[float, ...]) -> None:
    ours, theirs = own(*arguments), twin(*arguments)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    assert ours.state_dict() == theirs.state_dict() == {}


@EACH
def test_inplace_is_ignored(own: Kind, twin: Kind, arguments: tuple[float, ...]) -> None:
    if own in (torchbp.nn.Sigmoid, torchbp.nn.Tanh):
        pytest.skip("has no inplace")
    x = torch.randn(10)
    before = x.clone()
    y = own(*arguments, inplace=True)(x)
    assert torch.equal(x, before)
    assert_same(y, twin(*arguments)(x), 1e-6, 1e-6)


@EACH
def test_traced(own: Kind, twin: Kind, arguments: tuple[float, ...]) -> None:
    x = torch.randn(4, 3)
    module = own(*arguments)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(module, (x,)).module()
    assert_same(compiled(x), module(x), 0, 0)
    assert_same(exported(x), module(x), 0, 0)
