"""The graphs that tests draw, and what they measure of a drawing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.graph import Ledger, trace

__all__ = ["GRAPHS", "chain", "circuit", "contrast"]


def circuit() -> Ledger:
    """The lecture's f = (x + y) z."""
    return trace(lambda x, y, z: (x + y) * z, *torch.tensor([-2.0, 5.0, -4.0]))


def neuron() -> Ledger:
    def neuron(w0: Tensor, x0: Tensor, w1: Tensor, x1: Tensor, w2: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-(w0 * x0 + w1 * x1 + w2)))

    return trace(neuron, *torch.tensor([2.0, -1.0, -3.0, -2.0, -3.0]))


def two_layer() -> Ledger:
    def loss(x: Tensor, t: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        h = torch.relu(x @ w1 + b1)
        return F.cross_entropy(h @ w2, t) + 0.1 * ((w1 * w1).sum() + (w2 * w2).sum())

    g = torch.Generator().manual_seed(0)
    shapes = [(4, 5), (5, 6), (6,), (6, 3)]
    x, w1, b1, w2 = (torch.randn(shape, generator=g) for shape in shapes)
    return trace(loss, x, torch.tensor([0, 1, 2, 0]), w1, b1, w2)


def several() -> Ledger:
    """Several outputs, one of a gate that has several, one without a gradient."""

    def parts(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        a, b = (x @ w).chunk(2, dim=1)
        return a.tanh() * b, x.sum(0), x.detach() * 2

    upstream = [torch.ones(3, 2), None, None]
    x, w = torch.arange(12.0).view(3, 4) / 12, torch.ones(4, 4)
    return trace(parts, x, w, grad_output=upstream)


def broadcast() -> Ledger:
    return trace(lambda x, b: ((x + b) * b).mean(), torch.eye(3), torch.tensor([1.0, 2.0, 3.0]))


def strange() -> Ledger:
    """Numbers that JSON has not, no elements, complex ones, names that HTML has a use for."""

    def f(x: Tensor, empty: Tensor, z: Tensor) -> Tensor:
        return (x.log().sum() + empty.sum()) * (z * z).abs().sum()

    inputs = (
        torch.tensor([-1.0, 0.0, 1.0, float("inf"), 3.0]),
        torch.zeros(0, 3),
        torch.tensor([1 + 2j, 3 - 1j]),
    )
    return trace(f, *inputs, names=["</script><b>", "a&b \"q\" 'r'", "z\x00"])


def large() -> Ledger:
    return trace(lambda x: (x * x).mean(), torch.linspace(-1, 1, 4096).view(64, 64))


def chain(layers: int = 30) -> Ledger:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(3, 3), nn.Tanh())))
    return trace(lambda x: model(x).sum(), torch.ones(2, 3))


GRAPHS: dict[str, Callable[[], Ledger]] = {
    made.__name__: made
    for made in (circuit, neuron, two_layer, several, broadcast, strange, large, chain)
}


def contrast(one: str, two: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(two)])
    return (light + 0.05) / (dark + 0.05)
