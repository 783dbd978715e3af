"""Measures how far torchbp can be relied on, and writes RELIABILITY.md: figures, nothing typed by
hand.

    make reliability                                # all of it: hours, and goes on where it stopped
    python scripts/reliability.py --only accuracy   # one figure: printed, RELIABILITY.md stays
    python scripts/reliability.py --only accuracy:tanh:avx2     # the pieces with these values alone
    python scripts/reliability.py --sample          # the samples that the tests take: seconds
    python scripts/reliability.py --sample 0.01     # about a hundredth of the work

What is done is kept in a folder and not done again as long as nothing that it depends on has
changed: the built extension, torch, the Python that it runs. Exits with 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there

import torchbp
from scripts.benchmark import processor
from scripts.reliability_accuracy import Accuracy, levels
from scripts.reliability_determinism import Determinism
from scripts.reliability_frame import ROOT, Figure, Measured, Piece, State, key_of, run
from scripts.reliability_fuzz import Fuzz
from scripts.reliability_large import Large
from scripts.reliability_leaks import Leaks
from scripts.reliability_malformed import Malformed
from scripts.reliability_mutation import Mutation
from scripts.reliability_proofs import Proofs
from scripts.reliability_sanitizers import Sanitizers
from scripts.reliability_specials import Specials
from scripts.reliability_versions import Versions
from tests.machine import LEVELS
from torchbp.train import write_file

PAGE = ROOT / "RELIABILITY.md"
OTHERS = ROOT / "docs"
STATE = ROOT / ".reliability"

#: In the order of the page.
FIGURES: tuple[Figure, ...] = (
    Accuracy(),
    Proofs(),
    Fuzz(),
    Determinism(),
    Specials(),
    Malformed(),
    Sanitizers(),
    Large(),
    Leaks(),
    Mutation(),
    Versions(),
)


def chosen(figure: Figure, state: State, fraction: float) -> tuple[list[Piece], Measured, str]:
    """The pieces to speak of, those of them that are done, and the day of the last one.

    All of the complete run's if they are done, else those of a run of this fraction; 0: the
    figure's own sample.
    """
    lines = state.lines(figure)
    for part in (1.0, fraction or figure.sample):
        pieces = figure.pieces(part)
        done = [lines[key] for key in map(key_of, pieces) if key in lines]
        if len(done) == len(pieces):
            break
    last = max((line["date"] for line in done), default="")
    return pieces, [(line["piece"], line["result"]) for line in done], last


def status(figure: Figure, pieces: Sequence[Piece], measured: Measured, day: str) -> str:
    """How much of it was measured."""
    total = sum(map(figure.size, figure.pieces()))
    done = sum(figure.size(piece) for piece, _ in measured)
    if not measured:
        why = figure.obstacle()
        return f"not run: {why}" if why else "not run"
    if done == total and len(pieces) == len(measured):
        return f"complete, {total:,} {figure.unit}, {day}"
    return f"sampled, {done:,} of {total:,} {figure.unit}, {day}"


def section(figure: Figure, state: State, fraction: float) -> str:
    """What the page says of a figure."""
    pieces, measured, day = chosen(figure, state, fraction)
    parts = [
        f"## {figure.title}",
        figure.claim,
        f"`python scripts/reliability.py --only {figure.name}`: "
        f"{status(figure, pieces, measured, day)}.",
    ]
    if measured:
        parts += figure.tables(measured)
        wrong = figure.failures(measured)
        if wrong:
            shown = [f"- {line}" for line in wrong[:50]]
            if len(wrong) > len(shown):
                shown.append(f"- and {len(wrong) - len(shown):,} more")
            parts.append(f"**Does not hold in {len(wrong):,} points:**\n\n" + "\n".join(shown))
        else:
            parts.append("Holds in all of them.")
    return "\n\n".join(parts)


def commit() -> str:
    """The commit that is checked out, in words; empty where there is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return "" if done.returncode else f"at {done.stdout.strip()}, "


def elsewhere() -> str:
    """Links to the pages of other machines, docs/reliability-LEVEL.md, if there are any."""
    names = [path.stem.removeprefix("reliability-") for path in OTHERS.glob("reliability-*.md")]
    links = ", ".join(f"[{name}](docs/reliability-{name}.md)" for name in sorted(names))
    return f" On another machine: {links}." if links else ""


def page(state: State, fraction: float) -> str:
    """The text of RELIABILITY.md."""
    overview = []
    for figure in FIGURES:
        pieces, measured, day = chosen(figure, state, fraction)
        wrong = len(figure.failures(measured))
        verdict = f"**fails in {wrong:,} points**" if wrong else "holds" if measured else ""
        anchor = figure.title.lower().replace(" ", "-")
        overview.append(
            f"| [{figure.title}](#{anchor}) | {verdict} | "
            f"{status(figure, pieces, measured, day)} | "
            f"`python scripts/reliability.py --only {figure.name}` |"
        )
    lacking = [level for level in LEVELS if level not in levels()]
    parts = [
        "# Reliability",
        "<!-- generated by scripts/reliability.py -->",
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, {torchbp.cpu_level()}; "
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"torchbp {torchbp.__version__} {commit()}built by {torchbp._C.compiler()}; "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}. `make reliability` measures all of it"
        + (f", but not {', '.join(lacking)}, which this machine lacks." if lacking else ".")
        + elsewhere(),
        "\n".join(["| claim | | measured | command |", "| --- | --- | --- | --- |", *overview]),
        *(section(figure, state, fraction) for figure in FIGURES),
    ]
    return "\n\n".join(parts) + "\n"


