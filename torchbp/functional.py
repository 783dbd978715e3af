"""The operations as functions, named and ordered like torch.nn.functional.

They follow autocast (products in the autocast dtype, cross-entropy in float32, gates with two
inputs in the wider of their dtypes), work under torch.func and torch.compile, and raise TypeError,
ValueError or IndexError naming the operation and the argument. All take float64, float32, bfloat16
and float16 tensors; half types compute in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import functions
from .functions import check
from .functions.gate import any_autocast, call
from .functions.mlp import mlp_output
from .functions.products import linear_output
from .functions.softmax_ce import check_target, softmax_ce_loss

__all__ = [
    "add",
    "cross_entropy",
    "elu",
    "exp",
    "l2_penalty",
    "leaky_relu",
    "linear",
    "matmul",
    "maximum",
    "maxout",
    "mlp",
    "multiply",
    "reciprocal",
    "relu",
    "scale",
    "shift",
    "sigmoid",
    "tanh",
]


def _autocast_dtype(value: Any) -> torch.dtype | None:
    """The dtype that autocast wants products in, or None where autocast is off."""
    if not any_autocast() or not isinstance(value, Tensor) or value.is_meta:
        return None  # meta knows no autocast
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in another dtype; float64 stays, as in PyTorch's autocast."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


def _autocast(*values: Any) -> tuple[Any, ...]:
    """The operands of a product in the dtype that autocast wants; as they are where it is off."""
    dtype = _autocast_dtype(values[0])
    return values if dtype is None else tuple(_cast(value, dtype) for value in values)


def _promote(a: Any, b: Any) -> tuple[Any, Any]:
    """Under autocast, two inputs of different dtypes become the wider one."""
    if not any_autocast():
        return a, b
    if _autocast_dtype(a) is None or not isinstance(b, Tensor) or a.dtype == b.dtype:
        return a, b
    if not (a.is_floating_point() and b.is_floating_point()):
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, broadcast; the gate that distributes its gradient: dL/da = dL/db = dL/dy.

    Args:
        a, b: tensors of one dtype whose shapes broadcast.

    Example:
        >>> add(torch.tensor([1.0, 2.0]), torch.tensor([[10.0], [20.0]])).shape
        torch.Size([2, 2])
    """
    return call(functions.Add, *_promote(a, b))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a * b, broadcast; the gate that swaps its multipliers: dL/da = b dL/dy, dL/db = a dL/dy.

    Args:
        a, b: tensors of one dtype whose shapes broadcast. For a number use `scale`.

    Example:
        >>> multiply(torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0]))
        tensor([10., 21.])
    """
    return call(functions.Multiply, *_promote(a, b))


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """The larger of a and b, broadcast; the gate that routes its gradient to the larger input.

    Where both are equal each gets half of it; NaN propagates, as in torch.maximum.

    Args:
        a, b: tensors of one dtype whose shapes broadcast.

    Example:
        >>> maximum(torch.tensor([4.0, 1.0]), torch.tensor([5.0, 0.0]))
        tensor([5., 1.])
    """
    return call(functions.Maximum, *_promote(a, b))


def exp(x: Tensor) -> Tensor:
    """e^x; dL/dx = dL/dy e^x. Any shape.

    Example:
        >>> exp(torch.tensor([3.2, 5.1, -1.7]))  # the lecture's unnormalised probabilities
        tensor([ 24.5325, 164.0219,   0.1827])
    """
    return call(functions.Exp, x)


def reciprocal(x: Tensor) -> Tensor:
    """1 / x; dL/dx = -dL/dy / x^2. Any shape.

    Example:
        >>> reciprocal(torch.tensor([2.0, 4.0]))
        tensor([0.5000, 0.2500])
    """
    return call(functions.Reciprocal, x)


def scale(x: Tensor, a: float) -> Tensor:
    """a x for a number a; dL/dx = a dL/dy. Any shape.

    Example:
        >>> scale(torch.tensor([1.0, 2.0]), -1.0)
        tensor([-1., -2.])
    """
    return call(functions.Scale, x, a)


def shift(x: Tensor, c: float) -> Tensor:
    """x + c for a number c; dL/dx = dL/dy. Any shape.

    Example:
        >>> shift(torch.tensor([1.0, 2.0]), 1.0)
        tensor([2., 3.])
    """
    return call(functions.Shift, x, c)


def relu(x: Tensor) -> Tensor:
    """max(0, x); dL/dx = dL/dy where x > 0, else 0. Any shape.

    Example:
        >>> relu(torch.tensor([1.0, -2.0, 3.0, -1.0]))
        tensor([1., 0., 3., 0.])
    """
    return call(functions.ReLU, x)


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, else negative_slope x. Any shape. The lecture has negative_slope = 0.1.

    Example:
        >>> leaky_relu(torch.tensor([1.0, -2.0]), 0.1)
        tensor([ 1.0000, -0.2000])
    """
    return call(functions.LeakyReLU, x, negative_slope)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """x where x > 0, else alpha (e^x - 1). Any shape.

    Example:
        >>> elu(torch.tensor([1.0, -1.0]))
        tensor([ 1.0000, -0.6321])
    """
    return call(functions.ELU, x, alpha)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x); dL/dx = dL/dy (1 - y) y. Any shape.

    Example:
        >>> sigmoid(torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.7311])
    """
    return call(functions.Sigmoid, x)


def tanh(x: Tensor) -> Tensor:
    """tanh(x); dL/dx = dL/dy (1 - y^2). Any shape.

    Example:
        >>> tanh(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7616])
    """
    return call(functions.Tanh, x)


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """The product x w, with torch.matmul's rules for vectors and for batches of matrices.

    Args:
        x: [..., N, D], or [D].
        w: [..., D, M], or [D].

    Returns:
        [..., N, M]; without N if x was a vector, without M if w was.

    dL/dx = dL/dy w^T and dL/dw = x^T dL/dy: each the product that has the right shape.

    Example:
        >>> matmul(torch.ones(2, 3), torch.ones(3, 4)).shape
        torch.Size([2, 4])
    """
    x, w = _autocast(x, w)
    row = isinstance(x, Tensor) and x.dim() == 1
    column = isinstance(w, Tensor) and w.dim() == 1
    if (row or column) and isinstance(x, Tensor) and isinstance(w, Tensor):
        size = w.shape[-1 if column else -2] if w.dim() else None
        if x.dim() == 0 or x.shape[-1] != size:
            raise ValueError(
                "matmul: x and w want shapes (..., N, D) and (..., D, M), "
                f"got {tuple(x.shape)} and {tuple(w.shape)}"
            )
    y = call(functions.MatMul, x.unsqueeze(0) if row else x, w.unsqueeze(1) if column else w)
    y = y.squeeze(-1) if column else y
    return y.squeeze(-1 if column else -2) if row else y


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """f(x W^T + b): torch.nn.functional.linear, with an activation f fused to it.

    Args:
        x: [..., in_features], any leading dimensions.
        weight: [out_features, in_features].
        bias: [out_features], or None.
        activation: "relu", "leaky_relu", "elu", "sigmoid", "tanh" (with PyTorch's default
            parameters), or None.

    Returns:
        [..., out_features].

    Example:
        >>> linear(torch.ones(2, 3), torch.ones(4, 3), activation="relu").shape
        torch.Size([2, 4])
    """
    x, weight, bias = _autocast(x, weight, bias)
    return linear_output(x, weight, bias, "none" if activation is None else activation)


def maxout(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """max over p of x W_p^T + b_p: the lecture's max(w1^T x + b1, w2^T x + b2).

    The winning piece receives the gradient, the first one where several are equal.

    Args:
        x: [..., in_features].
        weight: [pieces, out_features, in_features].
        bias: [pieces, out_features], or None.

    Returns:
        [..., out_features].

    Example:
        >>> maxout(torch.ones(2, 3), torch.ones(2, 4, 3)).shape
        torch.Size([2, 4])
    """
    x, weight, bias = _autocast(x, weight, bias)
    y, _ = call(functions.Maxout, x, weight, bias)
    return y


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The softmax classifier's loss -log softmax(input)[target], as torch.nn.functional has it.

    Args:
        input: logits, [C], [N, C] or [N, C, d1, d2, ...].
        target: class indices (int64), the shape of input without C; or class probabilities, the
            shape and dtype of input.
        weight: [C] a factor for each class, or None. It has no gradient.
        ignore_index: positions whose class index is this count nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: s in [0, 1]: the target becomes (1 - s) q + s / C.

    Returns:
        one number, or for reduction "none" the shape of input without C.

    input is kept for backward, where PyTorch keeps a copy of its log-probabilities: it may not be
    changed in place before.

    Raises:
        IndexError: a class index is out of range. On a GPU, which is not waited for, the loss is
            nan and a later call raises (backward, or the next loss); with CUDA_LAUNCH_BLOCKING=1
            this one does.

    Example:
        >>> cross_entropy(torch.tensor([[3.2, 5.1, -1.7]]), torch.tensor([0]))
        tensor(2.0404)
    """
    if _autocast_dtype(input) is not None:
        input, target = _cast(input, torch.float32), _cast(target, torch.float32)
        weight = _cast(weight, torch.float32)
    options = weight, ignore_index, reduction, label_smoothing
    if not (isinstance(input, Tensor) and isinstance(target, Tensor) and input.dim() == 2):
        return _cross_entropy_of_any_shape(input, target, *options)
    return softmax_ce_loss(input, target, *options)


