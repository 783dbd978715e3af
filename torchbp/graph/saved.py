"""What each gate keeps for the backward: tensor by tensor, with the gate that keeps it.

A gate needs some of its inputs or its output to compute its local gradient, and holds them from the
forward to the backward: most of the memory that training takes beyond the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn import Module

from .calling import (
    arguments,
    captured,
    check_function,
    modules_of,
    name_of,
    not_connected,
    outputs_of,
    unchanged,
)
from .text import dims, dtype_name, render, size, table

__all__ = ["Comparison", "Gate", "Kept", "Saved", "saved"]


def saved(fn: Callable[..., Any], *inputs: Any) -> Saved:
    """What the gates of `fn(*inputs)` keep for the backward, as torch's saved-tensor hooks see it.

    What is kept depends on what requires grad. Inputs and parameters are taken as they are; if
    with them nothing needs a gradient, the floating inputs are made to require it.

    Args:
        fn: a function or module, on tensors; it is called once, or twice where nothing requires
            grad. Nothing of it changes: neither `.grad`, nor inputs, nor the random state, nor
            buffers of the modules that its code names.
        inputs: its arguments. Tensors may be in lists, tuples and dicts, and on "meta".

    Returns:
        a `Saved`, which prints as a table. It holds no tensors.

    Raises:
        TypeError: `fn` is not callable, or returns no floating tensor.
        ValueError: autograd cannot differentiate `fn`, or it has lazy parameters.
        RuntimeError: `fn` uses torch.func, which does not allow saved-tensor hooks.

    Example:
        >>> import torch
        >>> x = torch.ones(64, 100, requires_grad=True)
        >>> [(kept.node, kept.attribute, kept.bytes) for kept in saved(torch.relu, x).kept]
        [('ReluBackward0', 'result', 25600)]
        >>> saved(torch.add, x, x).total  # the adder needs nothing
        0
    """
    check_function("saved", fn)
    with unchanged(fn, inputs):
        found = _record(fn, inputs, lambda given: given.requires_grad)
        if found is None:
            found = _record(fn, inputs, lambda _: True)
        if found is None:
            raise not_connected("saved", fn)
        return found


@dataclass(frozen=True)
class Kept:
    """One tensor that a gate keeps.

    Attributes:
        gate: number of the gate, in the order of the forward; None if it is not known.
        node: name of its node in autograd's graph, such as "MulBackward0"; None if the tensor
            could not be attributed: its node leads to no output, or does not show what it keeps.
        attribute: what the node calls it, such as "self" or "result".
        shape, dtype, device: of the tensor.
        bytes: of its elements.
        storage_bytes: of the memory that it keeps alive: more, if it is a view of a part.
        role: "input", "parameter", "buffer", "output" (of the whole function), "captured" (by the
            function, from outside), or "intermediate".
        name: of the input, parameter, buffer, output or captured tensor; else "".
        shared: index of the first tensor in the same memory, if that is another one; else None.
    """

    gate: int | None
    node: str | None
    attribute: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int
    storage_bytes: int
    role: str
    name: str
    shared: int | None

    @property
    def what(self) -> str:
        """Role and name as one text."""
        return f"{self.role} {self.name}".rstrip()


@dataclass(frozen=True)
class Gate:
    """One gate: a node of autograd's graph.

    Attributes:
        number: in the order of the forward, from 0.
        node: its name in autograd's graph.
        kept: indices into `Saved.kept`.
    """

    number: int
    node: str
    kept: tuple[int, ...]


class Saved:
    """What the gates of a function keep.

    Attributes:
        fn: name of the function.
        nodes: its gates in the order of the forward, also those that keep nothing.
        kept: the tensors in the order in which they were saved.
    """

    def __init__(self, fn: str, nodes: list[Gate], kept: list[Kept]) -> None:
        self.fn, self.nodes, self.kept = fn, nodes, kept

    @property
    def total(self) -> int:
        """Bytes of the memory that is kept alive, each storage once."""
        return sum(kept.storage_bytes for kept in self.kept if kept.shared is None)

    @property
    def activations(self) -> int:
        """The part of `total` that the forward made: outputs and intermediate tensors."""
        made = ("output", "intermediate")
        return sum(k.storage_bytes for k in self.kept if k.shared is None and k.role in made)

    @property
    def packed(self) -> int:
        """Bytes of all tensors, shared ones as often as they are kept."""
        return sum(kept.bytes for kept in self.kept)

    @property
    def unattributed(self) -> list[Kept]:
        """The tensors of which no gate is known."""
        return [kept for kept in self.kept if kept.node is None]

    def compare(self, other: Saved, names: tuple[str, str] | None = None) -> Comparison:
        """This and another one side by side.

        Args:
            other: of another function.
            names: what to call the two; the functions' names if None.

        Raises:
            TypeError: `other` is no `Saved`.

        Example:
            >>> import torch
            >>> x = torch.ones(64, 100)
            >>> print(saved(torch.sigmoid, x).compare(saved(torch.nn.SiLU(), x)).summary)
            SiLU keeps as much as sigmoid: 25 KiB
        """
        if not isinstance(other, Saved):
            raise TypeError(f"compare: other wants a Saved, got {type(other).__name__}")
        return Comparison(self, other, names or (self.fn, other.fn))

    def to_json(self) -> dict[str, Any]:
        """All of it in dicts, lists, strings and numbers."""
        return {
            "fn": self.fn,
            "total": self.total,
            "activations": self.activations,
            "packed": self.packed,
            "nodes": [asdict(gate) | {"kept": list(gate.kept)} for gate in self.nodes],
            "kept": [asdict(kept) | {"shape": list(kept.shape)} for kept in self.kept],
        }

    def lines(self) -> list[tuple[str, Kept | None]]:
        """(gate, what it keeps), line by line as the tables show it; None if it keeps nothing."""
        made: list[tuple[str, Kept | None]] = []
        for gate in self.nodes:
            name = f"{gate.number} {gate.node}"
            made += [("" if i else name, self.kept[k]) for i, k in enumerate(gate.kept)]
            if not gate.kept:
                made.append((name, None))
        return made + [("? not attributed", kept) for kept in self.unattributed]

    def __rich__(self) -> Table:
        number = {id(kept): index for index, kept in enumerate(self.kept)}

        def cells(gate: str, kept: Kept | None) -> list[str]:
            if kept is None:
                return [gate, "", "nothing", *[""] * 5]
            return [
                gate,
                f"#{number[id(kept)]}",
                kept.attribute,
                dims(kept.shape),
                kept.dtype,
                size(kept.bytes),
                kept.what,
                "" if kept.shared is None else f"with #{kept.shared}",
            ]

        return table(
            ["gate", ">", "keeps", ">shape", "dtype", ">bytes", "which is", "shared"],
            [cells(*line) for line in self.lines()],
            title=f"What {self.fn} keeps for the backward",
            caption=self.summary,
        )

    @property
    def summary(self) -> str:
        """The totals in one sentence."""
        storages = sum(kept.shared is None for kept in self.kept)
        return (
            f"{size(self.total)} in {storages} storage{'' if storages == 1 else 's'} "
            f"({len(self.kept)} tensor{'' if len(self.kept) == 1 else 's'}), of which "
            f"{size(self.activations)} beyond inputs, parameters, buffers and captured tensors"
        )

    def __str__(self) -> str:
        return render(self)

    def __repr__(self) -> str:
        return f"<Saved by {self.fn}: {self.summary}>"


@dataclass(frozen=True)
class Comparison:
    """What two functions keep, side by side; it prints as a table.

    Attributes:
        a, b: the two.
        names: what they are called.
    """

    a: Saved
    b: Saved
    names: tuple[str, str]

    @property
    def difference(self) -> int:
        """Bytes that b keeps more than a; negative if less."""
        return self.b.total - self.a.total

    @property
    def summary(self) -> str:
        """Which keeps more, in one sentence."""
        a, b = self.names
        if not self.difference:
            return f"{b} keeps as much as {a}: {size(self.a.total)}"
        more = "more" if self.difference > 0 else "less"
        return (
            f"{b} keeps {size(abs(self.difference))} {more} than {a}: "
            f"{size(self.b.total)} against {size(self.a.total)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Both, and the difference, in dicts, lists, strings and numbers."""
        return {
            "names": list(self.names),
            "difference": self.difference,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
        }

    def __rich__(self) -> Table:
        def cells(line: tuple[str, Kept | None] | None) -> list[str]:
            if line is None:
                return ["", "", ""]
            gate, kept = line
            if kept is None:
                return [gate, "nothing", ""]
            again = "" if kept.shared is None else " (shared)"
            return [gate, f"{kept.what} {dims(kept.shape)}", f"{size(kept.bytes)}{again}"]

        rows = [
            cells(a) + cells(b) for a, b in itertools.zip_longest(self.a.lines(), self.b.lines())
        ]
        for label, attribute in (("total", "total"), ("of it activations", "activations")):
            row = [[label, "", size(getattr(side, attribute))] for side in (self.a, self.b)]
            rows.append(row[0] + row[1])
        heads = [head for name in self.names for head in (name, "keeps", ">bytes")]
        return table(heads, rows, title="What is kept for the backward", caption=f"{self.summary}.")

    def __str__(self) -> str:
        return render(self)


