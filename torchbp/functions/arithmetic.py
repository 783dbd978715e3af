"""The arithmetic gates: Add, Multiply, Maximum of two inputs; Exp, Reciprocal, Scale, Shift of one.

Each is a row of csrc/gates.h, elementwise, of dtype float64, float32, bfloat16 or float16 (half
types compute in float32). Two inputs broadcast against each other as in PyTorch, and each gradient
has the shape of its input: what was copied to many elements adds up their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .check import number
from .gate import Gate, TwoInputs, backward_of, factors, raw, save, sum_to

__all__ = ["Add", "Exp", "Maximum", "Multiply", "Reciprocal", "Scale", "Shift"]

_add, _multiply, _maximum = raw("add"), raw("multiply"), raw("maximum")
_exp, _reciprocal, _scale, _shift = raw("exp"), raw("reciprocal"), raw("scale"), raw("shift")

ExpBackward = backward_of("exp", "ExpBackward")
ReciprocalBackward = backward_of("reciprocal", "ReciprocalBackward")


multiply_gradients = TwoInputs("multiply")
maximum_gradients = TwoInputs("maximum")


class Add(Gate):
    """y = a + b; dL/da = dL/db = dL/dy: the gradient distributor.

    Example:
        >>> a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
        >>> Add.apply(a, b).backward(torch.tensor(2.0))
        >>> a.grad, b.grad
        (tensor(2.), tensor(2.))
    """

    row = "add"
    formula = staticmethod(torch.add)

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _add(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        a, b = inputs
        ctx.shapes = a.shape, b.shape
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        need_a, need_b = ctx.needs_input_grad
        shape_a, shape_b = ctx.shapes
        return (
            sum_to(grad_y, shape_a) if need_a else None,
            sum_to(grad_y, shape_b) if need_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, a_t: Tensor | None, b_t: Tensor | None) -> Tensor:
        if a_t is None or b_t is None:
            return (b_t if a_t is None else a_t).expand(ctx.shape).clone()  # type: ignore[union-attr]
        return Add.apply(a_t, b_t)


class Multiply(Gate):
    """y = a * b; dL/da = b * dL/dy, dL/db = a * dL/dy: the "swap multiplier".

    Example:
        >>> a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        >>> Multiply.apply(a, b).backward(torch.tensor(5.0))
        >>> a.grad, b.grad
        (tensor(15.), tensor(10.))
    """

    row = "multiply"
    formula = staticmethod(torch.mul)

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _multiply(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        a, b = inputs
        if a.requires_grad and b.requires_grad:
            save(ctx, a, b)
        else:
            save(ctx, *factors(ctx, a, b))
            ctx.shapes = a.shape, b.shape

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return multiply_gradients.backward(ctx, grad_y)

    @staticmethod
    def jvp(ctx: Any, a_t: Tensor | None, b_t: Tensor | None) -> Tensor:
        return multiply_gradients.jvp(ctx.saved_tensors, a_t, b_t)


class Maximum(Gate):
    """y = max(a, b); the larger input receives dL/dy, the other 0: the gradient router.

    Where both are equal each receives half, as in torch.maximum.

    Example:
        >>> a, b = torch.tensor(4.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
        >>> Maximum.apply(a, b).backward(torch.tensor(9.0))
        >>> a.grad, b.grad
        (tensor(0.), tensor(9.))
    """

    row = "maximum"
    formula = staticmethod(torch.maximum)

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _maximum(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return maximum_gradients.backward(ctx, grad_y)

    @staticmethod
    def jvp(ctx: Any, a_t: Tensor | None, b_t: Tensor | None) -> Tensor:
        return maximum_gradients.jvp(ctx.saved_tensors, a_t, b_t)


class Exp(Gate):
    """y = e^x; dL/dx = dL/dy * y.

    Example:
        >>> Exp.apply(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 2.7183])
    """

    row = "exp"
    formula = staticmethod(torch.exp)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _exp(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return ExpBackward.apply(grad_y, y)


class Reciprocal(Gate):
    """y = 1 / x; dL/dx = dL/dy * -1 / x^2 = -dL/dy * y^2.

    Example:
        >>> Reciprocal.apply(torch.tensor([1.0, 4.0]))
        tensor([1.0000, 0.2500])
    """

    row = "reciprocal"
    formula = staticmethod(torch.reciprocal)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _reciprocal(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return ReciprocalBackward.apply(grad_y, y)


class Scale(Gate):
    """y = a * x for a number a; dL/dx = a * dL/dy. Saves nothing but a.

    Example:
        >>> Scale.apply(torch.tensor([1.0, 2.0]), -1.0)
        tensor([-1., -2.])
    """

    row = "scale"

    @staticmethod
    def forward(x: Tensor, a: float) -> Tensor:
        return _scale(x, number("scale", "a", a))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.a = inputs

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return Scale.apply(grad_y, ctx.a), None

    @staticmethod
    def formula(x: Tensor, a: float) -> Tensor:
        return a * x


class Shift(Gate):
    """y = x + c for a number c; dL/dx = dL/dy. Saves nothing.

    Example:
        >>> Shift.apply(torch.tensor([1.0, 2.0]), 1.0)
        tensor([2., 3.])
    """

    row = "shift"

    @staticmethod
    def forward(x: Tensor, c: float) -> Tensor:
        return _shift(x, number("shift", "c", c))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y, None

    @staticmethod
    def formula(x: Tensor, c: float) -> Tensor:
        return x + c
