"""The stepper: a page on which a ledger's forward and backward run one gate at a time.

One file without a server or a network. What is put together here: the drawing of `svg`, the
ledger's JSON, the flat code, and the parts in the folder `page`.
"""

from __future__ import annotations

import html
import json
import os
import re
from importlib.resources import files
from typing import Any

from .ledger import Ledger
from .svg import PALETTE, STYLE, Drawing, Steps, clean, drawing, write
from .text import dims, size

__all__ = ["Html", "to_html"]

#: Colours that only the page has, by name: on light, on dark.
_COLOURS = {
    **PALETTE,
    "line": ("#dfe3e9", "#2c333e"),
    "accent": ("#2b59c3", "#8fb4ff"),
    "on-accent": ("#ffffff", "#10151d"),
    "lit": ("#e6eefc", "#243352"),
}
#: What the page has for the graph on a screen of 1280 x 800.
_VIEW = 860.0, 700.0
_MONO = 'ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace'


class Html(str):
    """A page as text, which a notebook shows in a frame of its own."""

    __slots__ = ()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        frame = (
            f'<iframe srcdoc="{html.escape(self)}" title="The steps of a computational graph" '
            'sandbox="allow-scripts" width="100%" height="720" style="border: 0"></iframe>'
        )
        return {"text/html": frame, "text/plain": "<the steps of a graph, as HTML>"}


def to_html(ledger: Ledger, path: str | os.PathLike[str] | None = None) -> Html:
    """See `Ledger.to_html`."""
    picture = drawing(ledger, _VIEW)
    parts = {
        "title": html.escape(picture.title),
        "style": _style(),
        "picture": _picture(picture),
        "code": _code(ledger),
        "data": _data(ledger),
        "script": _part("stepper.js"),
    }
    # In one pass, so that nothing that was put in is taken for a mark itself.
    text = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _part("stepper.html"))
    write("to_html", text, path)
    return Html(text)


def _part(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8").strip()


def _style() -> str:
    light, dark = (
        "".join(f"--{name}: {pair[i]}; " for name, pair in _COLOURS.items()) for i in (0, 1)
    )
    drawn = re.sub(r"(?m)^(?=[^\s}])", "#view > svg ", STYLE.strip())
    drawn = re.sub(r",\s*(?=\.)", ", #view > svg ", drawn)
    return "\n".join(
        [
            f":root {{ --mono: {_MONO}; color-scheme: light; {light}}}",
            f"@media (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {dark}}} }}",
            f":root[data-theme=light] {{ color-scheme: light; {light}}}",
            f":root[data-theme=dark] {{ color-scheme: dark; {dark}}}",
            drawn,
            _part("stepper.css"),
        ]
    )


def _picture(picture: Drawing) -> str:
    """The drawing, in a group that the page moves."""
    return (
        f'<svg role="img" aria-label="{html.escape(picture.title)}" '
        f'data-width="{picture.width:.0f}" data-height="{picture.height:.0f}">'
        f'<desc>{clean(picture.description)}</desc><g id="camera">{picture.body}</g></svg>'
    )


def _code(ledger: Ledger) -> str:
    """The flat code as a list of lines; why there is none where a gate cannot be flattened."""
    from .flat import flat_code

    try:
        code = flat_code(ledger)
    except RuntimeError as error:
        return f"<p>There is no flat code for this graph: {html.escape(str(error))}</p>"
    lines = []
    bases = {ledger.nodes[node].name for node in Steps.of(ledger).bases(ledger)}
    for text, node, phase in code.lines:
        of = ""
        if phase == "backward" and node in bases:  # its first line is where backward starts
            bases.remove(node)
            phase = "base"
        if node is not None and phase is not None:
            of = f' data-node="{html.escape(node)}" data-phase="{phase}"'
        lines.append(f"<li{of}>{_remarked(text)}</li>")
    return f"<ol>{''.join(lines)}</ol>"


def _remarked(text: str) -> str:
    """A line of code with its comment set apart; a # in a string counts as code."""
    code, mark, remark = text.partition("  # ")
    if text.lstrip().startswith("# "):
        code, mark, remark = "", "", text
    said = f'<span class="remark">{html.escape(mark + remark)}</span>' if remark else ""
    return html.escape(code) + said


def _data(ledger: Ledger) -> str:
    """All that the page knows, as JSON that may stand in a script element."""
    jacobians = [
        None
        if edge.jacobian_shape is None or edge.jacobian_bytes is None
        else f"{dims(edge.jacobian_shape)}, {size(edge.jacobian_bytes)}"
        for edge in ledger.edges
    ]
    steps = json.dumps(Steps.of(ledger).listed(ledger))
    text = (
        f'{{"ledger": {ledger.to_json()}, "steps": {steps}, "jacobians": {json.dumps(jacobians)}}}'
    )
    # Nothing can end the element, or open a comment in it: these three letters stand in strings
    # alone.
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
