"""Where the nodes of a graph are drawn, and how the edges between them run.

The package fast-sugiyama gives each node its layer and its place in the layer, with few crossings
(Sugiyama's method, as in Graphviz's dot). What is added here: the layers run from left to right,
as wide as what they hold; a graph that is too long for the page goes on in a next row, like text.

An edge is straight where it passes a layer, in a lane of its own that the layer's nodes leave free,
and bends between layers alone: so it crosses no node.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Layout", "Size", "layout"]

Point = tuple[float, float]
Pair = tuple[int, int]
Ranking = Literal["minimize", "down"]

#: The page that a graph is to fit on, in the units of the sizes.
PAGE = 1040.0, 620.0
#: How much smaller than it is a graph may be shown before it goes on in a next row.
SMALLEST = 0.8
#: Between layers, where edges bend.
GAP = 34.0
#: Between the edges that lead from a row to the next.
LINE = 9.0


@dataclass(frozen=True)
class Size:
    """The width of a node, `body`, and of what stands on its edges: `head` before it, `tail`
    behind it."""

    body: float
    tail: float = 0.0
    head: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A drawing, whose upper left corner is (0, 0); y grows downwards.

    Attributes:
        centers: of each node's body.
        ends: x where each node's tail ends.
        routes: of each edge, from the right of the source's body to the left of the target's
            layer: points that are joined by horizontal and vertical lines, or by a curve that is
            horizontal at both ends.
        rows: how many rows there are.
        width, height: of all.
    """

    centers: list[Point]
    ends: list[float]
    routes: dict[Pair, list[Point]]
    rows: int
    width: float
    height: float