@contextmanager
def progress(
    work: Sequence[tuple[Figure, Piece]], done: dict[str, int]
) -> Iterator[Callable[[Figure, Piece], None]]:
    """A bar for each figure on a terminal, nothing elsewhere; gives what tells it of a piece."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {}
        for figure, _ in work:
            if figure.name not in tasks:
                own = sum(other is figure for other, _ in work)
                before = done.get(figure.name, 0)
                tasks[figure.name] = bars.add_task(
                    figure.name, total=own + before, completed=before, start=False
                )

        def tell(figure: Figure, piece: Piece) -> None:
            bars.start_task(tasks[figure.name])
            bars.advance(tasks[figure.name])

        yield tell


def selected(piece: Piece, parts: Sequence[str]) -> bool:
    values = {str(value) for value in piece.values()}
    return values.issuperset(parts)


def only(text: str) -> tuple[Figure, list[str]]:
    name, *parts = text.split(":")
    for figure in FIGURES:
        if figure.name == name:
            if not any(selected(piece, parts) for piece in figure.pieces()):
                raise argparse.ArgumentTypeError(f"{name} has no piece with {', '.join(parts)}")
            return figure, parts
    names = ", ".join(figure.name for figure in FIGURES)
    raise argparse.ArgumentTypeError(f"wants one of {names}, got {name!r}")


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"wants a number between 0 and 1, got {text!r}")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"wants a positive integer, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        description="Measure how far torchbp can be relied on, and write RELIABILITY.md.",
        epilog="figures: " + ", ".join(figure.name for figure in FIGURES),
    )
    own.add_argument(
        "--only", type=only, nargs="+", action="extend", metavar="NAME[:VALUE...]",
        help="print these figures, of the pieces with these values, and write no page",
    )  # fmt: skip
    own.add_argument(
        "--sample", type=share, nargs="?", const=0.0, metavar="FRACTION",
        help="measure about this share of the work; without a number, what the tests measure",
    )  # fmt: skip
    own.add_argument("--state", type=Path, default=STATE, help="where what is done is kept")
    own.add_argument("--page", type=Path, default=PAGE, help="what is written")
    own.add_argument(
        "--jobs", type=count, default=len(os.sched_getaffinity(0)), help="processes at a time"
    )
    return own


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    state = State(options.state)
    asked: list[tuple[Figure, list[str]]] = options.only or [(figure, []) for figure in FIGURES]

    def fraction(figure: Figure) -> float:
        if options.sample is None:
            return 1.0
        return options.sample or figure.sample

    work: list[tuple[Figure, Piece]] = []
    wanted: dict[str, list[Piece]] = {}
    for figure, parts in asked:
        why = figure.obstacle()
        own = [piece for piece in figure.pieces(fraction(figure)) if selected(piece, parts)]
        wanted.setdefault(figure.name, []).extend(own)
        if why:
            print(f"{figure.name}: not run: {why}", file=sys.stderr)
            continue
        lines = state.lines(figure)
        left = [piece for piece in own if key_of(piece) not in lines]
        hindered = [why for why in map(figure.obstacle, left) if why]
        for why in dict.fromkeys(hindered):
            print(f"{figure.name}: {hindered.count(why)} not run: {why}", file=sys.stderr)
        work += [(figure, piece) for piece in left if not figure.obstacle(piece)]
    before = {
        name: len(own) - sum(figure.name == name for figure, _ in work)
        for name, own in wanted.items()
    }
    try:
        with progress(work, before) as tell:
            died = run(work, state, options.jobs, tell)
    except KeyboardInterrupt:
        print(f"stopped; what is done is in {options.state}: run again to go on", file=sys.stderr)
        return 130

    wrong = list(died)
    for figure in dict.fromkeys(figure for figure, _ in asked):
        lines = state.lines(figure)
        own = [lines[key] for key in map(key_of, wanted[figure.name]) if key in lines]
        measured = [(line["piece"], line["result"]) for line in own]
        wrong += [f"{figure.name}: {line}" for line in figure.failures(measured)]
        if options.only and measured:
            print("\n\n".join([f"## {figure.title}", *figure.tables(measured)]) + "\n")
    if not options.only:
        text = page(state, 1.0 if options.sample is None else options.sample)
        write_file(options.page, text)
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    if len(wrong) > 20:
        print(f"and {len(wrong) - 20:,} more", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
