"""The stepper's page as text; what it does in a browser is in test_browser."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.graph.drawn import GRAPHS, circuit
from torchbp.graph import ComputationalGraph, flat, trace
from torchbp.graph.flat import flat_code

pytest.importorskip("fast_sugiyama", reason="fast-sugiyama is not installed (Python 3.10)")


class Page(HTMLParser):
    """The elements of a page, and the text in each script, title and list item."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "title": [], "li": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")
            self.inside = tag

    def handle_data(self, data: str) -> None:
        if getattr(self, "inside", None):
            self.texts[self.inside][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in self.texts:
            self.inside = ""


@pytest.mark.parametrize("name", GRAPHS)
def test_a_page_holds_the_ledger_as_it_is(name: str) -> None:
    ledger = GRAPHS[name]()
    page = Page(ledger.to_html())
    data, script = page.texts["script"]
    held = json.loads(data)
    assert held["ledger"] == json.loads(ledger.to_json())
    assert len(held["jacobians"]) == len(ledger.edges)
    assert "<" not in data
    assert script.lstrip().startswith('"use strict"')


@pytest.mark.parametrize("name", GRAPHS)
def test_a_page_needs_nothing_else(name: str) -> None:
    page = Page(GRAPHS[name]().to_html())
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "img", "base", "object")]
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "data:").startswith("data:")
    (policy,) = [
        attributes["content"]
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in (policy or "")


def test_names_are_text() -> None:
    text = GRAPHS["strange"]().to_html()
    # The page's own elements, and none that a name brings in.
    assert text.count("</script>") == 2
    assert "<b>" not in text
    assert "\x00" not in text


def test_marks_of_the_template_in_a_name_stay_text() -> None:
    names = ["{{script}}", "x"]
    text = trace(lambda a, b: a * b, *torch.tensor([1.0, 2.0]), names=names).to_html()
    assert "{{script}}" in text
    assert not re.search(r"\{\{(?!script\}\})\w+\}\}", text)
    assert text.count('"use strict"') == 1


def test_the_flat_code_is_there_line_by_line() -> None:
    def loss(x: Any, w: Any) -> Any:
        return torch.tanh(x @ w).sum()

    ledger = trace(loss, torch.ones(2, 3), torch.ones(3, 4))
    page = Page(ledger.to_html())
    code = flat_code(ledger)
    assert page.texts["li"] == [text for text, _, _ in code.lines]
    assert (
        "\n".join(page.texts["li"]).strip()
        == flat(loss, torch.ones(2, 3), torch.ones(3, 4)).strip()
    )
    items = [attributes for tag, attributes in page.tags if tag == "li"]
    marks = [(item.get("data-node"), item.get("data-phase")) for item in items]
    assert [mark for mark in marks if mark[1] == "forward"] == [
        ("matmul1", "forward"),
        ("tanh1", "forward"),
        ("sum1", "forward"),
    ]
    assert [mark for mark in marks if mark[1] == "base"] == [("sum1", "base")]
    assert marks[-4:-2] == [("matmul1", "backward")] * 2


def test_why_there_is_no_flat_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ledger: Any) -> Any:
        raise RuntimeError("flat: the gate <odd> cannot be written as code")

    monkeypatch.setattr(sys.modules["torchbp.graph.flat"], "flat_code", refuse)
    text = circuit().to_html()
    assert "There is no flat code for this graph: flat: the gate &lt;odd&gt; cannot" in text


def test_a_path_is_written(tmp_path: Path) -> None:
    path = tmp_path / "steps.html"
    text = circuit().to_html(path)
    assert path.read_bytes() == text.encode()
    with pytest.raises(TypeError, match="to_html: path wants a str or Path, got int"):
        circuit().to_html(1)  # type: ignore[arg-type]


def test_notebooks_show_the_page_in_a_frame() -> None:
    text = circuit().to_html()
    shown = text._repr_mimebundle_()
    frame = Page(shown["text/html"])
    ((tag, attributes),) = frame.tags
    assert tag == "iframe"
    assert attributes["srcdoc"] == text
    assert attributes["sandbox"] == "allow-scripts"


def test_a_computational_graph_has_a_page_at_each_stage() -> None:
    graph = ComputationalGraph.from_function(lambda x, y: torch.exp(x * y) * 2)
    phases = []
    for run in (lambda: None, lambda: graph.forward(x=1.0, y=2.0), graph.backward):
        run()
        steps = json.loads(Page(graph.to_html()).texts["script"][0])["steps"]
        phases.append([step["phase"] for step in steps])
    assert phases[2] == ["inputs", *["forward"] * 3, "base", *["backward"] * 3]
    assert phases[0] == phases[1] == ["inputs", *["forward"] * 3]
    code = flat_code(graph.ledger()).text
    assert "multiply1 = x * y" in code


def test_the_parts_of_the_page_are_installed() -> None:
    folder = files("torchbp.graph") / "page"
    assert sorted(part.name for part in folder.iterdir()) == [
        "stepper.css",
        "stepper.html",
        "stepper.js",
    ]
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"graph/page/*"' in settings
