"""Layouts: nothing overlaps, no edge crosses a node, and the same graph is laid out the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchbp.graph.layout import Layout, Pair, Point, Size, layout

pytest.importorskip("fast_sugiyama", reason="fast-sugiyama is not installed (Python 3.10)")

PITCH = 40.0


@st.composite
def graphs(draw: st.DrawFn, most: int = 40) -> tuple[list[Size], list[Pair]]:
    """Sizes, and edges from smaller numbers to larger ones."""
    count = draw(st.integers(1, most))
    width = st.floats(1, 120)
    sizes = [
        Size(draw(width), draw(st.floats(0, 90)), draw(st.sampled_from([0.0, 0.0, 30.0])))
        for _ in range(count)
    ]
    near = draw(st.integers(1, 8))
    edges = [
        (max(0, target - draw(st.integers(1, near))), target)
        for target in range(1, count)
        for _ in range(draw(st.integers(0, 3)))
    ]
    far = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    edges += [(a, b) for a, b in draw(st.lists(far, max_size=6)) if a < b]
    return sizes, edges


def along(route: list[Point]) -> Iterator[Point]:
    """Points of a route as it is drawn, close to each other."""
    for (x0, y0), (x1, y1) in pairwise(route):
        straight = x0 == x1 or y0 == y1
        for i in range(21):
            t = i / 20
            rise = t if straight else t * t * (3 - 2 * t)  # a Bezier, level at both ends
            run = t if straight else 1.5 * t * (1 - t) * (1 - t) + 1.5 * t * t * (1 - t) + t**3
            yield x0 + (x1 - x0) * run, y0 + (y1 - y0) * rise


def boxes(found: Layout, sizes: list[Size]) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of what each node takes."""
    half = PITCH / 2 - 0.01
    return [
        (x - size.body / 2 - size.head, y - half, x + size.body / 2 + size.tail, y + half)
        for (x, y), size in zip(found.centers, sizes, strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(graphs(), st.booleans())
def test_no_edge_crosses_a_node_and_no_two_nodes_overlap(
    graph: tuple[list[Size], list[Pair]], flush: bool
) -> None:
    sizes, edges = graph
    found = layout(sizes, edges, PITCH, flush, page=(300, 300))
    taken = boxes(found, sizes)
    for (left, top, right, bottom), (left2, top2, right2, bottom2) in combinations(taken, 2):
        apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
        assert apart
    for left, top, right, bottom in taken:
        assert left >= -0.01
        assert top >= -0.01
        assert right <= found.width + 0.01
        assert bottom <= found.height + 0.01
    assert set(found.routes) == set(edges)
    for (source, target), route in found.routes.items():
        others = [box for i, box in enumerate(taken) if i not in (source, target)]
        for x, y in along(route):
            for left, top, right, bottom in others:
                assert not (left < x < right and top < y < bottom), (source, target)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.booleans())
def test_routes_lead_from_behind_the_source_to_the_target(
    graph: tuple[list[Size], list[Pair]], flush: bool
) -> None:
    sizes, edges = graph
    found = layout(sizes, edges, PITCH, flush)
    for (source, target), route in found.routes.items():
        x, y = found.centers[source]
        assert route[0] == pytest.approx((x + sizes[source].body / 2, y))
        assert route[1] == pytest.approx((found.ends[source], y))
        x, y = found.centers[target]
        assert route[-1][1] == y
        assert route[-1][0] <= x - sizes[target].body / 2 - sizes[target].head + 0.01


def test_a_chain_is_straight_though_parameters_come_in() -> None:
    chain = [(i, i + 1) for i in range(8)]
    parameters = [(9 + 2 * i + j, i + 1) for i in range(8) for j in (0, 1)]
    found = layout([Size(40)] * 25, chain + parameters, PITCH, page=(4000, 300))
    assert found.rows == 1
    across = [found.centers[i][1] for i in range(1, 9)]
    assert max(across) - min(across) <= PITCH


def test_a_long_chain_goes_on_in_rows_and_a_skip_follows_it() -> None:
    edges = [(i, i + 1) for i in range(59)] + [(0, 59)]
    found = layout([Size(60, 40)] * 60, edges, PITCH)
    assert found.rows > 2
    # As wide as the page, about: not a thread.
    assert 1 < found.width / found.height < 3
    assert found.routes[0, 59][-1] == pytest.approx(found.routes[58, 59][-1])
    # The skip bends only where the chain does, and in gaps.
    assert len(found.routes[0, 59]) > 4 * (found.rows - 1)


def test_flush_stands_inputs_in_the_first_layer() -> None:
    edges = [(0, 2), (1, 2), (2, 4), (3, 4)]
    near = layout([Size(30)] * 5, edges, PITCH)
    flush = layout([Size(30)] * 5, edges, PITCH, flush=True)
    assert near.centers[3][0] > near.centers[0][0]
    assert len({flush.centers[i][0] for i in (0, 1, 3)}) == 1


def test_nodes_without_edges_and_no_nodes_at_all() -> None:
    found = layout([Size(30)] * 3, [], PITCH)
    assert len({y for _, y in found.centers}) == 3
    assert layout([], [], PITCH).routes == {}


def test_layouts_do_not_depend_on_the_process() -> None:
    program = (
        "from torchbp.graph.layout import Size, layout; import random; r = random.Random(0);"
        "edges = [(r.randrange(max(0, t - 5), t), t) for t in range(1, 80) for _ in 'ab'];"
        "print(layout([Size(50, 30)] * 80, edges, 40))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_sugiyama", None)
    with pytest.raises(ImportError, match=r"fast-sugiyama .*torchbp\[graph\]"):
        layout([Size(1), Size(1)], [(0, 1)], PITCH)


def test_branches_stand_in_the_order_in_which_they_were_given() -> None:
    for count in range(2, 7):
        out = layout([Size(10)] * (count + 1), [(0, i) for i in range(1, count + 1)], pitch=20)
        into = layout([Size(10)] * (count + 1), [(i, count) for i in range(count)], pitch=20)
        for centers in (out.centers[1:], into.centers[:-1]):
            assert [y for _, y in centers] == sorted(y for _, y in centers)
