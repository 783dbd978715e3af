"""Custom Functions as they are published, written anew after their sources, to see what
check_function finds in them. Each keeps what matters of its source: what is saved and where, what
is changed in place, what leaves torch, and what the gradient is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.autograd import Function

__all__ = ["WILD", "GradientReversal", "Wild"]


@dataclass(frozen=True)
class Wild:
    """A function found in the wild.

    Attributes:
        source: where it is published.
        note: what is to be known of it, before it is checked.
        fn, inputs: makes the function, and its inputs.
        reference: what computes the same, if there is something.
    """

    name: str
    source: str
    note: str
    fn: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    reference: Callable[..., Any] | None = None


_TUTORIALS = "https://docs.pytorch.org/tutorials"
_NOTES = "https://docs.pytorch.org/docs/stable/notes"


class LegendrePolynomial3(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return (5 * x**3 - 3 * x) / 2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad_output * (7.5 * x**2 - 1.5)


class LinearFunction(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return x.mm(weight.t()) + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            grad_output.mm(weight) if wanted[0] else None,
            grad_output.t().mm(x) if wanted[1] else None,
            grad_output.sum(0) if wanted[2] else None,
        )


class SinhBad(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.up, ctx.down = x.exp(), (-x).exp()
        return (ctx.up - ctx.down) / 2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output * (ctx.up + ctx.down) / 2


class NumpySort(Function):
    @staticmethod
    def forward(x: Tensor, dim: int) -> Any:  # type: ignore[override]
        values = x.numpy(force=True)
        order = np.argsort(values, axis=dim)
        back = np.argsort(order, axis=dim)
        made = np.take_along_axis(values, order, axis=dim)
        return torch.tensor(made), torch.tensor(order), torch.tensor(back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, order, back = output
        ctx.mark_non_differentiable(order, back)
        ctx.save_for_backward(back)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *others: Tensor) -> Any:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        taken = np.take_along_axis(
            grad_output.numpy(force=True), back.numpy(force=True), axis=ctx.dim
        )
        return torch.tensor(taken), None


class BadFFTFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.new(abs(np.fft.rfft2(x.detach().numpy())))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output.new(np.fft.irfft2(grad_output.numpy()))


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return TF.hardtanh(grad_output)


class GradientReversal(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:  # type: ignore[override]
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return grad_output.neg() * ctx.alpha, None


class Swish(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        x = ctx.saved_tensors[0]
        s = torch.sigmoid(x)
        return grad_output * (s * (1 + x * (1 - s)))


class Sparsemax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:  # type: ignore[override]
        ctx.dim = dim
        x -= x.max(dim=dim, keepdim=True).values
        ordered = x.sort(descending=True, dim=dim).values
        total = ordered.cumsum(dim) - 1
        shape = [1] * x.dim()
        shape[dim] = -1
        count = torch.arange(1, x.size(dim) + 1, dtype=x.dtype).view(shape)
        support = (count * ordered > total).sum(dim, keepdim=True)
        output = torch.clamp(x - total.gather(dim, support - 1) / support, min=0)
        ctx.save_for_backward(support, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        support, output = ctx.saved_tensors
        grad = grad_output.clone()
        grad[output == 0] = 0
        mean = grad.sum(ctx.dim, keepdim=True) / support.to(output.dtype)
        return torch.where(output != 0, grad - mean, grad), None


class LowerBound(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, bound)
        return torch.max(x, bound)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        x, bound = ctx.saved_tensors
        return ((x >= bound) | (grad_output < 0)) * grad_output, None


@torch.library.custom_op("torchbp_wild::numpy_sin", mutates_args=())
def numpy_sin(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(x.numpy(force=True)))


numpy_sin.register_fake(lambda x: torch.empty_like(x))
numpy_sin.register_autograd(
    lambda ctx, grad: grad * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _matrix() -> tuple[Any, ...]:
    return (torch.randn(3, 4),)


WILD: tuple[Wild, ...] = (
    Wild(
        "LegendrePolynomial3",
        f"{_TUTORIALS}/beginner/examples_autograd/two_layer_net_custom_function.html",
        "The first custom Function of most users.",
        lambda: LegendrePolynomial3,
        _matrix,
    ),
    Wild(
        "LinearFunction",
        f"{_NOTES}/extending.html",
        "",
        lambda: LinearFunction,
        lambda: (torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)),
        TF.linear,
    ),
    Wild(
        "SinhBad",
        f"{_TUTORIALS}/intermediate/custom_function_double_backward_tutorial.html",
        "There as an example of how not to keep intermediate results.",
        lambda: SinhBad,
        _matrix,
        torch.sinh,
    ),
    Wild(
        "NumpySort",
        f"{_NOTES}/extending.func.html",
        "Without the vmap of its source.",
        lambda: NumpySort,
        lambda: (torch.randn(3, 4), -1),
    ),
    Wild(
        "BadFFTFunction",
        f"{_TUTORIALS}/advanced/numpy_extensions_tutorial.html",
        "Which says of itself that it is not mathematically correct.",
        lambda: BadFFTFunction,
        lambda: (torch.randn(4, 4),),
        lambda x: torch.fft.rfft2(x).abs(),
    ),
    Wild(
        "numpy_sin",
        f"{_TUTORIALS}/advanced/python_custom_ops.html",
        "An operation of `torch.library.custom_op` with a fake kernel and `register_autograd`.",
        lambda: numpy_sin,
        _matrix,
        torch.sin,
    ),
    Wild(
        "StraightThrough",
        "https://www.hassanaskary.com/python/pytorch/deep%20learning/2020/09/19/"
        "intuitive-explanation-of-straight-through-estimators.html",
        "A step whose gradient is another one on purpose: that `gradient` fails is its meaning.",
        lambda: StraightThrough,
        _matrix,
    ),
    Wild(
        "GradientReversal",
        "https://github.com/fungtion/DANN",
        "The identity with the gradient negated on purpose.",
        lambda: GradientReversal,
        lambda: (torch.randn(3, 4), 1.0),
    ),
    Wild(
        "Swish",
        "https://github.com/lukemelas/EfficientNet-PyTorch",
        "The memory-efficient Swish, copied into many code bases.",
        lambda: Swish,
        _matrix,
        TF.silu,
    ),
    Wild(
        "Sparsemax",
        "https://github.com/OpenNMT/OpenNMT-py",
        "Copied into many code bases.",
        lambda: Sparsemax,
        lambda: (torch.randn(3, 4), 1),
    ),
    Wild(
        "LowerBound",
        "https://github.com/InterDigitalInc/CompressAI",
        "Below the bound the gradient passes if it is negative, on purpose. The inputs are above.",
        lambda: LowerBound,
        lambda: (torch.rand(3, 4, requires_grad=True) + 0.5, torch.tensor([0.25])),
    ),
    Wild(
        "torch.nn.BatchNorm1d",
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html",
        "PyTorch's own.",
        lambda: nn.BatchNorm1d(4),
        _matrix,
    ),
    Wild(
        "torch.nn.LayerNorm",
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html",
        "PyTorch's own.",
        lambda: nn.LayerNorm(4),
        _matrix,
    ),
)
