"""What autograd's nodes do to the tensors that they are handed, seen from outside: the incoming
gradient changed, a shape that is not the operand's, the first number that is not finite."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchbp.graph.text import dims
from torchbp.graph.trace import frames_in, line_of

from .probe import Probe, as_tuple, functions_of, nodes_of, replaced, wanted_shapes
from .report import Cause

__all__ = ["Attached", "Widths", "first_not_finite", "hooked", "watched"]

Grads = tuple[Tensor | None, ...]


def _name(node: Any) -> str:
    """What a node is called in a message: that of a custom Function without its ending."""
    function = getattr(type(node), "_forward_cls", None)
    return function.__name__ if function is not None else str(node.name())


@contextmanager
def hooked(
    outputs: Sequence[Tensor],
    before: Callable[[Any, Grads], None],
    after: Callable[[Any, Grads, Grads], None],
) -> Iterator[None]:
    """With a look at each node before its backward and after it."""
    handles = []
    for node in nodes_of(outputs):

        def pre(grads: Grads, node: Any = node) -> None:
            before(node, grads)

        def post(made: Grads, grads: Grads, node: Any = node) -> None:
            after(node, made, grads)

        handles += [node.register_prehook(pre), node.register_hook(post)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watched(probe: Probe, strict: bool) -> list[Cause]:
    """What one backward shows: the incoming gradient changed, and, if `strict`, a gradient that
    is not summed to the shape of its operand."""
    outputs = probe.outputs()
    held: dict[Any, list[tuple[Tensor, int] | None]] = {}
    found: dict[str, Cause] = {}

    def before(node: Any, grads: Grads) -> None:
        held[node] = [
            None
            if grad is None or grad.layout is not torch.strided
            else (grad.clone(), grad._version)
            for grad in grads
        ]

    def after(node: Any, made: Grads, grads: Grads) -> None:
        for number, (grad, kept) in enumerate(zip(grads, held.get(node, []), strict=False)):
            if grad is None or kept is None:
                continue
            copy, version = kept
            same = torch.equal(grad.nan_to_num(), copy.nan_to_num())
            if not same or grad._version != version:
                which = f"number {number} " if len(grads) > 1 else ""
                found.setdefault(
                    "gradient-modified",
                    Cause(
                        "gradient-modified",
                        f"the backward of {_name(node)} changes the incoming gradient {which}in "
                        "place: other operations may still want it. It was compared with a copy "
                        "taken before the call. Make a new tensor instead.",
                    ),
                )

    def looking(function: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        def look(ctx: Any, *grads: Any) -> Any:
            made = method(ctx, *grads)
            pairs = zip(as_tuple(made), wanted_shapes(ctx), strict=False)
            for number, (grad, shape) in enumerate(pairs):
                if strict and grad is not None and shape is not None and tuple(grad.shape) != shape:
                    found.setdefault(
                        "broadcast-not-reduced",
                        Cause(
                            "broadcast-not-reduced",
                            f"the backward of {function.__name__} returns a gradient of shape "
                            f"{dims(grad.shape)} for argument {number}, whose shape is "
                            f"{dims(shape)}. Autograd sums it silently, and with that it passes. "
                            "Use sum_to_size",
                        ),
                    )
            return made

        return look

    if not any(output.requires_grad for output in outputs):
        return []
    with hooked(outputs, before, after), replaced(functions_of(outputs), "backward", looking):
        probe.backward(probe.upstream(0), outputs)
    return list(found.values())


# ---- where numbers stop being finite


def _finite(values: Any) -> bool:
    tensors = [
        leaf
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]
    return all(bool(t.isfinite().all()) for t in tensors if t.layout is torch.strided)


class _FirstNotFinite(TorchDispatchMode):
    """Finds the first operation that makes inf or nan of finite numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        finite = self.found is not None or _finite((args, kwargs))
        made = func(*args, **(kwargs or {}))
        uninitialised = "empty" in func.__name__
        if self.found is None and finite and not uninitialised and not _finite(made):
            name = func.__name__.partition(".")[0]
            line = line_of(frames_in(Probe.outputs, sys._getframe(1)))
            self.found = f"{name}" + (f" ({_short(line)})" if line else "")
        return made


def _short(line: str) -> str:
    """A source line without the folders of its file."""
    folder, mark, rest = line.partition(": ")
    return os.path.basename(folder) + mark + rest


def first_not_finite(probe: Probe) -> str | None:
    """Where inf or nan begins at the inputs, in words; None if all is finite there."""
    with _FirstNotFinite() as mode:
        outputs = probe.outputs()
    if mode.found is not None:
        return f"it starts in the forward of {mode.found}"
    found: list[str] = []

    def after(node: Any, made: Grads, grads: Grads) -> None:
        if _finite(grads) and not _finite(made) and not found:
            found.append(f"it starts in the backward of {_name(node)}, whose upstream is finite")

    with hooked(outputs, lambda node, grads: None, after):
        probe.backward(probe.upstream(0), outputs)
    return found[0] if found else None


class Widths(TorchDispatchMode):
    """Notes the narrowest floating type that anything is computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.narrowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.narrowest = max(self.narrowest, leaf.dtype, key=lambda d: torch.finfo(d).eps)
        return made


# ---- as if nothing were detached


class Attached(TorchFunctionMode):
    """Lets the gradient through where the function keeps it out: `detach`, `data`, `item` and
    `no_grad` have no effect.

    Attributes:
        met: what of these was met, and what cannot be undone: numpy, tolist.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and args and args[0] is False:
            self._note("no_grad")
            return None
        owner = getattr(func, "__self__", None)
        if func in (torch.detach, Tensor.detach, Tensor.detach_):
            self._note("detach")
            return args[0].view_as(args[0])
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            self._note(func.__name__)  # nothing comes through these
            return func(args[0].detach(), *args[1:], **kwargs)
        if func is Tensor.item:
            self._note("item")
            return args[0].reshape(())
        if getattr(func, "__name__", "") == "__get__" and owner is Tensor.data:
            self._note("data")
            return args[0].view_as(args[0])
        return func(*args, **kwargs)

    def _note(self, name: str) -> None:
        if name not in self.met:
            self.met.append(name)
