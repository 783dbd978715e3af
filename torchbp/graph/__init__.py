"""A PyTorch graph, looked at."""

from __future__ import annotations

from .jacobian import jacobian

__all__ = ["jacobian"]
