"""The pictures of `Jacobians.plot`: where a Jacobian has entries, and where it has none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.nn.functional import adaptive_max_pool2d

from .jacobian import Jacobian, Layout
from .text import dims, size

__all__ = ["plot"]

# Cells of a picture along one side; what is larger is drawn coarser.
CELLS = 256

# The smallest entry has a tint of its own: white is nothing at all.
_MINUS, _PLUS = ("#c2410c", "#fbdccd"), ("#cfe0ec", "#2f6f9f")
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", list(zip((0, 0.5, 0.5, 1), _MINUS + _PLUS, strict=True))
)
_UNSIGNED = LinearSegmentedColormap.from_list("unsigned", _PLUS)
_INK = "#333333"


def plot(entries: Sequence[Jacobian], layout: Layout) -> Figure:
    """A figure with a row for each output and a column for each input."""
    inputs = list(dict.fromkeys(entry.input for entry in entries))
    outputs = list(dict.fromkeys(entry.output for entry in entries))
    columns = len(inputs)
    figure = Figure(figsize=(4.2 * columns, 3.8 * len(outputs) + 0.2), layout="constrained")
    grid = figure.subplots(len(outputs), columns, squeeze=False)
    for entry in entries:
        _draw(grid[outputs.index(entry.output)][inputs.index(entry.input)], entry, layout)
    return figure


def _draw(axes: Axes, entry: Jacobian, layout: Layout) -> None:
    """The pattern of one Jacobian: colour where there is an entry, white where there is none."""
    axes.set_title(f"{entry.name}: {size(entry.bytes)}, {entry.structure}", fontsize=10, color=_INK)
    sides = [
        (entry.output, entry.output_shape),
        (entry.input, entry.input_shape),
    ]
    down, across = sides if layout == "torch" else sides[::-1]
    axes.set_ylabel(f"{down[0]} {dims(down[1])}")
    axes.set_xlabel(f"{across[0]} {dims(across[1])}")
    count = down[1].numel(), across[1].numel()
    if entry.bytes > entry.budget or entry._x.is_meta or not all(count):
        why = (
            "above the budget"
            if entry.bytes > entry.budget
            else "on meta"
            if all(count)
            else "empty"
        )
        axes.set(xticks=[], yticks=[])
        axes.text(
            0.5,
            0.5,
            f"{count[0]:,} x {count[1]:,}\n{size(entry.bytes)}\n{why}",
            ha="center",
            va="center",
            transform=axes.transAxes,
            color=_INK,
        )
        return
    values = entry.explicit().reshape(sides[0][1].numel(), -1).detach().float().cpu()
    values = values if layout == "torch" else values.t()
    coarse = max(count) > CELLS
    if coarse:
        cells = min(CELLS, count[0]), min(CELLS, count[1])
        values = adaptive_max_pool2d(values.abs()[None], cells)[0]
    largest = values[values.isfinite()].abs().max().item() if values.isfinite().any() else 0.0
    top = largest or 1.0
    colours = values.nan_to_num(nan=top, posinf=top, neginf=-top)
    picture = axes.imshow(
        np.ma.masked_equal(colours.numpy(), 0),
        cmap=_UNSIGNED if coarse else _SIGNED,
        vmin=0 if coarse else -top,
        vmax=top,
        interpolation="nearest",
        extent=(-0.5, count[1] - 0.5, count[0] - 0.5, -0.5),
        aspect="equal" if max(count) <= 4 * min(count) else "auto",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if max(count) <= 12:
        cells_of = itertools.product(range(count[0]), range(count[1]))
        for (i, j), value in zip(cells_of, values.flatten().tolist(), strict=True):
            if value:
                ink = "white" if not abs(value) <= 0.6 * top else _INK
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=8)
    label = "largest |entry| of a cell" if coarse else "entry"
    axes.figure.colorbar(picture, ax=axes, shrink=0.85, label=label)
