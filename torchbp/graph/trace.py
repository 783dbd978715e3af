"""`trace`: run a function forward and backward, and write down what every gate did.

PyTorch's own autograd does the work, so that the gradients are its own. What is added:

* a TorchFunctionMode sees every call of a torch function with what goes in and comes out, and
  which nodes of the autograd graph it made: together these are one gate;
* nodes that no such call made belong to a custom Function, or to a change of memory that is seen
  through a view: each is a gate of its own;
* a hook on each node sees the gradients that arrive at it and that leave it.
"""

from __future__ import annotations

import inspect
import linecache
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .calling import arguments, captured, check_function, name_of, unchanged
from .ledger import Edge, Held, Ledger, Node
from .operations import ELEMENTWISE, canonical, pattern_of, rule_of
from .recording import Alias, Call, Recording, Slot

__all__ = ["trace"]

Function = Callable[..., Any]


def trace(
    fn: Function,
    *inputs: Any,
    names: Sequence[str] | None = None,
    grad_output: Any = None,
) -> Ledger:
    """Run `fn` forward and backward, and return every value, upstream and local gradient.

    Any function of torch operations, torchbp's or custom Functions, or a module. Each call of a
    torch function is a gate, and so is each custom Function. Nothing outside changes: inputs are
    copied, buffers and the random state are put back, and no `.grad` is touched.

    Args:
        fn: a function or module.
        inputs: its arguments: tensors, or nested lists, tuples and dicts that hold some. Floating
            ones receive a gradient, and so does each parameter that requires one.
        names: of the tensors among the inputs; by default the names of `fn`'s parameters.
        grad_output: dL/doutput, for an output of more than one element; for several outputs a
            sequence, with None for one that does not count.

    Raises:
        TypeError: `fn` cannot be called, or `names` or `grad_output` do not fit.
        ValueError: there is nothing to differentiate, or `grad_output` has another shape.
        RuntimeError: autograd cannot differentiate the function.

    Example:
        >>> ledger = trace(lambda x, y, z: (x + y) * z, *torch.tensor([-2.0, 5.0, -4.0]))
        >>> print(ledger["mul1"].value, ledger["add1"].upstream)
        -12 -4
        >>> {name: grad.item() for name, grad in ledger.grads.items()}
        {'x': -4.0, 'y': -4.0, 'z': 3.0}
    """
    return record("trace", fn, inputs, names, lambda outputs: _upstream(outputs, grad_output))


def record(
    op: str,
    fn: Function,
    inputs: Sequence[Any],
    names: Sequence[str] | None,
    upstream: Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]],
) -> Ledger:
    """The ledger of `fn(*inputs)`.

    Args:
        op: who asks, for messages.
        upstream: the outputs to differentiate, and dL/doutput for each, of all outputs.
    """
    check_function(op, fn)
    with unchanged(fn, inputs):
        given, leaves, copies = arguments(fn, inputs, lambda _: True)
        recorder = _Recorder(fn)
        for (path, copy), name in zip(copies.items(), _names(op, names, copies), strict=True):
            recorder.add_input(copy, leaves.get(path), name)
        with recorder.watch():
            output = fn(*given)
        outputs = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
        for value in outputs:
            recorder.source_of(value)
        recorder.name_results()
        recorder.functions.clear()  # frames, which would keep this one alive
        recorder.function = None
        return recorder.differentiate(op, outputs, *upstream(outputs))


# ---- what is seen


@dataclass
class _Operand:
    """An edge into a gate; `target` is where its gradient goes, over so many edges of autograd's
    graph, or None if it has no gradient."""

    edge: Edge
    target: tuple[Any, int] | None
    paths: int


