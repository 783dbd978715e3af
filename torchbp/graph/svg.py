"""The picture of a ledger: the lecture's circuit, as SVG.

The value stands above each edge in green, the gradient below in red; under each gate, by the names
of its operands, upstream times local gradient. A tensor of more than a few elements is a small heat
map with its range. The picture is a file of its own: no script, no font, nothing from the network;
it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

from .layout import PAGE, Layout, Point, Size, layout
from .ledger import Edge, Held, Ledger, Node, pattern
from .text import dims, number

__all__ = [
    "PALETTE",
    "STYLE",
    "Drawing",
    "Steps",
    "Svg",
    "at_home",
    "clean",
    "drawing",
    "heat_map",
    "rows_of",
    "to_svg",
    "write",
]

#: Colours by name: on light, on dark.
PALETTE = {
    "paper": ("#ffffff", "#15181e"),
    "ink": ("#1b2330", "#e8ebf0"),
    "muted": ("#5b6676", "#9aa5b5"),
    "wire": ("#a3adbb", "#566072"),
    "gate": ("#f3f5f8", "#232932"),
    "rim": ("#566273", "#8d99aa"),
    "value": ("#067647", "#4fd391"),
    "gradient": ("#b42318", "#ff8d85"),
    "local": ("#5b3cc4", "#b8a5ff"),
}
#: Of heat maps: negative, positive, nan. Zero shows the paper.
_MINUS, _PLUS, _NAN = (216, 96, 20), (38, 110, 190), (200, 0, 200)

_FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif'

#: The drawing's own style: what it looks like, with the palette's colours as variables.
STYLE = """
text { font: 12px FONT; fill: var(--ink); text-anchor: middle; font-variant-numeric: tabular-nums; }
.gate > rect { fill: var(--gate); stroke: var(--rim); stroke-width: 1.25; }
.gate .sign { font-size: 17px; }
.leaf > rect { fill: var(--paper); stroke: var(--wire); }
.parameter > rect { fill: var(--gate); }
.buffer > rect, .constant > rect { stroke-dasharray: 3 2; }
.wire { fill: none; stroke: var(--wire); stroke-width: 1.5; }
.plain { stroke-dasharray: 2 3; }
.end { fill: var(--wire); stroke: none; }
.value { fill: var(--value); }
.gradient { fill: var(--gradient); }
.local { fill: var(--local); }
.caption, .name, .small, .caption tspan { font-size: 10.5px; }
.caption, .name { fill: var(--muted); }
.pattern { font-style: italic; }
.frame { fill: none; stroke: var(--wire); stroke-width: 0.75; }
image { image-rendering: pixelated; }
""".replace("FONT", _FONT)

#: Signs for gates; the others are called by their names.
_SIGNS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "matmul": "@", "mm": "@", "bmm": "@"}
#: The same with one tensor and a number c, as the lecture writes them.
_SIGNS_OF_ONE = {
    "add": "+c", "shift": "+c", "sub": "−c", "rsub": "c−x", "mul": "×c", "scale": "×c",
    "div": "÷c", "rdiv": "c/x", "neg": "×-1", "reciprocal": "1/x",
}  # fmt: skip

_HEIGHT = 32.0  # of a gate
_PORT = 13.0  # between the operands of a gate
_LINE = 13.0  # of captions
_MAP = 52.0, 20.0  # a heat map at most
_NAME = 20  # letters of a name at most
_EDGE = 14.0  # around all
_FEW = 12  # gates up to which each has its captions


class Svg(str):
    """A picture as text, which a notebook shows."""

    __slots__ = ()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"image/svg+xml": str(self), "text/plain": "<the picture of a graph, as SVG>"}


def to_svg(ledger: Ledger, path: str | os.PathLike[str] | None = None) -> Svg:
    """See `Ledger.to_svg`."""
    picture = drawing(ledger)
    text = f'<svg xmlns="http://www.w3.org/2000/svg" {picture.svg()}\n'
    write("to_svg", text, path)
    return Svg(text)


def write(op: str, text: str, path: str | os.PathLike[str] | None) -> None:
    """Write a text to a file, if there is one to write; UTF-8, one newline whatever the system."""
    if path is None:
        return
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{op}: path wants a str or Path, got {type(path).__name__}")
    Path(path).write_bytes(text.encode())


# ---- what is said


def text_of(held: Held) -> str | None:
    """A tensor as a few numbers; None if it is too large for that."""
    if held.numel == 1 or (held.tensor is not None and 0 < held.numel <= 4):
        text = str(held)
        return text if len(text) <= 28 else None
    return None


def rows_of(held: Held) -> list[str]:
    """A small matrix, a line for each row; none if it is too large for that."""
    if held.tensor is None or held.tensor.dim() != 2 or not 0 < held.numel <= 12:
        return []
    rows = [number(row) for row in held.tensor.tolist()]
    return rows if len(rows) <= 3 and max(map(len, rows)) <= 18 else []


def _texts(held: Held) -> list[str]:
    """What is written beside the heat map of a tensor: its range."""
    if not held.numel:
        return ["empty"]
    if math.isnan(held.min):
        return ["nan"]
    return [f"{number(held.min)} .. {number(held.max)}"]


def clean(text: str) -> str:
    """Text for XML, without what no XML may hold."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def at_home(source: str) -> str:
    """File, line and text of a call, without the folders of the machine it was made on."""
    return re.sub(r"^[^\n]*?[/\\](?=[^/\\\n]+:\d+: )", "", source)


