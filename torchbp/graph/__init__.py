"""See it: every value, upstream and local gradient of a graph.

`trace` runs any torch function or module and returns a `Ledger` of what each gate did.
"""

from __future__ import annotations

from .ledger import Edge, Held, Ledger, Node
from .trace import trace

__all__ = ["Edge", "Held", "Ledger", "Node", "trace"]
