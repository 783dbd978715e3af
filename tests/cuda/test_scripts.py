"""The training scripts on a GPU, on a few images in CIFAR-10's binary layout.

On the emulator the loader stays the CPU's, and there are no graphs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import torchbp.data.cifar10
from scripts import speedrun, train_cifar10
from tests.machine import EMULATED, GPU
from tests.scripts.cifar import write_cifar
from torchbp.optim import step as step_module

pytestmark = pytest.mark.gpu

IMAGES = 60  # in each of the six files, in place of 10,000


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torchbp.data.cifar10, "IMAGES_PER_FILE", IMAGES)
    if EMULATED:  # whose GPU is called the CPU
        monkeypatch.setattr(step_module, "is_gpu", lambda device: True)
    return write_cifar(tmp_path, IMAGES, contrast=50)


def test_a_run_is_that_of_torch(data: Path, tmp_path: Path) -> None:
    """From the same weights, on the same batches, a compiled step against autograd's."""
    history = []
    for kind in ("--baseline", "--compile", "--no-compile"):
        flags = ["--data-dir", str(data), "--device", GPU, "--output", str(tmp_path / kind), kind]
        flags += ["--hidden", "8", "6", "-b", "50", "--epochs", "2", "--no-plots"]
        assert train_cifar10.main(flags) == 0
        (folder,) = (tmp_path / kind).iterdir()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        history.append([{k: v for k, v in row.items() if "second" not in k} for row in rows])
    for wanted, *others in zip(*history, strict=True):
        for row in others:
            assert row == pytest.approx(wanted, rel=1e-3)  # float32, 12 steps


def test_a_speedrun_learns(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        speedrun.RECIPES[60], hidden=(16,), components=24, batch_size=25, epochs=5, lr=0.05
    )
    monkeypatch.setitem(speedrun.RECIPES, 60, small)
    file = tmp_path / "runs.json"
    flags = ["--data-dir", str(data), "--device", GPU, "--seeds", "1", "--json", str(file)]
    assert speedrun.main(flags) == 0
    (run,) = json.loads(file.read_text())["runs"]
    assert run["accuracy"] > 40  # chance: 10
