"""The activation gates: ReLU, LeakyReLU, ELU, Sigmoid, Tanh.

Each is a row of csrc/gates.h, elementwise, of any shape and of dtype float64, float32, bfloat16 or
float16 (half types compute in float32). Its Jacobian is diagonal, so that backward multiplies the
upstream gradient by the local one, element by element, and forward mode uses the same product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .check import number
from .gate import Gate, backward_of, raw, save

__all__ = ["ELU", "LeakyReLU", "ReLU", "Sigmoid", "Tanh"]

_relu, _leaky_relu, _elu = raw("relu"), raw("leaky_relu"), raw("elu")
_sigmoid, _tanh = raw("sigmoid"), raw("tanh")

ReLUBackward = backward_of("relu", "ReLUBackward")
LeakyReLUBackward = backward_of("leaky_relu", "LeakyReLUBackward")
ELUBackward = backward_of("elu", "ELUBackward")
SigmoidBackward = backward_of("sigmoid", "SigmoidBackward")
TanhBackward = backward_of("tanh", "TanhBackward")


class ReLU(Gate):
    """y = max(0, x); dL/dx = dL/dy where y > 0, else 0.

    Example:
        >>> x = torch.tensor([1.0, -2.0, 3.0, -1.0], requires_grad=True)
        >>> y = ReLU.apply(x)
        >>> y.backward(torch.tensor([4.0, -1.0, 5.0, 9.0]))
        >>> x.grad
        tensor([4., 0., 5., 0.])
    """

    row = "relu"
    formula = staticmethod(torch.relu)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return ReLUBackward.apply(grad_y, y)


class LeakyReLU(Gate):
    """y = x where x > 0, else negative_slope * x; dL/dx = dL/dy * (1 or negative_slope).

    Example:
        >>> x = torch.tensor([2.0, -2.0], requires_grad=True)
        >>> LeakyReLU.apply(x, 0.1)
        tensor([ 2.0000, -0.2000], grad_fn=<LeakyReLUBackward>)
    """

    row = "leaky_relu"
    formula = staticmethod(torch.nn.functional.leaky_relu)

    @staticmethod
    def forward(x: Tensor, negative_slope: float = 0.01) -> Tensor:
        return _leaky_relu(x, number("leaky_relu", "negative_slope", negative_slope))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.negative_slope = inputs
        save(ctx, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return LeakyReLUBackward.apply(grad_y, x, ctx.negative_slope), None


class ELU(Gate):
    """y = x where x > 0, else alpha * (e^x - 1); dL/dx = dL/dy * (1 or alpha * e^x).

    Example:
        >>> ELU.apply(torch.tensor([1.0, -1.0]), 1.0)
        tensor([ 1.0000, -0.6321])
    """

    row = "elu"
    formula = staticmethod(torch.nn.functional.elu)

    @staticmethod
    def forward(x: Tensor, alpha: float = 1.0) -> Tensor:
        return _elu(x, number("elu", "alpha", alpha))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.alpha = inputs
        save(ctx, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ELUBackward.apply(grad_y, x, ctx.alpha), None


class Sigmoid(Gate):
    """y = 1 / (1 + e^-x); dL/dx = dL/dy * (1 - y) * y.

    The primitive gates scale(-1), exp, shift(+1), reciprocal in one: a computational graph is not
    unique, and this one saves only y.

    Example:
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> y = Sigmoid.apply(x)
        >>> y.backward()
        >>> f"{y.item():.2f} {x.grad.item():.2f}"  # the lecture: 0.73, (1 - 0.73) * 0.73 = 0.2
        '0.73 0.20'
    """

    row = "sigmoid"
    formula = staticmethod(torch.sigmoid)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return SigmoidBackward.apply(grad_y, y)


class Tanh(Gate):
    """y = tanh(x); dL/dx = dL/dy * (1 - y^2).

    Example:
        >>> Tanh.apply(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7616])
    """

    row = "tanh"
    formula = staticmethod(torch.tanh)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return TanhBackward.apply(grad_y, y)
