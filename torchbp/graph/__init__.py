"""Graphs to look at: the value, the upstream and the local gradient at every gate."""

from __future__ import annotations

from .computational_graph import ComputationalGraph

__all__ = ["ComputationalGraph"]
