"""The stepper in headless Chromium: every number is the ledger's, at each step, by each control.

Driven by Playwright: it runs the Chromium that is installed, and is told of each request, each
message on the console and each error. Skipped where there is none.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.graph.drawn import GRAPHS, contrast

pytest.importorskip("fast_sugiyama", reason="fast-sugiyama is not installed (Python 3.10)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        # As root Chromium has no sandbox; the pages are our own.
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        yield (launched := playwright.chromium.launch(executable_path=CHROMIUM, args=options))
        launched.close()


class Stepper:
    """A page of a graph, and what went wrong on it."""

    def __init__(self, browser: Browser, name: str, folder: Path, **options: Any) -> None:
        self.ledger = GRAPHS[name]()
        self.json = json.loads(self.ledger.to_json())
        path = folder / "steps.html"
        self.ledger.to_html(path)
        self.wrong: list[str] = []
        options = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options
        self.page: Page = browser.new_page(**options)
        self.page.set_default_timeout(5000)
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.request(request.url))
        self.page.goto(path.as_uri())
        self.steps = self.page.evaluate("steps")

    def request(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.wrong.append(url)

    @property
    def step(self) -> int:
        return int(self.page.evaluate("document.body.dataset.step"))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def held(self, path: str) -> Any:
        value = self.json
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        return value


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    opened: list[Stepper] = []

    def open_one(name: str, **options: Any) -> Stepper:
        opened.append(Stepper(browser, name, tmp_path, **options))
        return opened[-1]

    yield open_one
    for stepper in opened:
        stepper.page.close()
        assert stepper.wrong == []


def same(text: str, value: Any) -> bool:
    """Whether a number on the page is the ledger's: its four digits, or itself."""
    if isinstance(value, list):  # complex, of whole numbers here
        return complex(text.replace("i", "j")) == complex(*value)
    if isinstance(value, (str, bool)):
        return text == str(value).lower()
    if float(text) == value:
        return True
    # Half of the last of four digits.
    return math.isfinite(value) and abs(float(text) - value) <= 0.5001 * 10 ** (
        math.floor(math.log10(abs(value))) - 3
    )


NUMBERS = """() => [...document.querySelectorAll("#gate [data-ref]")].map(
    (each) => [each.dataset.ref, each.textContent])"""
SEEN = """() => [...document.querySelectorAll("#view [data-held]:not(.future)")].map((each) =>
    [each.dataset.held, [...each.querySelectorAll("text:not(.caption)")].map((t) => t.textContent)])
"""
#: Lines that are lit, and those of them that the panel does not show; a screenful of them fits.
LIT = """() => { const box = document.querySelector("#code").getBoundingClientRect();
    const lit = [...document.querySelectorAll("#code li.lit")];
    return [lit.length, lit.filter((each) => { const own = each.getBoundingClientRect();
        return own.top < box.top || own.bottom > box.bottom; }).length]; }"""


@pytest.mark.parametrize("name", GRAPHS)
def test_every_number_is_the_ledgers_at_each_step(name: str, open_page: Any) -> None:
    stepper = open_page(name)
    nodes, edges = stepper.json["nodes"], stepper.json["edges"]
    known: set[str] = {f"nodes.{n['id']}.values.0" for n in nodes if n["kind"] != "gate"}
    sent: set[int] = set()
    for step, what in enumerate(stepper.steps):
        if step:
            stepper.press("ArrowRight")
        assert stepper.step == step
        # The panel.
        numbers = stepper.page.evaluate(NUMBERS)
        for path, text in numbers:
            assert same(text, stepper.held(path)), (step, path, text)
        shown = {path for path, _ in numbers}
        if what["phase"] == "forward":
            known |= {f"nodes.{what['node']}.values.{i}" for i in range(9)}
            held = nodes[what["node"]]["values"][0]
            if math.prod(held["shape"]) > 0:
                assert any(p.startswith(f"nodes.{what['node']}.values.0.") for p in shown)
        if what["phase"] == "backward":
            for number, edge in enumerate(edges):
                if edge["target"] != what["node"] or not edge["product"]:
                    continue
                sent.add(number)
                if math.prod(edge["product"]["shape"]) > 0:
                    assert any(p.startswith(f"edges.{number}.product.") for p in shown)
                    if edge["local"]:
                        assert any(p.startswith(f"edges.{number}.local.") for p in shown)
        # The picture: what is known at this step, and that is what the ledger holds.
        seen = dict(stepper.page.evaluate(SEEN))
        assert {path for path in seen if ".values." in path} == {
            path for path in known if path in seen or has(stepper.json, path)
        }
        backward = what["phase"] in ("base", "backward")
        for path, texts in seen.items():
            held = stepper.held(path)
            check(" ".join(texts), held)
            if ".upstreams." in path:
                assert backward
                _, node, _, output = path.split(".")
                uses = {
                    i
                    for i, e in enumerate(edges)
                    if (e["source"], e["output"]) == (int(node), int(output)) and e["product"]
                }
                assert uses <= sent
        lit, hidden = stepper.page.evaluate(LIT)
        assert hidden == 0
        assert lit > 0 or what["phase"] == "inputs" or not stepper.page.locator("#code li").count()
    upstreams = [u for n in nodes for u in n["upstreams"] if u]
    assert len([path for path in seen if ".upstreams." in path]) == len(upstreams)
    stepper.press("ArrowRight")
    assert stepper.step == len(stepper.steps) - 1


