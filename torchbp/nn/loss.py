"""The loss module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torchbp.functional.cross_entropy as a module, with torch.nn.CrossEntropyLoss's arguments.

    Example:
        >>> CrossEntropyLoss()(torch.tensor([[3.2, 5.1, -1.7]]), torch.tensor([0]))
        tensor(2.0404)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        try:
            weight = self._buffers["weight"]  # at a tenth of what self.weight costs
        except KeyError:
            weight = self.weight
        return functional.cross_entropy(
            input, target, weight, self.ignore_index, self.reduction, self.label_smoothing
        )
