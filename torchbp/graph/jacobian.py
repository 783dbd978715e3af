"""The explicit Jacobian: how large it would be, its structure, and what forming it costs.

Backpropagation never forms it: it multiplies the upstream gradient with it implicitly. Here it can
be looked at all the same, where it is small enough.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from .calling import (
    arguments,
    check_function,
    kinds,
    name_of,
    not_connected,
    outputs_of,
    unchanged,
)
from .text import dims, dtype_name, duration, render, size, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Costs", "Jacobian", "Jacobians", "jacobian"]

Layout = Literal["torch", "lecture"]
Structure = Literal["zero", "diagonal", "block diagonal by row", "dense", "unknown"]

# Elements of the upstream and downstream gradients that one batch of rows may take.
_BATCH = 2**23


def jacobian(
    fn: Callable[..., Any], *inputs: Any, budget: float = 2**30, parameters: bool = False
) -> Jacobians:
    """The Jacobian of each output of `fn` with respect to each floating input, without forming it.

    Shapes and bytes are computed before anything is allocated. The structure is found by probing
    with random upstream gradients, at these inputs (another x, another ReLU): at most
    1 + 2 ceil(log2 N) + 2 ceil(log2 numel) implicit products for a Jacobian.

    Args:
        fn: a function or module, on tensors; it is called once. Nothing of it changes: neither
            `.grad`, nor inputs, nor the random state, nor buffers of the modules that its code
            names.
        inputs: its arguments. Tensors may be in lists, tuples and dicts. What is no floating
            tensor is passed on as it is. Tensors on "meta" give sizes alone.
        budget: the most bytes that an explicit Jacobian may take.
        parameters: whether the parameters of the module `fn` that require grad count as inputs.

    Returns:
        a collection of `Jacobian`, which prints as a table. It keeps the graph of the call.

    Raises:
        TypeError: `fn` is not callable, or returns no floating tensor; `budget` is no number;
            `parameters` without a module.
        ValueError: no input is a floating tensor, `budget` is negative, autograd cannot
            differentiate `fn`, or it has lazy parameters.

    Example:
        >>> x, w = torch.ones(64, 4096, device="meta"), torch.ones(4096, 4096, device="meta")
        >>> product = jacobian(torch.matmul, x, w)
        >>> [size(entry.bytes) for entry in product]
        ['256 GiB', '16 TiB']
        >>> (relu,) = jacobian(torch.relu, torch.tensor([1.0, -2.0, 3.0, -1.0]))
        >>> relu.structure, size(relu.bytes)
        ('diagonal', '64 B')
        >>> relu.explicit()
        tensor([[1., 0., 0., 0.],
                [0., 0., 0., 0.],
                [0., 0., 1., 0.],
                [0., 0., 0., 0.]])
        >>> relu.vjp(torch.tensor([4.0, -1.0, 5.0, 9.0]))  # the same product, implicitly
        tensor([4., 0., 5., 0.])
    """
    check_function("jacobian", fn)
    if not isinstance(budget, Real) or isinstance(budget, bool):
        raise TypeError(f"jacobian: budget wants a number of bytes, got {type(budget).__name__}")
    if not budget >= 0:
        raise ValueError(f"jacobian: budget wants a number of bytes >= 0, got {budget}")
    if parameters and not isinstance(fn, Module):
        raise TypeError(f"jacobian: parameters=True wants fn to be a module, got {name_of(fn)}")
    with unchanged(fn, inputs):
        args, leaves, _ = arguments(fn, inputs, lambda _: True)
        if parameters and isinstance(fn, Module):
            own = {name: p for name, p in fn.named_parameters() if p.requires_grad}
            leaves |= {f"self.{n}" if n in leaves else n: p for n, p in own.items()}
        if not leaves:
            raise ValueError(
                "jacobian: inputs want at least one floating tensor, got "
                f"{kinds(pytree.tree_leaves(inputs))}"
            )
        outputs = outputs_of("jacobian", fn, fn(*args))
        if not any(y.requires_grad for y in outputs.values()):
            raise not_connected("jacobian", fn)
        return Jacobians(
            name_of(fn),
            [
                Jacobian(name_of(fn), out, y, given, x, int(min(budget, 2**63)))
                for out, y in outputs.items()
                for given, x in leaves.items()
            ],
        )


class Jacobian:
    """dy/dx of one output y with respect to one input x.

    Attributes:
        output, input: their names.
        output_shape, input_shape: their shapes.
        dtype: of the Jacobian: x's, as of a gradient.
        shape: in PyTorch's layout, y.shape + x.shape: entry [i, j] is dy_i/dx_j.
        lecture_shape: in the lecture's layout, x.shape + y.shape: input x output, the transpose.
        bytes: of the explicit Jacobian.
        budget: the most bytes to allocate for it.
        structure: "zero"; "diagonal": y_i depends on x_i alone, in the order of the elements;
            "block diagonal by row": y[n] depends on x[n] alone; "dense": none of these, though
            there may be zeros; "unknown": on meta, or where gradients are not finite.
        probed: what the structure rests on.
    """

    def __init__(self, fn: str, output: str, y: Tensor, input: str, x: Tensor, budget: int) -> None:
        self.fn, self.output, self.input, self.budget = fn, output, input, budget
        self._y, self._x = y, x
        self.output_shape, self.input_shape = y.shape, x.shape
        self.dtype = x.dtype
        self.shape = y.shape + x.shape
        self.lecture_shape = x.shape + y.shape
        self.bytes = math.prod(self.shape) * x.element_size()
        self.structure: Structure
        self.structure, self.probed = _structure(self)

    @property
    def name(self) -> str:
        """Such as "dy/dx"."""
        return f"d{self.output}/d{self.input}"

    def vjp(self, upstream: Tensor) -> Tensor:
        """dL/dx from the upstream gradient dL/dy: the product with the Jacobian, implicitly.

        Args:
            upstream: the shape of y.

        Returns:
            the shape of x.

        Raises:
            TypeError: `upstream` is no tensor.
            ValueError: it has another shape, or autograd cannot differentiate the function.
        """
        if not isinstance(upstream, Tensor):
            raise TypeError(
                f"{self.name}: upstream wants a torch.Tensor, got {type(upstream).__name__}"
            )
        if upstream.shape != self.output_shape:
            raise ValueError(
                f"{self.name}: upstream wants the shape of {self.output}, "
                f"{dims(self.output_shape)}, got {dims(upstream.shape)}"
            )
        gradient = self._gradient(upstream)
        return torch.zeros_like(self._x) if gradient is None else gradient

    def explicit(self, layout: Layout = "torch") -> Tensor:
        """The matrix itself, row by row from implicit products.

        Args:
            layout: "torch" for y.shape + x.shape, "lecture" for x.shape + y.shape.

        Raises:
            MemoryError: it takes more bytes than the budget. Nothing is allocated.
            ValueError: the tensors are on meta, `layout` is unknown, or autograd cannot
                differentiate the function.

        Example:
            >>> w = torch.tensor([[1.0, 2.0, 3.0]])
            >>> (product,) = jacobian(lambda x: x @ w, torch.ones(1))
            >>> product.explicit().shape, product.explicit("lecture").shape
            (torch.Size([3, 1]), torch.Size([1, 3]))
        """
        _check_layout(layout)
        if self.bytes > self.budget:
            raise MemoryError(
                f"{self.name} of shape {dims(self.shape)} takes {size(self.bytes)}, above the "
                f"budget of {size(self.budget)}: multiply with it implicitly (vjp), or give "
                "jacobian a larger budget"
            )
        if self._x.is_meta or self._y.is_meta:
            raise ValueError(f"{self.name}: tensors on meta have sizes and no values")
        rows = self._rows().view(self.shape)
        if layout == "torch":
            return rows
        split = len(self.output_shape)
        return rows.permute((*range(split, rows.dim()), *range(split)))

    def __getitem__(self, index: Any) -> Tensor:
        """Entries of the explicit Jacobian in PyTorch's layout: `entry[:]` is all of it."""
        return self.explicit()[index]

    def _gradient(self, upstream: Tensor, batched: bool = False) -> Tensor | None:
        """The gradient of x, None where y is not connected to it."""
        if not self._y.requires_grad:
            return None
        try:
            with torch.inference_mode(False):
                (gradient,) = torch.autograd.grad(
                    self._y,
                    self._x,
                    upstream,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"{self.name}: autograd cannot differentiate {self.fn}: {error}"
            ) from error
        return gradient

    def _rows(self) -> Tensor:
        """[y.numel(), x.numel()]: row i is the gradient of y_i."""
        y, x = self._y, self._x
        made = torch.zeros(y.numel(), x.numel(), dtype=x.dtype, device=x.device)
        many = max(1, _BATCH // max(1, y.numel() + x.numel()))
        batched = True
        for start in range(0, y.numel() if x.numel() else 0, many):
            part = made[start : start + many]
            upstream = y.new_zeros(len(part), y.numel())
            upstream.diagonal(start).fill_(1)
            upstream = upstream.view(-1, *y.shape)
            rows = None
            if batched:
                try:
                    rows = self._gradient(upstream, batched=True)
                except Exception:  # a backward that vmap cannot run may raise anything
                    batched = False
            if batched:
                if rows is None:  # not connected: zeros
                    break
                part.copy_(rows.reshape(part.shape))
            else:
                for row, one in zip(part, upstream, strict=True):
                    row.copy_(self.vjp(one).reshape(-1))
        return made

    def costs(self, min_run_time: float = 0.1) -> Costs:
        """Time and memory of the explicit against the implicit product. See `Jacobians.costs`."""
        own = self.output_shape.numel() * self._y.element_size()
        implicit = own + self.input_shape.numel() * self._x.element_size()
        forming = product = by_vjp = None
        if not (self._y.is_meta or self._x.is_meta):
            upstream = torch.ones_like(self._y, requires_grad=False)
            by_vjp = _median(partial(self.vjp, upstream), min_run_time)
            if self.bytes <= self.budget:
                rows, flat = self._rows(), upstream.reshape(-1).to(self.dtype)
                forming = _median(self._rows, min_run_time)
                product = _median(partial(torch.mv, rows.t(), flat), min_run_time)
        return Costs(self.name, forming, product, by_vjp, self.bytes, implicit)

    def plot(
        self, path: str | os.PathLike[str] | None = None, layout: Layout = "lecture"
    ) -> Figure:
        """The picture of this one; see `Jacobians.plot`."""
        return Jacobians(self.fn, [self]).plot(path, layout)

    def __repr__(self) -> str:
        return f"<Jacobian {self.name} {dims(self.shape)}: {size(self.bytes)}, {self.structure}>"


class Jacobians:
    """The Jacobians of a call: of each output, with respect to each input.

    It has a length, iterates, and is indexed by the input's name (where there is one output), by
    (output, input), or by position.

    Example:
        >>> found = jacobian(lambda x, w: x @ w, torch.ones(5, 3), torch.ones(3, 4))
        >>> found["x"].structure, found["y", "w"].shape
        ('block diagonal by row', torch.Size([5, 4, 3, 4]))
    """

    def __init__(self, fn: str, entries: list[Jacobian]) -> None:
        self.fn = fn
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Jacobian]:
        return iter(self.entries)

    def __getitem__(self, key: int | str | tuple[str, str]) -> Jacobian:
        if isinstance(key, int):
            return self.entries[key]
        outputs = {entry.output for entry in self.entries}
        for entry in self.entries:
            if key == (entry.output, entry.input) or (len(outputs) == 1 and key == entry.input):
                return entry
        known = ", ".join(repr((entry.output, entry.input)) for entry in self.entries)
        raise KeyError(f"jacobian: no {key!r}; there are {known}")

    @property
    def bytes(self) -> int:
        """Of all of them together, were they formed."""
        return sum(entry.bytes for entry in self.entries)

    def costs(self, min_run_time: float = 0.1) -> list[Costs]:
        """Time and memory of the explicit product, measured, against the implicit one.

        Args:
            min_run_time: seconds for which each time is measured; it is the median.

        Returns:
            one `Costs` for each Jacobian. Times are None on meta, and the explicit ones above the
            budget.

        Example:
            >>> (cost,) = jacobian(torch.relu, torch.ones(100)).costs(min_run_time=0)
            >>> cost.explicit_bytes, cost.implicit_bytes
            (40000, 800)
        """
        return [entry.costs(min_run_time) for entry in self.entries]

    def plot(
        self, path: str | os.PathLike[str] | None = None, layout: Layout = "lecture"
    ) -> Figure:
        """A picture of the pattern of each: one row of pictures an output, one column an input.

        Tensors are flattened. A Jacobian with more than 256 rows or columns is drawn coarser, with
        the largest absolute value of each cell; above the budget or on meta its size stands there.
        White is exactly zero; what is not finite is drawn as the largest.

        Args:
            path: where to save it as well, in the format of its suffix (.png, .svg, .pdf).
            layout: "lecture" for input x output, "torch" for output x input.

        Raises:
            ValueError: `layout` is unknown.

        Example:
            >>> figure = jacobian(torch.relu, torch.tensor([1.0, -2.0])).plot()
            >>> figure.axes[0].get_title()
            'dy/dx: 16 B, diagonal'
        """
        _check_layout(layout)
        # matplotlib takes longer to import than all the rest.
        from .jacobian_plot import plot

        figure = plot(self.entries, layout)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __rich__(self) -> Table:
        return table(
            ["output", "input", ">shape [output, input]", "dtype", ">bytes", "structure", "probed"],
            [
                [
                    f"{entry.output} {dims(entry.output_shape)}",
                    f"{entry.input} {dims(entry.input_shape)}",
                    dims(entry.shape),
                    dtype_name(entry.dtype),
                    size(entry.bytes),
                    entry.structure,
                    entry.probed,
                ]
                for entry in self.entries
            ],
            title=f"Jacobians of {self.fn}",
            caption=f"Together {size(self.bytes)}; the budget for one is "
            f"{size(self.entries[0].budget)}. The lecture's layout is the transpose, "
            "[input, output]. Dense is what has none of the other structures.",
        )

    def __str__(self) -> str:
        return render(self)

    def __repr__(self) -> str:
        return f"<Jacobians of {self.fn}: {', '.join(map(repr, self.entries))}>"