def _short_name(name: str) -> str:
    """The name, or its end."""
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]


def _wide(text: str, size: float = 12.0) -> float:
    """About the width of a text; an overestimate in most fonts."""
    return 0.62 * size * len(text)


def label_of(node: Node, ledger: Ledger) -> str:
    """What stands in a node: a sign or the name of its operation; the name of what is no gate."""
    if node.kind != "gate":
        return _short_name(node.name)
    if len(list(ledger.operands(node))) > 1:
        return _SIGNS.get(node.operation, _short_name(node.operation))
    call = ledger._recording.calls.get(node.id)
    given = [] if call is None else [a for a in call.args if isinstance(a, int | float)]
    constant = number(given[0]) if len(given) == 1 else "c"
    sign = _SIGNS_OF_ONE.get(node.operation, _short_name(node.operation))
    return re.sub(r"\bc\b", constant, sign)


def product_of(edge: Edge, ledger: Ledger) -> tuple[str, str, str] | None:
    """upstream, local and their product at an operand, if they are a few numbers of one shape."""
    upstream, local = ledger.nodes[edge.target].upstream, edge.local
    if upstream is None or local is None or edge.product is None:
        return None
    if not upstream.shape == local.shape == edge.product.shape:
        return None
    texts = [text_of(held) for held in (upstream, local, edge.product)]
    if any(text is None for text in texts):
        return None
    return texts[0] or "", texts[1] or "", texts[2] or ""


@dataclass(frozen=True)
class _Caption:
    """A line under a gate: parts of text with their classes."""

    parts: tuple[tuple[str, str], ...]

    @property
    def width(self) -> float:
        return _wide("".join(text for text, _ in self.parts), 10.5)