class _Gate:
    """A node of the ledger in the making.

    Attributes:
        members: the autograd nodes that are this gate.
        results: (autograd node, number of its output) of each of the gate's outputs, or None for
            one without a gradient.
        repeat: computes the gate again from other values of its tensors, if that may be done.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.members: list[Any] = []
        self.results: list[tuple[Any, int] | None] = []
        self.operands: list[_Operand] = []
        self.repeat: Callable[[list[Tensor]], Any] | None = None
        self.arguments: list[Tensor] = []


def _forwards(function: type, method: str) -> Iterator[FunctionType]:
    """The `forward`, or the `setup_context`, of every custom Function that there is."""
    kind: Any
    for kind in function.__subclasses__():
        own = inspect.unwrap(getattr(kind, method))
        if isinstance(own, FunctionType):
            yield own
        yield from _forwards(kind, method)


class _Recorder:
    def __init__(self, fn: Function) -> None:
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self.gates: dict[int, _Gate] = {}  # by the id of their node
        self.owner: dict[Any, _Gate] = {}  # of each autograd node
        self.leaves: dict[int, tuple[Tensor, int]] = {}  # id of a leaf -> itself, its node
        self.sources: dict[int, tuple[Tensor, Any, int, int]] = {}
        self.fresh: list[Tensor] = []  # made outside of any call: by custom Functions
        self.counts: dict[str, int] = {}
        self.taken: set[str] = set()
        self.named: dict[int, tuple[str, str]] = {}
        self.roots: dict[Any, int] = {}  # autograd nodes that are as good as a leaf -> its node
        self.trained: list[str] = []
        self.calls: dict[int, Call] = {}  # by the id of their node
        self.aliases: dict[Slot, Alias] = {}
        self.stale: dict[int, list[tuple[Slot, Slot]]] = {}  # id of a tensor -> writes under it
        self.locals: dict[Slot, str] = {}  # what the traced code calls a value
        self.unnamed: list[tuple[Tensor, list[FrameType]]] = []
        self.differentiable: set[Slot] = set()
        self.unseen: set[int] = set()  # nodes of what was computed by a call that was not seen
        self.grad_enabled = True  # as the traced code set it: off in a custom Function's forward
        self.function: FrameType | None = None  # the forward that ran last
        # Arguments of custom Functions, and where they were called, by the numbers of their nodes.
        self.functions: dict[int, tuple[tuple[Any, ...], list[FrameType]]] = {}
        self.random = False  # whether the call that runs draws random numbers
        self.fn = name_of(fn)
        for path, held in ({"": fn} if isinstance(fn, nn.Module) else captured(fn)).items():
            if isinstance(held, Tensor):
                kind = "parameter" if held.requires_grad else "constant"
                self.named.setdefault(id(held), (path, kind))
                continue
            prefix = path and f"{path}."
            for name, p in held.named_parameters():
                self.named[id(p)] = prefix + name, "parameter"
                self.trained += [prefix + name] * p.requires_grad
            for name, b in held.named_buffers():
                self.named[id(b)] = prefix + name, "buffer"
        self.forwards, self.contexts = (
            {own.__code__ for own in _forwards(torch.autograd.Function, method)}
            for method in ("forward", "setup_context")
        )

    def inside_function(self) -> bool:
        """Whether a custom Function that is differentiated runs its forward, which is one gate."""
        outermost = None
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not record.__code__:
            if frame.f_code in self.forwards or frame.f_code in self.contexts:
                outermost = frame
            frame = frame.f_back
        if outermost is None or not self.grad_enabled:
            return False
        if outermost is not self.function:
            given = _arguments_of(outermost)
            if outermost.f_code in self.contexts:  # of (ctx, inputs, output)
                given = list(given[0])
            if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
                return False
            # The node of the graph was numbered just before its forward began.
            number = _get_sequence_nr() - 1
            self.function = outermost
            slots = tuple(self.slot(value) for value in given)
            self.functions.setdefault(number, (slots, frames_in(record, outermost.f_back)))
        return True

    def watch(self) -> _Watch:
        return _Watch(self)

    # ---- nodes

    def add(self, name: str, kind: str, operation: str = "", source: str | None = None) -> Node:
        self.taken.add(name)
        node = Node(len(self.nodes), name, kind, operation, source)
        self.nodes.append(node)
        return node

    def numbered(self, name: str) -> str:
        """The name with the first number that makes it a new one."""
        while True:
            self.counts[name] = self.counts.get(name, 0) + 1
            result = f"{name}{self.counts[name]}"
            if result not in self.taken:
                return result

    def add_leaf(self, value: Tensor, name: str, kind: str) -> int:
        if name in self.taken:
            name = self.numbered(name + "_")
        node = self.add(name, kind)
        node.values, node.upstreams = [Held.of(value)], [None]
        if value.requires_grad:
            self.differentiable.add(Slot(node.id, 0))
        if kind == "constant" and any(made is value for made in self.fresh):
            self.unseen.add(node.id)
        self.leaves[id(value)] = value, node.id
        self.sources[id(value)] = value, value.grad_fn, node.id, 0
        return node.id

    def add_input(self, copy: Tensor, leaf: Tensor | None, name: str) -> None:
        """An argument: the function gets a copy of the leaf, which it may change in place."""
        number = self.add_leaf(copy if leaf is None else leaf, name, "input")
        self.sources[id(copy)] = copy, copy.grad_fn, number, 0
        if copy.grad_fn is not None:
            self.roots[copy.grad_fn] = number

    def ends(self, fn: Any) -> bool:
        """Whether an autograd node is where the gradient of a leaf ends."""
        return fn in self.roots or bool(fn.name() == "torch::autograd::AccumulateGrad")

    def leaf_at(self, fn: Any) -> int:
        return self.roots[fn] if fn in self.roots else self.leaf_of(fn.variable)

    def leaf_of(self, value: Tensor) -> int:
        """The node of a tensor that nothing computed here."""
        if id(value) in self.leaves:
            return self.leaves[id(value)][1]
        name, kind = self.named.get(id(value), (None, "constant"))
        if name is None:
            kind = "parameter" if value.requires_grad else "constant"
            name = self.numbered("leaf" if value.requires_grad else "constant")
        return self.add_leaf(value, name, kind)

    def source_of(self, value: Tensor) -> tuple[int, int]:
        """The node that a tensor is a value of, and which."""
        grad_fn = value.grad_fn
        known = self.sources.get(id(value))
        if known is not None and known[0] is value:
            written = self.stale.pop(id(value), None)
            if written is not None:
                return self.alias(value, Slot(*known[2:]), written)
            if known[1] is grad_fn:
                return known[2], known[3]
        if grad_fn is None:
            return self.leaf_of(value), 0
        gate = self.gate_of(grad_fn)
        slot = Slot(gate.node.id, self.result(gate, grad_fn, value.output_nr, value))
        if gate.node.id not in self.calls or isinstance(self.calls[gate.node.id].func, type):
            self.unnamed.append((value, self.frames_of(grad_fn)))
        return slot

    def made(self, value: Any) -> Slot | None:
        """The Slot of a tensor that a call returned; None for all else."""
        return Slot(*self.source_of(value)) if isinstance(value, Tensor) else None

    def slot(self, value: Any) -> Any:
        """The Slot of a tensor; all else as it is."""
        return Slot(*self.source_of(value)) if isinstance(value, Tensor) else value

    def alias(
        self, value: Tensor, before: Slot, written: list[tuple[Slot, Slot]]
    ) -> tuple[int, int]:
        """The value of a tensor after memory that it shares was written to."""
        grad_fn = value.grad_fn
        if grad_fn is None:
            gate = self.new_gate("alias", None)
            for argument, source in enumerate((before, written[-1][1])):
                self.connect(gate, *source, argument, None)
            gate.results.append(None)
            gate.node.values.append(Held.of(value))
            gate.node.upstreams.append(None)
            self.sources[id(value)] = value, None, gate.node.id, 0
            slot = Slot(gate.node.id, 0)
        else:
            gate = self.gate_of(grad_fn)
            slot = Slot(gate.node.id, self.result(gate, grad_fn, value.output_nr, value))
        self.aliases.setdefault(slot, Alias(before, tuple(written)))
        return slot

    def writes(self, value: Tensor, before: Slot, after: Slot) -> None:
        """Note a change in place for every other tensor in the same memory."""
        memory = _storage_of(value)
        for other, *_ in self.sources.values():
            if other is not value and memory is not None and _storage_of(other) == memory:
                self.stale.setdefault(id(other), []).append((before, after))

    # ---- names of local variables

    def frames_of(self, grad_fn: Any) -> list[FrameType]:
        """Where a custom Function was called from."""
        known = self.functions.get(_number_of(grad_fn))
        return [] if known is None else known[1]

    def name_results(self) -> None:
        """Find the names of the variables that the last results were assigned to."""
        for value, frames in self.unnamed:
            known = self.sources.get(id(value))
            if known is None or Slot(*known[2:]) in self.locals:
                continue
            names = (
                name
                for frame in frames
                for name, held in list(frame.f_locals.items())
                if held is value and name.isidentifier() and name.strip("_")
            )
            for name in names:
                self.locals[Slot(*known[2:])] = name
                break
        self.unnamed.clear()

    def result(self, gate: _Gate, grad_fn: Any, number: int, value: Tensor | None) -> int:
        """Which output of a gate an output of an autograd node is; a new one if need be."""
        if (grad_fn, number) in gate.results:
            place = gate.results.index((grad_fn, number))
        else:
            place = len(gate.results)
            gate.results.append((grad_fn, number))
            gate.node.values.append(None)
            gate.node.upstreams.append(None)
        if value is not None:
            if gate.node.values[place] is None:
                gate.node.values[place] = Held.of(value)
            if value.requires_grad:
                self.differentiable.add(Slot(gate.node.id, place))
            self.sources[id(value)] = value, grad_fn, gate.node.id, place
        return place

    # ---- gates

    def gate_of(self, grad_fn: Any) -> _Gate:
        """The gate of an autograd node: one of its own, if no call was seen to make it."""
        stack = [grad_fn]
        while stack:
            top = stack[-1]
            missing = [
                fn
                for fn, _ in top.next_functions
                if fn is not None and fn not in self.owner and not self.ends(fn)
            ]
            if top in self.owner:
                stack.pop()
            elif missing:
                stack += missing
            else:
                self.own_gate(stack.pop())
        return self.owner[grad_fn]

    def own_gate(self, grad_fn: Any) -> None:
        name = grad_fn.name().rpartition("::")[2]
        for end in ("Backward0", "Backward1", "Backward2", "Backward"):
            name = name.removesuffix(end)
        operation = canonical(name)
        given, frames = self.functions.get(_number_of(grad_fn), (None, []))
        gate = self.new_gate(operation, line_of(frames))
        self.claim(gate, grad_fn)
        if given is not None:
            function = type(grad_fn)._forward_cls
            self.calls[gate.node.id] = Call(function, given, {}, None)
        for argument, (fn, number) in enumerate(grad_fn.next_functions):
            if fn is None:
                continue
            if self.ends(fn):
                source, output = self.leaf_at(fn), 0
            else:
                producer = self.owner[fn]
                source, output = producer.node.id, self.result(producer, fn, number, None)
            self.connect(gate, source, output, argument, (fn, number))
        for value in self.fresh:
            if value.grad_fn is grad_fn:
                self.result(gate, grad_fn, value.output_nr, value)
                self.unnamed.append((value, frames))

    def new_gate(self, operation: str, source: str | None) -> _Gate:
        gate = _Gate(self.add(self.numbered(operation), "gate", operation, source))
        self.gates[gate.node.id] = gate
        return gate

    def claim(self, gate: _Gate, grad_fn: Any) -> None:
        self.owner[grad_fn] = gate
        gate.members.append(grad_fn)

    def connect(
        self,
        gate: _Gate,
        source: int,
        output: int,
        argument: int,
        target: tuple[Any, int] | None,
        paths: int = 1,
    ) -> None:
        edge = Edge(source, gate.node.id, argument, output)
        self.edges.append(edge)
        gate.operands.append(_Operand(edge, target, paths))
        if target is not None:
            self.nodes[source].uses += 1

    def call(
        self,
        name: str,
        source: str | None,
        arguments: list[Tensor],
        origins: list[tuple[int, int]],
        targets: list[tuple[Any, int] | None],
        results: list[Tensor],
    ) -> _Gate:
        """A call that was seen: its new autograd nodes are one gate."""
        gate = self.new_gate(canonical(name), source)
        gate.arguments = arguments
        stack = [value.grad_fn for value in results if value.grad_fn is not None]
        while stack:
            fn = stack.pop()
            if fn in self.owner or self.ends(fn):
                continue
            self.claim(gate, fn)
            stack += [below for below, _ in fn.next_functions if below is not None]
        # An operand has a gradient if an edge leaves the gate for it.
        leaving = [
            (fn, number)
            for member in gate.members
            for fn, number in member.next_functions
            if fn is not None and self.owner.get(fn) is not gate
        ]
        for argument, ((node, output), target) in enumerate(zip(origins, targets, strict=True)):
            paths = 0
            while target in leaving and (paths == 0 or target not in targets[argument + 1 :]):
                leaving.remove(target)
                paths += 1
            self.connect(gate, node, output, argument, target if paths else None, paths)
        for fn, number in leaving:  # operands that are no arguments of the call
            if self.ends(fn):
                self.connect(gate, self.leaf_at(fn), 0, len(gate.operands), (fn, number))
            else:
                producer = self.gate_of(fn)
                place = self.result(producer, fn, number, None)
                self.connect(gate, producer.node.id, place, len(gate.operands), (fn, number))
        for value in results:
            if value.grad_fn is not None and self.owner.get(value.grad_fn) is gate:
                self.result(gate, value.grad_fn, value.output_nr, value)
            else:
                place = len(gate.results)
                gate.results.append(None)
                gate.node.values.append(Held.of(value))
                gate.node.upstreams.append(None)
                self.sources[id(value)] = value, value.grad_fn, gate.node.id, place
        return gate

    # ---- backward

    def differentiate(
        self, op: str, outputs: list[Tensor], roots: list[Tensor], given: list[Tensor]
    ) -> Ledger:
        wanted = [(leaf, number) for leaf, number in self.leaves.values() if leaf.requires_grad]
        arrived: dict[Any, tuple[Any, Any]] = {}

        def watch(fn: Any) -> Any:
            def hook(grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> None:
                arrived[fn] = _copies(grad_inputs), _copies(grad_outputs)

            return fn.register_hook(hook)

        hooks = [watch(fn) for fn in self.owner]
        try:
            grads = torch.autograd.grad(
                roots, [leaf for leaf, _ in wanted], given, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise RuntimeError(f"{op}: autograd cannot differentiate this: {error}") from error
        finally:
            for handle in hooks:
                handle.remove()
        for (_, number), grad in zip(wanted, grads, strict=True):
            if grad is not None:
                self.nodes[number].upstreams[0] = Held.of(grad)
        for gate in self.gates.values():
            self.settle(gate, arrived)
        found: dict[str, Tensor | None] = {
            self.nodes[number].name: None if grad is None else grad.detach()
            for (_, number), grad in zip(wanted, grads, strict=True)
        }
        for name in self.trained:
            found.setdefault(name, None)
        returned = tuple(Slot(*self.source_of(value)) for value in outputs)
        return Ledger(
            self.nodes,
            self.edges,
            found,
            [slot.node for slot in returned],
            self.recording(returned, frozenset(Slot(*self.source_of(value)) for value in roots)),
        )

    def recording(self, outputs: tuple[Slot, ...], roots: frozenset[Slot]) -> Recording:
        calls = dict(self.calls)
        for number, call in self.calls.items():
            if isinstance(call.func, type):  # of a custom Function the outputs that were used
                gate = self.gates[number]
                (member,) = gate.members
                made: list[Slot | None] = [None] * len(member._input_metadata)
                for place, result in enumerate(gate.results):
                    if result is not None:
                        made[result[1]] = Slot(number, place)
                calls[number] = replace(call, result=made[0] if len(made) == 1 else tuple(made))
        return Recording(
            self.fn,
            calls,
            self.aliases,
            self.locals,
            frozenset(self.differentiable),
            outputs,
            roots,
            frozenset(self.unseen),
        )

    def settle(self, gate: _Gate, arrived: dict[Any, tuple[Any, Any]]) -> None:
        """Upstream gradients, local gradients and products of a gate."""
        node = gate.node
        for place, result in enumerate(gate.results):
            if result is not None and result[0] in arrived:
                upstream = arrived[result[0]][1][result[1]]
                node.upstreams[place] = None if upstream is None else Held.of(upstream)
        leaving: dict[tuple[Any, int], list[Tensor | None]] = {}
        for member in gate.members:
            grads = arrived.get(member, ((), ()))[0]
            for target, grad in zip(member.next_functions, grads, strict=False):
                leaving.setdefault(target, []).append(grad)
        differentiated = [operand for operand in gate.operands if operand.target is not None]
        node.pattern = pattern_of(node.operation, len(differentiated))
        local = self.local(gate, differentiated)
        for operand in differentiated:
            edge = operand.edge
            edge.product = _taken(leaving, operand)
            edge.local = local.get(id(edge))
            if edge.local is None:
                edge.rule = rule_of(node.operation, edge.argument)
            value, source = node.value, self.nodes[edge.source].values[edge.output]
            if value is not None and source is not None:
                edge.jacobian_shape = (*value.shape, *source.shape)
                edge.jacobian_bytes = math.prod(edge.jacobian_shape) * value.dtype.itemsize

    def local(self, gate: _Gate, operands: list[_Operand]) -> dict[int, Held]:
        """The local gradients of an elementwise gate, as tensors, by the ids of edges."""
        node = gate.node
        if node.operation not in ELEMENTWISE or node.value is None or not operands:
            return {}
        if len(node.values) > 1:
            return {}
        values = [self.nodes[o.edge.source].values[o.edge.output] for o in operands]
        if any(v is not None and v.dtype.is_complex for v in (node.value, *values)):
            return {}  # the gradient of a complex number is no product with one number
        shape = node.value.shape
        if len(gate.members) > 1 or any(v is None or v.shape != shape for v in values):
            return self.local_of_each(gate, operands)
        (member,) = gate.members
        ones = torch.ones(shape, dtype=node.value.dtype)
        found: dict[tuple[Any, int], list[Tensor | None]] = {}
        for target, grad in zip(member.next_functions, _grads_of(member, ones), strict=True):
            found.setdefault(target, []).append(grad)
        held = {id(operand.edge): _taken(found, operand) for operand in operands}
        return {key: value for key, value in held.items() if value is not None}

    def local_of_each(self, gate: _Gate, operands: list[_Operand]) -> dict[int, Held]:
        """The same where operands are broadcast, or several autograd nodes are the gate: from the
        gate computed again."""
        edges = [operand.edge for operand in operands]
        given = len(gate.arguments)
        if (
            gate.repeat is None
            or gate.node.value is None
            or any(e.argument >= given for e in edges)
        ):
            return {}
        shape = gate.node.value.shape
        arguments = [
            value.detach().expand(shape).clone() if value.is_floating_point() else value
            for value in gate.arguments
        ]
        chosen = [arguments[edge.argument].requires_grad_() for edge in edges]
        result = gate.repeat(arguments)
        if not isinstance(result, Tensor) or result.shape != shape:
            return {}
        grads = torch.autograd.grad(result, chosen, torch.ones_like(result), allow_unused=True)
        pairs = zip(edges, grads, strict=True)
        return {id(edge): Held.of(grad) for edge, grad in pairs if grad is not None}


def _copies(grads: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if grad is None else grad.detach().clone() for grad in grads)


def _taken(grads: dict[tuple[Any, int], list[Tensor | None]], operand: _Operand) -> Held | None:
    """The gradient of an operand, added up over its paths; those are taken from `grads`."""
    assert operand.target is not None
    arrived = grads.get(operand.target, [])
    mine = [grad for grad in arrived[: operand.paths] if grad is not None]
    del arrived[: operand.paths]
    if not mine:
        return None
    total = mine[0]
    for grad in mine[1:]:
        total = total + grad
    return Held.of(total)


def _names(op: str, names: Sequence[str] | None, paths: Iterable[str]) -> list[str]:
    """A name for each tensor among the inputs."""
    paths = list(paths)
    if names is None:
        return paths
    names = list(names)
    if len(names) != len(paths) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{op}: names wants {len(paths)} strings, got {names}")
    if len(set(names)) < len(names):
        raise TypeError(f"{op}: names wants each name once, got {names}")
    return names


@torch.no_grad()
def _grads_of(node: Any, upstream: Tensor) -> Sequence[Tensor | None]:
    """What an autograd node with one output hands on, for each of its `next_functions`."""
    if not isinstance(node, BackwardCFunction):
        grads = node(upstream)
        return grads if isinstance(grads, tuple) else (grads,)
    grads = node.apply(upstream)  # type: ignore[attr-defined]
    grads = iter(grads if isinstance(grads, tuple) else (grads,))
    needed = iter([grad for grad, need in zip(grads, node.needs_input_grad, strict=False) if need])
    return [None if fn is None else next(needed) for fn, _ in node.next_functions]


def roots_of(op: str, outputs: list[Tensor]) -> list[Tensor]:
    """The outputs that have a gradient."""
    roots = [value for value in outputs if value.requires_grad]
    if not roots:
        raise ValueError(
            f"{op}: fn wants an output that depends on a floating input or parameter through "
            f"differentiable operations, got {len(outputs)} tensors without a gradient"
        )
    return roots


def ones(op: str) -> Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """For `record`: every output is differentiated, with an upstream gradient of ones."""

    def upstream(outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        roots = roots_of(op, outputs)
        return roots, [torch.ones_like(root) for root in roots]

    return upstream


def _upstream(outputs: list[Tensor], grad_output: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that are differentiated, and dL/doutput for each."""
    roots = roots_of("trace", outputs)
    if grad_output is None:
        if len(roots) > 1:
            raise TypeError(
                f"trace: grad_output wants a tensor or None for each of {len(outputs)} outputs"
            )
        if roots[0].numel() != 1:
            raise ValueError(
                "trace: grad_output may be left out for an output of one element alone, "
                f"got shape {tuple(roots[0].shape)}"
            )
        return roots, [torch.ones_like(roots[0])]
    given = [grad_output] if isinstance(grad_output, Tensor) else list(grad_output)
    if len(given) == len(roots) < len(outputs):
        paired = list(zip(roots, given, strict=True))
    elif len(given) == len(outputs):
        paired = list(zip(outputs, given, strict=True))
    else:
        raise TypeError(
            f"trace: grad_output wants a tensor or None for each of {len(outputs)} outputs, "
            f"got {len(given)}"
        )
    result = []
    for value, upstream in paired:
        if upstream is None:
            continue
        if not isinstance(upstream, Tensor):
            raise TypeError(f"trace: grad_output wants tensors, got {type(upstream).__name__}")
        if upstream.shape != value.shape:
            raise ValueError(
                f"trace: grad_output wants shape {tuple(value.shape)}, got {tuple(upstream.shape)}"
            )
        if not value.requires_grad:
            raise ValueError("trace: grad_output wants None for an output without a gradient")
        result.append((value, upstream.detach().to(value.dtype)))
    if not result:
        raise ValueError("trace: grad_output wants a tensor for one output at least, got None")
    return [value for value, _ in result], [upstream for _, upstream in result]


