"""What check_function found: a row for each check, as data, as a table and as a page."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from torchbp.graph.text import render, table

from .report import Report, page, sections

__all__ = ["CheckFunctionError", "FunctionReport", "Row", "Status"]

Status = Literal["passed", "failed", "not supported", "not applicable", "measured"]

#: The width of a table as text.
_WIDTH = 100


@dataclass(frozen=True)
class Row:
    """What one check found.

    Attributes:
        name: one of `torchbp.testing.CHECKS`.
        status: "passed"; "failed"; "not supported", where the function says so by a clear error;
            "not applicable", where there is nothing to check; "measured", where a number is all
            that was asked for.
        text: what was found, in words.
        silent: the check failed without an error: a number, a tensor or memory is silently wrong.
        report: of a wrong gradient the `Report` with its cause.
        seconds: what the check took.
    """

    name: str
    status: Status
    text: str = ""
    silent: bool = False
    report: Report | None = None
    seconds: float = 0.0

    @property
    def result(self) -> str:
        """The status, and of a failure whether it is silent."""
        return "silently wrong" if self.silent else self.status


@dataclass(frozen=True)
class FunctionReport:
    """A table of checks.

    Attributes:
        fn: the name of the function.
        inputs: what it was called with, in words.
        rows: what each check found, in the order in which they ran.
    """

    fn: str
    inputs: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of a check, by its name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def failed(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.status == "failed"]

    @property
    def passed(self) -> bool:
        """Whether no row failed."""
        return not self.failed

    def raise_for_failures(self) -> None:
        """Raise CheckFunctionError if a row failed."""
        if self.failed:
            raise CheckFunctionError(self)

    def summary(self) -> str:
        """How many rows there are of each result."""
        counts = Counter(row.result for row in self.rows)
        return ", ".join(f"{count} {result}" for result, count in counts.items())

    def __rich__(self) -> Group:
        """The table, to be printed by rich."""
        return Group(self._table(), *map(Text, self._reports()))

    def __str__(self) -> str:
        return "\n\n".join([render(self._table(), width=_WIDTH), *self._reports()])

    def _table(self) -> Table:
        made = table(
            ["check", "result", "found"],
            [[row.name, row.result, text] for row, text in _said_once(self.rows)],
            title=f"{self.fn}({self.inputs})",
            caption=self.summary(),
        )
        made.columns[0].no_wrap = made.columns[1].no_wrap = True
        return made

    def _reports(self) -> list[str]:
        return [f"{row.name}. {row.report}" for row in self.rows if row.report is not None]

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The table as a page of its own, with both Jacobians of each gradient that is wrong.

        Args:
            path: the file to write; None writes none.

        Returns:
            the page as text.

        Raises:
            TypeError: `path` is neither a str nor a Path.
        """
        from torchbp.graph.svg import write

        title = f"{self.fn}({self.inputs})"
        rows = "".join(
            f'<tr class="{row.status.replace(" ", "-")}"><td>{html.escape(row.name)}</td>'
            f"<td>{row.result}</td><td>{html.escape(text)}</td></tr>"
            for row, text in _said_once(self.rows)
        )
        body = (
            f"<p>{self.summary()}</p>"
            f'<table class="checks"><tr><th>check</th><th>result</th><th>found</th></tr>{rows}'
            f"</table>{''.join(_details(self.rows))}"
        )
        text = page(title, body)
        write("to_html", text, path)
        return text

    def _repr_html_(self) -> str:
        """What a notebook shows: the page, in a frame of its own."""
        return (
            f'<iframe srcdoc="{html.escape(self.to_html())}" title="{html.escape(self.fn)}" '
            'sandbox="" width="100%" height="640" style="border: 0"></iframe>'
        )


def _said_once(rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
    """The rows with their texts; what an earlier one says is not repeated."""
    first: dict[str, str] = {}
    for row in rows:
        name = first.setdefault(row.text, row.name)
        yield row, row.text if name == row.name or len(row.text) < 60 else f"as {name}"


def _details(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.report is not None:
            yield f"<h2>{html.escape(row.name)}: {html.escape(row.report.cause)}</h2>"
            yield sections(row.report)


class CheckFunctionError(AssertionError):
    """A check of a function failed.

    Attributes:
        report: the `FunctionReport` with every row that ran.
    """

    def __init__(self, report: FunctionReport) -> None:
        super().__init__(f"{len(report.failed)} of {len(report)} checks failed\n{report}")
        self.report = report

    def __reduce__(self) -> tuple[type, tuple[FunctionReport]]:
        return type(self), (self.report,)
