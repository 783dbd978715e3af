"""What check_function looks at: a function at its inputs, run plainly, and what to compare with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Module
from torch.utils import _pytree as pytree

from torchbp.graph.calling import name_of, unchanged
from torchbp.graph.text import dims, dtype_name

from .case import Tolerance
from .probe import argument_names, as_tuple

__all__ = [
    "Failed",
    "NotApplicable",
    "Ran",
    "Settings",
    "Subject",
    "Unsupported",
    "difference",
    "drawn",
    "first_line",
    "is_number",
    "outputs_in",
    "plainly",
    "run",
    "upstream_of",
    "widened",
]

Tensors = Sequence[Tensor | None]


class Failed(Exception):
    """A check that failed.

    Attributes:
        text: what was found.
        report: of a wrong gradient.
        silent: whether there was no error, and a wrong result.
    """

    def __init__(self, text: str, report: Any = None, silent: bool = True) -> None:
        super().__init__(text)
        self.text, self.report, self.silent = text, report, silent


class Unsupported(Exception):
    """A feature that is refused by a clear error."""


class NotApplicable(Exception):
    """There is nothing to check."""


@dataclass(frozen=True)
class Settings:
    """What the caller asked for; see `check_function`."""

    reference: Callable[..., Any] | None = None
    atol: float = 1e-7
    rtol: float = 1e-7
    nondet_tol: float = 0.0
    kinks: Literal["raise", "skip"] = "raise"
    seed: int = 0
    backend: str = "aot_eager"
    max_time: float | None = None
    max_memory: float | None = None


@dataclass(frozen=True, eq=False)
class Ran:
    """One forward and backward.

    Attributes:
        outputs: the floating tensors that were returned, detached.
        names: what they are called.
        grads: of each differentiable input; None where there is none.
        live: which outputs required grad, where that was seen.
    """

    outputs: list[Tensor]
    names: list[str]
    grads: list[Tensor | None]
    live: list[bool] = field(default_factory=list)


def is_number(value: Any) -> bool:
    """Whether it is a tensor of floating or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def first_line(error: BaseException, width: int = 180) -> str:
    """The first line of what an error says, or its first sentences, with its type."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if len(text) <= width:
        return text
    sentence = text[:width].rpartition(". ")[0]
    return f"{sentence}." if len(sentence) > width // 3 else f"{text[: width - 3]}..."


def outputs_in(value: Any) -> list[Tensor]:
    """The tensors of numbers that a function returned."""
    return [leaf for leaf in pytree.tree_leaves(value) if is_number(leaf)]


def drawn(like: Tensor, seed: int) -> Tensor:
    """Normal numbers that depend on shape and seed alone, but for their rounding."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, generator=generator, dtype=wide).to(like.device, like.dtype)