# ---- the modes that see

#: What only looks at a tensor, or sets a flag.
_NO_GATE = frozenset(
    """
    requires_grad_ retain_grad register_hook detach_ grad size stride numel dim item
    tolist is_contiguous backward
    """.split()  # noqa: SIM905
)


class _Watch:
    """Records what runs inside."""

    def __init__(self, recorder: _Recorder) -> None:
        self.modes = _Values(recorder), _Calls(recorder)

    def __enter__(self) -> None:
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Values(TorchDispatchMode):
    """Keeps what operations return while no torch function runs: a custom Function's values."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.recorder.random |= _draws(func, args, kwargs or {})
        with torch._C.DisableTorchFunction():  # this is no call of the function that is traced
            result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                self.recorder.fresh.append(value)
        return result


class _Calls(TorchFunctionMode):
    """Records each call of a torch function. Those inside it are not seen: a mode is off there."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        name = _name_of(func)
        if name in _NO_GATE or recorder.inside_function():
            return func(*args, **kwargs)
        if name == "_set_grad_enabled":
            recorder.grad_enabled = args[0]
            return func(*args, **kwargs)
        recorder.name_results()
        recorder.random = False
        flat, structure = tree_flatten((args, kwargs))
        places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        arguments = [flat[i] for i in places]
        # Who made them, and where their gradients go, before the call changes any of them; where
        # it changes none, only once it is seen to compute a tensor.
        changes = _is_in_place(func, args, kwargs)
        origins = [recorder.source_of(value) for value in arguments] if changes else []
        targets = [_gradient_edge(value) for value in arguments]
        versions = [value._version for value in arguments]
        earlier, recorder.fresh = recorder.fresh, []
        result = func(*args, **kwargs)
        recorder.fresh = earlier
        random = recorder.random
        returned, shape = tree_flatten(result)
        results = [
            value
            for value in returned
            if isinstance(value, Tensor) and not _is_untouched(value, arguments, versions)
        ]
        if not results and changes:  # x[i] = value returns nothing
            results = [
                value
                for value, version in zip(arguments[:1], versions, strict=False)
                if value._version != version
            ]
        if not results:
            return result
        if not changes:
            origins = [recorder.source_of(value) for value in arguments]
        recorder.fresh.clear()
        frames = frames_in(record, sys._getframe(1))
        gate = recorder.call(name, line_of(frames), arguments, origins, targets, results)
        known = list(flat)
        for place, origin in zip(places, origins, strict=True):
            known[place] = Slot(*origin)
        args_, kwargs_ = tree_unflatten(known, structure)
        written = {
            id(value): (Slot(*origin), Slot(*recorder.source_of(value)))
            for value, origin in zip(arguments, origins, strict=True)
            if any(value is made for made in results)
        }
        for value in arguments:
            if id(value) in written:
                recorder.writes(value, *written[id(value)])
        recorder.unnamed += [(value, frames) for value in results]
        recorder.calls[gate.node.id] = Call(
            func,
            args_,
            kwargs_,
            tree_unflatten([recorder.made(value) for value in returned], shape),
            tuple(written.values()),
            bool(arguments)
            and results[0]._is_view()
            and not written
            and _storage_of(results[0]) == _storage_of(arguments[0]),
            random,
            torch._C._is_any_autocast_enabled(),
        )
        if versions == [value._version for value in arguments]:

            def repeat(values: list[Tensor]) -> Any:
                again = list(flat)
                for place, value in zip(places, values, strict=True):
                    again[place] = value
                args, kwargs = tree_unflatten(again, structure)
                return func(*args, **kwargs)

            gate.repeat = repeat
        return result


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what may draw random numbers does; attention without dropout does not."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
            return bool(given)
    return True


