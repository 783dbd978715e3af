"""torchbp.train.figures: what is drawn is what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from torchbp.train import figures

CLASSES = ["cat", "dog", "frog"]
HISTORY = [
    {
        "epoch": i + 1,
        "train_loss": 2 / (i + 1),
        "test_loss": 2.2 / (i + 1),
        "train_accuracy": 30.0 + i,
        "test_accuracy": 28.0 + i,
    }
    for i in range(4)
]


def test_curves_show_the_rows() -> None:
    figure = figures.curves(HISTORY)
    for axes, quantity in zip(figure.axes, ("loss", "accuracy"), strict=True):
        for line, split in zip(axes.lines, ("train", "test"), strict=True):
            assert np.asarray(line.get_xdata()).tolist() == [1, 2, 3, 4]
            assert np.asarray(line.get_ydata()).tolist() == [
                row[f"{split}_{quantity}"] for row in HISTORY
            ]
            assert split in str(line.get_label())
        assert axes.get_xlabel() == "epoch"
        assert quantity in axes.get_ylabel()


def test_curves_of_nothing() -> None:
    with pytest.raises(ValueError, match="curves: history is empty"):
        figures.curves([])


def test_templates_are_the_units_of_largest_norm_largest_first() -> None:
    weight = torch.full((6, 3072), 0.1) * torch.tensor([3.0, 1, 6, 2, 5, 4])[:, None]
    weight[:, 0] *= -torch.tensor([3.0, 1, 6, 2, 5, 4])  # a mark to tell the units by
    figure = figures.templates(weight, most=3)
    assert "the 3 of 6 units" in figure.get_suptitle()
    images = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    largest = torch.tensor([6.0, 5, 4])  # units 2, 4 and 5
    for image, norm in zip(images, largest.tolist(), strict=True):
        assert image.shape == (32, 32, 3)
        # Scaled by the largest magnitude, that of pixel 0: from -1 (black) over 0 (grey) to 1.
        assert image[0, 0, 0] == pytest.approx(0)
        assert image[0, 1, 0] == pytest.approx(0.5 + 0.5 / norm)


def test_templates_lay_out_channels_rows_columns() -> None:
    weight = torch.zeros(1, 3, 32, 32)
    weight[0, 2, 5, 7] = 1.0  # blue, row 5, column 7
    (axes,) = figures.templates(weight.reshape(1, 3072)).axes
    image = np.asarray(axes.images[0].get_array())
    assert image[5, 7].tolist() == [0.5, 0.5, 1.0]
    assert (image == 0.5).sum() == image.size - 1


def test_templates_of_zeros_are_grey() -> None:
    (axes,) = figures.templates(torch.zeros(1, 3072)).axes
    assert (np.asarray(axes.images[0].get_array()) == 0.5).all()


def test_templates_of_a_linear_classifier_are_named() -> None:
    figure = figures.templates(torch.randn(3, 3072), CLASSES)
    assert [axes.get_title() for axes in figure.axes] == CLASSES


@pytest.mark.parametrize("shape", [(3072,), (4, 100)])
def test_templates_refuse_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"templates: weight must be \[H, 3072\], got"):
        figures.templates(torch.zeros(shape))


def test_confusion_in_percent_of_each_row() -> None:
    counts = torch.tensor([[3, 1, 0], [0, 10, 0], [0, 0, 0]])  # no frog at all
    axes = figures.confusion(counts, CLASSES).axes[0]
    want = [[75, 25, 0], [0, 100, 0], [0, 0, 0]]
    assert np.asarray(axes.images[0].get_array()).tolist() == want
    assert [text.get_text() for text in axes.texts] == [str(v) for row in want for v in row]
    assert axes.get_title() == "Of all images, 92.86 % are classified right"  # 13 of 14
    assert [label.get_text() for label in axes.get_yticklabels()] == CLASSES
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_confusion_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match="3 classes, got"):
        figures.confusion(torch.zeros(2, 2), CLASSES)


def test_saved_as_png(tmp_path: Path) -> None:
    figures.save_figure(tmp_path / "curves.png", figures.curves(HISTORY))
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    data = (tmp_path / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