def _captions(node: Node, ledger: Ledger) -> list[_Caption]:
    """The pattern of a gate, and upstream times local for each operand; the sum behind a fork."""
    lines = []
    if pattern(node):
        lines.append(_Caption(((pattern(node), "pattern"),)))
    for edge in ledger.operands(node):
        if edge.product is None:
            continue
        source = f"{_short_name(ledger.nodes[edge.source].name)}: "
        numbers = product_of(edge, ledger)
        if numbers is not None:
            upstream, local, product = numbers
            lines.append(
                _Caption(
                    (
                        (source, ""),
                        (upstream, "gradient"),
                        (" × ", ""),
                        (local, "local"),
                        (" = ", ""),
                        (product, "gradient"),
                    )
                )
            )
        elif edge.rule and len(edge.rule) <= 40:
            lines.append(_Caption(((source, ""), (edge.rule, "local"))))
    uses = [edge.product for edge in ledger.edges if edge.source == node.id and edge.product]
    if len(uses) > 1 and node.upstream and len(node.values) == 1:
        texts = [text_of(held) for held in (*uses, node.upstream)]
        if None not in texts and sum(map(len, map(str, texts))) < 28:
            added = " + ".join(map(str, texts[:-1]))
            lines.append(_Caption(((f"{added} = {texts[-1]}", "gradient"),)))
    return lines


# ---- when it is known


@dataclass(frozen=True)
class Steps:
    """The order in which forward and backward meet the gates; step 0 has the inputs alone.

    Attributes:
        forward: the step at which a node has its value, 0 for what is no gate.
        base: the step of the base case, at which the outputs have their gradient; the last
            forward step's successor, whether or not a backward has run.
        backward: of each gate that a gradient arrives at, the step at which it is handed on.
        complete: by node and output, the step at which the last use has sent its gradient.
    """

    forward: list[int]
    base: int
    backward: dict[int, int]
    complete: dict[tuple[int, int], int]

    @classmethod
    def of(cls, ledger: Ledger) -> Steps:
        forward, gates = [], 0
        for node in ledger.nodes:
            gates += node.kind == "gate"
            forward.append(gates if node.kind == "gate" else 0)
        base = gates + 1
        sending = {edge.target for edge in ledger.edges if edge.product is not None}
        backward: dict[int, int] = {}
        for node in reversed(ledger.nodes):
            if node.id in sending:
                backward[node.id] = base + len(backward) + 1
        complete: dict[tuple[int, int], int] = {}
        for edge in ledger.edges:
            if edge.product is not None:
                key = edge.source, edge.output
                complete[key] = max(complete.get(key, base), backward[edge.target])
        return cls(forward, base, backward, complete)

    def bases(self, ledger: Ledger) -> list[int]:
        """The nodes whose gradient was given, not computed."""
        return [
            node.id
            for node in ledger.nodes
            if any(
                held is not None and self.arrived(node.id, output) == self.base
                for output, held in enumerate(node.upstreams)
            )
        ]

    def listed(self, ledger: Ledger) -> list[dict[str, Any]]:
        """Each step by its phase and node; for a page."""
        gates = [node.id for node in ledger.nodes if node.kind == "gate"]
        return [
            {"phase": "inputs"},
            *({"phase": "forward", "node": node} for node in gates),
            *({"phase": "base", "nodes": nodes} for nodes in [self.bases(ledger)] if nodes),
            *({"phase": "backward", "node": node} for node in self.backward),
        ]

    def arrived(self, node: int, output: int) -> int:
        """The step at which the gradient of a value is complete: all its uses have sent theirs."""
        return self.complete.get((node, output), self.base)


# ---- what is drawn


