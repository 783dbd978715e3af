"""`python -m torchbp.graph MODULE:FUNCTION INPUT ...`: see a function of your own.

Writes the stepper for one call of it: a page on which forward and backward run one gate at a time.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import math
import pickle
import re
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .calling import input_names, kinds, name_of
from .flat import flat_code
from .ledger import Ledger
from .svg import write
from .trace import ones, record

_DESCRIPTION = """\
Runs a function or module forward and backward and writes what every gate did:
a page to step through (.html), a picture (.svg) or all numbers (.json)."""

_EPILOG = """\
inputs, in the order of the function's arguments:
  4x3               random normal float32 of this shape; 1 is a vector of one element
  scalar            a random number
  4x3:float64       of another dtype
  5:int64:10        random integers below 10, such as class indices (below 2 if not said)
  -2.5              this number; it is one by its point: 3 is a shape and 3.0 a number
  '[[1.,2],[3,4]]'  these numbers, as torch.tensor reads them; a dtype may follow
or, with --inputs, a file of tensors:
  batch.pt          what torch.save wrote of a tensor, a list of them, or a dict by argument
  batch.safetensors  tensors by argument
An output that is no scalar is differentiated with an upstream gradient of ones.

examples:
  python -m torchbp.graph model.py:loss 4x3 4:int64:2
  python -m torchbp.graph torch:sigmoid '[-1.0, 0.0, 2.0]' -o sigmoid.svg
  python -m torchbp.graph my_package.nets:network --inputs batch.pt --flat

