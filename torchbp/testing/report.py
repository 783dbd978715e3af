"""What a failed gradcheck has to say: which elements are wrong, in what pattern, and why."""

from __future__ import annotations

import html
import itertools
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchbp.graph.text import dims, dtype_name, render, table

__all__ = ["CAUSES", "Cause", "Checked", "Element", "Report"]

#: The causes by name, in the order in which they are preferred where several hold.
CAUSES: dict[str, str] = {
    "low-precision": "float32 or less, in which a difference of eps is lost in rounding",
    "nondeterministic": "two runs at the same inputs differ",
    "saved-tensor-modified": "a tensor kept for backward was changed after it was kept",
    "gradient-modified": "backward changes the incoming gradient in place",
    "broadcast-not-reduced": "a broadcast operand's gradient is not summed to its shape",
    "non-finite": "inf or nan in the output or in a gradient",
    "upstream-ignored": "backward does not multiply by the upstream gradient",
    "kink": "the function is not differentiable between x - eps and x + eps",
    "cut": "detach, no_grad, or None or zero where a gradient belongs",
    "swapped-operands": "the gradients of two operands are exchanged",
    "wrong-sign": "the negative of the right gradient",
    "wrong-factor": "the right gradient times a constant",
    "transposed": "the gradient, or an operand in it, is transposed",
    "batch-sum-missing": "not summed over the dimension that the input lacks, as that of a bias",
    "wrong-input": "the gradient of another input",
    "overwritten": "of several uses only one counts, where their gradients add",
    "missing-term": "a term or factor of the product or chain rule left out",
    "wrong-mask": "the right formula at the wrong elements",
    "double-backward-wrong": "the gradient of the gradient is wrong, or silently zero",
    "tangent-wrong": "forward mode is wrong, or drops the tangent",
    "unknown": "none of the tested hypotheses holds",
}

#: Elements that a report lists of each input.
WORST = 5
#: Elements of a Jacobian that a heat map shows along one side at most.
_PIXELS = 320.0, 240.0


@dataclass(frozen=True)
class Element:
    """One element of a Jacobian.

    Attributes:
        output, input: what they are called, with the index of the element: "y[0, 1]", "x[2]".
        output_index, input_index: the indices alone.
        analytic, numeric: its value by backward, and by central differences.
    """

    output: str
    output_index: tuple[int, ...]
    input: str
    input_index: tuple[int, ...]
    analytic: float
    numeric: float

    @property
    def absolute(self) -> float:
        """|analytic - numeric|."""
        return abs(self.analytic - self.numeric)

    @property
    def relative(self) -> float:
        """The absolute error over |numeric|."""
        return self.absolute / abs(self.numeric) if self.numeric else float("inf")


@dataclass(frozen=True, eq=False)
class Checked:
    """One input and its gradient.

    Attributes:
        name, shape, dtype: of the input.
        analytic, numeric: the Jacobians, float64, a row for each element of the outputs and a
            column for each element of the input; complex elements are two.
        wrong: where they differ by more than the tolerance; bool, of the same shape.
        pattern: which elements of the gradient are wrong, in words.
        worst: the elements that differ most, the worst first.
        cause: the name of the cause for this input; None if its gradient is right.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    analytic: Tensor = field(repr=False)
    numeric: Tensor = field(repr=False)
    wrong: Tensor = field(repr=False)
    pattern: str
    worst: tuple[Element, ...]
    cause: str | None = None

    @property
    def count(self) -> int:
        """How many elements of the Jacobian are wrong."""
        return int(self.wrong.sum())


@dataclass(frozen=True)
class Cause:
    """A hypothesis that held when it was tested.

    Attributes:
        name: one of `CAUSES`.
        text: what was found, and how it was tested.
        factor: of wrong-factor and wrong-sign, by which the gradient is too large.
    """

    name: str
    text: str
    factor: float | None = None


def unique(causes: Sequence[Cause]) -> list[Cause]:
    """The first of each name."""
    return [c for k, c in enumerate(causes) if c.name not in [d.name for d in causes[:k]]]


@dataclass(frozen=True, eq=False)
class Report:
    """Why a gradient is wrong.

    Attributes:
        fn: the name of the function.
        of: what was compared: "gradient", "double backward" or "forward mode".
        inputs: each input that was checked.
        found: the causes that hold, best first; there is always one.
        notes: what else is to be known.
    """

    fn: str
    of: str
    inputs: tuple[Checked, ...]
    found: tuple[Cause, ...]
    notes: tuple[str, ...] = ()

    @property
    def cause(self) -> str:
        """The name of the best cause."""
        return self.found[0].name

    @property
    def causes(self) -> list[str]:
        """The names of all causes that hold, best first."""
        return list(dict.fromkeys(cause.name for cause in self.found))

    @property
    def factor(self) -> float | None:
        """By which the gradient is too large; None if it is no constant factor."""
        return next((cause.factor for cause in self.found if cause.factor is not None), None)

    def __str__(self) -> str:
        lines = [f"The {self.of} of {self.fn} is wrong: {self.cause}"]
        lines += [f"  {_wrapped(cause.name + ': ' + cause.text)}" for cause in self.found]
        lines += [f"  {_wrapped(note)}" for note in self.notes]
        for checked in self.inputs:
            head = f"{checked.name} {dims(checked.shape)} {checked.dtype}"
            if not checked.count:
                lines += ["", f"{head}: right"]
                continue
            total = checked.wrong.numel()
            lines += ["", _wrapped(f"{head}: {checked.count} of {total} wrong, {checked.pattern}")]
            rows = [
                [
                    f"d {e.output} / d {e.input}",
                    f"{e.analytic:.6g}",
                    f"{e.numeric:.6g}",
                    f"{e.absolute:.2g}",
                    f"{e.relative:.2g}",
                ]
                for e in checked.worst
            ]
            heads = ["worst", ">analytic", ">numeric", ">absolute error", ">relative"]
            lines.append(render(table(heads, rows, title="", caption=""), width=88).strip("\n"))
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Analytic, numeric and difference side by side, as a page of its own.

        Args:
            path: the file to write; None writes none.

        Returns:
            the page as text.

        Raises:
            TypeError: `path` is neither a str nor a Path.
        """
        from torchbp.graph.svg import write

        text = page(f"The {self.of} of {self.fn} is wrong: {self.cause}", sections(self))
        write("to_html", text, path)
        return text


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 88, subsequent_indent="    ")


