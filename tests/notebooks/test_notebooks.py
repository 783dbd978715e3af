"""The notebooks run from top to bottom, print the lecture's numbers, and hold no outputs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@cache
def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; nbclient raises on a cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    return NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


@every_notebook
def test_notebook_runs_without_error_or_warning(path: Path) -> None:
    for output in outputs(executed(path)):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


@every_notebook
def test_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert outputs(notebook) == []
    assert all(cell.get("execution_count") is None for cell in notebook.cells)


def test_backprop_prints_the_lectures_numbers() -> None:
    text = printed(executed(ROOT / "notebooks" / "01_backprop.ipynb"))
    for line in (
        "q = 3.0, f = -12.0",
        "df/dx = -4.0, df/dy = -4.0, df/dz = 3.0",
        "L = 0.73",
        "grad_x0 =  0.3932",
        "explicit: tensor([4., 0., 5., 0.])\nimplicit: tensor([4., 0., 5., 0.])",
        "dL/dx = [[0.0, 16.0, -9.0], [-24.0, 9.0, -30.0]]",
        "probabilities  ['0.13', '0.87', '0.00']",
        "loss           2.04",
        "gradcheck: Jacobian mismatch",
    ):
        assert line in text
    assert text.count("proved: True") == 2
    assert "proved: False" not in text


def test_backprop_trains_a_network_on_the_spirals_with_either_loss() -> None:
    text = printed(executed(ROOT / "notebooks" / "01_backprop.ipynb"))
    accuracies = [float(value) for value in re.findall(r"accuracy ([\d.]+) %", text)]
    # 100 % each, by margins of loss that leave room for another machine's rounding.
    assert len(accuracies) == 2
    assert min(accuracies) >= 98


def test_backprop_draws_its_figures() -> None:
    notebook = executed(ROOT / "notebooks" / "01_backprop.ipynb")
    figures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(figures) == 7
