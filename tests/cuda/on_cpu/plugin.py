"""A pytest plugin: whatever runs on the CPU runs the kernels of csrc/cuda, in the library that
TORCHBP_EMULATOR names."""

from __future__ import annotations

import os

import torch

import torchbp  # noqa: F401  (its kernels first)


def pytest_configure() -> None:
    torch.ops.load_library(os.environ["TORCHBP_EMULATOR"])
