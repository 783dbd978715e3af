"""Data sets and the batch loader: CIFAR-10, its synthetic stand-in, 2-D toy sets."""

from __future__ import annotations

from torchbp.data import toy
from torchbp.data.cifar10 import CIFAR10
from torchbp.data.loader import BatchLoader
from torchbp.data.synthetic import SyntheticCIFAR10

__all__ = ["CIFAR10", "BatchLoader", "SyntheticCIFAR10", "toy"]
