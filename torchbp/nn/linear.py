"""Linear and Maxout layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functions import check
from ..functions.products import ACTIVATIONS

__all__ = ["Linear", "Maxout"]


def check_size(op: str, argument: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a count of features."""
    check.integer(op, argument, value)
    if value < 1:
        raise ValueError(f"{op}: {argument} wants a positive int, got {value}")


def check_activation(op: str, activation: str | None) -> None:
    """Raise TypeError or ValueError for an activation that no fused layer knows."""
    if activation is not None:
        check.choice(op, "activation", activation, tuple(ACTIVATIONS))


class Linear(torch.nn.Linear):
    """f(x W^T + b): torch.nn.Linear with an activation fused to it.

    Same initialisation and state_dict keys (`weight`, `bias`) as torch.nn.Linear.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is a b.
        activation: "relu", "leaky_relu", "elu", "sigmoid", "tanh", or None.
        device, dtype: of the parameters.

    Shape: [..., in_features] -> [..., out_features].

    Example:
        >>> Linear(3, 4, activation="relu")(torch.ones(2, 3)).shape
        torch.Size([2, 4])
    """

    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation("Linear", activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        more = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + more


class Maxout(torch.nn.Module):
    """max over p of x W_p^T + b_p, the lecture's Maxout for `pieces` = 2.

    Each piece is initialised as torch.nn.Linear initialises.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        pieces: how many linear functions compete, 1 to 256.
        bias: whether there is a b.
        device, dtype: of the parameters.

    Shape: [..., in_features] -> [..., out_features]; weight [pieces, out_features, in_features],
    bias [pieces, out_features].

    Example:
        >>> Maxout(3, 4)(torch.ones(2, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (
            ("in_features", in_features), ("out_features", out_features), ("pieces", pieces)
        ):  # fmt: skip
            check_size("Maxout", argument, value)
        if pieces > 256:
            raise ValueError(f"Maxout: pieces wants at most 256, got {pieces}")
        self.in_features, self.out_features, self.pieces = in_features, out_features, pieces
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty(pieces, out_features, in_features, **kind))
        self.bias = torch.nn.Parameter(torch.empty(pieces, out_features, **kind)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases from U(-1/sqrt(in_features), 1/sqrt(in_features))."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return functional.maxout(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pieces={self.pieces}, bias={self.bias is not None}"
        )
