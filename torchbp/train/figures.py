"""Figures of a run: learning curves, first-layer weights as images, the confusion matrix."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from torchbp.train.files import write_file

TRAIN, TEST = "tab:blue", "tab:orange"


def curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss and accuracy by epoch, training and test, from the rows of `fit`.

    Raises:
        ValueError: `history` is empty.

    Example:
        >>> row = dict(epoch=1, train_loss=2, train_accuracy=30, test_loss=1.9, test_accuracy=35)
        >>> [axes.get_ylabel() for axes in curves([row]).axes]
        ['loss', 'accuracy in %']
    """
    if not history:
        raise ValueError("curves: history is empty")
    figure = _figure(9, 3.8)
    epochs = [row["epoch"] for row in history]
    for axes, quantity, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("loss", "accuracy in %"), strict=True
    ):
        for split, colour, note in (
            ("train", TRAIN, "training, running mean"),
            ("test", TEST, "test"),
        ):
            values = [row[f"{split}_{quantity}"] for row in history]
            axes.plot(
                epochs,
                values,
                marker="o",
                markersize=4,
                color=colour,
                label=f"{note}: {values[-1]:.4g}",
            )
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def templates(weight: Tensor, classes: Sequence[str] = (), most: int = 100) -> Figure:
    """The rows of a first layer as images: what each unit looks for. Grey is zero, in every image.

    Args:
        weight: [H, 3072], rows laid out as images [3, 32, 32].
        classes: names for the images where there is one unit a class, as in a linear classifier.
        most: where there are more units, those with the largest norm are drawn, largest first.

    Raises:
        ValueError: `weight` is of another shape.

    Example:
        >>> import torch
        >>> len(templates(torch.randn(12, 3072)).axes)
        12
    """
    if weight.ndim != 2 or weight.shape[1] != 3 * 32 * 32:
        raise ValueError(f"templates: weight must be [H, 3072], got {list(weight.shape)}")
    weight = weight.detach().float().cpu()
    units = len(weight)
    if named := units == len(classes):
        title = "The templates of a linear classifier, one a class"
    elif units > most:
        weight = weight[weight.norm(dim=1).argsort(descending=True)[:most]]
        title = f"First-layer weights: the {most} of {units} units with the largest norm"
    else:
        title = f"First-layer weights of {units} units"
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    images = (0.5 + 0.5 * weight / largest).reshape(-1, 3, 32, 32).permute(0, 2, 3, 1).numpy()

    columns = 5 if named else min(10, len(images))
    rows = -(-len(images) // columns)
    size = 1.5 if named else 0.85
    figure = _figure(size * columns, size * rows + (0.2 * rows if named else 0) + 0.45)
    for index, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        if named:
            axes.set_title(classes[index], fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def confusion(counts: Tensor, classes: Sequence[str]) -> Figure:
    """The confusion matrix in percent of each row's images; rows the truth, columns the prediction.

    Args:
        counts: [C, C], as `confusion_matrix` makes it.
        classes: the C names.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> import torch
        >>> confusion(torch.tensor([[3, 1], [0, 4]]), ["cat", "dog"]).axes[0].get_title()
        'Of all images, 87.50 % are classified right'
    """
    if list(counts.shape) != [len(classes)] * 2:
        raise ValueError(
            f"confusion: counts must be [C, C] for {len(classes)} classes, got {list(counts.shape)}"
        )
    matrix = counts.double().cpu().numpy()
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = _figure(7.2, 6.4)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(share):
        axes.text(
            j,
            i,
            f"{value:.0f}",
            ha="center",
            va="center",
            color="white" if value > 55 else "black",
            fontsize=9,
        )
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, classes)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(
        f"Of all images, {100 * matrix.trace() / max(matrix.sum(), 1):.2f} % are classified right"
    )
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.85)
    return figure


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write `figure` as a PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15)
    write_file(path, buffer.getvalue())


def _figure(width: float, height: float) -> Figure:
    """A figure apart from pyplot: no window, no global state; saving picks the PNG canvas (Agg)."""
    return Figure(figsize=(width, height), layout="constrained")
