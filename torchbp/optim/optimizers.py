"""SGD and AdamW that update all parameters in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from ..functions.gate import is_traced

__all__ = ["SGD", "AdamW", "adamw_row", "sgd_row"]

_sgd = torch.ops.torchbp.sgd_.default._op
_adamw = torch.ops.torchbp.adamw_.default._op
_is_profiled = torch._C._autograd._profiler_enabled
_increment_version = torch._C._increment_version

#: Steps that torch does after an operation refused what it was given, before it is asked again.
PAUSE = 1000


def _number(value: Any) -> float:
    """A hyperparameter, which may be a tensor of one element."""
    return value if type(value) is float else float(value)


def _unhooked(kind: type[Optimizer]) -> Callable[..., Any]:
    """torch's own `step`, without the hooks that it is wrapped in once somebody made a `kind`."""
    step = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def sgd_row(group: dict[str, Any]) -> tuple[float, ...]:
    """The hyperparameters of a group of SGD as csrc/optim.h orders them."""
    return (
        _number(group["lr"]), _number(group["momentum"]), _number(group["dampening"]),
        _number(group["weight_decay"]), group["nesterov"], group["maximize"],
    )  # fmt: skip


def adamw_row(group: dict[str, Any]) -> tuple[float, ...]:
    """The hyperparameters of a group of AdamW as csrc/optim.h orders them."""
    beta1, beta2 = group["betas"]
    return (
        _number(group["lr"]), _number(beta1), _number(beta2), _number(group["eps"]),
        _number(group["weight_decay"]), group["maximize"],
    )  # fmt: skip


class _OneCall(Optimizer):
    """How `step` and `zero_grad` come to cost little.

    A subclass names its operation, torch's own step, the options with which torch does the step,
    the hyperparameters of a group as the operation takes them, and the keys of the state that it
    wants of each parameter for those.
    """

    _operation: Callable[..., None]
    _torch_step: Callable[..., Any]
    _left_to_torch: tuple[str, ...]
    _row: Callable[[dict[str, Any]], tuple[float, ...]]
    _pause = 0

    def _keys(self, row: tuple[float, ...]) -> tuple[str, ...]:
        raise NotImplementedError

    def _gather(self) -> tuple[Any, ...] | None:
        """The operation's arguments, the parameters first, or None where torch is to do the step:
        where an option is left to it, and where it has yet to make the state."""
        state = self.state
        parameters: list[Tensor] = []
        grads: list[Tensor] = []
        kept: list[Tensor] = []
        groups: list[float] = []
        # Mostly in the order of the parameters, and a tensor's hash is a function in Python.
        remembered = iter(state.items())
        nobody: tuple[Any, dict[str, Any]] = None, {}
        for group in self.param_groups:
            for option in self._left_to_torch:
                if group[option]:
                    return None
            row = self._row(group)
            keys, before = self._keys(row), len(grads)
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                parameters.append(p)
                grads.append(grad)
                if keys:
                    owner, slot = next(remembered, nobody)
                    if owner is not p:
                        slot = state[p]
                    for key in keys:
                        value = slot.get(key)
                        if value is None:
                            return None
                        kept.append(value)
            groups.append(len(grads) - before)
            groups += row
        return parameters, grads, kept, groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss, which `step` returns too.
        """
        if (
            closure is not None
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _is_profiled()
            or is_traced()
        ):
            return self._watched_step() if closure is None else self._watched_step(closure)
        self._update()
        return None

    # torch wraps the step of each class in hooks and the profiler, at 10 us a call, unless it is
    # marked so. Here that wrapper is entered only where there is something to do.
    step.hooked = True  # type: ignore[attr-defined]

    @Optimizer.profile_hook_step
    def _watched_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if is_traced():
            return self._torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        if self._pause:
            self._pause -= 1
            self._torch_step(self)
            return
        arguments = self._gather()
        if arguments is None:
            self._torch_step(self)
            return
        parameters = arguments[0]
        if parameters:
            try:
                self._operation(*arguments)
            except RuntimeError:  # it checks everything before it changes anything
                self._pause = PAUSE
                self._torch_step(self)
                return
            # A graph that holds a parameter has to see that it was changed.
            _increment_version(parameters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; with `set_to_none=False`, fill them with zeros."""
        if not set_to_none or is_traced() or _is_profiled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class SGD(_OneCall, torch.optim.SGD):
    """torch.optim.SGD, all parameters in one pass over their memory.

        g = grad + weight_decay p       b = momentum b + (1 - dampening) g      (b = g at first)
        p = p - lr (g + momentum b if nesterov else b)

    Arguments, state (`momentum_buffer`), `state_dict`, closures and hooks are those of
    torch.optim.SGD, and the results are the same to rounding: one can take the place of the other
    at any step, and a checkpoint of one is a checkpoint of the other.

    That pass is for dense tensors on the CPU or on GPUs, of dtype float64, float32, bfloat16 or
    float16 (half types compute in float32 and are rounded once). torch.optim.SGD does the step
    where anything is different (both kinds of device at once, sparse or complex tensors,
    `differentiable`, `fused`), and the first one, which makes the momentum buffers. `foreach`
    changes nothing.

    Args: as of torch.optim.SGD.

    Raises:
        ValueError, TypeError: as torch.optim.SGD.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = SGD([p], lr=0.25, momentum=0.9)
        >>> p.square().sum().backward()
        >>> optimizer.step()
        >>> p.detach()
        tensor([0.5000, 1.0000])
    """

    _operation = staticmethod(_sgd)
    _torch_step = staticmethod(_unhooked(torch.optim.SGD))

    _left_to_torch = ("differentiable", "fused")
    _row = staticmethod(sgd_row)

    def _keys(self, row: tuple[float, ...]) -> tuple[str, ...]:
        return ("momentum_buffer",) if row[1] else ()


class AdamW(_OneCall, torch.optim.AdamW):
    """torch.optim.AdamW, all parameters in one pass over their memory.

        m = beta1 m + (1 - beta1) grad      v = beta2 v + (1 - beta2) grad^2
        p = p - lr weight_decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Arguments, state (`step`, `exp_avg`, `exp_avg_sq`), `state_dict`, closures and hooks are those
    of torch.optim.AdamW, and the results are the same to rounding, as for `SGD`, which says when
    torch does the step; here also with `amsgrad` and `capturable`, and so in a CUDA graph.

    Args: as of torch.optim.AdamW.

    Raises:
        ValueError, TypeError: as torch.optim.AdamW.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = AdamW([p], lr=0.25, weight_decay=0.0)
        >>> p.square().sum().backward()
        >>> optimizer.step()
        >>> p.detach()
        tensor([0.7500, 1.7500])
    """

    _operation = staticmethod(_adamw)
    _torch_step = staticmethod(_unhooked(torch.optim.AdamW))

    _left_to_torch = ("differentiable", "fused", "amsgrad", "capturable")
    _row = staticmethod(adamw_row)

    def _keys(self, row: tuple[float, ...]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "step")
