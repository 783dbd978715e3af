"""`convert`: a torch.nn model on torchbp's kernels."""

from __future__ import annotations

import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn.modules.module import _WrappedHook
from torch.nn.parameter import UninitializedParameter

from . import nn
from .nn.twin import CONTAINERS, TWINS, twin

__all__ = ["convert"]


def convert(module: torch.nn.Module, *, verbose: bool = True) -> torch.nn.Module:
    """The same model with its torch.nn layers and losses replaced by torchbp's, weights shared.

    Linear, ReLU, LeakyReLU, ELU, Sigmoid, Tanh and CrossEntropyLoss are replaced, wherever they
    are; a torch.nn.Sequential of just Linear and one kind of activation (and Dropout) becomes an
    `nn.MLP`. The original is not changed, and both use the same parameters and buffers: training
    one trains the other, and an optimizer of one is right for both. Move a model to its device and
    dtype before: that replaces the buffers of the one that is moved.

    Attributes, lists, dicts, bound methods and partials that refer to a layer refer to the new one.
    References kept elsewhere (in a closure or an object of another class) are not found: there the
    original layer runs, on the same weights.

    A warning names what was left alone: layers with parameters that have no twin, layers of the
    classes above that have hooks or are parametrised, modules whose `forward` was replaced (as
    torch.compile does: convert first), and ScriptModules, which are shared as they are.

    Args:
        module: any module.
        verbose: whether to warn about what was left alone.

    Returns:
        a new module, with the same state_dict keys.

    Raises:
        TypeError: not a torch.nn.Module.
        ValueError: a lazy layer that was never run.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> fast = convert(model)
        >>> type(fast).__name__, fast[0].weight is model[0].weight
        ('MLP', True)
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"convert: module wants a torch.nn.Module, got {type(module).__name__}")
    new: dict[int, torch.nn.Module] = {}
    left: list[str] = []
    result = _convert(module, "", new, left)
    for converted in new.values():
        _redirect(converted, new)
    if left and verbose:
        warnings.warn("convert left alone: " + "; ".join(left), stacklevel=2)
    return result


def _convert(
    module: torch.nn.Module, path: str, new: dict[int, torch.nn.Module], left: list[str]
) -> torch.nn.Module:
    """The converted module; `new` maps the ids of originals to theirs."""
    if id(module) in new:  # a module used in two places stays one module
        return new[id(module)]
    where = f"{path or 'the module itself'} ({type(module).__name__})"
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
        raise ValueError(f"convert: {where} has no shapes yet; run the model once before")
    reason = _why_not(module)
    if reason:
        left.append(f"{where}: {reason}")
    if isinstance(module, torch.jit.ScriptModule):
        return module
    result = twin(module, type(module) if reason else TWINS.get(type(module), type(module)))
    for name, child in module._modules.items():
        if child is not None:
            result._modules[name] = _convert(child, f"{path}.{name}" if path else name, new, left)
    if type(result) is torch.nn.Sequential and not reason and nn.MLP.fits(result):
        result = twin(result, nn.MLP)
    new[id(module)] = result
    return result


def _why_not(module: torch.nn.Module) -> str:
    """Why a module that seems to be for convert is left alone, or "" for all others."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "is parametrised"
    own_forward = vars(module).get("forward")
    if type(module) in TWINS:
        hooked = any(vars(module)[name] for name in CONTAINERS if name.endswith("_hooks"))
        return "has hooks or a forward of its own" if hooked or own_forward else ""
    if own_forward and not isinstance(own_forward, MethodType | partial):
        return "has a forward of its own"
    known = type(module).__module__.startswith(("torchbp.", "torch.nn.utils.parametrize"))
    has_parameters = any(parameter is not None for parameter in module._parameters.values())
    return "no twin" if has_parameters and not known else ""


def _redirect(module: torch.nn.Module, new: dict[int, torch.nn.Module]) -> None:
    """Let a converted module's attributes and hooks refer to converted modules."""
    for name, value in vars(module).items():
        if name not in ("_modules", "_parameters", "_buffers"):
            vars(module)[name] = _redirected(value, new)


def _redirected(value: Any, new: dict[int, torch.nn.Module]) -> Any:
    """`value` with each original module in it replaced; itself where there is none."""
    if isinstance(value, torch.nn.Module):
        return new.get(id(value), value)
    kind = type(value)
    parts: Collection[Any]
    build: Callable[[list[Any]], Any]
    if kind in (list, tuple):
        parts, build = value, kind
    elif kind in (dict, OrderedDict):
        parts, build = value.values(), lambda fresh: kind(zip(value, fresh, strict=True))
    elif kind is MethodType:
        parts, build = [value.__self__], lambda fresh: MethodType(value.__func__, *fresh)
    elif kind is partial:
        parts = [value.func, value.args, value.keywords]
        build = lambda fresh: partial(fresh[0], *fresh[1], **fresh[2])  # noqa: E731
    elif kind is _WrappedHook and value.with_module:
        parts, build = [value.module()], lambda fresh: _WrappedHook(value.hook, *fresh)
    else:
        return value
    fresh = [_redirected(part, new) for part in parts]
    return value if all(map(operator.is_, fresh, parts)) else build(fresh)
