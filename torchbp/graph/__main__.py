"""`python -m torchbp.graph MODULE:FUNCTION INPUT ...`: see a function of your own.

Writes the stepper for one call of it: a page on which forward and backward run one gate at a time.
"""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .command import FORMS, Wrong, function_of, inputs_of, parser_of, separated, with_spaces
from .flat import flat_code
from .ledger import Ledger
from .svg import write
from .trace import ones, record

_DESCRIPTION = """\
Runs a function or module forward and backward and writes what every gate did:
a page to step through (.html), a picture (.svg) or all numbers (.json)."""

_EPILOG = f"""\
{FORMS}An output that is no scalar is differentiated with an upstream gradient of ones.

examples:
  python -m torchbp.graph model.py:loss 4x3 4:int64:2
  python -m torchbp.graph torch:sigmoid '[-1.0, 0.0, 2.0]' -o sigmoid.svg
  python -m torchbp.graph my_package.nets:network --inputs batch.pt --flat

The module is imported, and so its code runs; a file of tensors is read without running any."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "torchbp.graph",
        _DESCRIPTION,
        _EPILOG,
        "MODULE:FUNCTION",
        "a function, a module (torch.nn.Module) or a class of modules that needs no arguments;"
        " MODULE as it is imported, or a .py file",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where to write: .html, .svg or .json (FUNCTION.html)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of random inputs, set before MODULE is imported (0)"
    )
    parser.add_argument("--table", action="store_true", help="print a line for each gate as well")
    parser.add_argument("--flat", action="store_true", help="print the flat code as well")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(with_spaces(given))
    try:
        place, path = separated("MODULE:FUNCTION", args.target)
        output = _output(args.output, path)
        torch.manual_seed(args.seed)
        fn = function_of("MODULE:FUNCTION", place, path)
        inputs = inputs_of(fn, args.input, args.inputs)
        ledger = _traced(fn, inputs)
        if args.table:
            print(ledger)
        if args.flat:
            print(flat_code(ledger).text)
        writers: dict[str, Callable[[Path], object]] = {
            ".html": ledger.to_html,
            ".svg": ledger.to_svg,
            ".json": lambda path: write("to_json", ledger.to_json() + "\n", path),
        }
        writers[output.suffix](output)
    except (Wrong, ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{output}: {ledger!r}")
    if args.open:
        webbrowser.open(output.resolve().as_uri())
    return 0


def _output(text: str | None, function: str) -> Path:
    path = Path(f"{function}.html" if text is None else text)
    if path.suffix not in (".html", ".svg", ".json"):
        raise Wrong(f"--output: wants a name that ends in .html, .svg or .json, got {text}")
    if not path.parent.is_dir():
        raise Wrong(f"--output: there is no folder {path.parent}")
    return path


def _traced(fn: Callable[..., Any], inputs: list[Any]) -> Ledger:
    try:
        return record("trace", fn, inputs, None, ones("trace"))
    except (TypeError, ValueError, RuntimeError) as error:
        if str(error).startswith("trace:"):
            raise Wrong(str(error)) from None
        raise  # the function's own


if __name__ == "__main__":
    sys.exit(main())
