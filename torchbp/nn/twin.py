"""A module of another class with the same contents: how a torch.nn layer becomes torchbp's."""

from __future__ import annotations

from typing import TypeVar

import torch

from . import activations
from .linear import Linear
from .loss import CrossEntropyLoss

__all__ = ["CONTAINERS", "TWINS", "twin"]

M = TypeVar("M", bound=torch.nn.Module)

#: torch.nn's class -> torchbp's. Exactly these: a subclass may have another forward.
TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Linear: Linear,
    torch.nn.CrossEntropyLoss: CrossEntropyLoss,
    **{
        getattr(torch.nn, name): getattr(activations, name)
        for name in activations.__all__
        if hasattr(torch.nn, name)
    },
}

#: What torch.nn.Module itself keeps in dicts and sets: parameters, buffers, children, hooks.
CONTAINERS = tuple(
    name for name, value in vars(torch.nn.Module()).items() if isinstance(value, dict | set)
)


def twin(module: torch.nn.Module, kind: type[M]) -> M:
    """A module of class `kind` that shares the parameters, buffers, children and hooks of `module`.

    Each has its own dicts of them, so that setting a child or adding a hook changes one alone.
    """
    result = kind.__new__(kind)
    result.__dict__.update(vars(module))
    for name in CONTAINERS:
        if name in vars(module):
            result.__dict__[name] = vars(module)[name].copy()
    return result
