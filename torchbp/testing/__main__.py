"""`python -m torchbp.testing MODULE:NAME INPUT ...`: check a function of your own."""

from __future__ import annotations

import argparse
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from torchbp.graph.command import (
    FORMS,
    Wrong,
    function_of,
    inputs_of,
    parser_of,
    separated,
    with_spaces,
)

from .battery import CHECKS, chosen, rows_of, settings_of, those_required
from .outcome import FunctionReport, Row
from .subject import Settings, Subject

_DESCRIPTION = """\
Checks all that a custom Function, operation or module is expected to do: gradient, double
backward, forward mode, torch.func, compile, dtypes, layouts, leaks and more.
Prints a table; the exit status is 1 if a check fails, 2 if it cannot be called."""

_EPILOG = f"""\
{FORMS}
examples:
  python -m torchbp.testing my_ops.py:Swish 3x4
  python -m torchbp.testing my_ops:swish 3x4 --reference torch.nn.functional:silu --max-time 1.5
  python -m torchbp.testing torch.nn:Tanh 3x4:float64 --checks gradient,vmap --require all

checks:
{chr(10).join(f"  {name:<16}{text}" for name, text in CHECKS.items())}

The module is imported, and so its code runs; a file of tensors is read without running any."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "torchbp.testing",
        _DESCRIPTION,
        _EPILOG,
        "MODULE:NAME",
        "an autograd.Function, a function, an operation, a module or a class of modules that "
        "needs no arguments; MODULE as it is imported, or a .py file",
    )
    parser.add_argument(
        "--reference", metavar="MODULE:NAME", help="a function of the same arguments that is right"
    )
    parser.add_argument("--checks", metavar="NAME,...", help="these checks alone; see below")
    parser.add_argument("--skip", metavar="NAME,...", default="", help="all but these checks")
    parser.add_argument(
        "--require",
        metavar="NAME,...",
        default="",
        help="checks that fail if the feature is not supported; all for all",
    )
    parser.add_argument("--atol", type=float, default=1e-7, help="of float64 results (1e-7)")
    parser.add_argument("--rtol", type=float, default=1e-7, help="of float64 results (1e-7)")
    parser.add_argument(
        "--nondet-tol", type=float, default=0.0, help="how far two runs may differ (0)"
    )
    parser.add_argument(
        "--kinks", choices=("raise", "skip"), default="raise", help="at kinks of the function"
    )
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile (aot_eager)")
    for name in ("time", "memory"):
        parser.add_argument(
            f"--max-{name}", type=float, metavar="N", help=f"at most N times the reference's {name}"
        )
    parser.add_argument(
        "--seed", type=int, default=0, help="of random numbers, set before MODULE is imported (0)"
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="run each check in a process of its own, so that a crash of compiled code is a row",
    )
    parser.add_argument("--html", metavar="FILE", help="write the table as a page too")
    parser.add_argument("--rows", metavar="FILE", help=argparse.SUPPRESS)  # of an isolated check
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser.parse_args(with_spaces(given))
    try:
        report = _checked(args, with_spaces(given))
        if args.rows is not None:  # whoever started this shows it
            Path(args.rows).write_bytes(pickle.dumps(report.rows))
            return 0
        if args.html is not None:
            report.to_html(args.html)
    except (Wrong, ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        print(report)
    return 0 if report.passed else 1


def _checked(args: argparse.Namespace, given: Sequence[str]) -> FunctionReport:
    op = "python -m torchbp.testing"
    place, path = separated("MODULE:NAME", args.target)
    torch.manual_seed(args.seed)
    fn = function_of("MODULE:NAME", place, path)
    inputs = inputs_of(fn, args.input, args.inputs)
    reference: Callable[..., Any] | None = None
    if args.reference is not None:
        reference = function_of("--reference", *separated("--reference", args.reference))
    try:
        checks = None if args.checks is None else _listed(args.checks)
        names = chosen(op, checks, _listed(args.skip))
        required = those_required(op, args.require == "all" or _listed(args.require))
        settings = settings_of(
            op, fn, reference,
            args.atol, args.rtol, args.nondet_tol, args.kinks, args.seed, args.backend,
            args.max_time, args.max_memory,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise Wrong(str(error).removeprefix(f"{op}: ")) from None
    subject = _subject(fn, inputs, settings)

    def run(name: str) -> list[Row]:
        if args.isolate and args.rows is None:
            return _isolated(given, name)
        return list(rows_of(subject, [name], required))

    console = Console(stderr=True)
    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(names[0] if names else "", total=len(names))
        rows: list[Row] = []
        for name in names:
            bars.update(task, description=name)
            rows += run(name)
            bars.advance(task)
    return FunctionReport(subject.name, subject.described, tuple(rows))


def _subject(fn: Callable[..., Any], inputs: Sequence[Any], settings: Settings) -> Subject:
    try:
        return Subject(fn, inputs, settings)
    except TypeError as error:
        if str(error).startswith("check_function: "):
            raise Wrong(str(error).removeprefix("check_function: ")) from None
        raise  # the function's own


def _isolated(given: Sequence[str], name: str) -> list[Row]:
    """The row of a check that runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        # The last of an option given twice counts.
        last = ["--checks", name, "--skip", "", "--rows", str(rows)]
        done = subprocess.run(
            [sys.executable, "-m", "torchbp.testing", *given, *last],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if rows.is_file():
            return list(pickle.loads(rows.read_bytes()))
    if done.returncode < 0:
        why = f"the process is killed by {signal.Signals(-done.returncode).name}"
    else:
        why = (
            f"the process ends with {done.returncode}: {done.stderr.strip().rpartition(chr(10))[2]}"
        )
    return [Row(name, "failed", why)]


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
