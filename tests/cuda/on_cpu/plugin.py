"""A pytest plugin: whatever runs on the CPU runs the kernels of csrc/cuda, in the library that
TORCHBP_EMULATOR names."""

from __future__ import annotations

import os

import torch

from torchbp.functions import softmax_ce  # (and torchbp's kernels first)


def pytest_configure() -> None:
    torch.ops.load_library(os.environ["TORCHBP_EMULATOR"])
    softmax_ce.on_gpu = lambda tensor: True
