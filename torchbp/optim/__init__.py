"""Optimizers that cost little: torch.optim's, with all parameters updated in one call."""

from __future__ import annotations

from .optimizers import SGD, AdamW

__all__ = ["SGD", "AdamW"]
