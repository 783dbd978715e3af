"""See it: every value, upstream and local gradient of any PyTorch graph.

`ComputationalGraph` is the lecture's class, a graph of the table's gates; `trace` runs any torch
function or module and returns a `Ledger` of what each gate did; `flat` prints it as code, the
gradients in reverse order; `jacobian` shows the size, structure and cost of the matrices that
backpropagation never forms; `saved` lists what each gate keeps for the backward.
"""

from __future__ import annotations

from .computational_graph import ComputationalGraph
from .flat import flat
from .jacobian import jacobian
from .ledger import Ledger
from .saved import saved
from .trace import trace

__all__ = ["ComputationalGraph", "Ledger", "flat", "jacobian", "saved", "trace"]
