"""torchbp.graph.calling: what a function reads, and that a call leaves it as it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchbp.graph.calling import captured, modules_of, unchanged

NORM = nn.BatchNorm1d(2)


def of_module(x: Tensor) -> Tensor:
    return NORM(x)


def through_another(x: Tensor) -> Tensor:
    return of_module(x)


class Callable:
    def __init__(self) -> None:
        self.layers = [NORM]

    def __call__(self, x: Tensor) -> Tensor:
        return self.layers[0](x)

    def method(self, x: Tensor) -> Tensor:
        return self(x)


def with_argument(norm: nn.Module, x: Tensor, norms: Any = None) -> Tensor:
    return norm(x)


@pytest.mark.parametrize(
    "fn",
    [
        NORM,
        NORM.forward,
        of_module,
        through_another,
        lambda x, norm=NORM: norm(x),
        partial(with_argument, NORM),
        partial(with_argument, norms=[NORM]),
        partial(through_another),
        Callable(),
        Callable().method,
    ],
)
def test_modules_of(fn: Any) -> None:
    assert list(modules_of(fn).values()) == [NORM]


def test_captured_tensors() -> None:
    a, b = torch.ones(1), {"c": [torch.ones(2)]}
    found = captured(lambda x: x * a * b["c"][0])
    assert set(found) == {"a", "b['c'][0]"}
    assert captured(torch.relu) == {}

    def before_its_cell_is_filled() -> dict[str, Any]:
        found = captured(lambda x: x * later)
        later: Tensor = a
        return found if later is a else {}

    assert before_its_cell_is_filled() == {}


def test_unchanged() -> None:
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    norm.register_buffer("none", None)
    buffers = dict(norm._buffers)
    values = {name: value.clone() for name, value in norm.named_buffers()}
    version, random = norm.running_mean._version, torch.get_rng_state()  # type: ignore[union-attr]
    with pytest.raises(KeyError), torch.no_grad(), unchanged(norm, [x]):  # noqa: PT012
        assert torch.is_grad_enabled()
        assert not torch.equal(norm(x + torch.rand(4, 2)), x)
        norm.running_var = torch.zeros(2)
        raise KeyError
    assert norm._buffers.items() == buffers.items()
    for name, value in norm.named_buffers():
        assert value is buffers[name]
        assert torch.equal(value, values[name])
    assert norm.running_mean is not None
    assert norm.running_mean._version <= version + 1  # torch's own; none for putting it back
    assert torch.equal(torch.get_rng_state(), random)
