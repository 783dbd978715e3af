"""The activation gates as modules: each a torch.nn module whose forward is torchbp's.

`inplace` is accepted as in torch.nn and ignored: torchbp never changes its input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional

__all__ = ["ELU", "LeakyReLU", "ReLU", "Sigmoid", "Tanh"]


class ReLU(torch.nn.ReLU):
    """torchbp.functional.relu as a module.

    Example:
        >>> ReLU()(torch.tensor([1.0, -2.0]))
        tensor([1., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input)


class LeakyReLU(torch.nn.LeakyReLU):
    """torchbp.functional.leaky_relu as a module, with `negative_slope`.

    Example:
        >>> LeakyReLU(0.1)(torch.tensor([1.0, -2.0]))
        tensor([ 1.0000, -0.2000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope)


class ELU(torch.nn.ELU):
    """torchbp.functional.elu as a module, with `alpha`.

    Example:
        >>> ELU()(torch.tensor([1.0, -1.0]))
        tensor([ 1.0000, -0.6321])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.elu(input, self.alpha)


class Sigmoid(torch.nn.Sigmoid):
    """torchbp.functional.sigmoid as a module.

    Example:
        >>> Sigmoid()(torch.tensor([0.0]))
        tensor([0.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """torchbp.functional.tanh as a module.

    Example:
        >>> Tanh()(torch.tensor([0.0]))
        tensor([0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)
