"""Modules on torchbp's kernels, with the names, arguments and state_dict keys of torch.nn's."""

from __future__ import annotations

from .activations import ELU, LeakyReLU, ReLU, Sigmoid, Tanh
from .linear import Linear, Maxout
from .loss import CrossEntropyLoss
from .mlp import MLP

__all__ = [
    "ELU",
    "MLP",
    "CrossEntropyLoss",
    "LeakyReLU",
    "Linear",
    "Maxout",
    "ReLU",
    "Sigmoid",
    "Tanh",
]