def _is_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may say that it writes to an argument: by its name, by `out` or `inplace`."""
    name = getattr(func, "__name__", "")
    if any(value is True for value in (*args, *kwargs.values())):
        return True
    dunder = name.startswith("__")
    return (
        "out" in kwargs
        or name == "__setitem__"
        or (name.endswith("_") and not dunder)
        or name.startswith("__i")
    )


def _is_untouched(value: Tensor, arguments: list[Tensor], versions: list[int]) -> bool:
    """Whether a result is an argument that the call returned as it was."""
    return any(
        value is argument and value._version == version
        for argument, version in zip(arguments, versions, strict=True)
    )


def _gradient_edge(value: Tensor) -> tuple[Any, int] | None:
    if not value.requires_grad:
        return None
    edge = torch.autograd.graph.get_gradient_edge(value)
    return edge.node, edge.output_nr


def _name_of(func: Any) -> str:
    """The last part of a function's name, without what marks a property."""
    if isinstance(func, torch._ops.OpOverload):  # of torch.ops
        return canonical(func._schema.name.rpartition("::")[2])
    name = resolve_name(func) or getattr(func, "__name__", type(func).__name__)
    parts = name.split(".")
    if parts[-1] in ("__get__", "__set__") and len(parts) > 1:
        return parts[-2]
    return canonical(parts[-1])