def has(ledger: Any, path: str) -> bool:
    _, node, which, output = path.split(".")
    held = ledger["nodes"][int(node)][which]
    return int(output) < len(held) and held[int(output)] is not None


def check(text: str, held: Any) -> None:
    """A label of the picture: a number, a list of them, the rows of a matrix, or a range."""
    if text == "empty":
        assert math.prod(held["shape"]) == 0
    elif " .. " in text:
        low, high = text.split(" .. ")
        assert same(low, held["min"])
        assert same(high, held["max"])
    elif text == "nan":
        assert "nan" in json.dumps(held)
    else:
        values = [held["values"]]
        for _ in held["shape"]:
            values = [each for part in values for each in part]
        texts = re.findall(r"[^\[\], ]+", text)
        assert len(texts) == len(values)
        for each, value in zip(texts, values, strict=True):
            assert (
                complex(each) == complex(*value)
                if held["dtype"] == "complex64"
                else same(each, value)
            )


def test_buttons_and_keys_step(open_page: Any) -> None:
    stepper = open_page("neuron")
    page, last = stepper.page, len(stepper.steps) - 1
    click = lambda name: page.get_by_role("button", name=name, exact=True).click()  # noqa: E731
    click("Next step")
    assert stepper.step == 1
    click("Last step")
    assert stepper.step == last
    click("Step back")
    assert stepper.step == last - 1
    click("First step")
    assert stepper.step == 0
    page.locator("#view").focus()
    stepper.press("ArrowRight", "ArrowDown", "ArrowLeft")
    assert stepper.step == 1
    stepper.press("End")
    assert stepper.step == last
    stepper.press("Home")
    assert stepper.step == 0
    page.locator("#scrub").focus()
    stepper.press("ArrowRight", "ArrowRight")
    assert stepper.step == 2
    assert page.locator("#scrub").get_attribute("aria-valuetext") == "Forward 2 of 8"


def test_space_plays_to_the_end_and_pauses(open_page: Any) -> None:
    stepper = open_page("circuit")
    page = stepper.page
    page.clock.install()
    page.locator("#view").focus()
    stepper.press("Space")
    assert page.get_by_role("button", name="Pause").count() == 1
    page.clock.run_for(2300)
    assert stepper.step == 2
    stepper.press("Space")
    page.clock.run_for(5000)
    assert stepper.step == 2
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(20000)
    assert stepper.step == len(stepper.steps) - 1
    assert page.get_by_role("button", name="Play").count() == 1


def test_a_click_on_a_gate_or_a_line_goes_there(open_page: Any) -> None:
    stepper = open_page("circuit")
    gate = stepper.ledger["mul1"].id
    stepper.page.locator(f"#view [data-node='{gate}'] > text").first.click()
    assert stepper.steps[stepper.step] == {"phase": "forward", "node": gate}
    stepper.page.locator("#code li[data-phase=backward]").last.click()
    assert stepper.steps[stepper.step] == {"phase": "backward", "node": stepper.ledger["add1"].id}
    stepper.page.locator(f"#view [data-node='{gate}'] > text").first.click()
    assert stepper.steps[stepper.step] == {"phase": "backward", "node": gate}


def test_each_step_is_said(open_page: Any) -> None:
    stepper = open_page("circuit")
    region = stepper.page.locator("#said[role=status]")
    assert region.get_attribute("aria-live") == "polite"
    said = []
    for _ in stepper.steps:
        said.append(region.text_content())
        stepper.press("ArrowRight")
    assert said == [
        "Start. 3 inputs and parameters, 2 gates.",
        "Forward 1 of 2. add1, add of x, y, gives 3.",
        "Forward 2 of 2. mul1, mul of add1, z, gives -12.",
        "Base case. The gradient of mul1 is 1.",
        "Backward 1 of 2. mul1, swap multiplier: upstream 1; to add1 times local -4 goes -4; "
        "to z times local 3 goes 3.",
        "Backward 2 of 2. add1, distributor: upstream -4; to x times local 1 goes -4; "
        "to y times local 1 goes -4.",
    ]


def test_every_control_has_a_name_and_shows_its_focus(open_page: Any) -> None:
    stepper = open_page("circuit")
    page = stepper.page
    reached: list[list[str]] = []
    for _ in range(30):
        stepper.press("Tab")
        found = page.evaluate(
            """() => { const on = document.activeElement, style = getComputedStyle(on);
            const label = on.getAttribute("aria-label") ?? "";
            return on === document.body ? null :
                [on.id, label, style.outlineStyle, style.outlineWidth] }"""
        )
        if found is None or found[0] in [r[0] for r in reached]:
            break
        reached.append(found)
    assert [found[0] for found in reached] == [
        *("first", "back", "play", "next", "last", "scrub", "theme"),
        *("view", "in", "out", "fit", "gate", "code"),
    ]
    assert all(label and style == "solid" and width == "2px" for _, label, style, width in reached)


