"""Functions and modules of PyTorch and torchbp with inputs, which the tests of torchbp.graph share.

`CASES` holds (function, a function that makes its inputs), `MODULES` (a function that makes the
module, the shape of its input), by name. Inputs are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import torchbp
import torchbp.functional as F


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.5


def classes(n: int, count: int) -> Tensor:
    return torch.randint(count, (n,))


def total(value: Any) -> Tensor:
    """One number of any output, in which no two elements count alike."""
    result = torch.zeros((), dtype=torch.float64)
    for i, part in enumerate(tree_flatten(value)[0]):
        if isinstance(part, Tensor) and part.is_floating_point():
            weight = torch.arange(1, part.numel() + 1, dtype=torch.float64).sin().view(part.shape)
            result = result + (i + 1) * (part.double() * weight).sum()
    return result


@torch.no_grad()
def without_grad(x: Tensor) -> Tensor:
    return x.exp() + 1


M = torch.nn.Module
CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {}


def case(name: str, function: Callable[..., Any], *shapes: Any) -> None:
    def inputs() -> tuple[Any, ...]:
        return tuple(
            rand(*shape) if isinstance(shape, tuple) else shape() if callable(shape) else shape
            for shape in shapes
        )

    assert name not in CASES
    CASES[name] = function, inputs


# ---- torch
for name in [
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "exp",
    "abs",
    "neg",
    "square",
    "sinh",
    "atan",
    "erf",
    "expm1",
    "asinh",
    "softmax_",
    "relu",
    "sgn",
    "positive",
    "trunc",
    "frac",
]:
    if name != "softmax_":
        case(f"torch.{name}", getattr(torch, name), (3, 4))
for name in ["log", "sqrt", "rsqrt", "reciprocal", "log1p", "log2", "lgamma", "digamma"]:
    case(f"torch.{name}", getattr(torch, name), lambda: positive(3, 4))
for name in ["add", "sub", "mul", "maximum", "minimum", "atan2", "hypot", "logaddexp"]:
    case(f"torch.{name}", getattr(torch, name), (3, 4), (3, 4))
    case(f"torch.{name} broadcast", getattr(torch, name), (3, 4), (4,))
case("torch.div", torch.div, (3, 4), lambda: positive(3, 1))
case("torch.pow", torch.pow, lambda: positive(3, 4), (4,))
case("torch.pow by a number", lambda x: x**3, (3, 4))
case("torch.lerp", torch.lerp, (3,), (3,), (3,))
case("torch.where", lambda a, b: torch.where(a > 0, a, b), (3, 4), (4,))
case("torch.clamp", lambda x: x.clamp(-0.5, 0.5), (3, 4))
case("torch.matmul", torch.matmul, (3, 4), (4, 2))
case("torch.mm", torch.mm, (3, 4), (4, 2))
case("torch.bmm", torch.bmm, (2, 3, 4), (2, 4, 5))
case("torch.mv", torch.mv, (3, 4), (4,))
case("torch.dot", torch.dot, (4,), (4,))
case("torch.addmm", torch.addmm, (2,), (3, 4), (4, 2))
case("torch.einsum", lambda a, b: torch.einsum("ij,kj->ik", a, b), (3, 4), (2, 4))
case("torch.outer", torch.outer, (3,), (4,))
case("torch.sum", lambda x: x.sum(1), (3, 4))
case("torch.mean", lambda x: x.mean(0, keepdim=True), (3, 4))
case("torch.prod", lambda x: x.prod(1), (3, 4))
case("torch.var", lambda x: x.var(1), (3, 4))
case("torch.std", lambda x: x.std(), (3, 4))
case("torch.norm", lambda x: torch.linalg.vector_norm(x, dim=1), (3, 4))
case("torch.cumsum", lambda x: x.cumsum(1), (3, 4))
case("torch.logsumexp", lambda x: x.logsumexp(1), (3, 4))
case("torch.max over a dimension", lambda x: x.max(1).values, (3, 4))
case("torch.max with its index", lambda x: x.max(1), (3, 4))
case("torch.amin", lambda x: x.amin(0), (3, 4))
case("torch.sort", lambda x: x.sort(1)[0], (3, 4))
case("torch.topk", lambda x: x.topk(2, 1).values, (3, 4))
case("torch.gather", lambda x: x.gather(1, torch.tensor([[0], [2], [1]])), (3, 4))
case("torch.cat", lambda a, b: torch.cat([a, b, a], 1), (3, 4), (3, 2))
case("torch.stack", lambda a, b: torch.stack([a, b]), (3, 4), (3, 4))
case("torch.split", lambda x: x.split([1, 3], 1), (3, 4))
case("torch.chunk", lambda x: torch.chunk(x, 2, 1)[1], (3, 4))
case("torch.unbind", lambda x: x.unbind(0)[2] * x.unbind(0)[0], (3, 4))
case("torch.view", lambda x: x.view(2, 6).t(), (3, 4))
case("torch.permute", lambda x: x.permute(2, 0, 1).contiguous(), (2, 3, 4))
case("torch.T", lambda x: x.T @ x, (3, 4))
case("torch.flip", lambda x: x.flip(0), (3, 4))
case("torch.roll", lambda x: x.roll(1, 1), (3, 4))
case("torch.expand", lambda x: x.unsqueeze(1).expand(3, 5), (3,))
case("torch.getitem", lambda x: x[1:, ::2] * x[0, 1], (3, 4))
case("torch.index_select", lambda x: x.index_select(0, torch.tensor([2, 0, 0])), (3, 4))
case("torch.tril", torch.tril, (4, 4))
case("torch.diagonal", torch.diagonal, (4, 4))
case("torch.linalg.inv", lambda x: torch.linalg.inv(x + 4 * torch.eye(3)), (3, 3))
case("torch.linalg.solve", lambda a, b: torch.linalg.solve(a + 4 * torch.eye(3), b), (3, 3), (3,))
case("torch.det", lambda x: torch.linalg.det(x), (3, 3))
case("in place", lambda x: x.clone().add_(1).mul_(2).sigmoid_(), (3, 4))
case("in place through a view", lambda x: write_row(x.clone()), (3, 4))
case("reuse", lambda x: x * x + x.sin() * x, (3,))
case("detached", lambda x: x * x.detach(), (3,))
case("without grad", lambda x: x * without_grad(x), (3,))
case("an input twice", lambda x, y: x * y + x, (3,), (3,))
case("nested inputs", lambda pair, d: pair[0] * pair[1] + d["z"], lambda: [rand(3), rand(3)],
     lambda: {"z": rand(3)})  # fmt: skip
case("several outputs", lambda x: (x.exp(), x.sum(), x), (3,))
case("complex", lambda x: torch.fft.fft(x).abs(), (8,))
case("float32 inside", lambda x: x.float().sigmoid().double(), (3, 4))

# ---- torch.nn.functional
for name in [
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "softplus",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "softsign",
    "tanhshrink",
    "softshrink",
    "hardshrink",
    "logsigmoid",
    "relu6",
]:
    case(f"F.{name}", getattr(TF, name), (3, 4))
case("F.softmax", lambda x: TF.softmax(x, 1), (3, 4))
case("F.log_softmax", lambda x: TF.log_softmax(x, 1), (3, 4))
case("F.linear", TF.linear, (3, 4), (2, 4), (2,))
case("F.bilinear", TF.bilinear, (3, 4), (3, 2), (5, 4, 2))
case("F.conv1d", TF.conv1d, (2, 3, 8), (4, 3, 3), (4,))
case("F.conv2d", TF.conv2d, (2, 3, 6, 6), (4, 3, 3, 3), (4,))
case("F.conv_transpose2d", TF.conv_transpose2d, (2, 3, 4, 4), (3, 2, 3, 3))
case("F.max_pool2d", lambda x: TF.max_pool2d(x, 2), (2, 3, 4, 4))
case("F.avg_pool2d", lambda x: TF.avg_pool2d(x, 2), (2, 3, 4, 4))
case("F.adaptive_avg_pool2d", lambda x: TF.adaptive_avg_pool2d(x, 1), (2, 3, 4, 4))
case("F.layer_norm", lambda x: TF.layer_norm(x, (4,)), (3, 4))
case("F.group_norm", lambda x: TF.group_norm(x, 2), (2, 4, 3))
case("F.batch_norm", lambda x: TF.batch_norm(x, None, None, training=True), (5, 4))
case("F.normalize", TF.normalize, (3, 4))
case("F.pad", lambda x: TF.pad(x, (1, 2)), (3, 4))
case("F.interpolate", lambda x: TF.interpolate(x, scale_factor=2), (1, 2, 3, 3))
case("F.unfold", lambda x: TF.unfold(x, 2), (1, 2, 3, 3))
case("F.glu", TF.glu, (3, 4))
case("F.dropout", lambda x: TF.dropout(x, 0.5), (3, 4))
case("F.embedding", lambda w: TF.embedding(torch.tensor([1, 0, 1]), w), (3, 4))
case("F.cross_entropy", lambda x, t: TF.cross_entropy(x, t), (5, 4), lambda: classes(5, 4))
case("F.nll_loss", lambda x, t: TF.nll_loss(x.log_softmax(1), t), (5, 4), lambda: classes(5, 4))
case("F.mse_loss", TF.mse_loss, (5, 4), (5, 4))
case("F.l1_loss", TF.l1_loss, (5, 4), (5, 4))
case("F.smooth_l1_loss", TF.smooth_l1_loss, (5, 4), (5, 4))
case("F.huber_loss", TF.huber_loss, (5, 4), (5, 4))
case("F.kl_div", lambda x: TF.kl_div(x.log_softmax(1), torch.full((5, 4), 0.25).double()), (5, 4))
case("F.bce_with_logits", lambda x: TF.binary_cross_entropy_with_logits(x, (x > 0).double()), (5,))
case("F.cosine_similarity", TF.cosine_similarity, (3, 4), (3, 4))
case("F.sdpa", TF.scaled_dot_product_attention, (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))

# ---- torch.nn
MODULES: dict[str, tuple[Callable[[], M], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (5, 4)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (5, 4)),
    "PReLU": (lambda: nn.PReLU(), (5, 4)),
    "Dropout": (lambda: nn.Dropout(0.3), (5, 4)),
    "LSTM": (lambda: nn.LSTM(4, 3), (5, 2, 4)),
    "GRU": (lambda: nn.GRU(4, 3, bidirectional=True), (5, 2, 4)),
    "MultiheadAttention": (lambda: Attention(), (3, 2, 4)),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), (3, 2, 4)),
    "shared weights": (lambda: Shared(), (5, 4)),
    "frozen": (lambda: Frozen(), (5, 4)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (5, 4)),
    "torchbp MLP": (lambda: torchbp.nn.MLP([4, 6, 3], activation="tanh"), (5, 4)),
    "torchbp Linear": (lambda: torchbp.nn.Linear(4, 3, activation="sigmoid"), (5, 4)),
    "torchbp Maxout": (lambda: torchbp.nn.Maxout(4, 3), (5, 4)),
}  # fmt: skip

# ---- torchbp
for name in ["exp", "relu", "leaky_relu", "elu", "sigmoid", "tanh"]:
    case(f"torchbp.{name}", getattr(F, name), (3, 4))
case("torchbp.reciprocal", F.reciprocal, lambda: positive(3, 4))
case("torchbp.scale", lambda x: F.scale(x, -2.0), (3, 4))
case("torchbp.shift", lambda x: F.shift(x, 2.0), (3, 4))
for name in ["add", "multiply", "maximum"]:
    case(f"torchbp.{name}", getattr(F, name), (3, 4), (3, 4))
    case(f"torchbp.{name} broadcast", getattr(F, name), (3, 4), (4,))
case("torchbp.matmul", F.matmul, (3, 4), (4, 2))
case("torchbp.linear", F.linear, (3, 4), (2, 4), (2,))
case("torchbp.linear with relu", lambda x, w: F.linear(x, w, activation="relu"), (3, 4), (2, 4))
case("torchbp.mlp", lambda x, v, w: F.mlp(x, [v, w], [], "tanh"), (5, 4), (3, 4), (2, 3))
case("torchbp.maxout", lambda x, w: F.maxout(x, w), (5, 4), (6, 2, 4))
case("torchbp.cross_entropy", F.cross_entropy, (5, 4), lambda: classes(5, 4))
case("torchbp.l2_penalty", lambda a, b: F.l2_penalty([a, b]), (3, 4), (2,))
case("a chain of torchbp", lambda x, w: F.sigmoid(F.relu(F.matmul(x, w))), (3, 4), (4, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x)[0]
        return result


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self.one(x).tanh())
        return result


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self[0].requires_grad_(False)


def write_row(x: Tensor) -> Tensor:
    x[1] = x[0] * 2
    x[:, 0].mul_(3)
    return x.exp()