def layout(
    sizes: Sequence[Size],
    edges: Sequence[Pair],
    pitch: float,
    flush: bool = False,
    page: Point = PAGE,
) -> Layout:
    """Lay out a graph without cycles.

    Args:
        sizes: of each node.
        edges: (source, target), places in `sizes`; several between two nodes are one.
        pitch: from the middle of a node to the middle of the next in its layer, at least.
        flush: whether all nodes without operands stand in the first layer, not next to their use.
        page: width and height that the graph is to fit on.

    Raises:
        ImportError: the package fast-sugiyama is missing.

    Example:
        >>> found = layout([Size(40), Size(40), Size(60)], [(0, 2), (1, 2)], pitch=50)
        >>> found.centers
        [(20.0, 25.0), (20.0, 75.0), (104.0, 50.0)]
        >>> found.routes[0, 2]
        [(40.0, 25.0), (40.0, 25.0), (74.0, 50.0)]
    """
    edges = sorted(set(edges))
    layers = _layers(len(sizes), edges)
    if flush:
        computed = {target for _, target in edges}
        layers = [layer if i in computed else 0 for i, layer in enumerate(layers)]
    count = max(layers, default=-1) + 1
    members: list[list[Size]] = [[] for _ in range(count)]
    for size, layer in zip(sizes, layers, strict=True):
        members[layer].append(size)
    widths = [sum(_widest(sizes)) + GAP for sizes in members]
    best: tuple[float, Layout] | None = None
    for rows in range(1, max(2, min(count // 4, 12)) + 1):
        cuts = _cuts(widths, layers, edges, rows)
        made = _Rows(sizes, edges, layers, cuts, pitch).layout()
        shown = min(page[0] / (made.width or 1), page[1] / (made.height or 1))
        # A row more must pay: what is read in one line is read best.
        if best is None or shown > 1.15 * best[0]:
            best = shown, made
        if best[0] >= SMALLEST:
            break
    assert best is not None
    return best[1]


def _widest(sizes: Sequence[Size]) -> tuple[float, float, float]:
    """The widths of heads, bodies and tails of a layer."""
    return (
        max((size.head for size in sizes), default=0.0),
        max((size.body for size in sizes), default=0.0),
        max((size.tail for size in sizes), default=0.0),
    )


def _positions(edges: Sequence[Pair], ranking: Ranking = "minimize") -> list[dict[int, Point]]:
    """Of each connected part: for each node its layer (from 0), and its place across.

    "minimize" makes edges short and wants each of them once, or it may never return; "down" puts
    each node as near to the last layer as may be, and an edge that is there several times is kept
    the straighter.
    """
    try:
        from fast_sugiyama import from_edges
    except ImportError:
        raise ImportError(
            "a drawing of a graph wants the package fast-sugiyama (Python 3.11 or newer): "
            'pip install "torchbp[graph]"'
        ) from None
    parts = from_edges(
        edges,
        vertex_spacing=1,
        dummy_vertices=False,
        ranking_type=ranking,
        crossing_minimization="barycenter",
        transpose=True,
    )
    found = []
    for positions, *_ in parts:
        top = max(y for _, (_, y) in positions)
        left = min(x for _, (x, _) in positions)
        found.append({int(node): (top - y, x - left) for node, (x, y) in positions})
    return sorted(found, key=min)


def _layers(count: int, edges: Sequence[Pair]) -> list[int]:
    """The layer of each node: those of an edge's ends grow along it; edges are short in total."""
    layers = [0] * count
    for part in _positions(edges):
        for node, (layer, _) in part.items():
            layers[node] = round(layer)
    return layers


def _cuts(
    widths: Sequence[float], layers: Sequence[int], edges: Sequence[Pair], rows: int
) -> list[int]:
    """The first layer of each row, and the number of layers: rows of like width, and few edges
    from one to another."""
    count = len(widths)
    starts = [sum(widths[:i]) for i in range(count + 1)]
    step = starts[-1] / rows
    cuts = [0]
    for row in range(1, rows):
        near = range(cuts[-1] + 1, count)
        inside = [i for i in near if abs(starts[i] - row * step) <= 0.15 * step]
        if not inside:
            inside = sorted(near, key=lambda i: abs(starts[i] - row * step))[:1]
        if inside:
            crossing = {
                i: sum(layers[a] < i <= layers[b] for a, b in edges if layers[b] - layers[a] > 0)
                for i in inside
            }
            cuts.append(min(inside, key=lambda i: (crossing[i], abs(starts[i] - row * step))))
    return [*cuts, count]


@dataclass
class _Spot:
    """A place in a row: a node, or an edge that passes; x is where it begins and ends."""

    node: int | None
    left: float = 0.0
    right: float = 0.0
    y: float = 0.0


class _Rows:
    """The graph with its layers cut into rows."""

    def __init__(
        self,
        sizes: Sequence[Size],
        edges: Sequence[Pair],
        layers: Sequence[int],
        cuts: Sequence[int],
        pitch: float,
    ) -> None:
        self.sizes, self.edges, self.pitch, self.cuts = sizes, edges, pitch, cuts
        self.computed = {target for _, target in edges}
        self.middles = [0.0] * len(sizes)  # x of each body
        self.row_of = [
            max(row for row, cut in enumerate(cuts[:-1]) if cut <= layer) for layer in layers
        ]
        self.layers = list(layers)
        self.start_late()

    def start_late(self) -> None:
        """A node without operands that is used in later rows alone stands in the first of them,
        in the layer before, where edges of earlier rows come in."""
        used: dict[int, list[int]] = defaultdict(list)
        for source, target in self.edges:
            used[source].append(target)
        for source, targets in used.items():
            row = min(self.row_of[target] for target in targets)
            if source not in self.computed and row > self.row_of[source]:
                self.row_of[source] = row
                self.layers[source] = self.cuts[row] - 1

    def layout(self) -> Layout:
        rows = len(self.cuts) - 1
        spots: list[list[_Spot]] = [[] for _ in range(rows)]
        links: list[dict[Pair, int]] = [{} for _ in range(rows)]  # with weights
        at: list[list[int]] = [[] for _ in range(rows)]  # the layer of each spot
        of_node: dict[int, _Spot] = {}
        through: dict[tuple[int, int, int], int] = {}  # an edge that passes, at a row and layer

        def spot(row: int, layer: int, node: int | None) -> int:
            made = _Spot(node)
            spots[row].append(made)
            at[row].append(layer)
            if node is not None:
                of_node[node] = made
                numbers[node] = len(spots[row]) - 1
            return len(spots[row]) - 1

        numbers: dict[int, int] = {}
        for node in range(len(self.sizes)):
            spot(self.row_of[node], self.layers[node], node)

        # An edge passes the layers between its ends, in one lane for all the uses of a value.
        passes: dict[Pair, list[tuple[int, int]]] = {}
        for source, target in self.edges:
            way: list[tuple[int, int]] = []  # (row, number of the spot)
            first = self.row_of[source], self.layers[source]
            last = self.row_of[target], self.layers[target]
            for row in range(first[0], last[0] + 1):
                early = self.cuts[row] - 1 if row > first[0] else first[1] + 1
                late = self.cuts[row + 1] if row < last[0] else last[1] - 1
                for layer in range(early, late + 1):
                    key = source, row, layer
                    if key not in through:
                        through[key] = spot(row, layer, None)
                    way.append((row, through[key]))
            passes[source, target] = way
            whole = [(first[0], numbers[source]), *way, (last[0], numbers[target])]
            for (row, one), (other, two) in itertools.pairwise(whole):
                if row == other:
                    # What is computed has more say in where its gate stands than a parameter.
                    links[row][one, two] = 3 if source in self.computed else 1

        top, width, rights = 0.0, 0.0, []
        for row in range(rows):
            height = self.place(spots[row], at[row], links[row])
            right = self.across(spots[row], at[row], row)
            # The edges that come from the row above run between both.
            lines = sum(
                1 for (_, r, layer) in through if r == row and layer == self.cuts[row] - 1 and row
            )
            top += LINE * (lines + 1) if lines else 0.0
            for passed in spots[row]:
                passed.y += top
            top += height
            width = max(width, right)
            rights.append(right)

        routes = {}
        joints = self.joints(spots, through, rights)
        left = min((x for joint in joints.values() for x, _ in joint), default=0.0)
        right = max((x for joint in joints.values() for x, _ in joint), default=width)
        for (source, target), way in passes.items():
            begin, goal = of_node[source], of_node[target]
            body = self.middles[source] + self.sizes[source].body / 2
            points = [(body, begin.y), (begin.right, begin.y)]
            before = self.row_of[source]
            for row, number in way:
                if row != before:
                    points += joints[source, row]
                    before = row
                lane = spots[row][number]
                points += [(lane.left, lane.y), (lane.right, lane.y)]
            points.append((goal.left, goal.y))
            routes[source, target] = [(x - left, y) for x, y in points]
        return Layout(
            centers=[(middle - left, of_node[node].y) for node, middle in enumerate(self.middles)],
            ends=[of_node[node].right - left for node in range(len(self.sizes))],
            routes=routes,
            rows=rows,
            width=max(width, right) - left,
            height=top,
        )

    def place(self, spots: list[_Spot], at: list[int], links: dict[Pair, int]) -> float:
        """Give the spots of a row their y, counted from its top; returns its height."""
        top = 0.0
        linked = {number for link in links for number in link}
        parts = _positions([link for link in links for _ in range(links[link])], "down")
        if any(len({at[i] - round(layer) for i, (layer, _) in p.items()}) > 1 for p in parts):
            parts = _positions(list(links))  # a gate that nobody uses went to the last layer
        parts += [{number: (0, 0.0)} for number in range(len(spots)) if number not in linked]
        for part in parts:
            height = max(across for _, across in part.values())
            nodes = [number for number in sorted(part) if spots[number].node is not None]
            falling = sum(
                1 if part[one][1] < part[two][1] else -1
                for one, two in itertools.combinations(nodes, 2)
                if at[one] == at[two]
            )
            for number, (_, across) in part.items():
                # The same upside down, if more of it is in the order in which it was given.
                across = across if falling >= 0 else height - across
                spots[number].y = top + (across + 0.5) * self.pitch
            top += (height + 1) * self.pitch
        return top

    def across(self, spots: list[_Spot], at: list[int], row: int) -> float:
        """Give the spots of a row their x; returns where the row ends."""
        x = 0.0
        for layer in sorted(set(at)):
            mine = [spot for spot, its in zip(spots, at, strict=True) if its == layer]
            sizes = [self.sizes[spot.node] for spot in mine if spot.node is not None]
            head, body, tail = _widest(sizes)
            for spot in mine:
                spot.left, spot.right = x, x + head + body + tail
                if spot.node is not None:
                    self.middles[spot.node] = x + head + body / 2
            x += head + body + tail + GAP
        return x - GAP

    def joints(
        self,
        spots: list[list[_Spot]],
        through: dict[tuple[int, int, int], int],
        rights: list[float],
    ) -> dict[tuple[int, int], list[Point]]:
        """How the value of a source comes to a row from the one above: (source, row) -> points.

        Down on the right, back between the rows, down on the left; side by side.
        """
        found = {}
        for row in range(1, len(spots)):
            layer = self.cuts[row] - 1
            entries = {
                s: spots[row][n] for (s, r, at), n in through.items() if (r, at) == (row, layer)
            }
            exits = {
                s: spots[row - 1][n]
                for (s, r, at), n in through.items()
                if (r, at) == (row - 1, self.cuts[row])
            }
            if not entries:
                continue
            above = max(spot.y for spot in spots[row - 1]) + self.pitch / 2
            down = sorted(exits, key=lambda s: exits[s].y)
            enter = sorted(entries, key=lambda s: entries[s].y)
            for source in entries:
                # The topmost is the outermost on the right, the lowest between the rows, and the
                # innermost on the left: then no two cross that keep their order.
                order, place = down.index(source), enter.index(source)
                x = rights[row - 1] + LINE * (len(down) - order)
                y = above + LINE * (len(down) - order)
                back = -LINE * (place + 1)
                found[source, row] = [
                    (x, exits[source].y),
                    (x, y),
                    (back, y),
                    (back, entries[source].y),
                ]
        return found