def run(
    fn: Callable[..., Any],
    args: Sequence[Any],
    upstream: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Ran:
    """Forward and backward of the arguments that require grad, as they are.

    The upstream gradient is normal, the same for the same shapes.
    """
    torch.manual_seed(seed)
    made = outputs_in(fn(*args))
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    given = upstream or upstream_of(made)
    pairs = [(y, v) for y, v in zip(made, given, strict=True) if y.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs and leaves:
        ys, vs = zip(*pairs, strict=True)
        grads = torch.autograd.grad(ys, leaves, vs, allow_unused=True)
    names = ["y"] if len(made) == 1 else [f"y[{i}]" for i in range(len(made))]
    return Ran([y.detach() for y in made], names, list(grads), [y.requires_grad for y in made])


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [drawn(y, 100 + i) for i, y in enumerate(outputs)]


def difference(
    what: str, got: Tensor | None, wanted: Tensor | None, allowed: Tensor | Tolerance
) -> str | None:
    """In words where two tensors differ by more than is allowed; None if they do not.

    None stands for zeros, as for autograd.
    """
    if got is None and wanted is None:
        return None
    got = torch.zeros_like(wanted) if got is None else got.detach()  # type: ignore[arg-type]
    wanted = torch.zeros_like(got) if wanted is None else wanted.detach()
    if got.shape != wanted.shape:
        return f"{what} has shape {dims(got.shape)}, and {dims(wanted.shape)} is right"
    if got.layout is not torch.strided or wanted.layout is not torch.strided:
        got, wanted = got.to_dense(), wanted.to_dense()
    wide = torch.complex128 if wanted.is_complex() or got.is_complex() else torch.float64
    got, wanted = got.to(wide).resolve_conj(), wanted.to(wide).resolve_conj()
    if isinstance(allowed, Tolerance):
        wrong = ~torch.isclose(got, wanted, rtol=allowed.rtol, atol=allowed.atol, equal_nan=True)
    else:
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        wrong = ~(same | ((got - wanted).abs() <= allowed))
    if not wrong.any():
        return None
    off = (got - wanted).abs().nan_to_num(nan=torch.inf).where(wrong, -1.0)
    flat = int(off.flatten().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape)]
    a, b = got.flatten()[flat].item(), wanted.flatten()[flat].item()
    where = f" at {index}" if index else ""
    return (
        f"{what} is wrong in {int(wrong.sum())} of {wrong.numel()} elements: {a:.5g} where "
        f"{b:.5g} is right{where}"
    )


class Subject:
    """A function and its inputs.

    A module's parameters are further inputs, so that whatever is checked of an input is checked of
    them. All runs are at copies of the inputs, in float64 if the function takes that.

    Attributes:
        fn: takes `args`.
        args: the arguments, in float64 if they are floating.
        names: of the arguments.
        where: positions of the arguments whose gradients are checked.
        narrow: why the function cannot be run in float64; None if it can.
    """

    def __init__(self, fn: Any, inputs: Any, settings: Settings) -> None:
        if isinstance(fn, type) and issubclass(fn, Function):
            fn = fn.apply
        self.settings = settings
        self.original: Callable[..., Any] = fn
        self.name = name_of(fn)
        given = as_tuple(inputs)
        self.count = len(given)
        self.names = argument_names(fn, self.count)
        self.module: Module | None = fn if isinstance(fn, Module) else None
        asked = any(isinstance(x, Tensor) and x.requires_grad for x in given)
        self.where = [
            i for i, x in enumerate(given) if is_number(x) and (x.requires_grad or not asked)
        ]
        self.fn = fn
        if self.module is not None:
            parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
            self.where += range(self.count, self.count + len(parameters))
            self.fn = _functional(self.module, self.names, list(parameters))
            self.names = [*self.names, *parameters]
            given = (*given, *parameters.values())
        self.given = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
        with unchanged(self.fn, self.given):  # what a plain call raises is the caller's
            made = self.fn(*map(_copy, self.given))
            if not outputs_in(made):
                raise TypeError(
                    f"check_function: {self.name} wants to return a floating tensor, or a tuple, "
                    f"list or dict of them, got {type(made).__name__}"
                )
        self._nested = not all(isinstance(y, Tensor) for y in as_tuple(made))
        self.narrow: str | None = None
        self.args = tuple(map(widened, self.given))
        if any(isinstance(x, Tensor) and x.dtype is not y.dtype for x, y in self._pairs()):
            try:
                with unchanged(self.fn, self.args):
                    run(self.fn, self.leaves())
            except Exception as error:
                self.narrow = first_line(error)
                self.args = self.given

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        yield from zip(self.given, self.args, strict=True)

    # ---- the inputs

    @property
    def described(self) -> str:
        """The inputs in words."""
        return ", ".join(
            f"{name} {dims(x.shape)} {dtype_name(x.dtype)}" if isinstance(x, Tensor) else f"{x!r}"
            for name, x in zip(self.names, self.given, strict=True)
        )

    @property
    def tensors(self) -> list[int]:
        """The positions of all tensors."""
        return [i for i, x in enumerate(self.args) if isinstance(x, Tensor)]

    def leaves(self, args: Sequence[Any] | None = None, frozen: Sequence[int] = ()) -> list[Any]:
        """Copies of the arguments in memory of their own, which require grad but for the frozen."""
        return [
            _copy(x).requires_grad_(i in self.where and i not in frozen)
            if isinstance(x, Tensor)
            else x
            for i, x in enumerate(self.args if args is None else args)
        ]

    def marked(self, args: Sequence[Any], frozen: Sequence[int] = ()) -> list[Any]:
        """These very tensors as leaves, with the strides that they have."""
        return [
            x.detach().requires_grad_(i in self.where and i not in frozen)
            if isinstance(x, Tensor)
            else x
            for i, x in enumerate(args)
        ]

    def other(self, number: int) -> list[Any]:
        """Other values near by, with the same signs and order: still inputs of the function."""
        return [
            x * (1 - 0.0625 * number) if i in self.where else x for i, x in enumerate(self.args)
        ]

    # ---- what is right

    @property
    def is_random(self) -> bool:
        """Whether two calls differ that do not differ with the same random state."""
        return self._drawing[0]

    @property
    def is_steady(self) -> bool:
        """Whether two calls with the same random state are the same."""
        return self._drawing[1]

    @cached_property
    def _drawing(self) -> tuple[bool, bool]:
        with unchanged(self.fn, self.args), torch.no_grad():
            torch.manual_seed(self.settings.seed)
            unseeded = [outputs_in(self.fn(*self.leaves())) for _ in range(3)]
            seeded = []
            for _ in range(3):
                torch.manual_seed(self.settings.seed)
                seeded.append(outputs_in(self.fn(*self.leaves())))
        steady = all(_equal(seeded[0], other) for other in seeded[1:])
        return steady and not all(_equal(unseeded[0], other) for other in unseeded[1:]), steady

    @property
    def seeded(self) -> Callable[..., Any]:
        """The function as gradcheck takes it: it returns tensors, and the same in each call."""
        if not self.is_random and not self._nested:
            return self.fn
        fn, seed, is_random = self.fn, self.settings.seed, self.is_random

        def seeded(*args: Any) -> Any:
            if is_random:
                torch.manual_seed(seed)
            return tuple(outputs_in(fn(*args)))

        seeded.__name__ = self.name
        _named(seeded, self.names)
        return seeded

    def run(
        self, args: Sequence[Any], fn: Any = None, upstream: Sequence[Tensor] | None = None
    ) -> Ran:
        """Forward and backward, of the function or of what was made of it."""
        return run(self.fn if fn is None else fn, args, upstream, self.settings.seed)

    def truth(self, args: Sequence[Any] | None = None) -> Ran:
        """What the function itself does, called plainly.

        Raises:
            Failed: it cannot do it.
        """
        with plainly():
            return self.run(self.leaves(args))

    # ---- comparing

    @property
    def tolerance(self) -> Tolerance:
        """Between two ways of computing the same in the dtype of the arguments."""
        if self.narrow is None:
            return Tolerance(self.settings.atol, self.settings.rtol)
        eps = max(torch.finfo(x.dtype).eps for x in self.args if is_number(x))
        return Tolerance(64 * eps, 64 * eps)

    def differences(
        self,
        got: Ran,
        wanted: Ran,
        allowed: Sequence[Tensor] | Tolerance | None = None,
        where: Sequence[int] | None = None,
    ) -> list[str]:
        """In words what differs, outputs and gradients, by more than is allowed (of each)."""
        if len(got.outputs) != len(wanted.outputs):
            return [f"{len(got.outputs)} outputs, and {len(wanted.outputs)} are right"]
        places = self.where if where is None else where
        names = [*wanted.names, *(f"the gradient of {self.names[i]}" for i in places)]
        pairs = zip(
            [*got.outputs, *got.grads], [*wanted.outputs, *wanted.grads], names, strict=True
        )
        limits: Sequence[Tensor | Tolerance]
        if allowed is None or isinstance(allowed, Tolerance):
            limits = [allowed or self.tolerance] * len(names)
        else:
            limits = allowed
        found = [
            difference(name, one, other, limit)
            for (one, other, name), limit in zip(pairs, limits, strict=True)
        ]
        return [text for text in found if text is not None]

    def same(self, got: Ran, wanted: Ran, when: str, where: Sequence[int] | None = None) -> None:
        """Raise Failed unless both agree."""
        found = self.differences(got, wanted, where=where)
        if found:
            raise Failed(f"{when}: {found[0]}")


def _functional(module: Module, names: Sequence[str], parameters: Sequence[str]) -> Any:
    """A module as a function of its inputs and these parameters, which leaves it as it is.

    Its other parameters and buffers get the dtype of the first floating argument.
    """
    from torch.func import functional_call

    count = len(names)
    held: dict[str, Tensor] = dict(module.named_buffers())
    held |= {n: p for n, p in module.named_parameters() if n not in parameters}

    def call(*args: Any) -> Any:
        like = next((x for x in args if is_number(x)), None)
        others = {
            n: (x.detach().to(like.dtype) if like is not None and is_number(x) else x.detach())
            for n, x in held.items()
        }
        # Copies: a layer may change its buffers.
        others = {n: x.clone() for n, x in others.items()}
        return functional_call(
            module, {**dict(zip(parameters, args[count:], strict=True)), **others}, args[:count]
        )

    call.__name__ = type(module).__name__
    _named(call, [*names, *parameters])
    return call


def _named(call: Callable[..., Any], names: Sequence[str]) -> None:
    """Give a function's arguments their names, for messages; "0.weight" is none in Python."""
    called = [re.sub(r"^(?=\d)|\W", "_", name) for name in names]
    if len(set(called)) == len(called):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in called]
        )


@contextmanager
def plainly(when: str = "called plainly") -> Iterator[None]:
    """What a plain call raises is a failure, and no feature that is missing."""
    try:
        yield
    except Failed:
        raise
    except Exception as error:
        raise Failed(f"{when} it raises {first_line(error)}", silent=False) from error


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)


def widened(value: Any) -> Any:
    """A tensor in float64 or complex128; all else as it is."""
    if not is_number(value):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )
