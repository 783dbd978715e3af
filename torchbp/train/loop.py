"""The training loop of the lecture: forward, loss, backward, update.

Minibatch gradient descent as in the lecture (Neural Networks and Backpropagation, Fundamentals of
Data Science, 2023). Accuracies are in percent. `amp` computes the forward pass in bfloat16
where autocast says so; bfloat16 has the range of float32, so the loss needs no scaling.

On a GPU the loop runs ahead of the device: it looks at losses and accuracies after the first batch
and then after every 64th one, instead of waiting for each. That has not run on a GPU yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..optim import CompiledStep
from .device import wait_for

Batches = Iterable[tuple[Tensor, Tensor]]  # of (x [B, ...], target [B]); iterated once an epoch


class Metrics(NamedTuple):
    """Means over the images seen.

    Attributes:
        loss: what the criterion says, in nats for a cross-entropy.
        accuracy: in percent.
    """

    loss: float
    accuracy: float


class Listener(Protocol):
    """What `fit` tells of its progress; `Log` is one."""

    def batch(self, epoch: int, images: int, metrics: Metrics) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...


def train_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    batches: Batches,
    amp: bool = False,
    on_batch: Callable[[int, Metrics], None] | None = None,
    step: CompiledStep | None = None,
) -> Metrics:
    """Train on every batch once; the scheduler steps after each.

    Args:
        model: maps x [B, ...] to logits [B, C].
        criterion: maps logits and target [B] (int64) to a scalar, a mean over the batch.
        optimizer: over the model's parameters.
        scheduler: of the optimizer's learning rate.
        batches: of (x, target), on the model's device.
        amp: forward in bfloat16 autocast.
        on_batch: called after each update with the images so far and their metrics; on a GPU, of
            the images whose metrics have been looked at.
        step: what `torchbp.compile_step` made of model and optimizer, to do the same faster.

    Returns:
        The metrics of the batches, each as it was before its own update.

    Raises:
        FloatingPointError: the loss is infinite or NaN; the model is as it was before that batch
            (with `step`: after it; on a GPU up to 64 batches later).

    Example:
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))] * 50
        >>> train_epoch(model, nn.CrossEntropyLoss(), optimizer, scheduler, batches).loss < 0.5
        True
    """
    model.train()
    meter = _Meter()
    for x, target in batches:
        if step is not None:
            loss = step(x, target)
            meter.add(loss, step.logits(), target)
        else:
            with _autocast(x, amp):
                logits = model(x)  # forward
                loss = criterion(logits, target)  # loss
            meter.add(loss, logits, target)

            optimizer.zero_grad()
            loss.backward()  # backward
            optimizer.step()  # update
        scheduler.step()

        if on_batch:
            on_batch(meter.images, meter.metrics(wait=meter.seen == 0))
    return meter.metrics()


@torch.no_grad()
def evaluate(
    model: nn.Module, criterion: nn.Module, batches: Batches, amp: bool = False
) -> Metrics:
    """The metrics of `model` on `batches`, without training. Arguments as for `train_epoch`.

    Raises:
        FloatingPointError: the loss is infinite or NaN.

    Example:
        >>> logits, target = torch.eye(2), torch.tensor([0, 0])
        >>> evaluate(nn.Identity(), nn.CrossEntropyLoss(), [(logits, target)]).accuracy
        50.0
    """
    model.eval()
    meter = _Meter()
    for x, target in batches:
        with _autocast(x, amp):
            logits = model(x)
            loss = criterion(logits, target)
        meter.add(loss, logits, target)
    return meter.metrics()


@torch.no_grad()
def confusion_matrix(model: nn.Module, batches: Batches, classes: int, amp: bool = False) -> Tensor:
    """How often class i was taken for class j: int64 [classes, classes] on the CPU, truth in rows.

    Example:
        >>> confusion_matrix(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))], classes=2)
        tensor([[1, 1],
                [0, 0]])
    """
    model.eval()
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    for x, target in batches:
        with _autocast(x, amp):
            predicted = model(x).argmax(1)
        counts += torch.bincount(target * classes + predicted, minlength=classes * classes).cpu()
    return counts.reshape(classes, classes)


def fit(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    train_batches: Batches,
    test_batches: Batches,
    epochs: int,
    history: list[dict[str, Any]],
    amp: bool = False,
    log: Listener | None = None,
    on_epoch: Callable[[], None] | None = None,
    step: CompiledStep | None = None,
) -> None:
    """Train and evaluate until `history` holds `epochs` rows, adding one after each epoch.

    The first epoch trained is number `len(history)`, so that a run goes on from a checkpoint.
    `on_epoch` is called after each row, the place to write one. `KeyboardInterrupt` passes through
    and leaves the model and the finished rows as they are. `step` is as for `train_epoch`.

    Raises:
        FloatingPointError: a loss is infinite or NaN.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for epoch in range(len(history), epochs):
        images = 0

        def on_batch(seen: int, metrics: Metrics, epoch: int = epoch) -> None:
            nonlocal images
            images = seen
            if log:
                log.batch(epoch, seen, metrics)

        lr = scheduler.get_last_lr()[0]
        wait_for(device)
        start = time.perf_counter()
        train = train_epoch(
            model, criterion, optimizer, scheduler, train_batches, amp, on_batch, step
        )
        wait_for(device)
        seconds = time.perf_counter() - start
        test = evaluate(model, criterion, test_batches, amp)
        row = {
            "epoch": epoch + 1,
            "lr": lr,  # at the start of the epoch
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "seconds": seconds,  # of training
            "images_per_second": images / seconds,
        }
        history.append(row)
        if on_epoch:
            on_epoch()
        if log:  # last: what the log shows is saved
            log.epoch(row)


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor of the learning rate at each step, for `torch.optim.lr_scheduler.LambdaLR`.

    It rises on a line to 1 over the first `warmup` of the steps, a share, then falls on half a
    cosine to 0 at step `steps`.

    Example:
        >>> factor = warmup_cosine(steps=100, warmup=0.1)
        >>> [round(factor(step), 3) for step in (0, 4, 9, 10, 55, 100)]
        [0.1, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rising = int(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


class _Meter:
    """Sums over the batches of an epoch.

    Attributes:
        images: that were added.
        seen: those of them that the metrics are of.
    """

    def __init__(self) -> None:
        self.images = self.seen = 0
        self._correct, self._loss = 0, 0.0
        self._waiting: list[tuple[Tensor, Tensor, int]] = []  # loss, how many are right, images

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        right = (logits.argmax(1) == target).sum()
        self._waiting.append((loss.detach(), right, len(target)))
        self.images += len(target)
        if len(self._waiting) >= _most_waiting(loss.device):
            self._look()

    def metrics(self, wait: bool = True) -> Metrics:
        """Of all images; of those that have been looked at where `wait` is False."""
        if wait:
            self._look()
        if not self.seen:
            raise ValueError("no batches: the data set is empty")
        return Metrics(self._loss / self.seen, 100 * self._correct / self.seen)

    def _look(self) -> None:
        """Read what waits, all at once: this is where Python waits for a GPU."""
        if not self._waiting:
            return
        losses, right, images = zip(*self._waiting, strict=True)
        self._waiting = []
        values = torch.stack(losses).tolist()
        for value, correct, n in zip(values, torch.stack(right).tolist(), images, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value}: try a smaller learning rate")
            self._loss += value * n
            self._correct += correct
            self.seen += n


def _most_waiting(device: torch.device) -> int:
    """Batches whose metrics are read at a time."""
    return 1 if device.type == "cpu" else 64


def _autocast(x: Tensor, amp: bool) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp)
