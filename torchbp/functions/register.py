"""Completes the raw operations of torch.ops.torchbp, whose kernels csrc/ops.cpp registers.

Each gets a fake kernel (shapes, dtypes and strides without data, for torch.compile and
torch.export), a vmap rule, and autograd: called on tensors that require grad, an operation runs
through its Function; one that has none (the fused backward kernels) refuses. Its twin in
torch.ops.torchbp_kernels, which the Functions call, gets the fake kernel and no autograd. Products
are counted by torch.utils.flop_counter as PyTorch's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .arithmetic import Scale, Shift
from .gate import BACKWARD, GATES, below
from .mlp import MLP
from .penalty import L2Penalty
from .products import ACTIVATIONS, Linear, arguments
from .softmax_ce import REDUCTIONS, SoftmaxCE
from .table import ROWS

_ops: Any = torch.ops.torchbp
_library = torch.library.Library("torchbp", "FRAGMENT")
_kernels = torch.library.Library("torchbp_kernels", "FRAGMENT")

# ---- fake kernels: what csrc/ops.h allocates


def _fake_binary(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    for tensor in (a, b):
        if tensor.shape == shape:
            return torch.empty_like(tensor)
    return a.new_empty(shape)


def _fake_reduced(dy: Tensor, input: Tensor) -> Tensor:
    return torch.empty_like(input) if dy.shape == input.shape else dy.new_empty(input.shape)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameter: float
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if ACTIVATIONS[activation].saves_x else _nothing(x)


def _fake_linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, saved: Tensor | None, activation: str,
    parameter: float, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *leading, out = dy.shape
    return (
        dy.new_empty(*leading, weight.shape[1]) if need_x else _nothing(dy),  # type: ignore[union-attr]
        dy.new_empty(out, x.shape[-1]) if need_weight else _nothing(dy),  # type: ignore[union-attr]
        dy.new_empty(out) if need_bias else _nothing(dy),
    )


def _fake_mlp(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str, parameter: float
) -> list[Tensor]:
    result = [x.new_empty(*x.shape[:-1], weights[-1].shape[0])]
    # The CPU's own products keep hidden layers feature-major.
    feature_major = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2
    for weight in weights[:-1]:
        if feature_major:
            h = x.new_empty(weight.shape[0], x.shape[0]).t()
        else:
            h = x.new_empty(*x.shape[:-1], weight.shape[0])
        result += [h, torch.empty_like(h)] if ACTIVATIONS[activation].saves_x else [h]
    return result


def _fake_mlp_backward(
    dy: Tensor, x: Tensor, weights: list[Tensor], saved: list[Tensor], activation: str,
    parameter: float, need_x: bool, need_weights: list[int], need_biases: list[int],
) -> list[Tensor]:  # fmt: skip
    result = [x.new_empty(x.shape) if need_x else _nothing(x)]
    for weight, need in zip(weights, need_weights, strict=True):
        result.append(weight.new_empty(weight.shape) if need else _nothing(x))
    for weight, need in zip(weights, need_biases, strict=False):
        result.append(weight.new_empty(weight.shape[0]) if need else _nothing(x))
    return result


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_softmax_ce(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, compute = input.shape[:1], _compute_dtype(input.dtype)
    loss = input.new_empty(rows if reduction == REDUCTIONS["none"] else ())
    return loss, input.new_empty(rows, dtype=compute), input.new_empty((), dtype=compute)


def _fake_softmax_ce_with_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return input.new_empty(()), input.new_empty(input.shape)


def _fake_softmax_ce_backward(
    dloss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, total: Tensor,
    ignore_index: int, reduction: int, label_smoothing: float, need_input: bool, need_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        input.new_empty(input.shape) if need_input else _nothing(input),
        input.new_empty(input.shape) if need_target else _nothing(input),
    )


def _fake_max_pieces(z: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*z.shape[:-2], z.shape[-1])
    return z.new_empty(shape), z.new_empty(shape, dtype=torch.uint8)


def _fake_max_pieces_backward(dy: Tensor, index: Tensor, pieces: int) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], pieces, dy.shape[-1])


# ---- vmap rules

# A rule gets the tensors with an extra dimension at in_dims (None: not batched) and returns the
# result with its batch dimension, here always 0.


def _front(tensor: Any, dim: int | None, size: int) -> Any:
    """The batch dimension first; one is made (of stride 0) where there was none."""
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _batch_elementwise(op: Callable[..., Tensor]) -> Callable[..., Any]:
    """Same shapes everywhere: the batch dimension is one more."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        fronted = (
            _front(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True)
        )
        return op(*fronted), 0

    return rule


