"""What a command line names: a function, and its inputs as shapes, as numbers or in a file."""

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Module

from .calling import input_names, kinds, name_of

__all__ = [
    "FORMS",
    "Wrong",
    "function_of",
    "inputs_of",
    "parser_of",
    "separated",
    "with_spaces",
]

#: How inputs are written, for the help.
FORMS = """\
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
"""

_INPUT = re.compile(r"(?P<size>scalar|\d+(?:x\d+)*)(?::(?P<dtype>\w+)(?::(?P<below>\d+))?)?")
_VALUES = re.compile(r"(?P<values>\[.*\]|[-+]?\d*\.\d*(?:[eE][-+]?\d+)?)(?::(?P<dtype>\w+))?")


class Wrong(Exception):
    """What the user is to change, in one line."""


def parser_of(
    module: str, description: str, epilog: str, target: str, what: str
) -> argparse.ArgumentParser:
    """A parser of `python -m MODULE TARGET INPUT ...`, `what` being the help on the target."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar=target, help=what)
    parser.add_argument("input", nargs="*", metavar="INPUT", help="a shape or numbers; see below")
    parser.add_argument("--inputs", metavar="FILE", help="a .pt or .safetensors file of tensors")
    return parser


def with_spaces(arguments: Sequence[str]) -> list[str]:
    """The arguments for argparse, which takes a number as -1e-3 for an option unless a space is
    before it."""
    return [f" {text}" if _VALUES.fullmatch(text) else text for text in arguments]


def separated(what: str, target: str) -> tuple[str, str]:
    """The module and the name within it of MODULE:NAME, as `what` calls it."""
    place, _, path = target.rpartition(":")
    if not place or not path:
        raise Wrong(f"{what}: wants a colon between the two, got {target}")
    return place, path


def function_of(what: str, place: str, path: str) -> Callable[..., Any]:
    """The function or module; a class of modules is called, a Function is its `apply`."""
    found: Any = _module(what, place)
    for name in path.split("."):
        if not hasattr(found, name):
            raise Wrong(f"{what}: {place} has no {path}")
        found = getattr(found, name)
    if isinstance(found, type) and issubclass(found, Module):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise Wrong(
                f"{what}: {path} is a class of modules and wants arguments ({error}): name"
                " a module, or a function that makes one and calls it"
            ) from None
        found = found()
    if isinstance(found, type) and issubclass(found, Function):
        found = found.apply
    if not callable(found):
        raise Wrong(f"{what}: wants a function or a module, {path} is {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _module(what: str, place: str) -> Any:
    """A module by the name it is imported by, or from its file."""
    if not place.endswith(".py"):
        sys.path.insert(0, "")  # as `python -m` does it, also where this is called from elsewhere
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            # Not found is what was asked for, and not something that it imports.
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            raise Wrong(f"{what}: there is no module {place}") from None
        finally:
            sys.path.remove("")
    file = Path(place)
    if not file.is_file():
        raise Wrong(f"{what}: there is no file {place}")
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
        raise Wrong(f"INPUT {text}: there is no dtype {name}")
    return dtype


def _made(text: str) -> Tensor:
    """A tensor from a shape or from values."""
    if match := _VALUES.fullmatch(text):
        try:
            values = torch.tensor(ast.literal_eval(match["values"]))
        except (ValueError, SyntaxError, TypeError, RuntimeError) as error:
            raise Wrong(f"INPUT {text}: wants numbers ({error})") from None
        return values.to(_dtype(match["dtype"], text) or values.dtype)
    match = _INPUT.fullmatch(text)
    if not match:
        raise Wrong(
            f"INPUT {text}: wants a shape such as 4x3, or numbers such as -2.0 and [1.0, 2.0]"
        )
    shape = [] if match["size"] == "scalar" else [int(n) for n in match["size"].split("x")]
    if math.prod(shape) > 2**28:
        raise Wrong(f"INPUT {text}: {math.prod(shape):,} elements are more than can be traced")
    dtype = _dtype(match["dtype"], text) or torch.get_default_dtype()
    if dtype.is_floating_point or dtype.is_complex:
        if match["below"]:
            raise Wrong(f"INPUT {text}: only integers have a bound")
        return torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    below = int(match["below"] or 2)
    if below < 1:
        raise Wrong(f"INPUT {text}: wants integers below 1 or more")
    return torch.randint(below, shape).to(dtype)


def _loaded(file: str, fn: Callable[..., Any]) -> list[Any]:
    """The inputs in a file: nothing but tensors, numbers and containers of them is unpickled."""
    path = Path(file)
    if not path.is_file():
        raise Wrong(f"--inputs: there is no file {file}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            held: Any = load_file(path)
        except SafetensorError as error:
            raise Wrong(f"--inputs: {file} is no file of tensors ({error})") from None
    else:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            line = str(error).strip().partition("\n")[0]
            raise Wrong(
                f"--inputs: {file} wants tensors alone, as torch.save writes them ({line})"
            ) from None
    if isinstance(held, dict):
        names = input_names(fn, len(held))
        if set(names) != set(held):
            raise Wrong(
                f"--inputs: {file} has {', '.join(map(str, held)) or 'nothing'}, and the arguments"
                f" of {name_of(fn)} are {', '.join(names) or 'none'}"
            )
        return [held[name] for name in names]
    if isinstance(held, (list, tuple)):
        return list(held)
    if isinstance(held, Tensor):
        return [held]
    raise Wrong(
        f"--inputs: {file} wants a tensor, or a list or dict of tensors, got {kinds([held])}"
    )


def inputs_of(fn: Callable[..., Any], texts: Sequence[str], file: str | None) -> list[Any]:
    """The inputs of `fn`, given as texts or in a file.

    Raises:
        Wrong: both are given, one of them cannot be read, or `fn` wants other arguments.
    """
    if file is None:
        inputs = [_made(text.strip()) for text in texts]
    elif texts:
        raise Wrong("INPUT and --inputs: give one of them")
    else:
        inputs = _loaded(file, fn)
    try:
        inspect.signature(fn.forward if isinstance(fn, Module) else fn).bind(*inputs)
    except ValueError:  # builtin functions have none
        pass
    except TypeError as error:
        raise Wrong(
            f"INPUT: {name_of(fn)} wants other arguments than {len(inputs)}: {error}"
        ) from None
    return inputs
