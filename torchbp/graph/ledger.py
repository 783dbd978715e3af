"""The ledger of a graph: every value, upstream and local gradient, and their products, as data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from .recording import Recording
from .text import dtype_name, number, render

if TYPE_CHECKING:
    from .html import Html
    from .svg import Svg

__all__ = ["Edge", "Held", "Ledger", "Node", "pattern"]

#: Elements up to which a tensor is held as it is.
WHOLE = 1024
#: Elements that are held of a larger one.
SAMPLE = 64


@dataclass(frozen=True)
class Held:
    """A tensor as a ledger holds it: whole if it is small, else its statistics and a sample.

    Attributes:
        shape, dtype: of the tensor.
        tensor: a copy of it, or None if it has more than 1024 elements.
        sample: up to 64 of its elements, spread evenly.
        min, max, mean, std: of its finite elements, nan if there are none; `std` is that of the
            population.
        finite: whether all its elements are finite.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None
    sample: Tensor
    min: float
    max: float
    mean: float
    std: float
    finite: bool

    @classmethod
    @torch.no_grad()
    def of(cls, value: Tensor) -> Held:
        """What to hold of a tensor; later changes of it are not seen."""
        value = value.detach()
        if value.layout != torch.strided:
            value = value.to_dense()
        whole = value.numel() <= WHOLE
        flat = value.reshape(-1)
        step = max(1, flat.numel() // SAMPLE)
        numbers = flat.abs() if value.is_complex() else flat
        mask = numbers.isfinite()
        finite = bool(mask.all())
        # In float64, but for large float32, of which a sum of so many parts is exact enough.
        wide = numbers if finite else numbers[mask]
        if wide.dtype != torch.float32 or whole:
            wide = wide.double()
        if wide.numel():
            low, high = (float(v) for v in wide.aminmax())
            variance, mean = (float(v) for v in torch.var_mean(wide, correction=0))
        else:
            low = high = mean = variance = math.nan
        return cls(
            shape=tuple(value.shape),
            dtype=value.dtype,
            tensor=value.clone() if whole else None,
            sample=flat[::step][:SAMPLE].clone(),
            min=low,
            max=high,
            mean=mean,
            std=math.sqrt(variance) if variance >= 0 else math.nan,
            finite=finite,
        )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """As numbers, lists and strings; `values` are all elements, or else `sample` some."""
        numbers = self.sample if self.tensor is None else self.tensor
        return {
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "min": _number(self.min),
            "max": _number(self.max),
            "mean": _number(self.mean),
            "std": _number(self.std),
            "finite": self.finite,
            "values" if self.tensor is not None else "sample": _numbers(numbers),
        }

    def __str__(self) -> str:
        if self.numel == 1:
            return number(self.sample.item())
        if self.tensor is not None and self.numel <= 4:
            return number(self.tensor.tolist())
        return f"{list(self.shape)} {number(self.min)} .. {number(self.max)}"


@dataclass
class Node:
    """A value of the graph, and the gate that computed it if one did.

    Attributes:
        id: its place in `Ledger.nodes`; what it is computed from comes before it.
        name: the name of an input, parameter or buffer; the operation and a number for a gate.
        kind: "input", "parameter", "buffer", "constant" or "gate".
        operation: of a gate, by the name that PyTorch's functions have, or of a custom Function.
        source: of a gate, file, line and text of the call, if known.
        values: what it gives, one for each output of the gate.
        upstreams: dL/dvalue for each of them, added up over its uses; None where none arrives.
        pattern: what the gate does with gradients, if that has a name: "distributor", "swap
            multiplier", "router", "mask", "scale", "transpose-and-multiply", "adder".
        uses: how many edges leave it with a gradient: two or more add up, as in an "adder".
    """

    id: int
    name: str
    kind: str
    operation: str = ""
    source: str | None = None
    values: list[Held | None] = field(default_factory=list)
    upstreams: list[Held | None] = field(default_factory=list)
    pattern: str | None = None
    uses: int = 0

    @property
    def value(self) -> Held | None:
        """Of its only output, or of the first that a gradient arrives at."""
        return self.values[self._main] if self.values else None

    @property
    def upstream(self) -> Held | None:
        """dL/dvalue."""
        return self.upstreams[self._main] if self.upstreams else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.value.shape if self.value else None

    @property
    def dtype(self) -> torch.dtype | None:
        return self.value.dtype if self.value else None

    @property
    def _main(self) -> int:
        return next((i for i, u in enumerate(self.upstreams) if u is not None), 0)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "operation": self.operation,
            "source": self.source,
            "pattern": self.pattern,
            "uses": self.uses,
            "values": [value and value.to_json() for value in self.values],
            "upstreams": [upstream and upstream.to_json() for upstream in self.upstreams],
        }


