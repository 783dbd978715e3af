"""torchbp.train.loop, against the lecture's formulas written out in float64."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchbp import compile_step
from torchbp.train import Metrics, confusion_matrix, evaluate, fit, loop, train_epoch, warmup_cosine

N, D, C = 20, 5, 3


class Batches:
    """A training set in batches of 8, 8 and 4."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(N, D, generator=generator, dtype=dtype)
        self.target = torch.randint(C, (N,), generator=generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(8), self.target.split(8), strict=True)


def linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, C, bias=False, dtype=dtype)


def sgd(model: nn.Module, lr: float = 0.1, **settings: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **settings)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.fixture(autouse=True)
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def test_train_epoch_is_the_lectures_gradient_descent() -> None:
    lr, lambda_ = 0.1, 0.01
    model, batches = linear(), Batches()
    weight = model.weight.detach().clone()
    loss, correct = 0.0, 0
    for x, target in batches:  # L = mean of L_i + lambda * R(W), R(W) = sum of squares
        p = (x @ weight.T).softmax(1)
        loss += float(-p[range(len(x)), target].log().sum())
        correct += int((p.argmax(1) == target).sum())
        gradient = (p - nn.functional.one_hot(target, C)).T @ x / len(x) + 2 * lambda_ * weight
        weight -= lr * gradient

    optimizer, scheduler = sgd(model, lr, weight_decay=2 * lambda_)
    metrics = train_epoch(model, nn.CrossEntropyLoss(), optimizer, scheduler, batches)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    assert metrics == pytest.approx((loss / N, 100 * correct / N), rel=1e-12)


def test_train_epoch_with_a_compiled_step() -> None:
    """Two epochs, whose very first step runs through autograd."""
    results = []
    for compiled in (False, True):
        model, batches = linear(torch.float32), Batches(torch.float32)
        optimizer, scheduler = sgd(model, 0.1, momentum=0.9)
        step = compile_step(model, optimizer) if compiled else None
        for _ in range(2):
            metrics = train_epoch(
                model, nn.CrossEntropyLoss(), optimizer, scheduler, batches, step=step
            )
        results.append((metrics, model.weight.detach()))
    (ours, weight), (theirs, wanted) = results[1], results[0]
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(weight, wanted)


def test_scheduler_steps_after_each_batch() -> None:
    model, batches = linear(), Batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train_epoch(model, nn.CrossEntropyLoss(), optimizer, scheduler, batches)
    assert scheduler.get_last_lr() == [0.125]


def test_on_batch_counts_images() -> None:
    model = linear()
    seen: list[tuple[int, Metrics]] = []
    result = train_epoch(
        model, nn.CrossEntropyLoss(), *sgd(model), Batches(), False, lambda *a: seen.append(a)
    )
    assert [images for images, _ in seen] == [8, 16, 20]
    assert seen[-1][1] == result