#: Where code lies that is not the traced function's.
_OWN = tuple(str(path) + os.sep for path in (torch.__path__[0], Path(__file__).parents[1]))


def frames_in(caller: Function, frame: FrameType | None) -> list[FrameType]:
    """The code of others that is running in a call by `caller`, the innermost call first."""
    frames = []
    while frame is not None and frame.f_code is not caller.__code__:
        if not frame.f_code.co_filename.startswith(_OWN):
            frames.append(frame)
        frame = frame.f_back
    return frames


def line_of(frames: list[FrameType]) -> str | None:
    """File, line and text of the line that is running."""
    if not frames:
        return None
    name, number = frames[0].f_code.co_filename, frames[0].f_lineno
    line = linecache.getline(name, number).strip()
    return f"{name}:{number}: {line}" if line else None


def _arguments_of(frame: FrameType) -> list[Any]:
    """What the function of a frame was called with, by position; without the `ctx` of a forward."""
    code, local = frame.f_code, frame.f_locals
    given = [local.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        given += local.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ())
    return given[1:] if given and isinstance(given[0], BackwardCFunction) else given


def _number_of(grad_fn: Any) -> int:
    """When a custom Function was called; -1 for other nodes of autograd's graph."""
    return grad_fn._sequence_nr() if isinstance(grad_fn, BackwardCFunction) else -1


def _storage_of(value: Tensor) -> int | None:
    """What tells whether two tensors share memory."""
    try:
        return value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse tensors have none
        return None
