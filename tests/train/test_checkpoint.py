"""torchbp.train.checkpoint: a run that goes on from one equals a run that was never stopped."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from torchbp.train import load_checkpoint, save_checkpoint, save_weights

Run = tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}


@pytest.fixture(autouse=True)
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def new_run(optimizer: str = "nesterov", seed: int = 0, units: int = 6) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, units), nn.Tanh(), nn.Dropout(0.5), nn.Linear(units, 2))
    chosen = OPTIMIZERS[optimizer](model.parameters())
    return model, chosen, torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 0.9**step)


def train(run: Run, steps: int) -> list[float]:
    model, optimizer, scheduler = run
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 4)  # from the random state that the checkpoint keeps
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    path = tmp_path / "last.safetensors"
    extra = {"epoch": 3, "history": [{"loss": 0.1}], "name": "µ", "none": None}
    run = new_run(optimizer)
    train(run, 3)
    save_checkpoint(path, *run, extra)
    losses = train(run, 4)

    other = new_run(optimizer, seed=1)
    train(other, 1)
    assert load_checkpoint(path, *other) == extra
    assert train(other, 4) == losses
    for a, b in zip(run[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    run = new_run()
    save_checkpoint(path, *run, {})
    losses = train(run, 2)
    other = new_run(seed=1)
    load_checkpoint(path, *other)
    assert train(other, 2) == losses


def test_no_pickle_and_no_stray_files(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    run = new_run()
    train(run, 1)
    save_checkpoint(path, *run, {"epoch": 1})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        assert json.loads(file.metadata()["torchbp"])["extra"] == {"epoch": 1}
        assert torch.equal(file.get_tensor("model.0.weight"), run[0].get_parameter("0.weight"))


def test_weights_load_into_the_same_model(tmp_path: Path) -> None:
    model, other = new_run()[0], new_run(seed=1)[0]
    save_weights(tmp_path / "model.safetensors", model)
    safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def rewrite(
    path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
) -> None:
    """Change the header and the tensors of a checkpoint."""
    with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        header = json.loads(file.metadata()["torchbp"])
    tensors = safetensors.torch.load_file(path)
    change(header, tensors)
    safetensors.torch.save_file(tensors, path, {"torchbp": json.dumps(header)})


MALFORMED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"model": {}})),
    "huge header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "weights alone": lambda path: save_weights(path, new_run()[0]),
    "header no JSON": lambda path: safetensors.torch.save_file({}, path, {"torchbp": "{"}),
    "header a list": lambda path: safetensors.torch.save_file({}, path, {"torchbp": "[]"}),
    "header empty": lambda path: safetensors.torch.save_file({}, path, {"torchbp": "{}"}),
    "other format": lambda path: rewrite(path, lambda h, t: h.update(format="other 2")),
    "no groups": lambda path: rewrite(path, lambda h, t: h["optimizer"].pop("param_groups")),
    "groups no list": lambda path: rewrite(
        path, lambda h, t: h["optimizer"].update(param_groups=3)
    ),
    "other groups": lambda path: rewrite(
        path, lambda h, t: h["optimizer"]["param_groups"][0].update(params=[0])
    ),
    "other scheduler": lambda path: rewrite(path, lambda h, t: h["scheduler"].update(step=1)),
    "weight missing": lambda path: rewrite(path, lambda h, t: t.pop("model.0.weight")),
    "weight too many": lambda path: rewrite(
        path, lambda h, t: t.update({"model.w": torch.zeros(1)})
    ),
    "weight of another dtype": lambda path: rewrite(
        path, lambda h, t: t.update({"model.0.bias": t["model.0.bias"].double()})
    ),
    "random state missing": lambda path: rewrite(path, lambda h, t: t.pop("rng.cpu")),
    "random state too short": lambda path: rewrite(
        path, lambda h, t: t.update({"rng.cpu": t["rng.cpu"][:-1].clone()})
    ),
    "momentum of another shape": lambda path: rewrite(
        path, lambda h, t: t.update({"optimizer.0.momentum_buffer": torch.zeros(2, 2)})
    ),
    "momentum of no parameter": lambda path: rewrite(
        path, lambda h, t: t.update({"optimizer.9.momentum_buffer": torch.zeros(2, 2)})
    ),
    "tensor of no part": lambda path: rewrite(path, lambda h, t: t.update({"x": torch.zeros(1)})),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_and_changes_nothing(tmp_path: Path, case: str) -> None:
    path = tmp_path / "last.safetensors"
    run = new_run()
    train(run, 1)
    save_checkpoint(path, *run, {})
    MALFORMED[case](path)

    other = new_run(seed=1)
    weights = [p.detach().clone() for p in other[0].parameters()]
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^load_checkpoint: \S+last\.safetensors\b"):
        load_checkpoint(path, *other)
    assert all(torch.equal(a, b) for a, b in zip(weights, other[0].parameters(), strict=True))
    assert other[1].state_dict()["state"] == {}
    assert torch.equal(torch.get_rng_state(), random)


def test_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, *new_run(units=6), {})
    with pytest.raises(ValueError, match=r"0\.bias is torch.float32 \[6\], wanted .* \[7\]"):
        load_checkpoint(path, *new_run(units=7))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing", *new_run())


def test_extra_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path / "last.safetensors", *new_run(), {"x": object()})
    assert not list(tmp_path.iterdir())
