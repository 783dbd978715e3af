"""MLP: a whole multi-layer perceptron as one Function."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import check
from .gate import (
    Gate,
    auxiliary,
    call,
    eager,
    fast_backward,
    past_autocast,
    plain,
    raw,
    requires_grad,
    save,
    unused,
    wanted,
)
from .products import ACTIVATIONS, affine_gradients, arguments, check_affine

__all__ = ["MLP", "mlp_output"]

_mlp, _mlp_backward = raw("mlp"), raw("mlp_backward")
_version = operator.attrgetter("_version")


def split(layers: int, parameters: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """(weights, biases) of the flat list of parameters; biases is empty where there are none."""
    return parameters[:layers], parameters[layers:]


class MLP(Gate):
    """y = W_L f(... f(W_1 x + b_1) ...) + b_L: linear layers with an activation f between them.

    Args (of apply):
        x: [..., in_features].
        layers: number of layers L.
        activation: a key of `ACTIVATIONS`.
        parameters: the L weights [out, in], then the L biases [out] or none at all.

    Returns (y, *saved): of each hidden layer the output h that backward needs, and before it the
    z = W h + b where the gradient of f reads that (elu, leaky_relu).

    Backward applies the chain rule from the last layer to the first: dL/dz_L = dL/dy, then
    dL/dW_i = dL/dz_i^T h_(i-1), dL/db_i = sum of dL/dz_i, dL/dz_(i-1) = (dL/dz_i W_i) f'.

    Example:
        >>> x, w1, w2 = torch.ones(5, 3), torch.ones(4, 3), torch.ones(2, 4)
        >>> y, h = MLP.apply(x, 2, "relu", w1, w2)
        >>> y.shape, h.shape
        (torch.Size([5, 2]), torch.Size([5, 4]))
    """

    @staticmethod
    def forward(x: Tensor, layers: int, activation: str, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(_mlp(x, *split(layers, parameters), *arguments(activation)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, layers, activation = inputs[:3]
        ctx.layers, ctx.activation = layers, activation
        auxiliary(ctx, *output[1:])
        save(ctx, x, *inputs[3 : 3 + layers], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *grad_saved: Tensor | None) -> Any:
        x, *tensors = ctx.saved_tensors
        described = ctx.layers, ctx.activation, wanted(ctx)
        if grad_y is not None and unused(*grad_saved) and fast_backward(grad_y):
            return fused_gradients(*described, grad_y, x, tensors)
        return gradients(*described, grad_y, grad_saved, x, tensors)

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, _: None, __: None, *tangents: Tensor | None) -> Any:
        x, *rest = ctx.saved_tensors
        weights, saved = split(ctx.layers, rest)
        weights_t, biases_t = split(ctx.layers, tangents)
        activation = ACTIVATIONS[ctx.activation]
        per_layer = activation.per_layer
        saved_t: list[Tensor] = []
        h, h_t = x, x_t
        for i, weight in enumerate(weights):
            z_t = h.new_zeros(*h.shape[:-1], weight.shape[0])
            if h_t is not None:
                z_t = z_t + torch.matmul(h_t, weight.mT)
            if weights_t[i] is not None:
                z_t = z_t + torch.matmul(h, weights_t[i].mT)
            if biases_t and biases_t[i] is not None:
                z_t = z_t + biases_t[i]
            if i + 1 == ctx.layers:
                return z_t, *saved_t
            h_t = activation.backward(z_t, saved[i * per_layer])
            saved_t += [z_t, h_t] if activation.saves_x else [h_t]
            h = saved[(i + 1) * per_layer - 1]
        raise AssertionError("an MLP has at least one layer")

    @staticmethod
    def check(x: Any, layers: Any, activation: Any, *parameters: Any) -> None:
        check.choice("mlp", "activation", activation, tuple(ACTIVATIONS))
        check.integer("mlp", "layers", layers)
        weights, biases = split(layers, parameters)
        if not weights:
            raise ValueError("mlp: weights wants at least one matrix, got none")
        if len(weights) != layers or len(biases) not in (0, layers):
            raise ValueError(f"mlp: biases wants none or {len(weights)} tensors, got {len(biases)}")
        h = x
        for i, weight in enumerate(weights):
            names = f"weights[{i}]", f"biases[{i}]"
            if biases:
                check.floating("mlp", names[1], biases[i])
            check_affine("mlp", h, weight, biases[i] if biases else None, names)
            h = x.new_empty((0, weight.shape[0]))

    @staticmethod
    def formula(x: Tensor, layers: int, activation: str, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = split(layers, parameters)
        f = ACTIVATIONS[activation]
        saved: list[Tensor] = []
        h = x
        for i, weight in enumerate(weights):
            z = torch.nn.functional.linear(h, weight, biases[i] if biases else None)
            if i + 1 == layers:
                return z, *saved
            h = f.formula(z)
            saved += [z, h] if f.saves_x else [h]
        raise AssertionError("an MLP has at least one layer")


def fused_gradients(
    layers: int, activation: str, needs_input_grad: tuple[bool, ...],
    grad_y: Tensor, x: Tensor, tensors: list[Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What MLP.backward returns, from its kernel; tensors: the weights, then what was saved."""
    need_x, _, _, *needs = needs_input_grad
    grad_x, *grads = _mlp_backward(
        grad_y, x, tensors[:layers], tensors[layers:], *arguments(activation),
        need_x, needs[:layers], needs[layers:],
    )  # fmt: skip
    if not all(needs):
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return grad_x if need_x else None, None, None, *grads


