"""The gates built on a matrix product: MatMul, Linear, Maxout.

The Jacobian of a product is huge and mostly zero, so that it is never formed: the gradients are
products themselves, dL/dx = dL/dy w^T and dL/dw = x^T dL/dy. No other order of the factors has the
right shapes. Products with a matrix are torchbp's wherever its kernels take them (csrc/ops.h);
those of batches of matrices are PyTorch's own (MKL, oneDNN, cuBLAS).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import activations, check
from .gate import (
    BACKWARD,
    GATES,
    REFUSALS,
    Gate,
    auxiliary,
    below,
    call,
    dispatch_modes,
    eager,
    factors,
    fast_backward,
    idle,
    is_traced,
    past_autocast,
    plain,
    raw,
    requires_grad,
    save,
    sum_to,
    unused,
    wanted,
)
from .table import ROWS

__all__ = ["ACTIVATIONS", "Linear", "MatMul", "Maxout", "arguments", "linear_output"]

_matmul = below(torch.matmul)
_linear, _linear_backward = raw("linear"), raw("linear_backward")
_max_pieces, _max_pieces_backward = raw("max_pieces"), raw("max_pieces_backward")

_aten: Any = torch.ops.aten
#: dL/dz from dL/dy, the saved y or z and the parameter by PyTorch, whose operations cost less than
#: a Function each where they are differentiated again, as often as somebody likes.
_DIFFERENTIABLE: dict[str, Callable[..., Tensor]] = {
    "relu": lambda grad_y, y: _aten.threshold_backward(grad_y, y, 0),
    "leaky_relu": lambda grad_y, z, slope: _aten.leaky_relu_backward(grad_y, z, slope, False),
    "elu": lambda grad_y, z, alpha: _aten.elu_backward(grad_y, alpha, 1, 1, False, z),
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}


class Activation:
    """An activation as linear and mlp fuse it: a gate of the table with its default parameter."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = GATES.get(name)
        self.gradient = BACKWARD.get(name)
        self.parameter: tuple[float, ...] = self.gate._defaults if self.gate else ()
        self.saves_x = self.gate is not None and ROWS[name].saves == ("x",)
        #: How many tensors an MLP saves of a hidden layer: h, and z where the gradient reads it.
        self.per_layer = 2 if self.saves_x else 1

    def saved(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Which of the two its gradient reads, None where it reads neither."""
        if self.gradient is None:
            return None
        return z if self.saves_x else y

    def backward(self, grad_y: Tensor, saved: Tensor | None) -> Tensor:
        """dL/dz from dL/dy and the saved z or y, differentiable again."""
        if self.gradient is None:
            return grad_y
        backward = _DIFFERENTIABLE.get(self.name, self.gradient.apply)
        return backward(grad_y, saved, *self.parameter)

    def formula(self, z: Tensor) -> Tensor:
        """y = f(z) from PyTorch's own operations."""
        return z if self.gate is None else self.gate.formula(z, *self.parameter)


#: The activations that linear and mlp take by name: "none" and every gate of activations.py.
ACTIVATIONS = {
    name: Activation(name)
    for name in (
        "none",
        *(name for name, gate in GATES.items() if gate.__module__ == activations.__name__),
    )
}


def arguments(activation: str) -> tuple[str, float]:
    """What the raw operations take of an activation: its name and its gate's default parameter."""
    parameter = ACTIVATIONS[activation].parameter
    return activation, parameter[0] if parameter else 0.0


# A float that torch.compile(dynamic=True) comes across is an input of its graph, of which it loses
# track from one Function to the next (torch 2.13). What a function marked so returns is none. This
# is torch.compiler.assume_constant_result, which imports all of torch.compile: two seconds.
arguments._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b: with a matrix b, what linear does with b^T for its weight."""
    if not is_traced():
        fits = isinstance(a, Tensor) and isinstance(b, Tensor) and b.dim() == 2 <= a.dim()
        if fits and not dispatch_modes():  # which are shown the one product
            return _linear(a, b.mT, None, "none", 0.0)[0]  # type: ignore[no-any-return]
        MatMul.check(a, b)  # before and not after: torch.matmul takes more than this gate does
    return _matmul(a, b)  # type: ignore[no-any-return]


class MatMul(Gate):
    """y = x w, of matrices or batches of them: x [..., N, D], w [..., D, M], y [..., N, M].

    dL/dx = dL/dy w^T and dL/dw = x^T dL/dy, summed over batch dimensions that were broadcast.

    Example:
        >>> x = torch.tensor([[2.0, 1.0, -3.0], [-3.0, 4.0, 2.0]], requires_grad=True)
        >>> w = torch.tensor([[3.0, 2, 1, -1], [2, 1, 3, 2], [3, 2, 1, -2]], requires_grad=True)
        >>> MatMul.apply(x, w).backward(torch.tensor([[2.0, 3, -3, 9], [-8, 1, 4, 6]]))
        >>> x.grad
        tensor([[  0.,  16.,  -9.],
                [-24.,   9., -30.]])
    """

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return _product(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, w = inputs
        save(ctx, *factors(ctx, x, w))
        ctx.shapes = x.shape, w.shape

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        shape_x, shape_w = ctx.shapes
        grad_x = grad_w = None
        need_x, need_w = wanted(ctx, grad_y.numel())
        product = _product if fast_backward(grad_y) else MatMul.apply
        if need_x:
            grad_x = sum_to(product(grad_y, w.mT), shape_x)  # dL/dy w^T
        if need_w and len(shape_w) == 2:  # a batch of matrices x is one of more rows
            grad_w = product(matrix(x).mT, matrix(grad_y))  # x^T dL/dy
        elif need_w:
            grad_w = sum_to(product(x.mT, grad_y), shape_w)
        return grad_x, grad_w

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, w_t: Tensor | None) -> Tensor:
        x, w = ctx.saved_tensors
        if x_t is None or w_t is None:
            return MatMul.apply(x, w_t) if x_t is None else MatMul.apply(x_t, w)
        return MatMul.apply(x_t, w) + MatMul.apply(x, w_t)

    @staticmethod
    def check(x: Any, w: Any) -> None:
        check.floating("matmul", "x", x)
        check.like("matmul", "w", w, "x", x)
        if x.dim() < 2 or w.dim() < 2 or x.shape[-1] != w.shape[-2]:
            raise ValueError(
                "matmul: x and w want shapes (..., N, D) and (..., D, M), "
                f"got {tuple(x.shape)} and {tuple(w.shape)}"
            )
        check.broadcastable("matmul", "x", x, "w", w, last=2)

    formula = staticmethod(torch.matmul)


def affine_gradients(
    grad_z: Tensor, x: Tensor | None, weight: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of z = x W^T + b, from operations that can be differentiated again.

    dL/dW alone reads x, and dL/dx alone W.
    """
    rows = matrix(grad_z)
    grad_x = grad_weight = None
    with past_autocast():
        if needs[0]:
            assert weight is not None
            grad_x = torch.mm(rows, weight)
        if needs[1]:
            assert x is not None
            grad_weight = torch.mm(rows.mT, matrix(x))
    if grad_x is not None and grad_z.dim() != 2:
        grad_x = grad_x.reshape(*grad_z.shape[:-1], grad_x.shape[1])
    grad_bias = rows.sum(0) if needs[2] else None
    return grad_x, grad_weight, grad_bias


def matrix(t: Tensor) -> Tensor:
    """A tensor's leading dimensions as one."""
    # math.prod and not -1, as the last size may be 0.
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def check_affine(
    op: str, x: Any, weight: Any, bias: Any, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """Raise TypeError or ValueError unless x W^T + b can be formed."""
    check.floating(op, "x", x)
    check.like(op, names[0], weight, "x", x)
    check.shape(op, names[0], weight, ("out_features", "in_features"))
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x wants shape (..., {weight.shape[1]}) for {names[0]} of shape "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if bias is not None:
        check.like(op, names[1], bias, "x", x)
        check.shape(op, names[1], bias, (weight.shape[0],))


class Linear(Gate):
    """y = f(x W^T + b): the linear layer, with an activation f fused to it.

    Args (of apply):
        x: [..., in_features], any leading dimensions.
        weight: [out_features, in_features].
        bias: [out_features], or None.
        activation: a key of `ACTIVATIONS`.

    Returns (y, z): y [..., out_features]; z is x W^T + b where the gradient of f reads it (elu,
    leaky_relu), else an empty tensor.

    With dL/dz = dL/dy f'(z): dL/dx = dL/dz W, dL/dW = dL/dz^T x, dL/db = sum of dL/dz over rows.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
        >>> y, _ = Linear.apply(x, weight, None, "relu")
        >>> y.shape
        torch.Size([2, 4])
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
    ) -> tuple[Tensor, Tensor]:
        return _linear(x, weight, bias, *arguments(activation))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, ctx.activation = inputs
        y, z = output
        activation = ACTIVATIONS[ctx.activation]
        if activation.saves_x:
            auxiliary(ctx, z)
        else:
            auxiliary(ctx, constant=(z,))
        save(ctx, *factors(ctx, x, weight), activation.saved(z, y))

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, saved = ctx.saved_tensors
        activation = ACTIVATIONS[ctx.activation]
        if unused(grad_z) and grad_y is not None and fast_backward(grad_y):
            needs = wanted(ctx, grad_y.numel())[:3]
            grads = _linear_backward(grad_y, x, weight, saved, *arguments(ctx.activation), *needs)
            return *(g if need else None for g, need in zip(grads, needs, strict=True)), None  # type: ignore[return-value]
        total = grad_z
        if grad_y is not None:
            through = activation.backward(grad_y, saved)
            total = through if total is None else total + through
        if total is None:
            return None, None, None, None
        return *affine_gradients(total, x, weight, wanted(ctx)[:3]), None

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor | None]:
        x, weight, saved = ctx.saved_tensors
        activation = ACTIVATIONS[ctx.activation]
        z_t = x.new_zeros(*x.shape[:-1], weight.shape[0])
        if x_t is not None:
            z_t = z_t + torch.matmul(x_t, weight.mT)
        if weight_t is not None:
            z_t = z_t + torch.matmul(x, weight_t.mT)
        if bias_t is not None:
            z_t = z_t + bias_t
        return activation.backward(z_t, saved), z_t if activation.saves_x else None

    @staticmethod
    def check(x: Any, weight: Any, bias: Any = None, activation: Any = "none") -> None:
        check_affine("linear", x, weight, bias)
        check.choice("linear", "activation", activation, tuple(ACTIVATIONS))

    @staticmethod
    def formula(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
    ) -> tuple[Tensor, Tensor]:
        z = torch.nn.functional.linear(x, weight, bias)
        return ACTIVATIONS[activation].formula(z), z


class Eager(Function):
    """Linear's y in plain eager mode, where the gradient of its activation reads no z: there y is
    the only output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> Tensor:
        y, z = Linear.forward(x, weight, bias, activation)
        ctx.activation = activation
        ctx.save_for_backward(*factors(ctx, x, weight), ACTIVATIONS[activation].saved(z, y))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return Linear.backward(ctx, grad_y, None)


_apply_eager = eager(Eager, Linear)
_EAGER = [name for name, activation in ACTIVATIONS.items() if not activation.saves_x]


def linear_output(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The y of Linear, the fastest way."""
    inputs = x, weight, bias, activation
    if idle(inputs):
        try:
            return Linear.forward(*inputs)[0]
        except REFUSALS:
            pass  # the Function says why, or has PyTorch do it
    if plain() and activation in _EAGER and requires_grad(inputs):
        return _apply_eager(*inputs)  # type: ignore[no-any-return]
    return call(Linear, *inputs)[0]  # type: ignore[no-any-return]


class Maxout(Gate):
    """y = max over the pieces p of x W_p^T + b_p: the lecture's max(w1^T x + b1, w2^T x + b2).

    Args (of apply):
        x: [..., in_features].
        weight: [pieces, out_features, in_features].
        bias: [pieces, out_features], or None.

    Returns (y, index), both [..., out_features]: index is the piece that won, as uint8. The winner
    receives the gradient, the first one where several are equal, as in torch.max(dim).

    Example:
        >>> weight = torch.tensor([[[1.0]], [[-1.0]]])  # max(x, -x) = |x|
        >>> y, index = Maxout.apply(torch.tensor([[3.0], [-2.0]]), weight)
        >>> y.flatten(), index.flatten()
        (tensor([3., 2.]), tensor([0, 1], dtype=torch.uint8))
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if weight.dim() != 3 or (bias is not None and bias.shape != weight.shape[:2]):
            Maxout.check(x, weight, bias)
        flat_bias = None if bias is None else bias.flatten()
        z, _ = _linear(x, weight.flatten(0, 1), flat_bias, *arguments("none"))
        return _max_pieces(z.unflatten(-1, weight.shape[:2]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        _, index = output
        auxiliary(ctx, constant=(index,))
        save(ctx, *factors(ctx, x, weight), index)
        ctx.shape = weight.shape

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if grad_y is None:
            return None, None, None
        x, weight, index = ctx.saved_tensors
        pieces, out, _ = ctx.shape
        if fast_backward(grad_y):
            grad_z = _max_pieces_backward(grad_y, index, pieces)
        else:
            grad_z = torch.where(won(index, pieces), grad_y.unsqueeze(-2), 0)
        grad_x, grad_weight, grad_bias = affine_gradients(
            grad_z.reshape(*grad_z.shape[:-2], pieces * out),
            x,
            None if weight is None else weight.flatten(0, 1),
            wanted(ctx, grad_y.numel()),
        )
        return (
            grad_x,
            None if grad_weight is None else grad_weight.view(ctx.shape),
            None if grad_bias is None else grad_bias.view(pieces, out),
        )

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None
    ) -> tuple[Tensor, None]:
        x, weight, index = ctx.saved_tensors
        flat = math.prod(weight.shape[:2])
        z_t = weight.new_zeros(*x.shape[:-1], flat)
        if x_t is not None:
            z_t = z_t + torch.matmul(x_t, weight.reshape(flat, weight.shape[2]).mT)
        if weight_t is not None:
            z_t = z_t + torch.matmul(x, weight_t.reshape(flat, weight.shape[2]).mT)
        z_t = z_t.view(*x.shape[:-1], *weight.shape[:2])
        if bias_t is not None:
            z_t = z_t + bias_t
        return torch.where(won(index, weight.shape[0]), z_t, 0).sum(-2), None

    @staticmethod
    def check(x: Any, weight: Any, bias: Any = None) -> None:
        check.floating("maxout", "x", x)
        check.like("maxout", "weight", weight, "x", x)
        check.shape("maxout", "weight", weight, ("pieces", "out_features", "in_features"))
        if not 1 <= weight.shape[0] <= 256:
            raise ValueError(f"maxout: weight wants 1 to 256 pieces, got {weight.shape[0]}")
        if x.dim() == 0 or x.shape[-1] != weight.shape[2]:
            raise ValueError(
                f"maxout: x wants shape (..., {weight.shape[2]}) for weight of shape "
                f"{tuple(weight.shape)}, got {tuple(x.shape)}"
            )
        if bias is not None:
            check.like("maxout", "bias", bias, "x", x)
            check.shape("maxout", "bias", bias, tuple(weight.shape[:2]))

    @staticmethod
    def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.einsum("...i,poi->...po", x, weight)
        y, index = (z if bias is None else z + bias).max(-2)
        return y, index.to(torch.uint8)


def won(index: Tensor, pieces: int) -> Tensor:
    """[..., pieces, out]: whether the piece won."""
    return index.unsqueeze(-2) == torch.arange(pieces, device=index.device).unsqueeze(-1)
