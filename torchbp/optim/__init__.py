"""Training at low cost: torch.optim's optimizers in one call, and whole steps as one operation."""

from __future__ import annotations

from .optimizers import SGD, AdamW
from .step import CompiledStep, compile_step

__all__ = ["SGD", "AdamW", "CompiledStep", "compile_step"]
