"""Training: the loop, checkpoints, the log of a run, figures."""

from __future__ import annotations

from torchbp.train.checkpoint import load_checkpoint, save_checkpoint, save_weights
from torchbp.train.device import add_device, default_device, device_name, usable_device, wait_for
from torchbp.train.files import write_file
from torchbp.train.log import Log
from torchbp.train.loop import Metrics, confusion_matrix, evaluate, fit, train_epoch, warmup_cosine

__all__ = [
    "Log",
    "Metrics",
    "add_device",
    "confusion_matrix",
    "default_device",
    "device_name",
    "evaluate",
    "fit",
    "load_checkpoint",
    "save_checkpoint",
    "save_weights",
    "train_epoch",
    "usable_device",
    "wait_for",
    "warmup_cosine",
    "write_file",
]
