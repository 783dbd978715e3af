"""Checkpoints: one safetensors file, tensors in its body, the rest JSON in its header; no pickle.

A checkpoint holds all that the next epoch depends on: the weights, the optimizer's and the
scheduler's state, torch's random state and whatever the caller adds, so that a run that goes on
from it equals one that was never stopped. One file, written whole or not at all: its parts always
belong together.
"""

from __future__ import annotations

import json
import os
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchbp.train.files import write_file

FORMAT = "torchbp checkpoint 1"


def save_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """The model's `state_dict` as a safetensors file, for `safetensors.torch.load_model`.

    Raises:
        OSError: the file cannot be written.
    """
    write_file(path, safetensors.torch.save(_contiguous(model.state_dict())))


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    extra: dict[str, Any],
) -> None:
    """Everything a run needs to go on, written whole or not at all.

    Args:
        path: the file, `.safetensors` by custom.
        model, optimizer, scheduler: those of the run.
        extra: the caller's own state, anything JSON holds: the loader's state, the metrics so far.

    Raises:
        OSError: the file cannot be written.
        TypeError: `extra`, or the state of the optimizer or scheduler, is not JSON.
    """
    state = optimizer.state_dict()
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"rng.{k}": v for k, v in _random_state(model).items()}
    slots: dict[
        str, dict[str, Any]
    ] = {}  # what the optimizer keeps for each parameter, the tensors apart
    for index, slot in state["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in slot.items() if isinstance(v, Tensor)}
        slots[str(index)] = {k: v for k, v in slot.items() if not isinstance(v, Tensor)}
    header = {
        "format": FORMAT,
        "optimizer": {"state": slots, "param_groups": state["param_groups"]},
        # A LambdaLR's functions are code, not state.
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
        "extra": extra,
    }
    write_file(path, safetensors.torch.save(_contiguous(tensors), {"torchbp": json.dumps(header)}))


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> dict[str, Any]:
    """Put the state of `save_checkpoint` back, torch's random state too, and return its `extra`.

    The file is checked against model, optimizer and scheduler before anything is changed.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, is not a checkpoint, or belongs to another model.
    """
    name = f"load_checkpoint: {os.fspath(path)}"
    ours = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "rng": {}, "optimizer": {}}
    like: dict[str, Tensor] = {}  # what each of the optimizer's tensors is to look like
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["torchbp"])
            for key in file.keys():  # noqa: SIM118 (the file is no dict)
                part, rest = key.split(".", 1)
                tensors[part][rest] = file.get_tensor(key)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, wanted {FORMAT!r}")
        groups, slots = header["optimizer"]["param_groups"], header["optimizer"]["state"]
        state = {int(index): dict(slot) for index, slot in slots.items()}
        for key, tensor in tensors["optimizer"].items():
            index, rest = key.split(".", 1)
            state[int(index)][rest] = tensor
            # Of the parameter's shape, or a count of steps.
            like[key] = parameters[int(index)] if tensor.ndim else torch.zeros(())
        if [(set(g), g["params"]) for g in groups] != [
            (set(g), g["params"]) for g in ours["param_groups"]
        ]:
            raise ValueError("it belongs to another optimizer")
        schedule, extra = dict(header["scheduler"]), dict(header["extra"])
        if not schedule.keys() <= scheduler.state_dict().keys():
            raise ValueError("it belongs to another scheduler")
    except OSError:
        raise
    except Exception as error:  # the file may hold anything, and so may the reason
        raise ValueError(f"{name} is damaged or no checkpoint for this run: {error!r}") from error
    _match(f"{name}, weights of the model", tensors["model"], model.state_dict())
    _match(f"{name}, random state", tensors["rng"], _random_state(model))
    _match(f"{name}, optimizer state", tensors["optimizer"], like)

    model.load_state_dict(tensors["model"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(scheduler.state_dict() | schedule)
    torch.set_rng_state(tensors["rng"]["cpu"])
    if "cuda" in tensors["rng"]:
        torch.cuda.set_rng_state(tensors["rng"]["cuda"], next(model.parameters()).device)
    return extra


def _random_state(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def _match(what: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Same names, shapes and dtypes, or a ValueError that names the first difference."""
    kinds = [{k: f"{t.dtype} {list(t.shape)}" for k, t in d.items()} for d in (got, want)]
    for name in sorted(got.keys() | want.keys()):
        here, wanted = (kind.get(name, "missing") for kind in kinds)
        if here != wanted:
            raise ValueError(f"{what}: {name} is {here}, wanted {wanted}")