def heat_map(
    held: Held,
    most: tuple[float, float] = _MAP,
    largest: float = 10.0,
    top: float | None = None,
) -> tuple[str, float, float]:
    """A heat map as a data URI, with the width and height to show it in.

    A row of the picture is one along the last dimension; of a large tensor the sample is shown, in
    four rows. Blue is positive, orange negative, the stronger the larger; nan is purple. A cell is
    `largest` wide at most; the strongest colour is that of `top`, or of the largest number.
    """
    values = held.sample if held.tensor is None else held.tensor
    values = values.abs() if values.is_complex() else values
    values = values.double()
    if held.tensor is None:
        grid = values.reshape(4, -1) if values.numel() % 4 == 0 else values.reshape(1, -1)
    elif values.dim() < 2:
        grid = values.reshape(1, -1)
    else:
        grid = values.reshape(-1, values.shape[-1])
    for dim, cells in ((0, 24), (1, 48)):
        if grid.shape[dim] > cells:
            chosen = torch.linspace(0, grid.shape[dim] - 1, cells).long()
            grid = grid.index_select(dim, chosen)
    rows, columns = grid.shape
    finite = grid[grid.isfinite()]
    if top is None:
        top = float(finite.abs().max()) if finite.numel() else 0.0
    strength = (grid.abs() / (top or 1.0)).clamp(0, 1).nan_to_num(nan=1.0)
    picture = torch.zeros(rows, columns, 4, dtype=torch.uint8)
    for colour, mask in ((_PLUS, grid > 0), (_MINUS, grid < 0), (_NAN, grid.isnan())):
        picture[..., :3][mask] = torch.tensor(colour, dtype=torch.uint8)
    picture[..., 3] = (255 * strength).round().to(torch.uint8)
    cell = min(most[0] / columns, most[1] / rows, largest)
    width, height = max(columns * cell, 8.0), max(rows * cell, 5.0)
    return "data:image/png;base64," + _png(picture), width, height


def _png(picture: torch.Tensor) -> str:
    from PIL import Image  # slow to import

    file = io.BytesIO()
    Image.fromarray(picture.numpy(), "RGBA").save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


class _Label:
    """A tensor on an edge: numbers, or a heat map with its range; its shape where asked for.

    A small one has either numbers or a heat map, in one line.
    """

    def __init__(self, held: Held, colour: str, shape: bool = False, small: bool = False) -> None:
        self.held, self.colour, self.small = held, colour, small
        text = text_of(held)
        lines = [text] if text is not None else [] if small else rows_of(held)
        self.map = None
        if not lines and held.numel:
            self.map = heat_map(held, (26.0, 10.0) if small else _MAP)
        self.lines = lines or ([] if small and self.map else _texts(held))
        self.shape = dims(held.shape) if shape and text is None else None

    @property
    def width(self) -> float:
        texts = [*self.lines, *([self.shape] if self.shape else [])]
        size = 12.0 if self.map is None and not self.small else 10.5
        return max(self.map[1] if self.map else 0.0, *(_wide(text, size) for text in texts), 0.0)

    @property
    def height(self) -> float:
        return (
            (self.map[2] + 3 if self.map else 0.0)
            + max(14.0 * len(self.lines) - 1, 0)
            + (12.0 if self.shape else 0.0)
        )

    def above(self, x: float, y: float) -> str:
        """Drawn on an edge: shape, range, and the heat map next to the edge."""
        return self._draw(x, y - self.height - 2)

    def below(self, x: float, y: float) -> str:
        return self._draw(x, y + 3, upside=True)

    def _draw(self, x: float, top: float, upside: bool = False) -> str:
        size = "" if self.map is None and not self.small else " small"
        parts = []

        def write(text: str, colour: str) -> None:
            nonlocal top
            top += 12
            parts.append(f'<text class="{colour}" x="{x:.1f}" y="{top - 2:.1f}">{text}</text>')

        def image() -> None:
            nonlocal top
            if self.map is None:
                return
            uri, width, height = self.map
            where = (
                f'x="{x - width / 2:.1f}" y="{top + 1:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}"'
            )
            parts.append(f'<image {where} preserveAspectRatio="none" href="{uri}"/>')
            parts.append(f'<rect class="frame" {where}/>')
            top += height + 3

        if upside:
            image()
        if self.shape:
            write(self.shape, "caption")
        for place, line in enumerate(self.lines):
            top += 2 if place else 0
            write(line, self.colour + size)
        if not upside:
            image()
        return "".join(parts)


