"""A `ComputationalGraph` as a `Ledger`, so that it is drawn as any other graph is."""

from __future__ import annotations

import math

import torch

from ..functions.gate import GATES
from .computational_graph import ComputationalGraph
from .flat import TWINS
from .ledger import Edge, Held, Ledger, Node
from .operations import canonical, pattern_of
from .recording import Call, Recording, Slot

__all__ = ["ledger"]


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
            TWINS[GATES[given.operation].__name__],
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
            roots=frozenset({Slot(output, 0)}),
        )
    return found
