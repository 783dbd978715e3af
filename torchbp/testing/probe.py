"""A function at its inputs, run as often as a diagnosis needs it, in the circumstances it wants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function, _is_setup_context_defined
from torch.utils._pytree import tree_leaves, tree_map

from torchbp.graph.calling import input_names

__all__ = [
    "Call",
    "Point",
    "Probe",
    "as_tuple",
    "calls_of",
    "cloned_saves",
    "functions_of",
    "nodes_of",
    "real",
    "replaced",
    "takes_context",
    "wanted_shapes",
]


def as_tuple(value: Any) -> tuple[Any, ...]:
    """As torch's gradcheck has it: lists and tuples are several, all else is one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def real(value: Tensor) -> Tensor:
    """The elements as a float64 vector; of complex ones the real and imaginary parts in turn."""
    value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return value.reshape(-1).double()


def _is_checked(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` arguments; of a custom Function's apply those of its forward.

    Example:
        >>> argument_names(lambda a, b: a, 2)
        ['a', 'b']
    """
    owner = getattr(fn, "__self__", None)
    if not (isinstance(owner, type) and issubclass(owner, Function)):
        return input_names(fn, count)
    context = takes_context(owner)
    return input_names(owner.forward, count + context)[context:]


@dataclass(frozen=True, eq=False)
class Point:
    """Both Jacobians at some values of the inputs.

    Attributes:
        values: of the inputs that are checked.
        analytic, numeric: of each input a matrix, a row for each element of the outputs and a
            column for each element of the input.
        missing: the inputs for which backward gave None.
    """

    values: list[Tensor]
    analytic: list[Tensor]
    numeric: list[Tensor]
    missing: frozenset[int]

    @property
    def finite(self) -> bool:
        return all(bool(m.isfinite().all()) for m in self.analytic + self.numeric)


class Probe:
    """A function and its inputs.

    The function always gets the tensors that were given, with other values in them for a while:
    it may hold them by other ways than its arguments, as a module holds its parameters.

    Attributes:
        leaves: the inputs that require grad, at the positions `where` of the arguments.
        names: what they are called; `all_names` are those of all arguments.
        chosen: the positions of the outputs that are checked.
        start: their values at first.
        seeded: whether each run draws the same random numbers.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Any],
        eps: float,
        names: Sequence[str] | None = None,
    ) -> None:
        self.fn, self.args, self.eps, self.seeded = fn, tuple(inputs), eps, True
        checked = [i for i, value in enumerate(self.args) if _is_checked(value)]
        all_names = names or argument_names(fn, len(self.args))
        self.all_names = list(all_names)
        self.where = checked
        self.names = [all_names[i] for i in checked]
        self.leaves: list[Tensor] = [self.args[i] for i in checked]
        self.start = [leaf.detach().clone() for leaf in self.leaves]
        self.devices = sorted(
            {x.device.index or 0 for x in self.args if isinstance(x, Tensor) and x.is_cuda}
        )
        self.chosen: list[int] = []
        self._known = False
        outputs = self.outputs()
        self.shapes = [tuple(output.shape) for output in outputs]
        self.outputs_real = [not output.is_complex() for output in outputs]
        self.dtypes = [output.dtype for output in outputs]
        self.sizes = [real(output).numel() for output in outputs]
        self.dense = all(t.layout is torch.strided for t in [*self.leaves, *outputs])

    # ---- running it

    def restore(self) -> None:
        """Put the first values back."""
        self.set(self.start)

    def set(self, values: Sequence[Tensor]) -> None:
        for leaf, value in zip(self.leaves, values, strict=True):
            leaf.data.copy_(value)

    def outputs(self) -> list[Tensor]:
        """The outputs that are checked: those that require grad; if none does, all."""
        with torch.enable_grad(), torch.random.fork_rng(self.devices, self.seeded):
            if self.seeded:
                torch.manual_seed(0)
            made = as_tuple(self.fn(*self.args))
        if not self._known:
            self._known = True
            floating = [
                i
                for i, value in enumerate(made)
                if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            ]
            self.chosen = [i for i in floating if made[i].requires_grad] or floating
        return [made[i] for i in self.chosen]

    def value(self) -> Tensor:
        """All outputs as one vector."""
        parts = [real(output) for output in self.outputs()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def upstream(self, seed: int) -> Tensor:
        """A random vector, a number for each element of the outputs."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.size, dtype=torch.float64, generator=generator)

    def split(self, upstream: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The parts of such a vector as gradients of the outputs."""
        made = []
        for part, output in zip(upstream.split(self.sizes), outputs, strict=True):
            if output.is_complex():
                wide = torch.view_as_complex(part.reshape(*output.shape, 2).contiguous())
                made.append(wide.to(output.device, output.dtype))
            else:
                made.append(part.to(output.device, output.dtype).reshape(output.shape).clone())
        return made

    def backward(
        self,
        upstream: Tensor,
        outputs: Sequence[Tensor] | None = None,
        retain: bool = False,
    ) -> list[Tensor | None]:
        """The gradients of the inputs, as autograd returns them."""
        outputs = self.outputs() if outputs is None else outputs
        pairs = [
            (output, part)
            for output, part in zip(outputs, self.split(upstream, outputs), strict=True)
            if output.requires_grad and (retain is False or bool(part.any()) or len(outputs) == 1)
        ]
        if not pairs:
            return [None] * len(self.leaves)
        given, parts = zip(*pairs, strict=True)
        return list(
            torch.autograd.grad(given, self.leaves, parts, retain_graph=retain, allow_unused=True)
        )

    def vjp(
        self,
        upstream: Tensor,
        outputs: Sequence[Tensor] | None = None,
        retain: bool = False,
    ) -> list[Tensor]:
        """The gradients of the inputs as vectors, zero where there is none."""
        return [
            torch.zeros(real(leaf).numel(), dtype=torch.float64)
            if grad is None
            else real(grad.to_dense() if grad.layout is not torch.strided else grad).cpu()
            for leaf, grad in zip(
                self.leaves, self.backward(upstream, outputs, retain), strict=True
            )
        ]

    # ---- the two Jacobians

    def analytic(self) -> tuple[list[Tensor], frozenset[int]]:
        """Backward's Jacobians, a row for each element of the outputs; the inputs with None."""
        outputs = self.outputs()
        rows = [
            torch.stack(parts)
            for parts in zip(
                *(
                    self.vjp(row, outputs, retain=True)
                    for row in torch.eye(self.size, dtype=torch.float64)
                ),
                strict=True,
            )
        ]
        if not rows:  # no output at all
            return [torch.zeros(0, real(leaf).numel()) for leaf in self.leaves], frozenset()
        ones = torch.ones(self.size, dtype=torch.float64)
        none = [i for i, grad in enumerate(self.backward(ones, outputs)) if grad is None]
        return rows, frozenset(none)

    def shifted(self, step: float) -> list[tuple[Tensor, Tensor]]:
        """Of each input the outputs at x + step and x - step, a column for each element."""
        made = []
        for leaf in self.leaves:
            data = torch.view_as_real(leaf.data) if leaf.is_complex() else leaf.data
            columns: tuple[list[Tensor], list[Tensor]] = ([], [])
            for index in itertools.product(*map(range, data.shape)):
                held = data[index].clone()
                try:
                    for side, sign in zip(columns, (1, -1), strict=True):
                        data[index] = held + sign * step
                        side.append(self.value().cpu())
                finally:
                    data[index] = held
            empty = torch.zeros(self.size, 0, dtype=torch.float64)
            plus, minus = (torch.stack(c, 1) if c else empty for c in columns)
            made.append((plus, minus))
        return made

    def numeric(self, step: float | None = None) -> list[Tensor]:
        """Central differences."""
        step = step or self.eps
        return [(plus - minus) / (2 * step) for plus, minus in self.shifted(step)]

    def point(self, values: Sequence[Tensor] | None = None) -> Point:
        """Both Jacobians at these values of the inputs, or at the first ones."""
        self.set(self.start if values is None else values)
        try:
            held = [leaf.detach().clone() for leaf in self.leaves]
            numeric = self.numeric()
            return Point(held, *_swapped(numeric, self.analytic()))
        finally:
            self.restore()

    def other_values(self) -> Iterator[list[Tensor]]:
        """Other values to look at: some that keep the signs, for functions that want that, some
        that do not."""
        for seed in (1, 2, 3):
            generator = torch.Generator().manual_seed(seed)

            def draw(
                like: Tensor, kind: Callable[..., Tensor], generator: torch.Generator = generator
            ) -> Tensor:
                dtype = torch.float64 if not like.is_complex() else torch.complex128
                return kind(like.shape, dtype=dtype, generator=generator).to(
                    like.device, like.dtype
                )

            if seed < 3:  # zeros are moved too: kinks are there
                yield [
                    torch.where(
                        x.abs() < 1e-3,
                        0.1 + draw(x, torch.rand),
                        x * (0.6 + 0.7 * draw(x, torch.rand)),
                    )
                    for x in self.start
                ]
            else:
                yield [x + 0.5 * draw(x, torch.randn) for x in self.start]


def _swapped(
    numeric: list[Tensor], analytic: tuple[list[Tensor], frozenset[int]]
) -> tuple[list[Tensor], list[Tensor], frozenset[int]]:
    return analytic[0], numeric, analytic[1]


# ---- what stands in the graph


def nodes_of(outputs: Sequence[Tensor]) -> list[Any]:
    """The nodes of autograd's graph behind the outputs."""
    found: dict[Any, None] = {}
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [following for following, _ in node.next_functions]
    return list(found)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a custom Function.

    Attributes:
        function: its class.
        inputs: copies of what it got, tensors that require grad where the given ones did.
    """

    function: type
    inputs: tuple[Any, ...]


def functions_of(outputs: Sequence[Tensor]) -> list[Any]:
    """The classes of the custom Functions behind the outputs."""
    nodes: list[Any] = [node for node in nodes_of(outputs) if isinstance(node, BackwardCFunction)]
    return list(dict.fromkeys(node._forward_cls for node in nodes))


def takes_context(function: Any) -> bool:
    """Whether forward has `ctx` as its first argument."""
    return not _is_setup_context_defined(function.setup_context)


def calls_of(probe: Probe, alone: bool = False) -> list[Call]:
    """The calls of custom Functions, in order, of a function that is more than one such call;
    with `alone` that one call of a function that is no more."""
    outputs = probe.outputs()
    functions = functions_of(outputs)
    others = [
        node for node in nodes_of(outputs) if node.name() != "torch::autograd::AccumulateGrad"
    ]
    if not functions or alone != (len(others) < 2):
        return []
    calls: list[Call] = []

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    def telling(function: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            given = args[1:] if takes_context(function) else args
            calls.append(Call(function, tuple(map(copy, given))))
            return forward(*args, **kwargs)

        return told

    with replaced(functions, "forward", telling):
        probe.outputs()
    return calls


@contextmanager
def replaced(
    functions: Sequence[Any], method: str, made: Callable[[Any, Callable[..., Any]], Any]
) -> Iterator[None]:
    """With made(function, method) in the place of a static method of these classes.

    "backward" is `vjp` where that is what a class defines.
    """
    held = []
    try:
        for function in functions:
            name = method
            if method == "backward" and function.vjp is not Function.vjp:
                name = "vjp"
            held.append((function, name, function.__dict__.get(name)))
            setattr(function, name, staticmethod(made(function, getattr(function, name))))
        yield
    finally:
        for function, name, original in reversed(held):
            if original is None:
                delattr(function, name)
            else:
                setattr(function, name, original)


@contextmanager
def cloned_saves(functions: Sequence[Any]) -> Iterator[None]:
    """With copies in the place of what is kept for backward: later changes do not reach it.

    Copied are saved tensors, and what these classes keep as attributes of `ctx`.
    """
    kept: dict[int, dict[str, Any]] = {}

    def clone(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    def keeping(function: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        def then_keep(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            made = method(ctx, *args, **kwargs)
            kept[id(ctx)] = {
                name: tree_map(clone, value)
                for name, value in vars(ctx).items()
                if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
            }
            return made

        return then_keep

    def giving(function: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        def give_back(ctx: Any, *grads: Any) -> Any:
            vars(ctx).update(tree_map(clone, kept.get(id(ctx), {})))
            return method(ctx, *grads)

        return give_back

    old = [function for function in functions if takes_context(function)]
    new = [function for function in functions if not takes_context(function)]
    with (
        replaced(old, "forward", keeping),
        replaced(new, "setup_context", keeping),
        replaced(functions, "backward", giving),
        torch.autograd.graph.saved_tensors_hooks(clone, clone),
    ):
        yield


def wanted_shapes(ctx: Any) -> list[tuple[int, ...] | None]:
    """Of each argument of a custom Function the shape that its gradient has to have.

    None for what needs no gradient. A node has an edge for each tensor that it was given.
    """
    edges = [
        tuple(node._input_metadata[index].shape)
        for node, index in ctx.next_functions
        if node is not None
    ]
    return [edges.pop(0) if needed and edges else None for needed in ctx.needs_input_grad]