@dataclass
class _Place:
    """What stands at a node of the layout: a node, or one output of a node that has several."""

    node: Node
    output: int
    tap: bool
    text: str
    value: _Label | None = None
    gradient: _Label | None = None
    name: str = ""  # above a gate, for the captions that speak of it
    captions: Sequence[_Caption] = ()
    ports: Sequence[Edge] = ()
    heads: dict[int, _Label] | None = None  # by argument: what one use of a value sends back

    @property
    def width(self) -> float:
        if self.tap:
            return _wide(self.text, 10.5)
        return max(_HEIGHT, _wide(self.text) + 18)

    @property
    def height(self) -> float:
        step = _PORT + 4 if self.heads else _PORT
        return _HEIGHT if self.tap else max(_HEIGHT, step * min(len(self.ports), 8) + 4)

    @property
    def size(self) -> Size:
        labels = [label for label in (self.value, self.gradient) if label is not None]
        tail = max((label.width for label in labels), default=0.0)
        head = max((label.width for label in (self.heads or {}).values()), default=0.0)
        return Size(
            body=max(
                self.width, _wide(self.name, 10.5), *(line.width for line in self.captions), 0.0
            ),
            tail=tail + 14 if labels else 0.0,
            head=head + 8 if head else 0.0,
        )

    @property
    def up(self) -> float:
        """How far it reaches above its middle."""
        name = _LINE if self.name else 0.0
        return max(self.height / 2 + name, self.value.height + 2 if self.value else 0.0)

    @property
    def down(self) -> float:
        label = self.gradient.height + 3 if self.gradient else 0.0
        return max(self.height / 2 + _LINE * len(self.captions) + 3, label)

    def port(self, edge: Edge) -> float:
        """Where an operand comes in, from the middle of the gate."""
        count = len(self.ports)
        step = (self.height - 4) / count
        return step * (self.ports.index(edge) - (count - 1) / 2) if count > 1 else 0.0


@dataclass(frozen=True)
class Drawing:
    """An SVG in parts, so that a page can hold it too.

    Attributes:
        body: the elements.
        width, height: of the whole.
        title, description: for those who do not see it.
    """

    body: str
    width: float
    height: float
    title: str
    description: str

    def svg(self) -> str:
        """A picture of its own, from the attributes of the root element on."""
        mark = "torchbp-" + sha256(self.body.encode()).hexdigest()[:8]
        scoped = re.sub(r"(?m)^(?=[^\s}])", f".{mark} ", STYLE.strip())
        scoped = re.sub(r",\s*(?=\.)", f", .{mark} ", scoped)
        light, dark = (
            "".join(f"--{name}: {pair[i]}; " for name, pair in PALETTE.items()) for i in (0, 1)
        )
        style = (
            f".{mark} {{ {light}}}\n"
            f"@media (prefers-color-scheme: dark) {{ .{mark} {{ {dark}}} }}\n{scoped}\n"
            f".{mark} .paper {{ fill: var(--paper); }}"
        )
        return (
            f'class="{mark}" width="{self.width:.0f}" height="{self.height:.0f}" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" '
            f'aria-labelledby="{mark}-title {mark}-desc">\n'
            f'<title id="{mark}-title">{clean(self.title)}</title>\n'
            f'<desc id="{mark}-desc">{clean(self.description)}</desc>\n'
            f"<style>{style}</style>\n"
            f'<rect class="paper" width="100%" height="100%" rx="8"/>\n'
            f"{self.body}</svg>"
        )


def drawing(ledger: Ledger, page: Point = PAGE) -> Drawing:
    """The picture of a ledger, for a page of this width and height."""
    return _Picture(ledger, page).drawing()