def _cross_entropy_of_any_shape(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float,
) -> Tensor:  # fmt: skip
    """cross_entropy of the rows that input [C] or [N, C, d1, d2, ...] holds."""
    check.tensor("cross_entropy", "input", input)
    check.tensor("cross_entropy", "target", target)
    shape = input.shape
    if input.dim() == 0:
        raise ValueError("cross_entropy: input wants shape (C,), (N, C) or (N, C, ...), got ()")
    probabilities = target.is_floating_point()
    wanted = shape if probabilities else shape[:-1] if input.dim() == 1 else shape[:1] + shape[2:]
    check_target(target, wanted, shape)
    rows = input
    if input.dim() == 1:
        rows, target = input.unsqueeze(0), target.unsqueeze(0)
    elif input.dim() > 2:
        rows = input.movedim(1, -1).flatten(0, -2)
        target = target.movedim(1, -1).flatten(0, -2) if probabilities else target.flatten()
    loss = softmax_ce_loss(rows, target, weight, ignore_index, reduction, label_smoothing)
    if reduction != "none":
        return loss
    return loss.reshape(shape[:1] + shape[2:] if input.dim() > 1 else ())


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    activation: str = "relu",
) -> Tensor:
    """A multi-layer perceptron as one operation: an activation between linear layers.

    Args:
        x: [..., in_features].
        weights: one [out, in] for each layer.
        biases: one [out] for each layer, or None (or empty) for none at all.
        activation: "relu", "leaky_relu", "elu", "sigmoid" or "tanh" (with PyTorch's default
            parameters). None follows the last layer.

    Returns:
        [..., out_features of the last layer].

    Example:
        >>> mlp(torch.ones(5, 3), [torch.ones(4, 3), torch.ones(2, 4)]).shape
        torch.Size([5, 2])
    """
    biases = () if biases is None else biases
    if not (isinstance(weights, (list, tuple)) and isinstance(biases, (list, tuple))):
        first = isinstance(weights, (list, tuple))
        argument, value = ("biases", biases) if first else ("weights", weights)
        raise TypeError(f"mlp: {argument} wants a list of torch.Tensor, got {type(value).__name__}")
    if any_autocast():
        x, *parameters = _autocast(x, *weights, *biases)
        weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    return mlp_output(x, len(weights), activation, *weights, *biases)


def l2_penalty(tensors: Tensor | Sequence[Tensor]) -> Tensor:
    """R(W): the sum of the squares of all elements of all tensors, without a factor 1/2.

    Adding `lam * l2_penalty(weights)` to a loss does what SGD's `weight_decay = 2 * lam` does.

    Args:
        tensors: a list of tensors of one dtype and device (or one tensor).

    Returns:
        one number.

    Example:
        >>> l2_penalty([torch.tensor([1.0, 0, 0, 0])]), l2_penalty([torch.full((4,), 0.25)])
        (tensor(1.), tensor(0.2500))
    """
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    if not isinstance(tensors, Iterable):
        raise TypeError(
            f"l2_penalty: tensors wants a list of torch.Tensor, got {type(tensors).__name__}"
        )
    return call(functions.L2Penalty, *tensors)
