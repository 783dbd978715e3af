"""The multi-layer perceptron as one module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import functional
from ..functions import check
from ..functions.products import ACTIVATIONS
from .activations import ELU, LeakyReLU, ReLU, Sigmoid, Tanh
from .linear import Linear, check_size

__all__ = ["MLP"]

_MODULES: dict[str, type[torch.nn.Module]] = {
    "relu": ReLU, "leaky_relu": LeakyReLU, "elu": ELU, "sigmoid": Sigmoid, "tanh": Tanh,
}  # fmt: skip


class MLP(torch.nn.Sequential):
    """A multi-layer perceptron: linear layers with an activation (and dropout) between them.

    It is the Sequential of its layers, with the same initialisation and state_dict keys
    (`0.weight`, `0.bias`, `2.weight`, ...) as the torch.nn.Sequential it stands for, and runs them
    as one
    operation while no dropout is active and no layer has hooks.

    Args:
        sizes: [in_features, hidden..., out_features].
        activation: "relu", "leaky_relu", "elu", "sigmoid" or "tanh".
        bias: whether the layers have biases.
        dropout: probability with which a hidden activation is dropped in training.
        device, dtype: of the parameters.

    Shape: [..., sizes[0]] -> [..., sizes[-1]].

    Example:
        >>> model = MLP([3072, 512, 256, 10])
        >>> model(torch.zeros(2, 3072)).shape
        torch.Size([2, 10])
        >>> list(model.state_dict())[:2]
        ['0.weight', '0.bias']
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes wants [in_features, ..., out_features], got {sizes}")
        for i, size in enumerate(sizes):
            check_size("MLP", f"sizes[{i}]", size)
        check.choice("MLP", "activation", activation, tuple(_MODULES))
        if not 0 <= check.number("MLP", "dropout", dropout) < 1:
            raise ValueError(f"MLP: dropout wants a probability in [0, 1), got {dropout}")
        modules: list[torch.nn.Module] = []
        for i, (size_in, size_out) in enumerate(pairwise(sizes)):
            modules.append(Linear(size_in, size_out, bias, device=device, dtype=dtype))
            if i + 2 < len(sizes):
                modules.append(_MODULES[activation]())
                if dropout:
                    modules.append(torch.nn.Dropout(dropout))
        super().__init__(*modules)
        self.activation = activation
        self.dropout = dropout

    @classmethod
    def from_sequential(cls, sequential: torch.nn.Sequential) -> MLP:
        """An MLP that shares the parameters of a Sequential of Linear, activation (and Dropout).

        Args:
            sequential: Linear layers of torch.nn or torchbp.nn, all with or all without a bias, one
                kind of activation (with default parameters) after each but the last, and either no
                Dropout or the same after each activation.

        Raises:
            TypeError: not a Sequential.
            ValueError: another structure; the message names the first module that does not fit.

        Example:
            >>> from torch import nn
            >>> twin = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
            >>> model = MLP.from_sequential(twin)
            >>> model[0].weight is twin[0].weight
            True
        """
        if not isinstance(sequential, torch.nn.Sequential):
            raise TypeError(
                f"MLP.from_sequential wants a torch.nn.Sequential, got {type(sequential).__name__}"
            )
        linears, activation, dropout = _parse(sequential)
        sizes = [linears[0].in_features, *(linear.out_features for linear in linears)]
        model = cls(sizes, activation, linears[0].bias is not None, dropout, device="meta")
        own = (module for module in model if isinstance(module, Linear))
        for mine, theirs in zip(own, linears, strict=True):
            mine.weight, mine.bias = theirs.weight, theirs.bias
        return model.train(sequential.training)

    def forward(self, input: Tensor) -> Tensor:
        if (self.dropout and self.training) or any(_hooked(module) for module in self):
            return super().forward(input)
        linears = [module for module in self if isinstance(module, Linear)]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return functional.mlp(input, [linear.weight for linear in linears], biases, self.activation)


def _hooked(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _activation_name(module: torch.nn.Module) -> str | None:
    """The name of an activation module with default parameters, or None."""
    for name, kind in _MODULES.items():
        twin = kind.__mro__[1]  # the torch.nn class
        if type(module) in (kind, twin):
            parameter = tuple(
                getattr(module, attribute)
                for attribute in ("negative_slope", "alpha")
                if hasattr(module, attribute)
            )
            return name if parameter == ACTIVATIONS[name].parameter else None
    return None


def _parse(sequential: Iterable[torch.nn.Module]) -> tuple[list[torch.nn.Linear], str, float]:
    """(linear layers, activation, dropout) of a Sequential that an MLP can stand for."""
    linears: list[torch.nn.Linear] = []
    activations: set[str] = set()
    dropouts: list[float] = []
    modules = list(sequential)

    def refuse(i: int, wants: str) -> ValueError:
        return ValueError(f"MLP.from_sequential wants {wants} at position {i}, got {modules[i]}")

    i = 0
    while i < len(modules):
        module = modules[i]
        if type(module) not in (torch.nn.Linear, Linear) or getattr(module, "activation", None):
            raise refuse(i, "a Linear")
        assert isinstance(module, torch.nn.Linear)
        if linears and (module.bias is None) != (linears[0].bias is None):
            raise refuse(i, "a Linear with a bias if and only if the first has one,")
        if linears and module.in_features != linears[-1].out_features:
            raise refuse(i, f"a Linear of {linears[-1].out_features} in_features")
        linears.append(module)
        i += 1
        if i == len(modules):
            break
        name = _activation_name(modules[i])
        if name is None or (activations and name not in activations):
            raise refuse(i, "the one activation of the network, with default parameters,")
        activations.add(name)
        i += 1
        if i < len(modules) and type(modules[i]) is torch.nn.Dropout:
            dropouts.append(modules[i].p)  # type: ignore[arg-type]
            i += 1
        if i == len(modules):
            raise refuse(i - 1, "a Linear last, not what stands")
    if not linears:
        raise ValueError("MLP.from_sequential wants at least one Linear, got an empty Sequential")
    if dropouts and (len(set(dropouts)) > 1 or len(dropouts) != len(linears) - 1):
        raise ValueError(
            "MLP.from_sequential wants no Dropout or the same after every activation, "
            f"got p = {dropouts} after {len(linears) - 1} activations"
        )
    return linears, next(iter(activations), "relu"), dropouts[0] if dropouts else 0.0