class _Picture:
    def __init__(self, ledger: Ledger, page: Point) -> None:
        self.ledger = ledger
        self.steps = Steps.of(ledger)
        self.places: list[_Place] = []
        self.start_of: dict[tuple[int, int], int] = {}  # (node, output) -> where its edges start
        self.of_node: list[int] = []
        self.edges: list[tuple[int, int]] = []
        self.numbers = {id(edge): number for number, edge in enumerate(ledger.edges)}
        self.used = {(edge.source, edge.output) for edge in ledger.edges}
        uses: dict[tuple[int, int], int] = {}
        for edge in ledger.edges:
            if edge.product is not None:
                key = edge.source, edge.output
                uses[key] = uses.get(key, 0) + 1
        gates = sum(node.kind == "gate" for node in ledger.nodes)
        for node in ledger.nodes:
            self.add(node, captions=gates <= _FEW)
        for edge in ledger.edges:
            place = self.places[self.of_node[edge.target]]
            self.edges.append((self.start(edge), self.of_node[edge.target]))
            place.ports = [*place.ports, edge]
            if uses.get((edge.source, edge.output), 0) > 1 and edge.product is not None:
                place.heads = place.heads or {}
                place.heads[edge.argument] = _Label(edge.product, "gradient", small=True)
        leaves = [n.value for n in ledger.nodes if n.kind != "gate" and n.value is not None]
        pitch = max((p.up for p in self.places), default=0.0)
        pitch += max((p.down for p in self.places), default=0.0)
        self.layout: Layout = layout(
            [place.size for place in self.places],
            self.edges,
            pitch + 10,
            flush=gates <= _FEW and all(text_of(value) for value in leaves),
            page=page,
        )
        for place in self.places:
            place.ports = sorted(place.ports, key=self.comes_from)

    def add(self, node: Node, captions: bool) -> None:
        """A place for a node, and one for each of its outputs if there are several."""
        several = len(node.values) > 1
        place = _Place(node, 0, tap=False, text=label_of(node, self.ledger))
        if captions:
            place.captions = _captions(node, self.ledger)
            place.name = _short_name(node.name) if node.kind == "gate" else ""
        self.of_node.append(len(self.places))
        self.places.append(place)
        outputs = range(len(node.values)) if several else [0]
        for output in outputs:
            holder = place
            if several:
                if (node.id, output) not in self.used and node.upstreams[output] is None:
                    continue
                holder = _Place(node, output, tap=True, text=f"[{output}]")
                self.edges.append((self.of_node[node.id], len(self.places)))
                self.places.append(holder)
            value = node.values[output] if node.values else None
            upstream = node.upstreams[output] if node.upstreams else None
            if value is not None:
                holder.value = _Label(value, "value", shape=True)
            if upstream is not None:
                holder.gradient = _Label(upstream, "gradient")
            self.start_of[node.id, output] = self.places.index(holder)

    def start(self, edge: Edge) -> int:
        return self.start_of[edge.source, edge.output]

    def route(self, edge: Edge) -> list[Point]:
        return self.layout.routes[self.start(edge), self.of_node[edge.target]]

    def comes_from(self, edge: Edge) -> tuple[float, int]:
        """Operands in the order in which they arrive from above."""
        return self.route(edge)[-2][1], edge.argument

    def drawing(self) -> Drawing:
        parts = [self.wire(edge) for edge in self.ledger.edges]
        parts += [self.to_tap(i) for i, place in enumerate(self.places) if place.tap]
        parts += [self.labels(i) for i in self.start_of.values()]
        parts += [self.node(i) for i in range(len(self.places))]
        gates = sum(node.kind == "gate" for node in self.ledger.nodes)
        levels = [y for route in self.layout.routes.values() for _, y in route]
        pairs = list(zip(self.layout.centers, self.places, strict=True))
        top = min([*levels, *(y - place.up for (_, y), place in pairs)], default=0.0)
        bottom = max([*levels, *(y + place.down for (_, y), place in pairs)], default=0.0)
        frame = f'<g transform="translate({_EDGE} {_EDGE - top:.1f})">'
        return Drawing(
            body=f"{frame}\n" + "\n".join(parts) + "\n</g>\n",
            width=self.layout.width + 2 * _EDGE,
            height=bottom - top + 2 * _EDGE,
            title=f"Computational graph{self.of()}: {gates} gate{'s' * (gates != 1)}",
            description=" ".join(
                [
                    "The value stands above each edge in green, the gradient below in red.",
                    *self.sentences(),
                ]
            ),
        )

    def of(self) -> str:
        name = self.ledger._recording.name
        return f" of {name}" if self.ledger._recording.calls and name.isidentifier() else ""

    def sentences(self, most: int = 40) -> Iterable[str]:
        for node in self.ledger.nodes[:most]:
            operands = ", ".join(
                self.ledger.nodes[edge.source].name for edge in self.ledger.operands(node)
            )
            what = f"{node.name} = {node.operation}({operands})" if operands else node.name
            held = [f"value {node.value}"] if node.value else []
            held += [f"gradient {node.upstream}"] if node.upstream else []
            yield f"{what}: {', '.join(held)}."
        if len(self.ledger.nodes) > most:
            yield f"And {len(self.ledger.nodes) - most} more."

    def wire(self, edge: Edge) -> str:
        target = self.of_node[edge.target]
        place = self.places[target]
        points = list(self.route(edge))
        x, y = self.layout.centers[target]
        port = y + place.port(edge)
        start = self.places[self.start(edge)]
        points[0] = self.leaving(self.start(edge)), points[0][1]
        points[-1] = points[-1][0], port
        inside = 6 if len(place.ports) > 1 else 0
        points.append((x - place.width / 2 + inside, port))
        kind = "wire" if edge.product is not None else "wire plain"
        label = (place.heads or {}).get(edge.argument)
        lines = [
            f'<path class="{kind}" data-edge="{self.numbers[id(edge)]}" '
            f'data-at="{self.steps.forward[start.node.id]}" d="{_path(points)}"/>'
        ]
        if label is not None:
            left = points[-2][0]
            at = self.steps.backward[edge.target]
            middle = left + 4 + label.width / 2
            lines.append(
                f'<g class="use" data-at="{at}" data-edge="{self.numbers[id(edge)]}">'
                f"<title>{clean(self.tooltip_of_use(edge))}</title>"
                f"{label.below(middle, port - 2)}</g>"
            )
        return "".join(lines)

    def leaving(self, index: int) -> float:
        """x where the edges of a node start."""
        return self.layout.centers[index][0] + self.places[index].width / 2

    def to_tap(self, index: int) -> str:
        node = self.of_node[self.places[index].node.id]
        points = list(self.layout.routes[node, index])
        points[0] = self.leaving(node), points[0][1]
        points.append((self.layout.centers[index][0] - self.places[index].width / 2, points[-1][1]))
        at = self.steps.forward[self.places[index].node.id]
        return f'<path class="wire" data-at="{at}" d="{_path(points)}"/>'

    def labels(self, index: int) -> str:
        """Value and gradient behind a node, and the end of the edge if nothing follows."""
        place = self.places[index]
        node, output = place.node, place.output
        left, right = self.leaving(index), self.layout.ends[index]
        y = self.layout.centers[index][1]
        # Behind the widest body of the layer, where all tails start.
        tail = place.size.tail
        middle = right - tail / 2 if tail else right
        lines = []
        forward = self.steps.forward[node.id]
        path = f"nodes.{node.id}"
        if (node.id, output) not in self.used and (
            node.id in self.ledger.outputs or place.gradient
        ):
            lines.append(
                f'<g data-at="{forward}">'
                f'<path class="wire" d="M{left:.1f} {y:.1f}H{right - 6:.1f}"/>'
                f'<path class="end" d="M{right - 7:.1f} {y - 4:.1f}l7 4l-7 4z"/></g>'
            )
        if place.value:
            lines.append(
                f'<g data-at="{forward}" data-held="{path}.values.{output}">'
                f"{place.value.above(middle, y)}</g>"
            )
        if place.gradient:
            at = self.steps.arrived(node.id, output)
            lines.append(
                f'<g data-at="{at}" data-held="{path}.upstreams.{output}">'
                f"{place.gradient.below(middle, y)}</g>"
            )
        return "".join(lines)

    def node(self, index: int) -> str:
        place = self.places[index]
        node = place.node
        x, y = self.layout.centers[index]
        label = clean(place.text)
        if place.tap:
            return f'<text class="caption" x="{x:.1f}" y="{y + 4:.1f}">{label}</text>'
        width, height = place.width, place.height
        kinds = "gate" if node.kind == "gate" else f"leaf {node.kind}"
        sign = ' class="sign"' if place.text in _SIGNS.values() else ""
        drop = 6 if sign else 4
        lines = [
            f'<g class="{kinds}" data-node="{node.id}" data-at="{self.steps.forward[node.id]}">',
            f"<title>{clean(self.tooltip(node))}</title>",
            f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" rx="{16 if node.kind == "gate" else 5}"/>',
            f'<text{sign} x="{x:.1f}" y="{y + drop:.1f}">{label}</text>',
        ]
        if place.name:
            above = y - height / 2 - 4
            lines.append(
                f'<text class="name" x="{x:.1f}" y="{above:.1f}">{clean(place.name)}</text>'
            )
        below = y + height / 2 + 2
        for line in place.captions:
            below += _LINE
            at = self.steps.backward.get(node.id, 0)
            spans = "".join(
                f'<tspan class="{kind}">{clean(text)}</tspan>' if kind else clean(text)
                for text, kind in line.parts
            )
            lines.append(
                f'<text class="caption" data-at="{at}" x="{x:.1f}" y="{below - 2:.1f}" '
                f'xml:space="preserve">{spans}</text>'
            )
        return "".join([*lines, "</g>"])

    def tooltip(self, node: Node) -> str:
        lines = [f"{node.name}: {node.operation or node.kind}"]
        if pattern(node):
            lines[0] += f", {pattern(node)}"
        lines += [at_home(node.source)] if node.source else []
        lines += [f"value {node.value}"] if node.value else []
        lines += [f"gradient {node.upstream}"] if node.upstream else []
        return "\n".join(lines)

    def tooltip_of_use(self, edge: Edge) -> str:
        source, target = self.ledger.nodes[edge.source], self.ledger.nodes[edge.target]
        return f"{target.name} sends to {source.name}: {edge.product}"