@pytest.mark.parametrize("name", ["neuron", "several", "strange", "chain"])
@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080), (700, 900)], ids=str)
def test_nothing_overflows(name: str, size: tuple[int, int], open_page: Any) -> None:
    stepper = open_page(name, viewport={"width": size[0], "height": size[1]})
    for key in ("Home", "ArrowRight", "End"):
        stepper.press(key)
        wide = stepper.page.evaluate(
            """() => [document.documentElement, document.body, document.querySelector("#gate")]
                .filter((each) => each.scrollWidth > each.clientWidth)
                .map((each) => [each.id || each.tagName, each.scrollWidth, each.clientWidth])"""
        )
        assert wide == []
        if size[0] > 900:
            assert stepper.page.evaluate("document.documentElement.scrollHeight") <= size[1]


@pytest.mark.parametrize("name", GRAPHS)
def test_all_of_the_graph_is_seen_at_first(name: str, open_page: Any) -> None:
    stepper = open_page(name)
    inside = """() => { const box = document.querySelector("#view").getBoundingClientRect();
        return [...document.querySelectorAll("#view [data-node] > rect")].every((each) => {
            const own = each.getBoundingClientRect();
            return own.left >= box.left && own.right <= box.right && own.top >= box.top
                && own.bottom <= box.bottom - 40; }) }"""
    assert stepper.page.evaluate(inside)
    stepper.press("+", "+", "End")
    assert not stepper.page.evaluate(inside) or name in ("circuit", "broadcast", "large")
    stepper.press("0")
    assert stepper.page.evaluate(inside)


def test_sixty_gates_can_be_read(open_page: Any) -> None:
    stepper = open_page("chain")
    size = """(what) => Math.min(...[...document.querySelectorAll(what)].map((each) =>
        parseFloat(getComputedStyle(each).fontSize) * scale))"""
    # From far away the gates' names are still as large as a footnote.
    assert stepper.page.evaluate(size, "#view .gate text") >= 9
    stepper.press("ArrowRight", "ArrowRight")
    assert stepper.page.evaluate(size, "#view text.value") >= 8
    for _ in range(20):
        stepper.press("ArrowRight")
        current = stepper.page.locator("#view .current > rect").bounding_box()
        view = stepper.page.locator("#view").bounding_box()
        assert view["x"] <= current["x"]
        assert current["x"] + current["width"] <= view["x"] + view["width"]
        assert view["y"] <= current["y"]
        assert current["y"] + current["height"] <= view["y"] + view["height"]


def test_wheel_drag_and_keys_zoom_and_move(open_page: Any) -> None:
    stepper = open_page("neuron")
    page = stepper.page
    state = lambda: page.evaluate("[scale, left, top_]")  # noqa: E731
    scale, left, top = state()
    page.mouse.move(400, 400)
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"scale > {scale}")
    nearer = state()
    # What is under the pointer stays there: 57 is the height of the header, about.
    head = page.locator("#view").bounding_box()["y"]
    assert (400 - nearer[1]) / nearer[0] == pytest.approx((400 - left) / scale, abs=0.5)
    assert (400 - head - nearer[2]) / nearer[0] == pytest.approx(
        (400 - head - top) / scale, abs=0.5
    )
    page.mouse.down()
    page.mouse.move(440, 380, steps=4)
    page.mouse.up()
    assert state() == pytest.approx([nearer[0], nearer[1] + 40, nearer[2] - 20], abs=0.5)
    assert stepper.step == 0  # a drag is no click
    stepper.press("-")
    assert state()[0] < nearer[0]
    stepper.press("0")
    assert state() == pytest.approx([scale, left, top], abs=0.5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, open_page: Any) -> None:
    stepper = open_page("two_layer", color_scheme=scheme)
    stepper.press("End")
    colours = """() => [...document.querySelectorAll(
            "h1, #gate *, #code li, #code span, .legend *, output, #view text, #view tspan")]
        .filter((each) => each.textContent.trim() && each.checkVisibility())
        .map((each) => {
            const style = getComputedStyle(each);
            const behind = getComputedStyle(each.closest(".lit") ?? document.body);
            return [each.ownerSVGElement ? style.fill : style.color, behind.backgroundColor]; })"""
    pairs = {tuple(map(hexadecimal, pair)) for pair in stepper.page.evaluate(colours)}
    assert len(pairs) >= 5
    for ink, paper in pairs:
        assert contrast(ink, paper) >= 4.5
    dark = contrast("#000000", next(iter(pairs))[1]) < 5
    assert dark == (scheme == "dark")


def hexadecimal(colour: str) -> str:
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def test_the_button_turns_light_to_dark(open_page: Any) -> None:
    stepper = open_page("circuit")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = stepper.page.evaluate(paper)
    stepper.page.locator("#theme").click()
    dark = stepper.page.evaluate(paper)
    assert contrast("#000000", hexadecimal(dark)) < 5 < contrast("#000000", hexadecimal(light))
    stepper.page.locator("#theme").click()
    assert stepper.page.evaluate(paper) == light