# ---- recording -----------------------------------------------------------------------------------


class _Packed:
    """What stands in the graph for a saved tensor: met again where its node is asked for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself would be a cycle
        self.gate: int | None = None
        self.node: str | None = None
        self.attribute = ""


def _record(
    fn: Callable[..., Any], inputs: tuple[Any, ...], wanted: Callable[[Tensor], bool]
) -> Saved | None:
    """What the call keeps; None if no output of it requires grad."""
    args, _, copies = arguments(fn, inputs, wanted)
    packed: list[_Packed] = []
    met: list[_Packed] = []

    def pack(tensor: Tensor) -> _Packed:
        packed.append(_Packed(tensor))
        return packed[-1]

    def unpack(one: _Packed) -> Tensor:
        met.append(one)
        return one.tensor

    first = _get_sequence_nr()  # nodes are numbered as they are made
    with saved_tensors_hooks(pack, unpack):
        output = fn(*args)
    outputs = outputs_of("saved", fn, output)
    if not any(tensor.requires_grad for tensor in outputs.values()):
        return None

    nodes = _nodes(outputs.values(), first)
    for number, node in enumerate(nodes):
        for attribute in _attributes(node):
            met.clear()
            try:
                getattr(node, attribute)
            except RuntimeError:  # it shows nothing
                continue
            for index, one in enumerate(met):
                one.gate, one.node = number, node.name()
                one.attribute = attribute.removeprefix("_saved_")
                if len(met) > 1:
                    one.attribute += f"[{index}]"

    roles = _roles(fn, copies, outputs)
    kept: list[Kept] = []
    holders: dict[int, int] = {}
    for index, one in enumerate(packed):
        tensor = one.tensor
        storage, storage_bytes = _storage(tensor)
        holder = holders.setdefault(storage, index)
        role, name = roles.get(storage, ("intermediate", ""))
        kept.append(
            Kept(
                one.gate,
                one.node,
                one.attribute,
                tuple(tensor.shape),
                dtype_name(tensor.dtype),
                str(tensor.device),
                storage_bytes if tensor.is_sparse else tensor.numel() * tensor.element_size(),
                storage_bytes,
                role,
                name,
                None if holder == index else holder,
            )
        )
    of_gate: dict[int | None, list[int]] = {}
    for index, one in enumerate(packed):
        of_gate.setdefault(one.gate, []).append(index)
    gates = [
        Gate(number, node.name(), tuple(of_gate.get(number, ())))
        for number, node in enumerate(nodes)
    ]
    return Saved(name_of(fn), gates, kept)


def _nodes(outputs: Any, first: int) -> list[Node]:
    """The gates that lead to the outputs, from number `first` on, in the order of the forward."""
    found: dict[Node, None] = {}
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in found or node.name() == _LEAF or node._sequence_nr() < first:
            continue
        found[node] = None
        waiting += [following for following, _ in node.next_functions]
    return sorted(found, key=lambda node: node._sequence_nr())


_LEAF = "torch::autograd::AccumulateGrad"


def _attributes(node: Node) -> list[str]:
    """The names under which a node shows what it saved."""
    if hasattr(node, "saved_tensors"):  # of a custom Function
        return ["saved_tensors"]
    return [name for name in dir(node) if name.startswith("_saved_")]


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What is the same for all views of one memory, and its bytes."""
    try:
        storage = tensor.untyped_storage()
        return storage._cdata, storage.nbytes()
    except (NotImplementedError, RuntimeError):  # other layouts have none of their own
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        return id(tensor), sum(part.numel() * part.element_size() for part in parts)


def _roles(
    fn: Callable[..., Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> dict[int, tuple[str, str]]:
    """Storage -> (role, name), of the tensors that are something to the user."""
    found: list[tuple[str, str, Tensor]] = [("input", *item) for item in inputs.items()]
    for name, module in modules_of(fn).items():
        prefix = f"{name}." if name else ""
        for role, named in (
            ("parameter", module.named_parameters()),
            ("buffer", module.named_buffers()),
        ):
            found += [(role, prefix + own, tensor) for own, tensor in named]
    if not isinstance(fn, Module):
        reads = captured(fn).items()
        found += [("captured", name, value) for name, value in reads if isinstance(value, Tensor)]
    found += [("output", *item) for item in outputs.items()]
    roles: dict[int, tuple[str, str]] = {}
    for role, name, tensor in found:
        roles.setdefault(_storage(tensor)[0], (role, name))
    return roles