def _path(points: Sequence[Point]) -> str:
    """Through the points: lines where they are level or upright, round where these meet; a curve
    between lanes."""
    x, y = points[0]
    parts = [f"M{x:.1f} {y:.1f}"]
    for place, (a, b) in enumerate(points[1:], 1):
        level, upright = abs(b - y) < 0.05, abs(a - x) < 0.05
        if level or upright:
            end = a, b
            if place + 1 < len(points):
                c, d = points[place + 1]
                turn = min(7.0, max(abs(a - x), abs(b - y)) / 2, max(abs(c - a), abs(d - b)) / 2)
                corner = level != upright and (abs(c - a) < 0.05) != upright
                corner = corner and (abs(c - a) < 0.05 or abs(d - b) < 0.05)
                if corner and turn > 0.5:
                    near = _towards((a, b), (x, y), turn)
                    end = _towards((a, b), (c, d), turn)
                    parts.append(f"L{near[0]:.1f} {near[1]:.1f}Q{a:.1f} {b:.1f} ")
                    parts.append(f"{end[0]:.1f} {end[1]:.1f}")
                    x, y = end
                    continue
            if not (level and upright):
                parts.append(f"H{a:.1f}" if level else f"V{b:.1f}")
        else:
            middle = (x + a) / 2
            parts.append(f"C{middle:.1f} {y:.1f} {middle:.1f} {b:.1f} {a:.1f} {b:.1f}")
        x, y = a, b
    return "".join(parts)


def _towards(start: Point, goal: Point, distance: float) -> Point:
    """So far from a point on the way to another, level or upright."""
    return (
        start[0] + math.copysign(distance, goal[0] - start[0]) * (goal[0] != start[0]),
        start[1] + math.copysign(distance, goal[1] - start[1]) * (goal[1] != start[1]),
    )