def _aligned(info: Any, in_dims: tuple[Any, ...], args: tuple[Tensor, ...]) -> list[Tensor]:
    """All batched, with ones after the batch dimension of those of fewer dimensions."""
    fronted = [_front(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True)]
    dims = max(arg.dim() for arg in fronted)
    return [arg.reshape(arg.shape[0], *[1] * (dims - arg.dim()), *arg.shape[1:]) for arg in fronted]


def _batch_binary(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Tensor) -> tuple[Tensor, int]:
        return op(*_aligned(info, in_dims, args)), 0

    return rule


def _batch_binary_backward(op: Callable[..., Any], which: str) -> Callable[..., Any]:
    """which: the inputs ("ab", "a" or "b") whose gradients, in their own shapes, op returns."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Tensor) -> tuple[Any, Any]:
        grads = op(*_aligned(info, in_dims, args))
        _, a, b = (
            _front(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True)
        )
        inputs = [{"a": a, "b": b}[name] for name in which]
        if len(which) == 1:
            return grads.reshape(inputs[0].shape), 0
        return tuple(g.reshape(i.shape) for g, i in zip(grads, inputs, strict=True)), (0, 0)

    return rule


def _batch_loop(op: Callable[..., Any]) -> Callable[..., Any]:
    """One call for each element of the batch: for operations that nobody calls in a hot loop."""

    def pick(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, list | tuple) and isinstance(dim, list | tuple):
            return [pick(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            op(*(pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        if isinstance(results[0], list):
            return stacked, [0] * len(stacked)
        return tuple(stacked), (0,) * len(stacked)

    return rule


def _batch_linear(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None,
    activation: str, parameter: float,
) -> tuple[Any, Any]:  # fmt: skip
    """Batched rows are more leading dimensions; batched weights are a batched product."""
    x = _front(x, in_dims[0], info.batch_size)
    if in_dims[1] is None and (bias is None or in_dims[2] is None):
        y, z = _ops.linear(x, weight, bias, activation, parameter)
    else:
        weight = _front(weight, in_dims[1], info.batch_size)
        rows = x.reshape(info.batch_size, math.prod(x.shape[1:-1]), x.shape[-1])
        z = torch.matmul(rows, weight.mT)
        if bias is not None:
            z = z + _front(bias, in_dims[2], info.batch_size).unsqueeze(1)
        z = z.reshape(*x.shape[:-1], weight.shape[1])
        y = z if activation == "none" else _activation(activation, z, parameter)
    if not ACTIVATIONS[activation].saves_x:
        z = _nothing(x).expand(info.batch_size, 0)
    return (y, z), (0, 0)


def _activation(name: str, z: Tensor, parameter: float) -> Tensor:
    op = getattr(_ops, name)
    return op(z) if ROWS[name].parameter is None else op(z, parameter)


def _batch_softmax_ce(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, reduction: int, label_smoothing: float,
) -> tuple[Any, Any]:  # fmt: skip
    """All rows of all batches at once, then the reduction of each batch."""
    if weight is not None and in_dims[2] is not None:
        return _batch_loop(_ops.softmax_ce)(
            info, in_dims, input, target, weight, ignore_index, reduction, label_smoothing
        )
    size = info.batch_size
    input, target = _front(input, in_dims[0], size), _front(target, in_dims[1], size)
    rows, lse, _ = _ops.softmax_ce(
        input.flatten(0, 1), target.flatten(0, 1), weight, ignore_index, 0, label_smoothing
    )
    rows, lse = rows.view(input.shape[:2]), lse.view(input.shape[:2])
    total = lse.new_ones(size)
    if reduction == REDUCTIONS["none"]:
        return (rows, lse, total), (0, 0, 0)
    loss = rows.sum(1)
    if reduction == REDUCTIONS["mean"]:
        if target.dtype == torch.int64:
            kept = target != ignore_index
            counts = kept if weight is None else weight[torch.where(kept, target, 0)] * kept
            total = counts.sum(1).to(lse.dtype)
        else:
            total = total * input.shape[1]
        loss = loss / total.to(loss.dtype)
    return (loss, lse, total), (0, 0, 0)


def _batch_max_pieces(info: Any, in_dims: tuple[Any], z: Tensor) -> tuple[Any, Any]:
    return _ops.max_pieces(_front(z, in_dims[0], info.batch_size)), (0, 0)


# ---- autograd


def _recorded(args: tuple[Any, ...]) -> bool:
    """Whether something will be differentiated: a tensor requires grad or carries a tangent."""
    tensors = _tensors(args)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among the arguments and in the lists among them."""
    flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,))]
    return [arg for arg in flat if isinstance(arg, Tensor)]