@dataclass(frozen=True)
class Costs:
    """What the product of an upstream gradient with a Jacobian costs, explicit and implicit.

    Attributes:
        name: such as "dy/dx".
        forming: seconds to form the matrix; None if it was not formed.
        product: seconds to multiply with it once it is there; None if it was not formed.
        implicit: seconds of the implicit product, one backward; None on meta.
        explicit_bytes: of the matrix.
        implicit_bytes: of the upstream gradient and the product, all that the implicit one holds
            besides what forward saved (`torchbp.graph.saved`).
    """

    name: str
    forming: float | None
    product: float | None
    implicit: float | None
    explicit_bytes: int
    implicit_bytes: int

    def __str__(self) -> str:
        forming, product, implicit = (
            "not measured" if seconds is None else duration(seconds)
            for seconds in (self.forming, self.product, self.implicit)
        )
        return (
            f"{self.name}: explicit {size(self.explicit_bytes)}, forming {forming}, then "
            f"{product} a product; implicit {size(self.implicit_bytes)}, {implicit} a product"
        )


def _check_layout(layout: str) -> None:
    if layout not in ("torch", "lecture"):
        raise ValueError(f'jacobian: layout wants "torch" or "lecture", got {layout!r}')


def _median(run: Callable[[], Any], min_run_time: float) -> float:
    from torch.utils import benchmark  # slow to import

    timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


