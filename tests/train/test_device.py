"""torchbp.train.device: which device a run takes. No GPU is needed for it."""

from __future__ import annotations

import argparse

import pytest
import torch

from torchbp.train import default_device, device, device_name, usable_device, wait_for


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_default_device(monkeypatch: pytest.MonkeyPatch, built: bool, there: bool) -> None:
    monkeypatch.setattr(device, "HAS_CUDA", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert default_device() == ("cuda" if built and there else "cpu")


@pytest.mark.parametrize("text", ["", "abacus", "cuda:99", "cpu:x"])
def test_devices_that_are_not_there(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' cannot be used: .") as raised:
        usable_device(text)
    assert len(str(raised.value).splitlines()) == 1


def test_a_gpu_that_torchbp_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: None)  # torch has the GPU
    monkeypatch.setattr(device, "HAS_CUDA", True)
    assert usable_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(device, "HAS_CUDA", False)
    with pytest.raises(argparse.ArgumentTypeError, match="built without its CUDA kernels"):
        usable_device("cuda:1")


@pytest.mark.parametrize(("threads", "name"), [(1, "1 CPU thread"), (2, "2 CPU threads")])
def test_device_name(monkeypatch: pytest.MonkeyPatch, threads: int, name: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name("cpu") == name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda which: f"GPU {which.index}")
    assert device_name("cuda:1") == "GPU 1"


def test_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    wait_for("cpu")
    assert waited == []
    wait_for("cuda:1")
    assert waited == [torch.device("cuda:1")]
