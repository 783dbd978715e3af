"""The tests of a GPU where there is none: csrc/cuda, built for the CPU with an emulator of its
threads (on_cpu/), takes the place of the CPU's kernels in a process of its own.

That tells whether the kernels compute the right thing, index by index and barrier by barrier. It
tells nothing of speed, and does not stand in for a run on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.on_cpu.build import ROOT, build

#: What runs on the emulator: the GPU's own tests, and others of the operations that it has.
TESTS = (
    "tests/cuda/test_cuda.py",
    "tests/cuda/test_narrow.py",
    "tests/cuda/test_step.py",
    "tests/cuda/test_scripts.py",
    "tests/cuda/emulator.py",
    "tests/optim/test_step.py::test_checkpoint_in_the_middle",
    "tests/optim/test_step.py::test_state_that_is_replaced",
    "tests/optim/test_step.py::test_hyperparameters_are_read_in_every_step",
    "tests/optim/test_step.py::test_models",
    "tests/optim/test_step.py::test_inputs_of_any_strides",
    "tests/optim/test_step.py::test_refusals_change_nothing",
    "tests/optim/test_optimizers.py::test_refusals_change_nothing",
    "tests/optim/test_optimizers.py::test_layouts",
    "tests/functions/test_softmax_ce.py::test_special_values",
    "tests/functions/test_softmax_ce.py::test_upstream_gradients",
    "tests/functions/test_softmax_ce.py::test_ignored_rows_have_no_gradient_whatever_arrives",
)


@pytest.fixture
def emulator(tmp_path: Path) -> Path:
    return build(tmp_path)


def test_kernels(emulator: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda.on_cpu.plugin", *TESTS]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TORCHBP_EMULATOR": str(emulator), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]