def checked(
    name: str,
    like: Tensor,
    analytic: Tensor,
    numeric: Tensor,
    wrong: Tensor,
    outputs: Sequence[tuple[str, tuple[int, ...]]],
) -> Checked:
    """One input, with the elements that are wrong in words and numbers.

    `outputs` has the name and shape of each, complex ones with a last dimension of two.
    """
    shape = tuple(like.shape)
    full = (*shape, 2) if like.is_complex() else shape
    rows = [(output, index) for output, of in outputs for index in _indices(of)]
    columns = _indices(full)
    off = (analytic - numeric).abs().nan_to_num(nan=torch.inf).where(wrong, -1.0)
    order = off.flatten().sort(descending=True, stable=True).indices[:WORST].tolist()
    worst = []
    for flat in order:
        k, j = divmod(flat, analytic.shape[1])
        if not wrong[k, j]:
            break
        output, index = rows[k]
        worst.append(
            Element(
                output + _subscript(index),
                index,
                name + _subscript(columns[j]),
                columns[j],
                float(analytic[k, j]),
                float(numeric[k, j]),
            )
        )
    pattern = _pattern(wrong, full, outputs, analytic, numeric)
    return Checked(
        name, shape, dtype_name(like.dtype), analytic, numeric, wrong, pattern, tuple(worst)
    )


def _indices(shape: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape)))


def _subscript(index: Sequence[int]) -> str:
    return str(list(index)) if index else ""


def _pattern(
    wrong: Tensor,
    shape: tuple[int, ...],
    outputs: Sequence[tuple[str, tuple[int, ...]]],
    analytic: Tensor,
    numeric: Tensor,
) -> str:
    """Which elements are wrong, in words."""
    if not wrong.any():
        return "none"
    parts = [_place(wrong.any(0).reshape(shape), "of the input")]
    if len(outputs) == 1:
        there = _place(wrong.any(1).reshape(outputs[0][1]), "of the output")
        if there != "all elements of the output":
            parts.append(there)
    if wrong.shape[0] == wrong.shape[1] > 1 and not (wrong & ~torch.eye(len(wrong)).bool()).any():
        parts.append("on the diagonal of the Jacobian")
    a, n = analytic[wrong], numeric[wrong]
    if not a.any():
        parts.append("zero where it should not be")
    elif not n.any():
        parts.append("not zero where it should be")
    elif n.all() and a.isfinite().all() and n.isfinite().all():
        ratio = a / n
        if (ratio - ratio.mean()).abs().max() <= 1e-4 * ratio.mean().abs():
            parts.append(f"{float(ratio.mean()):.4g} times what is right")
    return ", ".join(parts)


