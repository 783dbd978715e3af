"""A `ComputationalGraph` as a `Ledger`, so that it is drawn as any other graph is."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .computational_graph import ComputationalGraph
from .ledger import Edge, Held, Ledger, Node
from .operations import canonical, pattern_of
from .recording import Call, Recording, Slot

__all__ = ["ledger"]

#: The functions that rows are, where torch has them by another name.
_CALLED: dict[str, Any] = {
    "multiply": torch.mul,
    "scale": torch.mul,
    "shift": torch.add,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
}


def ledger(graph: ComputationalGraph) -> Ledger:
    """The ledger of what the graph's nodes hold; nothing where no forward or backward has run.

    Raises:
        ValueError: the graph has a cycle, or an operand's name is not in the graph.
    """
    found = Ledger([], [], {}, [])
    ids: dict[str, int] = {}
    calls: dict[int, Call] = {}
    for given in graph.nodes:
        number = ids[given.name] = len(found.nodes)
        operation = canonical(given.operation or "")
        node = Node(
            number,
            given.name,
            kind="input" if given.operation is None else "gate",
            operation=operation,
            values=[None if given.value is None else Held.of(given.value)],
            upstreams=[None if given.upstream is None else Held.of(given.upstream)],
        )
        found.nodes.append(node)
        if given.operation is None:
            found.grads[given.name] = given.grad
            continue
        node.pattern = pattern_of(operation, len(given.inputs))
        local = given.local
        for argument, operand in enumerate(given.inputs):
            edge = Edge(ids[operand.name], number, argument)
            if local is not None and given.value is not None and operand.value is not None:
                edge.local = Held.of(local[argument])
                edge.jacobian_shape = (*given.value.shape, *operand.value.shape)
                size = torch.empty((), dtype=given.value.dtype).element_size()
                edge.jacobian_bytes = math.prod(edge.jacobian_shape) * size
            if given.downstream is not None:
                edge.product = Held.of(given.downstream[argument])
            found.edges.append(edge)
            found.nodes[edge.source].uses += 1
        calls[number] = Call(
            _CALLED.get(given.operation) or getattr(torch, given.operation),
            (
                *(Slot(ids[operand.name], 0) for operand in given.inputs),
                *(() if given.parameter is None else (given.parameter,)),
            ),
            {},
            Slot(number, 0),
        )
    output = ids[graph.output.name]
    found.outputs = [output]
    if graph.output.value is not None:
        found._recording = Recording(
            calls=calls,
            names={Slot(number, 0): name for name, number in ids.items()},
            differentiable=frozenset(Slot(number, 0) for number in ids.values()),
            outputs=(Slot(output, 0),),
        )
    return found
