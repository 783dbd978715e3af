"""A PyTorch graph, looked at: the Jacobians of its gates, what they keep for backward."""

from __future__ import annotations

from .jacobian import jacobian
from .saved import saved

__all__ = ["jacobian", "saved"]
