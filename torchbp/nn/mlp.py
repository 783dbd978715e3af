"""The multi-layer perceptron as one module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from ..functions import check
from ..functions.gate import GATES
from ..functions.products import ACTIVATIONS
from ..functions.table import ROWS
from . import activations
from .linear import Linear, check_size
from .twin import TWINS, twin

__all__ = ["MLP"]

#: Name of an activation -> its module: a Function and its module have one name.
_MODULES: dict[str, type[torch.nn.Module]] = {
    name: getattr(activations, gate.__name__)
    for name, gate in GATES.items()
    if name in ACTIVATIONS and hasattr(activations, gate.__name__)
}

#: Class of an activation, torchbp's or torch.nn's -> its name, its parameter's name, the default.
_NAMES = {
    own: (name, ROWS[name].parameter, ACTIVATIONS[name].parameter) for name, own in _MODULES.items()
}
_NAMES |= {theirs: _NAMES[own] for theirs, own in TWINS.items() if own in _NAMES}


class MLP(torch.nn.Sequential):
    """A multi-layer perceptron: linear layers with an activation (and dropout) between them.

    It is the Sequential of its layers, with the same initialisation and state_dict keys
    (`0.weight`, `0.bias`, `2.weight`, ...) as the torch.nn.Sequential it stands for. It runs them
    as one operation wherever that gives the same result, else one after the other: while dropout is
    active, layers have hooks, or the layers were changed to something that is no MLP any more.
    `model[:-1]` is a torch.nn.Sequential of the same layers.

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
        if not isinstance(sizes, Iterable):
            raise TypeError(f"MLP: sizes wants a list of int, got {type(sizes).__name__}")
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

    @classmethod
    def from_sequential(cls, sequential: torch.nn.Sequential) -> MLP:
        """An MLP that shares the parameters of a Sequential of Linear, activation (and Dropout).

        It keeps the names of the layers, their hooks, and whether each is in training mode.

        Args:
            sequential: Linear layers of torch.nn or torchbp.nn, all with or all without a bias,
                with one kind of activation (with default parameters) between them; Dropout may
                stand anywhere.

        Raises:
            TypeError: not a Sequential.
            ValueError: another structure; the message names the first module that does not fit.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
            >>> fast = MLP.from_sequential(model)
            >>> fast[0].weight is model[0].weight
            True
        """
        if not isinstance(sequential, torch.nn.Sequential):
            raise TypeError(
                f"MLP.from_sequential wants a torch.nn.Sequential, got {type(sequential).__name__}"
            )
        misfit = _Plan(list(sequential)).misfit
        if misfit is not None:
            i, wants = misfit
            got = sequential[i] if i < len(sequential) else "the end"
            raise ValueError(f"MLP.from_sequential wants {wants} at position {i}, got {got}")
        model = twin(sequential, cls)
        for name, layer in sequential._modules.items():
            model._modules[name] = twin(layer, TWINS.get(type(layer), type(layer)))
        return model

    @staticmethod
    def fits(sequential: torch.nn.Sequential) -> bool:
        """Whether `from_sequential` takes it, and gains by it: there is more than one Linear."""
        plan = _Plan(list(sequential))
        return plan.misfit is None and len(plan.weights) > 1

    def __getitem__(self, idx: slice | int) -> Any:
        if isinstance(idx, slice):
            return twin(self, torch.nn.Sequential)[idx]
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        plan = _Plan(self._modules.values())
        if plan.misfit or plan.does_more or _has_any_global_hook():
            return super().forward(input)
        return functional.mlp(input, plan.weights, plan.biases, plan.activation)


class _Plan:
    """What functional.mlp takes, from the layers of a Sequential.

    It is made anew for each call, as anything may have changed since the last one, and so reads the
    layers' own dicts: an attribute of a module takes ten times longer.

    Attributes:
        weights, biases: of the linear layers; biases is empty where they have none.
        activation: the name of the activation between them.
        misfit: position of the first layer that is in the way and what is wanted there, or None.
        does_more: whether calling one of the layers does more than the formula of its class.
    """

    __slots__ = ("activation", "biases", "does_more", "misfit", "weights")

    def __init__(self, layers: Iterable[Any]) -> None:
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.activation = ""
        self.misfit: tuple[int, str] | None = None
        self.does_more = False
        after_linear = False
        position = 0
        for position, layer in enumerate(layers, 1):
            kind, own = type(layer), layer.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                self.does_more = True
            if kind is torch.nn.Dropout:  # the identity unless it is active
                self.does_more = self.does_more or bool(own["training"] and own["p"])
                continue
            if kind is Linear or kind is torch.nn.Linear:
                wants = "an activation" if after_linear else self._add_linear(layer, own)
            else:
                wants = self._add_activation(kind, own) if after_linear else "a Linear"
            if wants:
                self.misfit = position - 1, wants
                return
            after_linear = not after_linear
        if not after_linear:
            self.misfit = position, "a Linear"
        self.activation = self.activation or "relu"

    def _add_linear(self, layer: Any, own: dict[str, Any]) -> str:
        if own.get("activation") is not None:
            return "a Linear without an activation"
        parameters = own["_parameters"]
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # pruned, or in a replica of torch.nn.DataParallel
            weight, bias = layer.weight, layer.bias
        self.weights.append(weight)
        if bias is not None:
            self.biases.append(bias)
        if self.biases and len(self.biases) != len(self.weights):
            return "a Linear with a bias if and only if the first has one,"
        return ""

    def _add_activation(self, kind: type[torch.nn.Module], own: dict[str, Any]) -> str:
        name, parameter, default = _NAMES.get(kind, ("", None, ()))
        if (
            not name
            or name != (self.activation or name)
            or (parameter is not None and own[parameter] != default[0])
        ):
            return "the one activation of the network, with default parameters,"
        self.activation = name
        return ""