class _NotFinite(Exception):
    """A probe met NaN or an infinity, and says nothing."""


def _structure(entry: Jacobian) -> tuple[Structure, str]:
    """The structure, and what it rests on.

    Whether block i of x is reached from block i of y alone is settled by 2 ceil(log2 count)
    upstream gradients: for each bit of the blocks' numbers, random values in the blocks that have
    the bit, zeros elsewhere, and the other way round. Any two blocks differ in a bit, so that one
    of the probes has the one and not the other: an entry of the Jacobian between them would show
    as a gradient where there was nothing upstream. What is zero is exactly zero; that random
    values cancel, or that a tiny product underflows, are the ways to be wrong.
    """
    y, x = entry._y, entry._x
    if y.is_meta or x.is_meta:
        return "unknown", "tensors on meta have no values"
    if not y.numel() or not x.numel():
        return "zero", "it has no entries"
    if not y.requires_grad:
        return "zero", f"{entry.output} does not require grad"
    generator = torch.Generator(y.device).manual_seed(0)
    probes = 0

    def gradient(chosen: Tensor | None = None) -> Tensor | None:
        """Of random values with absolute values from 1 to 2, in the chosen blocks."""
        nonlocal probes
        probes += 1
        options: dict[str, Any] = {"generator": generator, "device": y.device, "dtype": y.dtype}
        upstream = torch.rand(y.shape, **options) + 1
        upstream = torch.where(torch.rand(y.shape, **options) < 0.5, -upstream, upstream)
        if chosen is not None:
            blocks = upstream.reshape(len(chosen), -1)
            upstream = torch.where(chosen.unsqueeze(1), blocks, 0).reshape(y.shape)
        found = entry._gradient(upstream)
        if found is not None and not found.isfinite().all():
            raise _NotFinite
        return found

    def separate(count: int) -> bool:
        """Whether each of `count` blocks of x is reached from its own block of y alone."""
        number = torch.arange(count, device=y.device)
        for bit in range((count - 1).bit_length()):
            one = (number >> bit) % 2 == 1
            for chosen in (one, ~one):
                found = gradient(chosen)
                if found is not None and found.reshape(count, -1)[~chosen].any():
                    return False
        return True

    try:
        found = gradient()
        if found is None:
            return "zero", f"no path in the graph leads to {entry.input}"
        if not found.any():
            return "zero", "1 random upstream gradient"
        rows = y.dim() > 0 and x.dim() > 0 and len(y) == len(x) > 1
        structure: Structure = "dense"
        if not rows or separate(len(y)):
            structure = "block diagonal by row" if rows else "dense"
            if y.numel() == x.numel() and separate(y.numel()):
                structure = "diagonal"
    except _NotFinite:
        return "unknown", f"gradient {probes} of random upstream gradients was not finite"
    return structure, f"{probes} random upstream gradient{'s' if probes > 1 else ''}"