def test_metrics_that_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here every two batches: the same in the end, and in between those looked at."""
    wanted = train_epoch(linear(), nn.CrossEntropyLoss(), *sgd(linear()), Batches())
    steps: list[Metrics] = []
    train_epoch(
        linear(),
        nn.CrossEntropyLoss(),
        *sgd(linear()),
        Batches(),
        on_batch=lambda images, metrics: steps.append(metrics),
    )
    monkeypatch.setattr(loop, "_most_waiting", lambda device: 2)
    seen: list[tuple[int, Metrics]] = []
    result = train_epoch(
        linear(),
        nn.CrossEntropyLoss(),
        *sgd(linear()),
        Batches(),
        on_batch=lambda *batch: seen.append(batch),
    )
    assert result == wanted
    # The first is looked at at once; the second waits for the third.
    assert seen == [(8, steps[0]), (16, steps[0]), (20, steps[2])]
    assert evaluate(linear(), nn.CrossEntropyLoss(), Batches()) == pytest.approx(wanted)


def test_a_loss_that_is_not_finite_is_found_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_most_waiting", lambda device: 64)
    batches = Batches()
    batches.x[8, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf).*learning rate"):
        train_epoch(linear(), nn.CrossEntropyLoss(), *sgd(linear()), batches)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf).*learning rate"):
        evaluate(linear(), nn.CrossEntropyLoss(), batches)


def test_fit_waits_for_the_device_before_it_reads_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    clock = iter([10.0, 14.0])

    def read() -> float:
        events.append("clock")
        return next(clock)

    model, batches = linear(), Batches()
    optimizer, scheduler = sgd(model)
    monkeypatch.setattr(loop, "wait_for", lambda device: events.append(device.type))
    monkeypatch.setattr(time, "perf_counter", read)
    history: list[dict[str, Any]] = []
    fit(model, nn.CrossEntropyLoss(), optimizer, scheduler, batches, batches, 1, history)
    assert events == ["cpu", "clock", "cpu", "clock"]
    assert (history[0]["seconds"], history[0]["images_per_second"]) == (4, N / 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value: float) -> None:
    model, batches = linear(), Batches()
    batches.x[0, 0] = value
    before = model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf).*learning rate"):
        train_epoch(model, nn.CrossEntropyLoss(), *sgd(model), batches)
    assert torch.equal(model.weight, before)


def test_evaluate_weighs_by_image_and_changes_nothing() -> None:
    batches = Batches()
    layer = linear()
    model = nn.Sequential(nn.Dropout(0.5), layer)
    logits = batches.x @ layer.weight.T.detach()
    before, random = layer.weight.detach().clone(), torch.get_rng_state()
    metrics = evaluate(model, nn.CrossEntropyLoss(), batches)
    loss = -logits.log_softmax(1)[range(N), batches.target].mean()
    accuracy = 100 * (logits.argmax(1) == batches.target).double().mean()
    assert metrics == pytest.approx((float(loss), float(accuracy)), rel=1e-12)
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


def test_train_epoch_turns_dropout_on_again() -> None:
    model = nn.Sequential(nn.Dropout(0.5), linear())
    model.eval()
    train_epoch(model, nn.CrossEntropyLoss(), *sgd(model), Batches())
    assert model.training


def test_confusion_matrix_counts_pairs() -> None:
    model, batches = linear(), Batches()
    predicted = (batches.x @ model.weight.T).argmax(1)
    want = torch.zeros(C, C, dtype=torch.int64)
    for truth, guess in zip(batches.target.tolist(), predicted.tolist(), strict=True):
        want[truth, guess] += 1
    assert torch.equal(confusion_matrix(model, batches, C), want)


@pytest.mark.parametrize("amp", [False, True])
def test_amp_computes_in_bfloat16_and_keeps_float32_weights(amp: bool) -> None:
    model, batches = linear(torch.float32), Batches(torch.float32)
    dtypes = []
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    criterion = nn.CrossEntropyLoss()
    train_epoch(model, criterion, *sgd(model), batches, amp)
    evaluate(model, criterion, batches, amp)
    confusion_matrix(model, batches, C, amp)
    assert set(dtypes) == {torch.bfloat16 if amp else torch.float32}
    assert model.weight.dtype == torch.float32


def test_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        evaluate(linear(), nn.CrossEntropyLoss(), [])


def test_fit_adds_a_row_an_epoch_and_goes_on_from_history() -> None:
    model, batches = linear(), Batches()
    events: list[Any] = []

    class Log:
        def batch(self, epoch: int, images: int, metrics: Metrics) -> None:
            events.append((epoch, images))

        def epoch(self, row: dict[str, Any]) -> None:
            events.append(row["epoch"])

    history: list[dict[str, Any]] = []
    criterion = nn.CrossEntropyLoss()
    optimizer, scheduler = sgd(model, lr=0.1)
    arguments = (model, criterion, optimizer, scheduler, batches, list(batches))
    fit(*arguments, 1, history, log=Log(), on_epoch=lambda: events.append("saved"))
    assert events == [(0, 8), (0, 16), (0, 20), "saved", 1]
    fit(*arguments, 3, history)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    last = history[-1]
    assert (last["test_loss"], last["test_accuracy"]) == evaluate(model, criterion, batches)
    assert last["test_loss"] < history[0]["test_loss"]
    assert last["lr"] == 0.1
    assert last["images_per_second"] == pytest.approx(N / last["seconds"])
    fit(*arguments, 3, history)  # nothing left to do
    assert len(history) == 3


def test_an_interrupt_keeps_finished_rows() -> None:
    model, batches = linear(), Batches()
    history: list[dict[str, Any]] = []

    class Log:
        def batch(self, epoch: int, images: int, metrics: Metrics) -> None:
            if (epoch, images) == (1, 16):
                raise KeyboardInterrupt

        def epoch(self, row: dict[str, Any]) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        fit(model, nn.CrossEntropyLoss(), *sgd(model), batches, batches, 5, history, log=Log())
    assert [row["epoch"] for row in history] == [1]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.15, 1.0])
def test_warmup_cosine_rises_once_and_falls_once(steps: int, warmup: float) -> None:
    factor = warmup_cosine(steps, warmup)
    values = [factor(step) for step in range(steps)]
    top = values.index(max(values))
    assert max(values) == 1.0
    assert min(values) > 0
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert warmup == 1.0 or factor(steps) == 0
