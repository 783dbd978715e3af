"""`convert`: a torch.nn model on torchbp's kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import nn

__all__ = ["convert"]


def _linear(module: Any) -> torch.nn.Module:
    twin = nn.Linear(1, 1, module.bias is not None, device="meta")
    twin.in_features, twin.out_features = module.in_features, module.out_features
    twin.weight, twin.bias = module.weight, module.bias
    return twin


def _cross_entropy(module: Any) -> torch.nn.Module:
    return nn.CrossEntropyLoss(
        module.weight,
        ignore_index=module.ignore_index,
        reduction=module.reduction,
        label_smoothing=module.label_smoothing,
    )


#: Exactly these classes: a subclass may have another forward.
_TWINS: dict[type[torch.nn.Module], Callable[[Any], torch.nn.Module]] = {
    torch.nn.Linear: _linear,
    torch.nn.ReLU: lambda module: nn.ReLU(),
    torch.nn.LeakyReLU: lambda module: nn.LeakyReLU(module.negative_slope),
    torch.nn.ELU: lambda module: nn.ELU(module.alpha),
    torch.nn.Sigmoid: lambda module: nn.Sigmoid(),
    torch.nn.Tanh: lambda module: nn.Tanh(),
    torch.nn.CrossEntropyLoss: _cross_entropy,
}
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def _has_hooks(module: torch.nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


def _is_parametrized(module: torch.nn.Module) -> bool:
    return torch.nn.utils.parametrize.is_parametrized(module)


def convert(module: torch.nn.Module, *, verbose: bool = True) -> torch.nn.Module:
    """The same model with its torch.nn layers and losses replaced by torchbp's, weights shared.

    Linear, ReLU, LeakyReLU, ELU, Sigmoid, Tanh and CrossEntropyLoss are replaced, wherever they
    are; a torch.nn.Sequential of just Linear and one kind of activation becomes an `nn.MLP`. The
    original is not changed, and both use the same parameters: training one trains the other.
    Everything else is shared as it is, and named in a warning when it is a layer with parameters,
    or one of the classes above that could not be replaced (it has hooks or is parametrised).

    Args:
        module: any module.
        verbose: whether to warn about what was left alone.

    Returns:
        a new module, with the same state_dict keys.

    Raises:
        TypeError: not a torch.nn.Module.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> fast = convert(model)
        >>> type(fast).__name__, fast[0].weight is model[0].weight
        ('MLP', True)
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"convert: module wants a torch.nn.Module, got {type(module).__name__}")
    left: list[str] = []
    result = _convert(module, "", {}, left)
    if left and verbose:
        warnings.warn("convert left alone: " + "; ".join(left), stacklevel=2)
    return result


def _convert(
    module: torch.nn.Module, path: str, seen: dict[int, torch.nn.Module], left: list[str]
) -> torch.nn.Module:
    if id(module) in seen:  # a module used in two places stays one module
        return seen[id(module)]
    result = _replace(module, path, left)
    if result is None:
        result = copy.copy(module)
        seen[id(module)] = result
        result._modules = {
            name: child
            if child is None
            else _convert(child, f"{path}.{name}" if path else name, seen, left)
            for name, child in module._modules.items()
        }
        result._parameters = module._parameters.copy()
        result._buffers = module._buffers.copy()
    seen[id(module)] = result
    return result


def _replace(module: torch.nn.Module, path: str, left: list[str]) -> torch.nn.Module | None:
    """The twin of one module, or None where it has none (its children may)."""
    where = f"{path or 'the module itself'} ({type(module).__name__})"
    if type(module) is torch.nn.Sequential and not _has_hooks(module):
        plain = not any(_has_hooks(child) or _is_parametrized(child) for child in module)
        linears = [child for child in module if type(child) is torch.nn.Linear]
        if plain and len(linears) > 1 and len(set(map(id, module))) == len(module):
            try:
                return nn.MLP.from_sequential(module)
            except ValueError:
                return None
        return None
    make = _TWINS.get(type(module))
    if make is None:
        own = next(module.parameters(recurse=False), None) is not None
        known = type(module).__module__.startswith("torchbp")
        if own and not known:
            left.append(f"{where}: no twin")
        return None
    if _has_hooks(module) or _is_parametrized(module):
        left.append(f"{where}: has hooks or is parametrised")
        return None
    twin = make(module)
    return twin.train(module.training)
