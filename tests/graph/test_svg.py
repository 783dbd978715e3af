"""Pictures of ledgers: valid XML that holds the ledger's numbers, and nothing else's."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from tests.graph.drawn import GRAPHS, chain, circuit, contrast
from torchbp.graph import ComputationalGraph, trace
from torchbp.graph.ledger import Held
from torchbp.graph.svg import PALETTE, Steps, heat_map, rows_of, to_svg

pytest.importorskip("fast_sugiyama", reason="fast-sugiyama is not installed (Python 3.10)")

SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def words(root: ElementTree.Element, kind: str) -> list[str]:
    """The texts of a class."""
    return [
        "".join(each.itertext())
        for each in root.iter()
        if kind in (each.get("class") or "").split() and each.tag.endswith(("text", "tspan"))
    ]


def test_the_circuit_holds_the_lectures_numbers() -> None:
    root = parsed(circuit().to_svg())
    assert words(root, "value") == ["-2", "5", "-4", "3", "-12"]
    labels = [
        "".join(each.itertext())
        for each in root.iter(f"{SVG}g")
        if ".upstreams." in (each.get("data-held") or "")
    ]
    assert labels == ["-4", "-4", "3", "-4", "1"]
    captions = words(root, "caption")
    assert captions == [
        "distributor",
        "x: -4 × 1 = -4",
        "y: -4 × 1 = -4",
        "swap multiplier",
        "add1: 1 × -4 = -4",
        "z: 1 × 3 = 3",
    ]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_label_says_what_the_ledger_holds(name: str) -> None:
    ledger = GRAPHS[name]()
    root = parsed(ledger.to_svg())
    seen = set()
    for group in root.iter(f"{SVG}g"):
        path = group.get("data-held")
        if path is None:
            continue
        seen.add(path)
        _, node, which, output = path.split(".")
        held = getattr(ledger.nodes[int(node)], which)[int(output)]
        said = "".join("".join(text.itertext()) for text in group.iter(f"{SVG}text"))
        shape = str(list(held.shape)) if which == "values" else ""
        if held.numel == 0:
            assert said == f"{shape}empty"
        elif group.find(f"{SVG}image") is None:
            rows = rows_of(held)
            assert said == (f"{shape}{''.join(rows)}" if rows and held.numel > 4 else str(held))
        else:
            assert said == f"{shape}{held.min:.4g} .. {held.max:.4g}"
    wanted = {
        f"nodes.{node.id}.{which}.{output}"
        for node in ledger.nodes
        for which in ("values", "upstreams")
        for output, held in enumerate(getattr(node, which))
        if held is not None
    }
    assert seen == wanted


@pytest.mark.parametrize("name", GRAPHS)
def test_a_picture_needs_nothing_else(name: str) -> None:
    text = GRAPHS[name]().to_svg()
    root = parsed(text)
    assert not list(root.iter(f"{SVG}script"))
    links = re.findall(r'(?:href|src)="([^"]*)"', text)
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.parametrize("name", GRAPHS)
def test_a_picture_is_the_same_each_time(name: str) -> None:
    assert GRAPHS[name]().to_svg() == GRAPHS[name]().to_svg()


def test_title_and_description_are_read_out() -> None:
    root = parsed(circuit().to_svg())
    assert root.get("role") == "img"
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert desc is not None
    assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
    assert title.text == "Computational graph: 2 gates"
    assert "mul1 = mul(add1, z): value -12, gradient 1." in (desc.text or "")


def test_styles_reach_no_other_part_of_a_page() -> None:
    text = circuit().to_svg()
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    mark = re.search(r'class="(torchbp-\w+)"', text)
    assert mark
    for rule in re.findall(r"([^{}]+)\{", style):
        for selector in rule.split(","):
            assert selector.strip().startswith((f".{mark[1]}", "@media")), selector
    assert f"prefers-color-scheme: dark) {{ .{mark[1]} {{ --paper: {PALETTE['paper'][1]}" in style


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "muted", "value", "gradient", "local"])
def test_text_has_contrast(name: str, scheme: int) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("paper", "gate"):
        # 4.5 is what WCAG's level AA wants of small text.
        assert contrast(PALETTE[name][scheme], PALETTE[ground][scheme]) >= 4.5


def test_uses_add_up_on_the_picture() -> None:
    # The lecture's copy gate: 4 and 2 come back, 6 goes on.
    root = parsed(trace(lambda x: x * 4 + x * 2, torch.tensor(1.0)).to_svg())
    assert words(root, "caption")[:2] == ["adder", "4 + 2 = 6"]
    uses = [g for g in root.iter(f"{SVG}g") if g.get("class") == "use"]
    said = [[(t.text, t.get("class")) for t in use.iter(f"{SVG}text")] for use in uses]
    assert sorted(said) == [[("2", "gradient small")], [("4", "gradient small")]]


def test_a_small_matrix_is_written_row_by_row() -> None:
    # The lecture's x, w, and dL/dy.
    x, w = torch.tensor([[2.0, 1, -3], [-3, 4, 2]]), torch.tensor([[3.0, 2, 1, -1]] * 3)
    upstream = torch.tensor([[2.0, 3, -3, 9], [-8, 1, 4, 6]])
    root = parsed(trace(torch.matmul, x, w, grad_output=upstream).to_svg())
    assert not list(root.iter(f"{SVG}image"))
    assert words(root, "value")[:5] == ["[2, 1, -3]", "[-3, 4, 2]", *["[3, 2, 1, -1]"] * 3]
    assert words(root, "gradient")[-2:] == ["[2, 3, -3, 9]", "[-8, 1, 4, 6]"]


@pytest.mark.parametrize(
    "matrix", [torch.ones(4, 3), torch.ones(2, 7), torch.ones(1, 2, 3), torch.rand(2, 3)]
)
def test_a_matrix_that_is_too_wide_or_tall_is_a_heat_map(matrix: Tensor) -> None:
    assert rows_of(Held.of(matrix)) == []


def test_each_output_of_a_gate_has_its_own_place() -> None:
    root = parsed(GRAPHS["several"]().to_svg())
    assert {"[0]", "[1]"} <= set(words(root, "caption"))


def pixels(held: Held) -> list[list[tuple[int, ...]]]:
    from PIL import Image

    uri, _, _ = heat_map(held)
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    picture = Image.open(io.BytesIO(data))
    width, height = picture.size
    return [[picture.getpixel((x, y)) for x in range(width)] for y in range(height)]  # type: ignore[misc]


def test_heat_maps_show_sign_strength_and_shape() -> None:
    nan, inf = float("nan"), float("inf")
    rows = pixels(Held.of(torch.tensor([[0.0, 2.0, -2.0], [1.0, nan, -inf]])))
    assert [len(row) for row in rows] == [3, 3]
    (zero, plus, minus), (half, missing, endless) = rows
    assert zero[3] == 0
    assert plus == (38, 110, 190, 255)
    assert minus == (216, 96, 20, 255) == endless
    assert half == (38, 110, 190, 128)
    assert missing == (200, 0, 200, 255)


@pytest.mark.parametrize(
    "shape", [(1000,), (2, 3, 4), (30, 34), (200, 300), (5000,), (1, 1), (7, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.complex64])
def test_heat_maps_are_small(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    held = Held.of(torch.ones(shape).to(dtype))
    if held.numel:
        _, width, height = heat_map(held)
        assert 0 < width <= 52
        assert 0 < height <= 24
    assert parsed(trace(lambda x: x.sum() * 2, torch.ones(shape)).to_svg()) is not None


def test_steps_meet_each_gate_once_forward_and_once_backward() -> None:
    ledger = GRAPHS["two_layer"]()
    steps = Steps.of(ledger)
    listed = steps.listed(ledger)
    gates = [node.id for node in ledger.nodes if node.kind == "gate"]
    assert len(listed) == 2 * len(gates) + 2
    assert [s["node"] for s in listed if s["phase"] == "forward"] == gates
    assert [s["node"] for s in listed if s["phase"] == "backward"] == gates[::-1]
    assert listed[len(gates) + 1] == {"phase": "base", "nodes": ledger.outputs}
    # A gradient is complete when the last of its uses has sent its part.
    w1 = ledger["w1"]
    users = [edge.target for edge in ledger.edges if edge.source == w1.id]
    assert steps.arrived(w1.id, 0) == max(steps.backward[target] for target in users)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_written(kind: Any, tmp_path: Path) -> None:
    path = kind(tmp_path / "graph.svg")
    Path(path).write_text("old, and longer than nothing")
    text = circuit().to_svg(path)
    assert Path(path).read_bytes() == text.encode()


@pytest.mark.parametrize("path", [3, b"graph.svg", True])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError, match=r"to_svg: path wants a str or Path, got (int|bytes|bool)"):
        circuit().to_svg(path)


def test_a_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        circuit().to_svg(tmp_path / "nowhere" / "graph.svg")


def test_notebooks_show_the_picture() -> None:
    ledger = circuit()
    text = ledger.to_svg()
    assert ledger._repr_svg_() == text
    shown = text._repr_mimebundle_()
    assert shown["image/svg+xml"] == text
    assert len(shown["text/plain"]) < 80


def test_without_a_layout_a_notebook_shows_text(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = circuit()
    monkeypatch.setitem(sys.modules, "fast_sugiyama", None)
    assert ledger._repr_svg_() is None
    with pytest.raises(ImportError, match="fast-sugiyama"):
        ledger.to_svg()


def test_a_computational_graph_is_drawn_at_each_stage() -> None:
    graph = ComputationalGraph.from_function(lambda x, y, z: (x + y) * z)
    assert words(parsed(graph.to_svg()), "value") == []
    graph.forward(x=-2, y=5, z=-4)
    root = parsed(graph.to_svg())
    assert words(root, "value") == ["-2", "5", "-4", "3", "-12"]
    assert words(root, "gradient") == []
    graph.backward()
    root = parsed(graph.to_svg())
    traced = parsed(circuit().to_svg())
    assert words(root, "gradient") == words(traced, "gradient")
    assert graph._repr_svg_() == graph.to_svg()


def test_a_graph_with_a_cycle_is_no_picture() -> None:
    graph = ComputationalGraph()
    graph.gate("exp", "b", name="a")
    graph.gate("exp", "a", name="b")
    assert graph._repr_svg_() is None
    with pytest.raises(ValueError, match="cycle"):
        graph.to_svg()


def test_constants_stand_in_their_gates() -> None:
    root = parsed(trace(lambda x: 2 / (x * 3 + 1) - 0.5, torch.tensor(1.0)).to_svg())
    signs = [
        "".join(text.itertext())
        for group in root.iter(f"{SVG}g")
        if group.get("class") == "gate"
        for text in [group.find(f"{SVG}text")]
        if text is not None
    ]
    assert signs == ["×3", "+1", "2/x", "−0.5"]


def test_sixty_gates_fit_a_page() -> None:
    root = parsed(to_svg(chain()))
    width, height = (float(root.get(side, "")) for side in ("width", "height"))
    assert sum(group.get("class") == "gate" for group in root.iter(f"{SVG}g")) == 61
    # As it is shown 1280 wide: not smaller than a third.
    assert 1280 / width > 1 / 3
    assert 1 < width / height < 3