def _place(wrong: Tensor, whose: str) -> str:
    """Where the elements are that are wrong: all, one row, one column, so many."""
    count, total = int(wrong.sum()), wrong.numel()
    if count == total:
        return f"all elements {whose}"
    if wrong.dim() == 2:
        for dim, kind in ((1, "row"), (0, "column")):
            lines = wrong.all(dim)
            if count == int(lines.sum()) * wrong.shape[dim]:
                which = ", ".join(map(str, lines.nonzero().flatten().tolist()[:4]))
                more = ", ..." if int(lines.sum()) > 4 else ""
                return f"{kind}{'s' if int(lines.sum()) > 1 else ''} {which}{more} {whose}"
        if wrong.shape[0] == wrong.shape[1] and not (wrong & ~torch.eye(len(wrong)).bool()).any():
            return f"{count} elements of the diagonal {whose}"
    if count == 1:
        return f"element {wrong.nonzero()[0].tolist()} {whose}"
    return f"{count} of {total} elements {whose}"


# ---- the page


def page(title: str, body: str) -> str:
    """A page that needs no other file, in the colours of the drawings."""
    from torchbp.graph.svg import PALETTE

    light, dark = (
        "".join(f"--{name}: {pair[i]}; " for name, pair in PALETTE.items()) for i in (0, 1)
    )
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>\n"
        f":root {{ color-scheme: light; {light}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {dark}}} }}\n"
        f"{_STYLE.strip()}\n</style></head><body><main><h1>{title}</h1>"
        f"{body}</main></body></html>\n"
    )


def sections(report: Report) -> str:
    """What a report says, and a section for each input."""
    said = "".join(
        f"<li><b>{html.escape(cause.name)}</b>: {html.escape(cause.text)}</li>"
        for cause in report.found
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    return f"<ul>{said}</ul>{notes}{''.join(map(_section, report.inputs))}"


_STYLE = """
body { background: var(--paper); color: var(--ink); margin: 0; line-height: 1.45;
  font: 15px/1.45 ui-sans-serif, system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 24px 40px; }
h1 { font-size: 21px; } h2 { font-size: 17px; margin: 28px 0 4px; }
p, ul { margin: 6px 0; } .muted, figcaption { color: var(--muted); font-size: 13px; }
.maps { display: flex; flex-wrap: wrap; gap: 20px; margin: 12px 0; }
figure { margin: 0; } img { image-rendering: pixelated; border: 1px solid var(--wire); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--wire); }
th { color: var(--muted); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
.checks :is(th, td) { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; }
.checks td:nth-child(-n + 2) { white-space: nowrap; } .checks td:first-child { font-weight: 500; }
.checks td:last-child { overflow-wrap: anywhere; }
.failed td:nth-child(2) { color: var(--gradient); font-weight: 600; }
.checks :is(.not-supported, .not-applicable) td { color: var(--muted); }
"""


def _section(checked: Checked) -> str:
    head = html.escape(f"{checked.name} {dims(checked.shape)} {checked.dtype}")
    if not checked.count:
        return f'<h2>{head}</h2><p class="muted">right</p>'
    total = checked.wrong.numel()
    maps = "".join(
        _figure(name, matrix, top)
        for name, matrix, top in (
            ("analytic", checked.analytic, _top(checked)),
            ("numeric", checked.numeric, _top(checked)),
            ("analytic − numeric", checked.analytic - checked.numeric, None),
        )
    )
    rows = "".join(
        f"<tr><td>d {html.escape(e.output)} / d {html.escape(e.input)}</td>"
        f"<td>{e.analytic:.6g}</td><td>{e.numeric:.6g}</td><td>{e.absolute:.2g}</td>"
        f"<td>{e.relative:.2g}</td></tr>"
        for e in checked.worst
    )
    return (
        f"<h2>{head}</h2><p>{checked.count} of {total} wrong, {html.escape(checked.pattern)}</p>"
        f'<div class="maps">{maps}</div>'
        "<table><tr><th>worst</th><th>analytic</th><th>numeric</th><th>absolute error</th>"
        f"<th>relative</th></tr>{rows}</table>"
    )


def _top(checked: Checked) -> float:
    """The number that has the strongest colour in both maps, so that they can be compared."""
    both = torch.cat([checked.analytic.flatten(), checked.numeric.flatten()])
    both = both[both.isfinite()]
    return float(both.abs().max()) if both.numel() else 1.0


def _figure(name: str, matrix: Tensor, top: float | None) -> str:
    from torchbp.graph.ledger import Held
    from torchbp.graph.svg import heat_map
    from torchbp.graph.text import number

    held = replace(Held.of(matrix), tensor=matrix)
    uri, width, height = heat_map(held, _PIXELS, largest=22.0, top=top)
    down, across = matrix.shape
    span = f"{number(held.min)} .. {number(held.max)}"
    return (
        f'<figure><img src="{uri}" width="{width:.0f}" height="{height:.0f}" '
        f'alt="heat map of the {html.escape(name)} Jacobian">'
        f"<figcaption>{html.escape(name)}: {span}<br>{down} elements of the output down, "
        f"{across} of the input across</figcaption></figure>"
    )
