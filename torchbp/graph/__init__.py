"""See it: every value, upstream and local gradient of any PyTorch graph.

`trace` runs any torch function or module and returns a `Ledger` of what each gate did; `jacobian`
shows the size, structure and cost of the matrices that backpropagation never forms; `saved` lists
what each gate keeps for the backward.
"""

from __future__ import annotations

from .jacobian import jacobian
from .ledger import Edge, Held, Ledger, Node
from .saved import saved
from .trace import trace

__all__ = ["Edge", "Held", "Ledger", "Node", "jacobian", "saved", "trace"]
