"""scripts/benchmark_gpu.py, on the CPU: that every case runs and computes what PyTorch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmark_gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_every_case_runs(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    peers = ["--peers", "copy", "torch", "torch, graph"]  # the others take minutes to compile
    done = run(
        "--device", "cpu", "--quick", "--seconds", "0.01", "--json", str(path), *peers
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert len(data["results"]) == 18
    for result in data["results"]:
        assert {"torchbp", "torch"} <= set(result["contestants"]), result["skipped"]
        assert "torch, graph" in result["skipped"]  # the CPU has none
        assert result["contestants"]["torchbp"]["ratio"] == 1
        assert result["rounds"] >= 5
        assert result["case"] in done.stdout
    assert data["quick"]


def test_cases_by_how_their_names_begin() -> None:
    done = run(
        "--device", "cpu", "--quick", "--seconds", "0.01", "--case", "relu", "ce_65536", "--peers"
    )
    assert done.returncode == 0, done.stderr
    assert "relu_64M" in done.stdout
    assert "ce_65536x10" in done.stdout
    assert "sigmoid" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    done = run("--case", "relu")
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr
    done = run("--case", "nonsense")
    assert done.returncode == 2
    assert "--case: no case begins with nonsense" in done.stderr