def gradients(
    layers: int, activation: str, needs_input_grad: tuple[bool, ...], grad_y: Tensor | None,
    grad_saved: Sequence[Tensor | None], x: Tensor, tensors: list[Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The same from operations that can be differentiated again. What else used a layer's z or h
    (only a second derivative does) adds its gradient, one of `grad_saved`."""
    weights, saved = split(layers, tensors)
    need_x, _, _, *needs = needs_input_grad
    need_weights, need_biases = split(layers, needs)
    f = ACTIVATIONS[activation]
    per_layer = f.per_layer
    grad_weights: list[Tensor | None] = [None] * layers
    grad_biases: list[Tensor | None] = [None] * len(need_biases)
    grad_x = None
    grad_z = grad_y
    for i in reversed(range(layers)):
        h = saved[i * per_layer - 1] if i else x
        grad_h = None
        if grad_z is not None:
            need_bias = bool(need_biases) and need_biases[i]
            grad_h, grad_weights[i], grad_bias = affine_gradients(
                grad_z, h, weights[i], (i > 0 or need_x, need_weights[i], need_bias)
            )
            if need_biases:
                grad_biases[i] = grad_bias
        if i == 0:
            grad_x = grad_h
            break
        grad_h = total(grad_h, grad_saved[i * per_layer - 1])
        grad_z = None
        if grad_h is not None:
            grad_z = f.backward(grad_h, saved[(i - 1) * per_layer])
        if f.saves_x:
            grad_z = total(grad_z, grad_saved[(i - 1) * per_layer])
    return grad_x, None, None, *grad_weights, *grad_biases


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be missing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


class Eager(Function):
    """MLP's y in plain eager mode: what backward needs of the hidden layers is saved and no output,
    and nothing of layers below the first one that is trained.

    Whatever differentiates the gradient itself goes through PyTorch's operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: int, activation: str, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:layers], parameters[layers:]
        y, *saved = _mlp(x, weights, biases, *arguments(activation))
        needs = ctx.needs_input_grad
        # Backward is that of the layers from the first on that gets a gradient.
        first = 0 if needs[0] or needs[3] else first_needed(*split(layers, needs[3:]))
        if first:
            below = first * ACTIVATIONS[activation].per_layer
            x, saved = saved[below - 1], saved[below:]
            weights, biases = weights[first:], biases[first:]
        # The gradients read no biases, and the first weights only for dL/dx: only a gradient of
        # theirs does, which wants them as they were, and that they are changed before backward is
        # no error, as it is none in PyTorch.
        if needs[0]:
            unread = biases
            ctx.save_for_backward(x, *weights, *saved)
        else:
            unread = weights[:1] + biases
            ctx.save_for_backward(x, *weights[1:], *saved)
        ctx.rest = layers, first, activation, unread, [*map(_version, unread)]
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        layers, first, activation, unread, versions = ctx.rest
        biases = unread
        needs = wanted(ctx)
        if not ctx.needs_input_grad[0]:
            tensors, biases = [unread[0], *tensors], unread[1:]
        if first:
            of_weights, of_biases = split(layers, needs[3:])
            needs = *needs[:3], *of_weights[first:], *of_biases[first:]
        described = layers - first, activation, needs
        fast = fast_backward(grad_y)
        if not fast and torch.is_grad_enabled():  # the hidden layers once more, on record
            if versions != [*map(_version, unread)]:
                raise RuntimeError(
                    "mlp: a bias, or the first weight, was changed in place since forward, and the "
                    "gradient of the gradient needs it as it was"
                )
            weights = tensors[: layers - first]
            with past_autocast():
                _, *saved = MLP.formula(x, layers - first, activation, *weights, *biases)
            tensors = [*weights, *saved]
        if fast:
            grads = fused_gradients(*described, grad_y, x, tensors)
        else:
            grads = gradients(*described, grad_y, [None] * len(tensors), x, tensors)
        if first:
            none = [None] * first
            of_weights, of_biases = split(layers - first, grads[3:])
            grads = None, None, None, *none, *of_weights, *(none if of_biases else ()), *of_biases
        return grads


def first_needed(need_weights: Sequence[bool], need_biases: Sequence[bool]) -> int:
    """The first layer of which a gradient is needed, as one of some layer is."""
    layer = need_weights.index(True) if True in need_weights else len(need_weights)
    return min(layer, need_biases.index(True)) if True in need_biases else layer


_apply_eager = eager(Eager, MLP)


def mlp_output(*inputs: Any) -> Tensor:
    """The y of MLP, the fastest way; the arguments are those of MLP.apply."""
    if plain() and requires_grad(inputs):
        return _apply_eager(*inputs)  # type: ignore[no-any-return]
    return call(MLP, *inputs)[0]  # type: ignore[no-any-return]