def _refuse(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise RuntimeError(
            f"torchbp::{name} is a fused kernel and records no gradient: call it under "
            "torch.no_grad(), or differentiate torchbp.functional, which needs no such kernel"
        )

    return run


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if len({tensor.device for tensor in _tensors(args)}) > 1:
            raise RuntimeError(f"torchbp::{name}: the tensors are on different devices")
        return fake(*args)

    return run


def _register(
    name: str,
    fake: Callable[..., Any],
    batch: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
) -> None:
    kernel = below(getattr(_ops, name).default)

    recorded = differentiable or _refuse(name)

    def autograd(*args: Any) -> Any:
        return recorded(*args) if _recorded(args) else kernel(*args)

    for library in (_library, _kernels):
        checked = _on_one_device(name, fake)
        torch.library.register_fake(f"{library.ns}::{name}", checked, lib=library)
    torch.library.register_vmap(f"torchbp::{name}", batch, lib=_library)
    _library.impl(name, autograd, "Autograd")
    _kernels.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _gradient_of(name: str) -> Callable[..., Any]:
    """The gradient column of a unary row as something to differentiate."""
    if name in BACKWARD:
        return BACKWARD[name].apply
    # The rows that save nothing: dx = a dy is Scale itself, dx = dy a Shift by 0.
    return {"scale": Scale.apply, "shift": lambda dy, c: Shift.apply(dy, 0.0)}[name]


for _name, _row in ROWS.items():
    _op, _op_backward = getattr(_ops, _name), getattr(_ops, f"{_name}_backward")
    if len(_row.inputs) == 2:
        _register(_name, _fake_binary, _batch_binary(_op), GATES[_name].apply)
        _register(
            f"{_name}_backward",
            lambda dy, a, b: (_fake_reduced(dy, a), _fake_reduced(dy, b)),
            _batch_binary_backward(_op_backward, "ab"),
        )
        for _which, _place in (("a", 1), ("b", 2)):
            _register(
                f"{_name}_backward_{_which}",
                lambda *args, place=_place: _fake_reduced(args[0], args[place]),
                _batch_binary_backward(getattr(_ops, f"{_name}_backward_{_which}"), _which),
            )
        continue
    _register(_name, lambda x, *_: torch.empty_like(x), _batch_elementwise(_op), GATES[_name].apply)
    # dx has the layout of the saved tensor, the last of the arguments.
    _register(
        f"{_name}_backward",
        lambda *args: torch.empty_like([arg for arg in args if isinstance(arg, Tensor)][-1]),
        _batch_elementwise(_op_backward),
        _gradient_of(_name),
    )


def _linear_recorded(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameter: float
) -> tuple[Tensor, Tensor]:
    _default_parameter("linear", activation, parameter)
    return Linear.apply(x, weight, bias, activation)


def _mlp_recorded(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str, parameter: float
) -> list[Tensor]:
    _default_parameter("mlp", activation, parameter)
    return list(MLP.apply(x, len(weights), activation, *weights, *biases))


def _default_parameter(op: str, activation: str, parameter: float) -> None:
    if arguments(activation) != (activation, parameter):
        raise RuntimeError(f"torchbp::{op} records a gradient for the default parameter alone")


def _softmax_ce_recorded(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    name = next(name for name, number in REDUCTIONS.items() if number == reduction)
    return SoftmaxCE.apply(input, target, weight, ignore_index, name, label_smoothing)


_register("linear", _fake_linear, _batch_linear, _linear_recorded)
_register("linear_backward", _fake_linear_backward, _batch_loop(_ops.linear_backward))
_register("mlp", _fake_mlp, _batch_loop(_ops.mlp), _mlp_recorded)
_register("mlp_backward", _fake_mlp_backward, _batch_loop(_ops.mlp_backward))
_register("softmax_ce", _fake_softmax_ce, _batch_softmax_ce, _softmax_ce_recorded)
_register(
    "softmax_ce_with_gradient",
    _fake_softmax_ce_with_gradient,
    _batch_loop(_ops.softmax_ce_with_gradient),
)
_register("softmax_ce_backward", _fake_softmax_ce_backward, _batch_loop(_ops.softmax_ce_backward))
_register("max_pieces", _fake_max_pieces, _batch_max_pieces)
_register("max_pieces_backward", _fake_max_pieces_backward, _batch_loop(_ops.max_pieces_backward))
_register(
    "l2_penalty",
    lambda tensors: tensors[0].new_empty(()),
    _batch_loop(_ops.l2_penalty),
    lambda tensors: L2Penalty.apply(*tensors),
)

# ---- what changes its arguments: the updates of torchbp.optim


def _register_in_place(name: str, fake: Callable[..., Any] = lambda *args: None) -> None:
    """No gradient goes through an update: autograd passes it on as if under torch.no_grad()."""
    torch.library.register_fake(f"torchbp::{name}", _on_one_device(name, fake), lib=_library)
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


_register_in_place("sgd_")
_register_in_place("adamw_")


# ---- what torch.utils.flop_counter counts: two for each multiplication of a product, and as
# everywhere in PyTorch nothing for what is elementwise. A tensor's shape is in its place.

Shape = Sequence[int]


def _count_linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _count_linear_backward(
    dy: Shape, x: Shape | None, weight: Shape | None, saved: Shape | None, activation: str,
    parameter: float, need_x: bool, need_weight: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    read = weight if x is None else x  # each of which the other's gradient reads
    return 0 if read is None else 2 * math.prod(dy) * read[-1] * (need_x + need_weight)


def _count_mlp(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return sum(_count_linear(x, weight) for weight in weights)


def _count_mlp_backward(
    dy: Shape, x: Shape, weights: Sequence[Shape], saved: Sequence[Shape], activation: str,
    parameter: float, need_x: bool, need_weights: Sequence[int], need_biases: Sequence[int],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    count, below = 0, need_x  # whether somebody wants a gradient below the layer
    for i, weight in enumerate(weights):
        count += _count_linear(x, weight) * (below + bool(need_weights[i]))
        below = below or bool(need_weights[i]) or bool(need_biases and need_biases[i])
    return count


for _name, _count in (
    ("linear", _count_linear),
    ("linear_backward", _count_linear_backward),
    ("mlp", _count_mlp),
    ("mlp_backward", _count_mlp_backward),
):
    register_flop_formula(getattr(_ops, _name))(_count)
