"""Calling somebody's function with leaves of our own, so that nothing of it changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

__all__ = [
    "arguments",
    "captured",
    "check_function",
    "kinds",
    "modules_of",
    "name_of",
    "not_connected",
    "outputs_of",
    "unchanged",
]


def name_of(fn: Callable[..., Any]) -> str:
    """
    Example:
        >>> name_of(torch.relu), name_of(torch.nn.ReLU()), name_of(partial(torch.relu))
        ('relu', 'ReLU', 'relu')
    """
    if isinstance(fn, partial):
        return name_of(fn.func)
    owner = getattr(fn, "__self__", None)
    if getattr(fn, "__name__", None) == "apply" and isinstance(owner, type):
        return owner.__name__  # of a custom Function
    return getattr(fn, "__name__", type(fn).__name__)


def captured(fn: Any) -> dict[str, Any]:
    """What a function reads besides its arguments, by name, as far as its code names it.

    Followed are bound methods, partial, objects that can be called, and functions of the same file.

    Example:
        >>> weight = torch.ones(2)
        >>> list(captured(lambda x: weight * x))
        ['weight']
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def follow(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, partial):
            keep("args", value.args)
            keep("keywords", value.keywords)
            follow(value.func)
        elif inspect.ismethod(value):
            keep("self", value.__self__)
            follow(value.__self__)
            follow(value.__func__)
        elif inspect.isfunction(value):
            try:
                variables = inspect.getclosurevars(value)
            except ValueError:  # a cell that is still empty
                return
            names = {**variables.globals, **variables.nonlocals}
            for name, held in names.items():
                if callable(held) and getattr(held, "__module__", None) == value.__module__:
                    follow(held)
                keep(name, held)
            keep("defaults", [value.__defaults__, value.__kwdefaults__])
        elif hasattr(value, "__dict__") and not isinstance(value, (type, Module, Tensor)):
            keep("self", vars(value))  # an object that can be called

    def keep(name: str, held: Any) -> None:
        for path, leaf in pytree.tree_flatten_with_path(held)[0]:
            if isinstance(leaf, (Module, Tensor)):
                found.setdefault(name + pytree.keystr(path), leaf)

    follow(fn)
    return found


def modules_of(fn: Any) -> dict[str, Module]:
    """The modules that a call of `fn` runs, as far as can be seen; a module is there as "".

    Example:
        >>> layer = torch.nn.ReLU()
        >>> modules_of(layer), modules_of(lambda x: layer(x))
        ({'': ReLU()}, {'layer': ReLU()})
    """
    if isinstance(fn, Module):
        return {"": fn}
    return {name: held for name, held in captured(fn).items() if isinstance(held, Module)}


@contextmanager
def unchanged(fn: Any, inputs: Sequence[Any]) -> Iterator[None]:
    """With grad mode on, and afterwards random state and buffers as before.

    The buffers are those of the modules in `modules_of(fn)`: batch norm's running statistics.
    """
    roots = modules_of(fn).values()
    held = [module._buffers for root in roots for module in root.modules()]
    before = [
        (
            buffers,
            dict(buffers),
            [None if b is None else b.detach().clone() for b in buffers.values()],
        )
        for buffers in held
    ]
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    tensors += [parameter for root in roots for parameter in root.parameters()]
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    try:
        with (
            torch.random.fork_rng(sorted(d for d in devices if d is not None)),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for buffers, originals, values in before:
            buffers.clear()
            buffers.update(originals)
            for original, value in zip(originals.values(), values, strict=True):
                if original is not None and value is not None:
                    # Past the version counter: for other graphs that hold it, nothing happened.
                    original.data.copy_(value)


def input_names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` positional arguments of `fn`.

    Example:
        >>> input_names(lambda a, *rest: a, 3), input_names(torch.relu, 1)
        (['a', 'rest[0]', 'rest[1]'], ['x'])
    """
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, Module) else fn)
        parameters = list(signature.parameters.values())
    except (TypeError, ValueError):  # builtin functions have none
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][
        :count
    ]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    missing = count - len(names)
    if rest is not None:
        return names + [f"{rest}[{i}]" for i in range(missing)]
    if count == 1 and missing:
        return ["x"]
    return names + [f"x{i}" for i in range(len(names), count)]


def check_function(op: str, fn: Any) -> None:
    """Raise TypeError unless `fn` can be called, ValueError if calling it would initialise it."""
    if not callable(fn):
        raise TypeError(f"{op}: fn wants a function or module, got {type(fn).__name__}")
    for module in modules_of(fn).values():
        if any(is_lazy(parameter) for parameter in (*module.parameters(), *module.buffers())):
            raise ValueError(
                f"{op}: {name_of(fn)} has parameters that its first call will initialise: call it "
                "once before"
            )


def kinds(leaves: Iterable[Any]) -> str:
    """What there is, for a message.

    Example:
        >>> kinds([torch.tensor(1), "a"]), kinds([])
        ('a tensor of torch.int64, str', 'none')
    """
    return (
        ", ".join(
            f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in leaves
        )
        or "none"
    )


def arguments(
    fn: Any, inputs: Sequence[Any], wanted: Callable[[Tensor], bool]
) -> tuple[list[Any], dict[str, Tensor], dict[str, Tensor]]:
    """The inputs as `fn` is to be called with: copies, which it may change in place.

    Args:
        fn: the function, whose signature names them.
        inputs: its arguments; tensors may be in lists, tuples and dicts.
        wanted: whether a floating tensor is to require grad.

    Returns:
        arguments; name -> leaf, of those that require grad; name -> copy, of every tensor.
    """
    leaves: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    made = []
    for name, value in zip(input_names(fn, len(inputs)), inputs, strict=True):
        flat, spec = pytree.tree_flatten_with_path(value)
        held: list[Any] = []
        for path, leaf in flat:
            if isinstance(leaf, Tensor):
                full = name + pytree.keystr(path)
                own = leaf.clone() if leaf.is_inference() else leaf.detach()
                if own.is_floating_point() and wanted(leaf):
                    leaves[full] = own.requires_grad_()
                copies[full] = own.clone()
                held.append(copies[full])
            else:
                held.append(leaf)
        made.append(pytree.tree_unflatten(held, spec))
    return made, leaves, copies


def outputs_of(op: str, fn: Any, output: Any) -> dict[str, Tensor]:
    """The floating tensors that `fn` returned, by name: y, or y[0], y['loss'].

    Raises:
        TypeError: there is none.

    Example:
        >>> list(outputs_of("op", len, (torch.ones(2), {"loss": torch.ones(())})))
        ['y[0]', "y[1]['loss']"]
    """
    flat = pytree.tree_flatten_with_path(output)[0]
    found = {
        "y" + pytree.keystr(path): leaf
        for path, leaf in flat
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    if not found:
        raise TypeError(
            f"{op}: {name_of(fn)} wants to return a floating tensor, or a tuple, list or dict of "
            f"them, got {kinds(leaf for _, leaf in flat)}"
        )
    return found


def not_connected(op: str, fn: Any) -> ValueError:
    """The error for a function none of whose outputs requires grad."""
    return ValueError(
        f"{op}: autograd cannot differentiate {name_of(fn)}: its output is not connected to its "
        "inputs (does it use detach, no_grad, item, numpy, or a constant?)"
    )
