"""L2Penalty: the lecture's regulariser R(W)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import check
from .arithmetic import Multiply, Scale
from .gate import Gate, needs_grad, raw, save

__all__ = ["L2Penalty"]

_l2_penalty = raw("l2_penalty")


class L2Penalty(Gate):
    """R = sum of the squares of all elements of all tensors; dR/dW = 2 W.

    There is no factor 1/2, as in the lecture: adding lambda R to a loss is what SGD's
    `weight_decay = 2 * lambda` does.

    Example:
        >>> L2Penalty.apply(torch.tensor([1.0, 0, 0, 0])), L2Penalty.apply(torch.full((4,), 0.25))
        (tensor(1.), tensor(0.2500))
    """

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return _l2_penalty(list(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        needs = needs_grad(ctx, len(inputs))
        save(ctx, *(t if need else None for t, need in zip(inputs, needs, strict=True)))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        twice = Scale.apply(grad_y, 2.0)
        return tuple(
            Multiply.apply(tensor, twice) if need else None
            for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        terms = [
            2 * (tensor * tangent).sum()
            for tensor, tangent in zip(ctx.saved_tensors, tangents, strict=True)
            if tangent is not None
        ]
        return torch.stack(terms).sum()

    @staticmethod
    def check(*tensors: Any) -> None:
        if not tensors:
            raise ValueError("l2_penalty: tensors wants at least one tensor, got none")
        check.tensors("l2_penalty", "tensors", tensors)

    @staticmethod
    def formula(*tensors: Tensor) -> Tensor:
        return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum()