@dataclass
class Edge:
    """An operand of a gate: what it sends forward, and the gradient that comes back.

    Attributes:
        source, target: ids of nodes; `output`: which output of the source.
        argument: which operand of the target, from 0.
        local: dtarget/dsource where the gate is elementwise, in the shape of the gate's value.
        rule: how the gradient is computed, as text.
        jacobian_shape: of dtarget/dsource, the target's shape before the source's.
        jacobian_bytes: what that would take.
        product: upstream times local gradient: what this use contributes to dL/dsource.
    """

    source: int
    target: int
    argument: int
    output: int = 0
    local: Held | None = None
    rule: str | None = None
    jacobian_shape: tuple[int, ...] | None = None
    jacobian_bytes: int | None = None
    product: Held | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "target": self.target,
            "argument": self.argument,
            "output": self.output,
            "local": self.local and self.local.to_json(),
            "rule": self.rule,
            "jacobian_shape": self.jacobian_shape and list(self.jacobian_shape),
            "jacobian_bytes": self.jacobian_bytes,
            "product": self.product and self.product.to_json(),
        }


@dataclass
class Ledger:
    """Every value and gradient of a graph; what `trace` returns.

    Attributes:
        nodes: inputs, parameters and gates, in the order of the forward pass.
        edges: the gates' operands.
        grads: the whole gradient of each input and parameter by its name; None for one that the
            output does not depend on.
        outputs: ids of the nodes whose values the function returned.
    """

    nodes: list[Node]
    edges: list[Edge]
    grads: dict[str, Tensor | None]
    outputs: list[int]
    _recording: Recording = field(default_factory=Recording, repr=False, compare=False)

    def __getitem__(self, name: str) -> Node:
        """The node of a name."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise KeyError(f"there is no node {name}; there are {names}")

    def operands(self, node: Node) -> Iterator[Edge]:
        """The edges that end in a node, in the order of its arguments."""
        return (edge for edge in self.edges if edge.target == node.id)

    def table(self) -> Table:
        """One row for each node and operand, to be printed by rich."""
        table = Table("node", "value", "upstream", "operand", "local", "product", "pattern")
        for node in self.nodes:
            first = [node.name, _cell(node.value), _cell(node.upstream)]
            operands = list(self.operands(node))
            if not operands:
                table.add_row(*first, "", "", "", pattern(node))
            for edge in operands:
                local = _cell(edge.local) or edge.rule or ""
                source = self.nodes[edge.source].name
                last = pattern(node) if edge is operands[0] else ""
                table.add_row(*first, source, local, _cell(edge.product), last)
                first = ["", "", ""]
        return table

    def to_json(self) -> str:
        """Everything but the whole gradients of large tensors, as JSON."""
        return json.dumps(
            {
                "nodes": [node.to_json() for node in self.nodes],
                "edges": [edge.to_json() for edge in self.edges],
                "outputs": self.outputs,
            }
        )

    def to_svg(self, path: str | os.PathLike[str] | None = None) -> Svg:
        """The picture: the value above each edge in green, the gradient below in red.

        Under each gate of a small graph stands upstream times local gradient. A tensor of more
        than a few elements is a heat map with its range. Long graphs go on in a next row.

        Args:
            path: where to write it as well; a file that is there is replaced.

        Returns:
            the text of an SVG file that needs no other and is light or dark as its reader is; a
            notebook shows it.

        Raises:
            TypeError: `path` is no path.
            ImportError: the package fast-sugiyama, which lays graphs out, is missing.

        Example:
            >>> from torchbp.graph import trace
            >>> ledger = trace(lambda x, y: x * y, *torch.tensor([2.0, 3.0]))
            >>> picture = ledger.to_svg()
            >>> "swap multiplier" in picture, picture[:4]
            (True, '<svg')
        """
        from .svg import to_svg

        return to_svg(self, path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> Html:
        """The stepper: a page on which forward and backward run one gate at a time.

        Buttons and arrow keys step, space plays, the wheel or + and - zoom, 0 shows all. The gate
        that is met shows upstream times local gradient and their product, next to the flat code.

        Args:
            path: where to write it as well; a file that is there is replaced.

        Returns:
            the text of an HTML file that needs no other and no network; a notebook shows it.

        Raises:
            TypeError: `path` is no path.
            ImportError: the package fast-sugiyama, which lays graphs out, is missing.

        Example:
            >>> from torchbp.graph import trace
            >>> ledger = trace(lambda x, y: x * y, *torch.tensor([2.0, 3.0]))
            >>> page = ledger.to_html()
            >>> page[:15], '"swap multiplier"' in page
            ('<!doctype html>', True)
        """
        from .html import to_html

        return to_html(self, path)

    def _repr_svg_(self) -> str | None:
        """What a notebook shows: the picture, or the text where no layout is installed."""
        try:
            return str(self.to_svg())
        except ImportError:
            return None

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return render(self.table(), 160)

    def __repr__(self) -> str:
        gates = sum(node.kind == "gate" for node in self.nodes)
        return f"Ledger({gates} gates, {len(self.nodes) - gates} inputs and parameters)"


def _cell(held: Held | None) -> str:
    return "" if held is None else str(held)


def pattern(node: Node) -> str:
    """The gate's, and that of the fork behind it."""
    fork = node.uses > 1 and len(node.values) < 2  # several outputs may have one use each
    names = [*([node.pattern] if node.pattern else []), *(["adder"] if fork else [])]
    return ", ".join(names)


def _number(value: Any) -> Any:
    """JSON knows no nan and no infinity: they are strings."""
    if isinstance(value, complex):
        return [_number(value.real), _number(value.imag)]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _numbers(tensor: Tensor) -> Any:
    def convert(value: Any) -> Any:
        return [convert(v) for v in value] if isinstance(value, list) else _number(value)

    return convert(tensor.tolist())
