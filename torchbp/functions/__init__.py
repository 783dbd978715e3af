"""The hand-written `torch.autograd.Function` classes, one file a family.

Apply one with `ReLU.apply(x)`. torchbp.functional offers the same as plain functions that follow
autocast and torch.compile; prefer those outside of lessons.
"""

from __future__ import annotations

from . import register  # noqa: F401  (completes torch.ops.torchbp)
from .activations import ELU, LeakyReLU, ReLU, Sigmoid, Tanh
from .arithmetic import Add, Exp, Maximum, Multiply, Reciprocal, Scale, Shift
from .mlp import MLP
from .penalty import L2Penalty
from .products import Linear, MatMul, Maxout
from .softmax_ce import SoftmaxCE

__all__ = [
    "ELU",
    "MLP",
    "Add",
    "Exp",
    "L2Penalty",
    "LeakyReLU",
    "Linear",
    "MatMul",
    "Maximum",
    "Maxout",
    "Multiply",
    "ReLU",
    "Reciprocal",
    "Scale",
    "Shift",
    "Sigmoid",
    "SoftmaxCE",
    "Tanh",
]