The module is imported, and so its code runs; a file of tensors is read without running any."""

_INPUT = re.compile(r"(?P<size>scalar|\d+(?:x\d+)*)(?::(?P<dtype>\w+)(?::(?P<below>\d+))?)?")
_VALUES = re.compile(r"(?P<values>\[.*\]|[-+]?\d*\.\d*(?:[eE][-+]?\d+)?)(?::(?P<dtype>\w+))?")


class _Wrong(Exception):
    """What the user is to change, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torchbp.graph",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        metavar="MODULE:FUNCTION",
        help="a function, a module (torch.nn.Module) or a class of modules that needs no arguments;"
        " MODULE as it is imported, or a .py file",
    )
    parser.add_argument("input", nargs="*", metavar="INPUT", help="a shape or numbers; see below")
    parser.add_argument("--inputs", metavar="FILE", help="a .pt or .safetensors file of tensors")
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
    # A space before a number: argparse takes -1e-3 for an option.
    args = parser.parse_args([f" {text}" if _VALUES.fullmatch(text) else text for text in given])
    try:
        place, _, path = args.target.rpartition(":")
        if not place or not path:
            raise _Wrong(f"MODULE:FUNCTION: wants a colon between the two, got {args.target}")
        output = _output(args.output, path)
        torch.manual_seed(args.seed)
        fn = _function(place, path)
        if args.inputs is not None:
            if args.input:
                raise _Wrong("INPUT and --inputs: give one of them")
            inputs = _loaded(args.inputs, fn)
        else:
            inputs = [_made(text.strip()) for text in args.input]
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
    except (_Wrong, ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{output}: {ledger!r}")
    if args.open:
        webbrowser.open(output.resolve().as_uri())
    return 0


def _output(text: str | None, function: str) -> Path:
    path = Path(f"{function}.html" if text is None else text)
    if path.suffix not in (".html", ".svg", ".json"):
        raise _Wrong(f"--output: wants a name that ends in .html, .svg or .json, got {text}")
    if not path.parent.is_dir():
        raise _Wrong(f"--output: there is no folder {path.parent}")
    return path


def _function(place: str, path: str) -> Callable[..., Any]:
    found: Any = _module(place)
    for name in path.split("."):
        if not hasattr(found, name):
            raise _Wrong(f"MODULE:FUNCTION: {place} has no {path}")
        found = getattr(found, name)
    if isinstance(found, type) and issubclass(found, Module):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise _Wrong(
                f"MODULE:FUNCTION: {path} is a class of modules and wants arguments ({error}): name"
                " a module, or a function that makes one and calls it"
            ) from None
        found = found()
    if not callable(found):
        raise _Wrong(
            f"MODULE:FUNCTION: wants a function or a module, {path} is {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]


def _module(place: str) -> Any:
    """A module by the name it is imported by, or from its file."""
    if not place.endswith(".py"):
        sys.path.insert(0, "")  # as `python -m` does it, also where this is called from elsewhere
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            # Not found is what was asked for, and not something that it imports.
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            raise _Wrong(f"MODULE:FUNCTION: there is no module {place}") from None
        finally:
            sys.path.remove("")
    file = Path(place)
    if not file.is_file():
        raise _Wrong(f"MODULE:FUNCTION: there is no file {place}")
    sys.path.insert(0, str(file.resolve().parent))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def _dtype(name: str | None, text: str) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(dtype, torch.dtype):
        raise _Wrong(f"INPUT {text}: there is no dtype {name}")
    return dtype


def _made(text: str) -> Tensor:
    """A tensor from a shape or from values."""
    if match := _VALUES.fullmatch(text):
        try:
            values = torch.tensor(ast.literal_eval(match["values"]))
        except (ValueError, SyntaxError, TypeError, RuntimeError) as error:
            raise _Wrong(f"INPUT {text}: wants numbers ({error})") from None
        return values.to(_dtype(match["dtype"], text) or values.dtype)
    match = _INPUT.fullmatch(text)
    if not match:
        raise _Wrong(
            f"INPUT {text}: wants a shape such as 4x3, or numbers such as -2.0 and [1.0, 2.0]"
        )
    shape = [] if match["size"] == "scalar" else [int(n) for n in match["size"].split("x")]
    if math.prod(shape) > 2**28:
        raise _Wrong(f"INPUT {text}: {math.prod(shape):,} elements are more than can be traced")
    dtype = _dtype(match["dtype"], text) or torch.get_default_dtype()
    if dtype.is_floating_point or dtype.is_complex:
        if match["below"]:
            raise _Wrong(f"INPUT {text}: only integers have a bound")
        return torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    below = int(match["below"] or 2)
    if below < 1:
        raise _Wrong(f"INPUT {text}: wants integers below 1 or more")
    return torch.randint(below, shape).to(dtype)


def _loaded(file: str, fn: Callable[..., Any]) -> list[Any]:
    """The inputs in a file: nothing but tensors, numbers and containers of them is unpickled."""
    path = Path(file)
    if not path.is_file():
        raise _Wrong(f"--inputs: there is no file {file}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            held: Any = load_file(path)
        except SafetensorError as error:
            raise _Wrong(f"--inputs: {file} is no file of tensors ({error})") from None
    else:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            line = str(error).strip().partition("\n")[0]
            raise _Wrong(
                f"--inputs: {file} wants tensors alone, as torch.save writes them ({line})"
            ) from None
    if isinstance(held, dict):
        names = input_names(fn, len(held))
        if set(names) != set(held):
            raise _Wrong(
                f"--inputs: {file} has {', '.join(map(str, held)) or 'nothing'}, and the arguments"
                f" of {name_of(fn)} are {', '.join(names) or 'none'}"
            )
        return [held[name] for name in names]
    if isinstance(held, (list, tuple)):
        return list(held)
    if isinstance(held, Tensor):
        return [held]
    raise _Wrong(
        f"--inputs: {file} wants a tensor, or a list or dict of tensors, got {kinds([held])}"
    )


def _traced(fn: Callable[..., Any], inputs: list[Any]) -> Ledger:
    try:
        inspect.signature(fn.forward if isinstance(fn, Module) else fn).bind(*inputs)
    except ValueError:  # builtin functions have none
        pass
    except TypeError as error:
        raise _Wrong(
            f"INPUT: {name_of(fn)} wants other arguments than {len(inputs)}: {error}"
        ) from None
    try:
        return record("trace", fn, inputs, None, ones("trace"))
    except (TypeError, ValueError, RuntimeError) as error:
        if str(error).startswith("trace:"):
            raise _Wrong(str(error)) from None
        raise  # the function's own


if __name__ == "__main__":
    sys.exit(main())
