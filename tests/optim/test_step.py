"""torchbp.optim.step: compile_step against autograd and torch.optim."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, ReduceLROnPlateau

import torchbp
from tests.compare import assert_same
from tests.machine import EMULATED
from tests.optim.test_optimizers import Calls, calls
from torchbp import _C, compile_step, nn
from torchbp.data import BatchLoader
from torchbp.optim import CompiledStep
from torchbp.train import load_checkpoint, save_checkpoint

Batch = tuple[Tensor, Tensor]

SIZES = [20, 16, 12, 4]
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
ADAMW: dict[str, Any] = {"lr": 3e-3, "weight_decay": 1e-1}
EACH_RULE = pytest.mark.parametrize(("rule", "options"), [("SGD", SGD), ("AdamW", ADAMW)])


def batches(steps: int, rows: int = 32, features: int = SIZES[0]) -> list[Batch]:
    """A problem that can be learned, with a row now and then that does not count."""
    truth = torch.randn(SIZES[-1], features)
    result = []
    for _ in range(steps):
        x = torch.randn(rows, features)
        target = (x @ truth.T).argmax(1)
        target[torch.rand(rows) < 0.1] = -100
        result.append((x, target))
    return result


def smooth_mlp() -> nn.MLP:
    """No unit dies: where gradients are 0 but for rounding, AdamW divides rounding by rounding."""
    return nn.MLP(SIZES, "tanh")


def optimizer_of(model: torch.nn.Module, rule: str = "SGD", **options: Any) -> Any:
    return getattr(torch.optim, rule)(model.parameters(), **(options or SGD))


def autograd_step(
    model: torch.nn.Module, optimizer: Any, x: Tensor, target: Tensor, smoothing: float = 0.0
) -> Tensor:
    """What compile_step stands for, in torch alone."""
    loss = torch.nn.functional.cross_entropy(model(x), target, label_smoothing=smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def either(compiled: bool, step: CompiledStep, x: Tensor, target: Tensor) -> Tensor:
    """A step by `step`, or by autograd with its model and optimizer."""
    return step(x, target) if compiled else autograd_step(step.model, step.optimizer, x, target)


def values(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def everything(model: torch.nn.Module, optimizer: Any) -> list[Tensor]:
    """Parameters and optimizer state."""
    state = [
        optimizer.state[p][key].clone()
        for p in model.parameters()
        for key in sorted(optimizer.state.get(p, {}))
    ]
    return values(model) + state


def vector(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in values(model)]).double()


def torch_model(
    activation: str = "relu", bias: bool = True, widths: Sequence[int] = SIZES[1:-1],
    features: int = SIZES[0],
) -> torch.nn.Sequential:  # fmt: skip
    """The network in torch.nn, so that no torchbp runs in the reference."""
    kinds: dict[str, Callable[[], torch.nn.Module]] = {
        "relu": torch.nn.ReLU, "leaky_relu": torch.nn.LeakyReLU, "elu": torch.nn.ELU,
        "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh,
    }  # fmt: skip
    layers: list[torch.nn.Module] = []
    for size_in, size_out in pairwise([features, *widths, SIZES[-1]]):
        layers += [torch.nn.Linear(size_in, size_out, bias), kinds[activation]()]
    return torch.nn.Sequential(*layers[:-1])


def upside_down(rows: Tensor) -> Tensor:
    return rows.flip(0)


def assert_as_autograd(
    data: list[Batch],
    start: torch.nn.Module,
    rule: str,
    options: dict[str, Any],
    smoothing: float = 0.0,
) -> Tensor:
    """No further from float64 than float32 in torch is: rounding grows from step to step,
    differently for each order of the sums, so that torch runs in two orders, of the rows of each
    batch. Returns the losses in float64.
    """
    results = []
    for dtype, order in (
        (torch.float64, Tensor.clone), (torch.float32, Tensor.clone), (torch.float32, upside_down)
    ):  # fmt: skip
        model = copy.deepcopy(start).to(dtype)
        optimizer = optimizer_of(model, rule, **options)
        losses = [
            autograd_step(model, optimizer, order(x.to(dtype)), order(target), smoothing)
            for x, target in data
        ]
        results.append((vector(model), torch.stack(losses).double()))
    model = copy.deepcopy(start)
    step = compile_step(model, optimizer_of(model, rule, **options), smoothing)
    losses = [step(x, target) for x, target in data]

    (exact, exact_losses), *torchs = results
    drift = max(float((p - exact).norm()) for p, _ in torchs)
    assert float((vector(model) - exact).norm()) <= 2 * drift
    drift = max(float((loss - exact_losses).norm()) for _, loss in torchs)
    assert float((torch.stack(losses).double() - exact_losses).norm()) <= 2 * drift
    return exact_losses


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "sigmoid", "tanh"])
@pytest.mark.parametrize(
    ("rule", "options", "bias", "smoothing"),
    [
        ("SGD", {"lr": 0.05}, True, 0.0),
        # Smoothing whose shares of 4 classes are float32 numbers: rounding them is no drift.
        ("SGD", SGD, False, 0.25),
        ("SGD", {"lr": 0.05, "momentum": 0.5, "dampening": 0.2}, True, 0.25),
        ("AdamW", ADAMW, True, 0.0),
        ("AdamW", {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-4}, False, 0.25),
    ],
)
def test_200_steps_as_autograd(
    activation: str, rule: str, options: dict[str, Any], bias: bool, smoothing: float
) -> None:
    losses = assert_as_autograd(
        batches(200), torch_model(activation, bias), rule, options, smoothing
    )
    assert losses[-50:].mean() < losses[:50].mean()  # it learned something


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("SGD", SGD),
        ("SGD", {"lr": 0.05}),
        ("SGD", {"lr": 0.05, "maximize": True}),
        # A larger eps: where AdamW's is small, a gradient that is all rounding makes a whole step.
        ("AdamW", {**ADAMW, "eps": 1e-2}),
    ],
    ids=["SGD", "plain SGD", "maximizing", "AdamW"],
)
@pytest.mark.parametrize("widths", [(40, 40), (24, 50), (9, 70)], ids=str)
@pytest.mark.parametrize("rows", [32, 40, 45, 64])
def test_widths_that_vectors_do_not_divide(
    rule: str, options: dict[str, Any], widths: tuple[int, int], rows: int
) -> None:
    """Updates in registers, tile by tile and in one run, of whole vectors, halves and what is left;
    activations of a tile and of all columns of its rows."""
    assert_as_autograd(batches(20, rows), torch_model("tanh", widths=widths), rule, options)


@pytest.mark.parametrize("rows", [100, 300, 530])
@pytest.mark.parametrize(
    ("rule", "options"), [("SGD", SGD), ("SGD", {"lr": 0.05}), ("AdamW", {**ADAMW, "eps": 1e-2})]
)
def test_updates_of_large_layers(rule: str, options: dict[str, Any], rows: int) -> None:
    """Rows of a weight that are updated in several runs, and sums over more examples than a product
    takes at once."""
    assert_as_autograd(batches(5, rows), torch_model("tanh", widths=(530, 70)), rule, options)


@pytest.mark.parametrize("features", [48, 610])
@pytest.mark.parametrize(
    ("rule", "options"), [("SGD", SGD), ("SGD", {"lr": 0.05}), ("AdamW", {**ADAMW, "eps": 1e-2})]
)
def test_updates_of_few_outputs(rule: str, options: dict[str, Any], features: int) -> None:
    """Of a weight for whose gradient examples are read where they lie."""
    model = torch_model("tanh", widths=(5, 7), features=features)
    assert_as_autograd(batches(5, 300, features), model, rule, options)


@EACH_RULE
def test_one_operation_does_it(rule: str, options: dict[str, Any]) -> None:
    model = nn.MLP(SIZES)
    step = compile_step(model, optimizer_of(model, rule, **options))
    first, *rest = batches(4)
    step(*first)
    for batch in rest:
        with calls(1):
            loss = step(*batch)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert not loss.requires_grad


@EACH_RULE
@pytest.mark.parametrize("kind", [torch.optim, torchbp.optim])
def test_mixed_with_autograd(rule: str, options: dict[str, Any], kind: Any) -> None:
    """In any order, and with the optimizers of torch and of torchbp."""
    data = batches(24)
    start = smooth_mlp()
    results = []
    for pattern in (range(24), (), range(0, 24, 2), range(1, 24, 3), range(12), range(12, 24)):
        model = copy.deepcopy(start)
        optimizer = getattr(kind, rule)(model.parameters(), **options)
        step = compile_step(model, optimizer)
        for i, (x, target) in enumerate(data):
            if i in pattern:
                step(x, target)
            else:
                autograd_step(model, optimizer, x, target)
        results.append(everything(model, optimizer))
    for result in results[1:]:  # float32, 24 steps
        assert_same(result, results[0], rtol=1e-3, atol=2e-5)


@EACH_RULE
def test_gradients_stay_as_they_are(rule: str, options: dict[str, Any]) -> None:
    model = nn.MLP(SIZES)
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, rule)([*model.parameters(), extra], **options)
    step = compile_step(model, optimizer)
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    extra.grad = torch.ones(3)
    for batch in batches(3):  # the first through autograd
        step(*batch)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads)
    assert torch.equal(extra, torch.ones(3))  # of another model


@EACH_RULE
def test_checkpoint_in_the_middle(tmp_path: Path, rule: str, options: dict[str, Any]) -> None:
    """A run that goes on from a checkpoint is the same bit for bit, compiled all the way."""
    data = batches(12)
    results = []
    for stop in (False, True):
        torch.manual_seed(0)
        model = nn.MLP(SIZES)
        optimizer = optimizer_of(model, rule, **options)
        scheduler = ExponentialLR(optimizer, 0.9)
        step = compile_step(model, optimizer)
        for i, batch in enumerate(data):
            if stop and i == 6:
                path = tmp_path / "checkpoint.safetensors"
                save_checkpoint(path, model, optimizer, scheduler, {})
                model = nn.MLP(SIZES)
                optimizer = optimizer_of(model, rule, **options)
                scheduler = ExponentialLR(optimizer, 0.9)
                step = compile_step(model, optimizer)
                load_checkpoint(path, model, optimizer, scheduler)
            step(*batch)
            scheduler.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0], rtol=0, atol=0)


@EACH_RULE
def test_state_that_is_replaced(rule: str, options: dict[str, Any]) -> None:
    """load_state_dict makes new state; so may a user."""
    model = nn.MLP(SIZES)
    optimizer = optimizer_of(model, rule, **options)
    step = compile_step(model, optimizer)
    first, second, third = batches(3)
    step(*first)
    weights, state = values(model), copy.deepcopy(optimizer.state_dict())

    def again(change: Callable[[], object]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(model.parameters(), weights, strict=True):
                p.copy_(value)
        change()
        step(*second)
        step(*third)
        return everything(model, optimizer)

    wanted = again(lambda: optimizer.load_state_dict(copy.deepcopy(state)))

    def by_hand() -> None:
        optimizer.load_state_dict(copy.deepcopy(state))
        for p in model.parameters():
            optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}

    assert_same(again(by_hand), wanted, rtol=0, atol=0)
    fresh = again(optimizer.state.clear)  # as at the start: through autograd once
    assert not torch.equal(fresh[0], wanted[0])
    assert len(fresh) == len(wanted)


def assert_same_either_way(
    rule: str, options: dict[str, Any], steps: int, change: Callable[[Any, int], object]
) -> None:
    """Some steps of a network, compiled and through autograd, give the same; `change(optimizer, i)`
    comes before step i."""
    data = batches(steps)
    start = smooth_mlp()
    results = []
    for compiled in (True, False):
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model, rule, **options)
        step = compile_step(model, optimizer)
        for i, (x, target) in enumerate(data):
            change(optimizer, i)
            either(compiled, step, x, target)
        results.append(values(model))
    assert_same(results[0], results[1], rtol=1e-3, atol=1e-5)


@EACH_RULE
def test_hyperparameters_are_read_in_every_step(rule: str, options: dict[str, Any]) -> None:
    def change(optimizer: Any, i: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] = torch.tensor(0.01 * (i + 1)) if i % 2 else 0.01 * (i + 1)
        group["weight_decay"] = 0.1 / (i + 1)
        group["maximize"] = i == 5

    assert_same_either_way(rule, options, 8, change)


@EACH_RULE
def test_hyperparameters_that_change_inside_or_stay(rule: str, options: dict[str, Any]) -> None:
    def change(optimizer: Any, i: int) -> None:
        group = optimizer.param_groups[0]
        if i == 3:
            group["lr"] = torch.tensor(0.02)
            group["betas"] = [0.9, 0.99]
        elif i == 5:
            group["lr"].fill_(0.002)
        elif i == 7:
            group["lr"] = 0.01
            group["betas"][0] = 0.5

    assert_same_either_way(rule, options, 9, change)


@EACH_RULE
def test_hyperparameters_that_a_call_of_many_steps_left(rule: str, options: dict[str, Any]) -> None:
    """A trainer keeps those of its last step; the next one's may be others."""
    data = batches(9)
    start = smooth_mlp()
    results = []
    for compiled in (True, False):
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model, rule, **options)
        scheduler = ExponentialLR(optimizer, 0.5)
        step = compile_step(model, optimizer)
        for i, (x, target) in enumerate(data):
            if i in (2, 3, 6):  # in a call that changes the learning rate behind each step
                if compiled:
                    step.scan(x[None], target[None], scheduler)
                else:
                    either(False, step, x, target)
                    scheduler.step()
                continue
            if compiled and i == 4:
                with pytest.raises(IndexError):
                    step(x, target + 100)
            either(compiled, step, x, target)
        results.append(values(model))
    assert_same(results[0], results[1], rtol=1e-3, atol=1e-5)


@EACH_RULE
def test_groups(rule: str, options: dict[str, Any]) -> None:
    """Each parameter by the options of its group, whose order is the optimizer's own."""
    data = batches(6)
    start = smooth_mlp()
    results = []
    for compiled in (True, False):
        model = copy.deepcopy(start)
        decayed = [p for p in model.parameters() if p.dim() == 2]
        other = torch.nn.Parameter(torch.ones(2))
        groups: list[dict[str, Any]] = [
            {"params": [other]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
            {"params": decayed[1:], "lr": 0.02},
            {"params": decayed[:1], "maximize": True, "lr": 0.001},
        ]
        if rule == "SGD":
            groups[1] |= {"momentum": 0.0, "nesterov": False}
        optimizer = getattr(torch.optim, rule)(groups, **options)
        step = compile_step(model, optimizer)
        for x, target in data:
            either(compiled, step, x, target)
        results.append(everything(model, optimizer))
    assert_same(results[0], results[1], rtol=1e-3, atol=1e-5)


@EACH_RULE
def test_frozen_layers(rule: str, options: dict[str, Any]) -> None:
    """Not updated, without state; thawed later they are trained."""
    data = batches(9)
    start = smooth_mlp()
    results = []
    for compiled in (True, False):
        model = copy.deepcopy(start)
        model[0].requires_grad_(False)
        model[2].bias.requires_grad_(False)
        optimizer = getattr(torch.optim, rule)(model.parameters(), **options)
        step = compile_step(model, optimizer)
        for i, (x, target) in enumerate(data):
            if i == 5:
                assert torch.equal(model[0].weight, start[0].weight)
                assert torch.equal(model[2].bias, start[2].bias)
                assert model[0].weight not in optimizer.state
                model[0].requires_grad_()
            if i == 7:
                model[4].requires_grad_(False)
            either(compiled, step, x, target)
        results.append(everything(model, optimizer))
    assert_same(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_all_frozen() -> None:
    model = nn.MLP(SIZES)
    optimizer = optimizer_of(model)
    model.requires_grad_(False)
    before = values(model)
    ((x, target),) = batches(1)
    with calls(1):
        loss = compile_step(model, optimizer)(x, target)
    assert_same(loss, torch.nn.functional.cross_entropy(model(x), target), rtol=1e-5, atol=1e-6)
    assert_same(values(model), before, rtol=0, atol=0)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "torch.nn.Linear": lambda: torch.nn.Linear(20, 5),
    "torchbp.nn.Linear": lambda: nn.Linear(20, 5, bias=False),
    "one layer": lambda: nn.MLP([20, 5]),
    "Sequential": lambda: torch.nn.Sequential(
        torch.nn.Linear(20, 7), torch.nn.Tanh(), nn.Linear(7, 5)
    ),
    "dropout in eval mode": lambda: nn.MLP([20, 7, 5], dropout=0.5).eval(),
    "dropout of nothing": lambda: torch.nn.Sequential(
        torch.nn.Linear(20, 7), torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.Linear(7, 5)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str) -> None:
    start = MODELS[kind]()
    data = batches(4)
    results = []
    for compiled in (True, False):
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model)
        step = compile_step(model, optimizer)
        losses = [
            step(x, target) if compiled else autograd_step(model, optimizer, x, target)
            for x, target in data
        ]
        results.append([*losses, *everything(model, optimizer)])
    assert_same(results[0], results[1], rtol=1e-4, atol=1e-6)


@EACH_RULE
def test_scheduler_in_turn(rule: str, options: dict[str, Any]) -> None:
    model = nn.MLP(SIZES)
    optimizer = optimizer_of(model, rule, **options)
    for batch in batches(2):  # so that the first step with the scheduler is compiled
        compile_step(model, optimizer)(*batch)
    step = compile_step(model, optimizer)
    scheduler = ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(3):
            step(*batch)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == options["lr"] / 8


@EACH_RULE
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("how", ["scan", "epoch"])
def test_scan_and_epoch_are_steps(
    rule: str, options: dict[str, Any], scheduled: bool, trained_before: bool, how: str
) -> None:
    data = batches(7)
    start = smooth_mlp()
    results = []
    for at_once in (True, False):
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model, rule, **options)
        step = compile_step(model, optimizer)
        if trained_before:
            step(*data[0])
        scheduler = None
        if scheduled:
            scheduler = LambdaLR(optimizer, lambda i: 1 / (i + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if not at_once:
                every = []
                for batch in data:
                    every.append(step(*batch))
                    if scheduler:
                        scheduler.step()
                losses = torch.stack(every)
            elif how == "epoch":
                losses = step.epoch(iter(data), scheduler)
            else:
                xs, targets = map(torch.stack, zip(*data, strict=True))
                with calls(1) if trained_before else Calls():
                    losses = step.scan(xs, targets, scheduler)
        assert losses.shape == (7,)
        assert losses.dtype == torch.float32
        results.append([losses, *everything(model, optimizer)])
        assert optimizer.param_groups[0]["lr"] == options["lr"] / (8 if scheduled else 1)
    assert_same(results[0], results[1], rtol=0, atol=0)


class Returning(LRScheduler):
    """Every other step a tenth of the learning rate, and then the very number that was there."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        first = optimizer.param_groups[0]["lr"]
        self.rates = first, first / 10
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [self.rates[self.last_epoch % 2]]


@pytest.mark.parametrize("how", ["scan", "epoch of images"])
def test_hyperparameters_that_come_back(how: str) -> None:
    """After steps of other ones in the trainer, though nothing that Python sees has changed."""
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    data = SimpleNamespace(images=images, targets=torch.randint(0, 5, (8,)))
    loader = BatchLoader(data, batch_size=4)
    rows = list(loader)
    start = nn.MLP([48, 9, 5])
    results = []
    for compiled in (True, False):
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model)
        step = compile_step(model, optimizer)
        scheduler = Returning(optimizer)
        either(compiled, step, *rows[0])
        either(compiled, step, *rows[0])
        if not compiled:
            for batch in rows:
                either(compiled, step, *batch)
                scheduler.step()
        elif how == "scan":
            xs, targets = map(torch.stack, zip(*rows, strict=True))
            step.scan(xs, targets, scheduler)
        else:
            loader.epoch = 0
            step.epoch(loader, scheduler)
        assert optimizer.param_groups[0]["lr"] is scheduler.rates[0]
        either(compiled, step, *rows[0])
        results.append(values(model))
    assert_same(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_no_steps() -> None:
    model = nn.MLP(SIZES)
    optimizer = optimizer_of(model)
    step = compile_step(model, optimizer)
    before = values(model)
    empty = torch.empty(0, 8, 20), torch.empty(0, 8, dtype=torch.int64)
    scheduler = ExponentialLR(optimizer, 0.5)
    assert step.scan(*empty, scheduler).shape == (0,)
    assert step.epoch([], scheduler).shape == (0,)
    step(*batches(1)[0])
    after = values(model)
    assert step.scan(*empty, scheduler).shape == (0,)
    assert_same(values(model), after, rtol=0, atol=0)
    assert not torch.equal(after[0], before[0])
    assert optimizer.param_groups[0]["lr"] == SGD["lr"]


def test_epoch_of_images() -> None:
    """A BatchLoader gives the batches that iterating over it gives."""
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    data = SimpleNamespace(images=images, targets=torch.randint(0, 5, (50,)))
    start = nn.MLP([48, 9, 5])
    results = []
    for at_once in (True, False):
        loader = BatchLoader(data, batch_size=16, flip=True, shift=1)
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model)
        step = compile_step(model, optimizer)
        scheduler = ExponentialLR(optimizer, 0.9)
        losses = []
        for _ in range(2):
            if at_once:
                losses.append(step.epoch(loader, scheduler))
            else:
                for batch in loader:
                    losses.append(step(*batch).reshape(1))
                    scheduler.step()
        assert loader.epoch == 2
        results.append([torch.cat(losses), *everything(model, optimizer)])
    assert_same(results[0], results[1], rtol=1e-5, atol=1e-6)


@EACH_RULE
@pytest.mark.parametrize("sizes", [[20, 16, 12, 5], [20, 300, 200, 5], [20, 1024, 5]])
def test_threads_change_nothing(
    rule: str, options: dict[str, Any], sizes: list[int], threads: Callable[[int], None]
) -> None:
    """Bit for bit, in small networks and in those that several threads share."""
    data = batches(4, rows=128)
    start = nn.MLP(sizes)
    results = []
    for count in (1, 2):
        threads(count)
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model, rule, **options)
        step = compile_step(model, optimizer)
        losses = [step(*batch) for batch in data]
        results.append([*losses, *everything(model, optimizer)])
    assert_same(results[0], results[1], rtol=0, atol=0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- threads -------------------------------------------------------------------------------------


def wide_batches(steps: int) -> tuple[Tensor, Tensor]:
    """Enough work for a team of threads, in a row of batches."""
    return torch.randn(steps, 32, 100), torch.randint(0, 10, (steps, 32))


def wide_step(start: nn.MLP) -> CompiledStep:
    model = copy.deepcopy(start)
    step = compile_step(model, optimizer_of(model))
    step(torch.ones(32, 100), torch.zeros(32, dtype=torch.int64))  # makes the optimizer's state
    return step


@pytest.mark.parametrize("steps", [1, 25])
def test_a_team_of_any_size_gives_the_same(threads: Callable[[int], None], steps: int) -> None:
    start, batch = nn.MLP([100, 160, 160, 10]), wide_batches(steps)
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        step = wide_step(start)
        losses = step.scan(*batch)
        results.append([losses, *everything(step.model, step.optimizer)])
    for other in results[1:]:
        assert_same(results[0], other, rtol=0, atol=0)


@pytest.mark.parametrize("count", [128, 150])
@pytest.mark.parametrize("size", [8, 64])
def test_an_epoch_on_any_number_of_threads_is_the_same(
    threads: Callable[[int], None], size: int, count: int
) -> None:
    """Each thread makes a batch of its own, or all make one where eight would be 25 MB: more memory
    with more threads, and less for a last batch that is smaller."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    data = SimpleNamespace(images=images, targets=torch.randint(0, 10, (count,)))
    start = nn.MLP([3 * size * size, 64, 10])
    results = []
    for numbers in ([1, 1, 1, 1], [1, 2, 3, 8], [8, 3, 2, 1]):
        loader = BatchLoader(data, batch_size=64, flip=True, shift=1)
        model = copy.deepcopy(start)
        step = compile_step(model, optimizer_of(model, lr=0.01))
        losses = []
        for number in numbers:
            threads(number)
            losses.append(step.epoch(loader))
        results.append([torch.cat(losses), *everything(model, step.optimizer)])
    for other in results[1:]:
        assert_same(results[0], other, rtol=0, atol=0)


def test_an_error_dismisses_the_team(threads: Callable[[int], None]) -> None:
    threads(2)
    (xs, targets), start = wide_batches(30), nn.MLP([100, 160, 160, 10])
    step = wide_step(start)
    step.scan(xs, targets)
    bad = targets.clone()
    bad[20, 3] = 10
    for _ in range(3):
        with pytest.raises(RuntimeError, match="target 10 in row 3 is out of range"):
            torch.ops.torchbp_trainer.steps(step._trainer, xs, bad, step._hyper())
    assert step.scan(xs, targets).isfinite().all()


def test_two_teams_at_once(threads: Callable[[int], None]) -> None:
    """Steps release Python's lock: each of two Python threads has a team of its own."""
    threads(2)
    (xs, targets), start = wide_batches(40), nn.MLP([100, 160, 160, 10])
    alone = wide_step(start).scan(xs, targets)
    steps = [wide_step(start) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for losses in pool.map(lambda step: step.scan(xs, targets), steps):
            assert torch.equal(losses, alone)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("ignored", [False, True])
def test_small_and_ignored_batches(rows: int, ignored: bool) -> None:
    """Without a row that counts the loss is NaN and no gradient changes a thing, as in torch."""
    first = batches(1)[0]
    x, target = torch.randn(rows, 20), torch.randint(0, 4, (rows,))
    if ignored:
        target.fill_(-100)
    start = smooth_mlp()
    results = []
    for compiled in (True, False):
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model)
        step = compile_step(model, optimizer)
        autograd_step(model, optimizer, *first)
        loss = step(x, target) if compiled else autograd_step(model, optimizer, x, target)
        results.append([loss, *everything(model, optimizer)])
    assert_same(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert bool(results[0][0].isnan()) == (ignored or not rows)


def test_inputs_of_any_strides() -> None:
    xs, targets = torch.randn(20, 6, 3).permute(2, 1, 0), torch.randint(0, 4, (6, 3)).T
    model = nn.MLP(SIZES)
    other = copy.deepcopy(model)
    first = batches(1)[0]
    results = []
    for network, dense in ((model, False), (other, True)):
        optimizer = optimizer_of(network)
        step = compile_step(network, optimizer)
        step(*first)
        batch = (xs.contiguous(), targets.contiguous()) if dense else (xs, targets)
        results.append([step.scan(*batch), step(batch[0][0], batch[1][0]), *values(network)])
    assert_same(results[0], results[1], rtol=0, atol=0)


def test_graph_that_holds_a_parameter_notices() -> None:
    model = nn.MLP(SIZES)
    step = compile_step(model, optimizer_of(model))
    first, second = batches(2)
    step(*first)
    loss = model[0].weight.square().sum()
    step(*second)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_no_grad() -> None:
    """The step trains all the same: it is no autograd that does it."""
    model = nn.MLP(SIZES)
    step = compile_step(model, optimizer_of(model))
    before = values(model)
    with torch.no_grad():
        for batch in batches(2):
            step(*batch)
    assert not any(map(torch.equal, values(model), before))
    assert all(p.requires_grad for p in model.parameters())


def test_inside_torch_compile() -> None:
    start = smooth_mlp()
    data = batches(3)
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        step = compile_step(model, optimizer_of(model))
        run = torch.compile(lambda *batch: step(*batch) * 2, backend="eager") if compiled else step  # noqa: B023
        losses = [run(*batch) / (2 if compiled else 1) for batch in data]
        results.append([*losses, *values(model)])
    assert_same(results[0], results[1], rtol=0, atol=0)


# ---- refusals


def relu_mlp() -> nn.MLP:
    return nn.MLP(SIZES)


class OwnForward(torch.nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def tied() -> torch.nn.Module:
    model = nn.MLP([4, 4, 4])
    model[2].weight = model[0].weight
    return model


def replaced(change: Callable[[Any], object]) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        model = relu_mlp()
        change(model)
        return model

    return make


def hook(*_: Any) -> None:
    pass


#: model, error, what the message says.
BAD_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: len, TypeError, "model wants a torch.nn.Module, got builtin"),
    "other": (lambda: torch.nn.Bilinear(2, 2, 2), TypeError, "wants an MLP, a Sequential or a Lin"),
    "own forward": (lambda: OwnForward(torch.nn.Linear(2, 2)), TypeError, "got OwnForward"),
    "misfit": (
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)),
        ValueError, "wants the one activation of the network, .* at position 1, got LayerNorm",
    ),
    "activation": (lambda: nn.Linear(3, 3, activation="relu"), ValueError, "without an activation"),
    "dropout": (lambda: nn.MLP(SIZES, dropout=0.1), ValueError, r"call model.eval\(\)"),
    "hook": (
        replaced(lambda model: model[1].register_forward_hook(hook)), ValueError, "no hooks: remove"
    ),
    "hook of the model": (
        replaced(lambda model: model.register_full_backward_hook(hook)), ValueError, "no hooks"
    ),
    "hook of a parameter": (
        replaced(lambda model: model[2].bias.register_hook(hook)), ValueError, "2.bias wants no ho"
    ),
    "hook after accumulation": (
        replaced(lambda model: model[2].bias.register_post_accumulate_grad_hook(hook)),
        ValueError, "2.bias wants no hooks",
    ),
    "forward of a layer": (
        replaced(lambda model: setattr(model[1], "forward", torch.tanh)), ValueError, "of its own"
    ),
    "tied": (tied, ValueError, "2.weight is used twice|0.weight is used twice"),
    "float64": (lambda: relu_mlp().double(), TypeError, r"0.weight wants float32.*model.float\(\)"),
    "meta": (lambda: relu_mlp().to("meta"), ValueError, r"0.weight wants the CPU.*model.cpu\(\)"),
    "strides": (
        replaced(lambda model: setattr(model[0].weight, "data", torch.randn(20, 16).T)),
        ValueError, "0.weight wants contiguous",
    ),
    "parametrised": (
        lambda: torch.nn.Sequential(
            torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))
        ),
        ValueError, "wants a Linear at position 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case: str) -> None:
    make, error, message = BAD_MODELS[case]
    model = make()
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else [torch.ones(1)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(error, match=f"^compile_step: .*(?:{message})"):
        compile_step(model, optimizer)


#: How the optimizer is made, error, message.
BAD_OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "kind": (lambda ps: torch.optim.Adam(ps), TypeError, "wants SGD or AdamW .*, got Adam"),
    "none": (lambda ps: None, TypeError, "wants SGD or AdamW .*, got NoneType"),
    "amsgrad": (lambda ps: torch.optim.AdamW(ps, amsgrad=True), ValueError, "amsgrad=False"),
    "capturable": (lambda ps: torch.optim.AdamW(ps, capturable=True), ValueError, "capturable=Fa"),
    "differentiable": (lambda ps: torch.optim.SGD(ps, differentiable=True), ValueError, "differen"),
    "parameter missing": (lambda ps: torch.optim.SGD(ps[:-1]), ValueError, "4.bias is not in the"),
    "of another model": (
        lambda ps: torch.optim.SGD(relu_mlp().parameters()), ValueError, "0.weight is not in the"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIMIZERS)
def test_bad_optimizers(case: str) -> None:
    make, error, message = BAD_OPTIMIZERS[case]
    model = relu_mlp()
    with pytest.raises(error, match=f"^compile_step: .*{message}"):
        compile_step(model, make(list(model.parameters())))


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_step_hooks(register: str) -> None:
    model = relu_mlp()
    optimizer = optimizer_of(model)
    handle = getattr(optimizer, register)(hook)
    with pytest.raises(ValueError, match="optimizer wants no step hooks"):
        compile_step(model, optimizer)
    handle.remove()
    compile_step(model, optimizer)


@pytest.mark.parametrize(
    ("smoothing", "error"), [(-0.1, ValueError), (1.5, ValueError), ("a", TypeError)]
)
def test_bad_label_smoothing(smoothing: Any, error: type[Exception]) -> None:
    model = relu_mlp()
    with pytest.raises(error, match="compile_step: label_smoothing wants"):
        compile_step(model, optimizer_of(model), smoothing)


#: What happens to a model, an optimizer or the state between two steps, error, message.
LATER: dict[str, tuple[Callable[[Any, Any], object], type[Exception], str]] = {
    "replaced": (
        lambda model, _: setattr(model[0], "weight", torch.nn.Parameter(torch.ones(16, 20))),
        ValueError, "0.weight is not in the optimizer",
    ),
    "layer": (
        lambda model, _: model.__setitem__(1, torch.nn.GELU()), ValueError, "at position 1, got GEL"
    ),
    "more layers": (
        lambda model, _: model.append(torch.nn.ReLU()), ValueError, "a Linear at position 6"
    ),
    "tied": (
        lambda model, _: setattr(model[4], "bias", model[2].bias), ValueError, "is used twice"
    ),
    "hook": (lambda model, _: model[0].register_forward_hook(hook), ValueError, "no hooks"),
    "step hook": (lambda _, opt: opt.register_step_post_hook(hook), ValueError, "no step hooks"),
    "float64": (lambda model, _: model.double(), TypeError, "0.weight wants float32"),
    "meta": (lambda model, _: model.to("meta"), ValueError, "0.weight wants the CPU"),
    "group": (
        lambda _, opt: opt.param_groups[0]["params"].pop(), ValueError, "4.bias is not in the opti"
    ),
    "state of another dtype": (
        lambda model, opt: opt.state[model[0].bias].update(
            momentum_buffer=torch.zeros(16, dtype=torch.float64)),
        TypeError, "momentum_buffer of 0.bias wants the dtype",
    ),
    "state of another shape": (
        lambda model, opt: opt.state[model[0].bias].update(momentum_buffer=torch.zeros(3)),
        ValueError, r"momentum_buffer of 0.bias wants shape \(16,\)",
    ),
    "state with gaps": (
        lambda model, opt: opt.state[model[0].bias].update(momentum_buffer=torch.zeros(32)[::2]),
        ValueError, "momentum_buffer of 0.bias wants contiguous",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_changes_between_steps(case: str) -> None:
    change, error, message = LATER[case]
    model = relu_mlp()
    optimizer = optimizer_of(model)
    step = compile_step(model, optimizer)
    first, second = batches(2)
    step(*first)
    change(model, optimizer)
    for _ in range(2):  # it goes on saying so
        with pytest.raises(error, match=f"^compile_step: .*{message}"):
            step(*second)


def test_dropout_and_autocast_between_steps() -> None:
    model = nn.MLP(SIZES, dropout=0.5).eval()
    step = compile_step(model, optimizer_of(model))
    first, second = batches(2)
    step(*first)
    model.train()
    with pytest.raises(ValueError, match="active dropout"):
        step(*second)
    model.eval()
    for _ in range(3):  # where there was one step, two and three
        with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
            step(*second)
        with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
            step.scan(second[0][None], second[1][None])
        step(*second)


X, TARGET = torch.zeros(4, 20), torch.zeros(4, dtype=torch.int64)
BAD_BATCHES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no tensor": ([[0.0] * 20], TARGET[:1], TypeError, "x wants a torch.Tensor, got list"),
    "no target": (X, [0] * 4, TypeError, "target wants a torch.Tensor, got list"),
    "float64": (X.double(), TARGET, TypeError, "x wants float32, got float64"),
    "bytes": (X.byte(), TARGET, TypeError, "x wants float32, got uint8"),
    "int32": (X, TARGET.int(), TypeError, "target wants int64, got int32"),
    "probabilities": (X, torch.ones(4, 5) / 5, TypeError, "target wants int64, got float32"),
    "image": (X.view(4, 5, 2, 2), TARGET, ValueError, r"x wants shape \(B, 20\), got"),
    "many": (X[None], TARGET[None], ValueError, r"x wants shape \(B, 20\), got \(1, 4, 20\)"),
    "width": (X[:, 1:], TARGET, ValueError, r"x wants shape \(B, 20\), got \(4, 19\)"),
    "rows": (X, TARGET[1:], ValueError, r"target wants shape \(4,\), got \(3,\)"),
    "meta": (X.to("meta"), TARGET, ValueError, "x wants the CPU, got meta"),
    "sparse": (X.to_sparse(), TARGET, ValueError, "x wants a dense tensor"),
    "gradient": (X.clone().requires_grad_(), TARGET, ValueError, r"pass x.detach\(\)"),
    "class": (X, TARGET + 5, IndexError, "class indices from 0 to 3 .* got 5 at position 0"),
    "negative class": (X, TARGET - 1, IndexError, "got -1 at position 0"),
}


@EACH_RULE
@pytest.mark.parametrize("case", BAD_BATCHES)
@pytest.mark.parametrize("many", [False, True])
def test_bad_batches_change_nothing(
    rule: str, options: dict[str, Any], case: str, many: bool
) -> None:
    x, target, error, message = BAD_BATCHES[case]
    model = relu_mlp()
    optimizer = optimizer_of(model, rule, **options)
    scheduler = ExponentialLR(optimizer, 0.5)
    step = compile_step(model, optimizer)
    for _ in range(3):  # the first step, one with hyperparameters, and one with the same again
        before = everything(model, optimizer)
        if many:
            xs, targets = (v[None] if isinstance(v, Tensor) else v for v in (x, target))
            if case == "sparse":
                xs = torch.zeros(1, 4, 20).to_sparse()
            with pytest.raises(error, match=r"wants a|xs wants|targets wants|class indices"):
                step.scan(xs, targets, scheduler)
        else:
            with pytest.raises(error, match=message):
                step(x, target)
        assert_same(everything(model, optimizer), before, rtol=0, atol=0)
        assert scheduler.last_epoch == 0
        step(*batches(1)[0])


def test_bad_schedulers() -> None:
    model = relu_mlp()
    optimizer = optimizer_of(model)
    step = compile_step(model, optimizer)
    xs, targets = X[None], TARGET[None]
    for run in (lambda s: step.scan(xs, targets, s), lambda s: step.epoch([(X, TARGET)], s)):
        with pytest.raises(TypeError, match="without a metric, got ReduceLROnPlateau"):
            run(ReduceLROnPlateau(optimizer))
        with pytest.raises(TypeError, match="got int"):
            run(3)
        with pytest.raises(ValueError, match="scheduler wants that of the step's optimizer"):
            run(ExponentialLR(optimizer_of(relu_mlp()), 0.5))


def test_steps_counted_in_float64() -> None:
    """torch.optim counts in float64 where that is PyTorch's default dtype."""
    optimizers = []

    def change(optimizer: Any, i: int) -> None:
        if i == 2:
            optimizers.append(optimizer)
            for slot in optimizer.state.values():
                slot["step"] = slot["step"].double()

    assert_same_either_way("AdamW", ADAMW, 5, change)
    assert len(optimizers) == 2
    counts = [slot["step"] for optimizer in optimizers for slot in optimizer.state.values()]
    assert all(count == 5 and count.dtype == torch.float64 for count in counts)


@pytest.mark.parametrize("first", [True, False])
def test_logits_are_those_before_the_update(first: bool) -> None:
    """Of the first step, which runs through autograd, and of one that does not."""
    model = relu_mlp()
    step = compile_step(model, optimizer_of(model, "SGD", **SGD))
    with pytest.raises(RuntimeError, match="no logits before the first step"):
        step.logits()
    for x, target in batches(1 if first else 2):
        with torch.no_grad():
            wanted = model(x)
        step(x, target)
    torch.testing.assert_close(step.logits(), wanted)


def test_copies_have_trainers_of_their_own() -> None:
    model = relu_mlp()
    step = compile_step(model, optimizer_of(model, "SGD", **SGD))
    before = batches(2)
    for batch in before:
        step(*batch)
    other = copy.deepcopy(step)
    assert torch.equal(step(*before[0]), other(*before[0]))
    for mine, theirs in zip(model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    del step
    other(*before[1])


# ---- the operation itself


@dataclass
class Call:
    """What the operations of a trainer take, by their names."""

    weights: list[Any]
    biases: list[Any]
    state: list[Any]
    rule: str
    groups: list[int]
    slots: list[int]
    xs: Any
    targets: Any
    hyper: list[float]
    activation: str = "relu"
    smoothing: float = 0.1

    @classmethod
    def of(cls, rule: str, steps: int | None = None) -> Call:
        weights, biases = [torch.randn(4, 3), torch.randn(2, 4)], [torch.randn(4), torch.randn(2)]
        lead = () if steps is None else (steps,)
        xs, targets = torch.randn(*lead, 5, 3), torch.randint(0, 2, (*lead, 5))
        ones = [torch.rand(4, 3), torch.rand(2, 4), torch.rand(2)]
        if rule == "sgd":
            state, slots = [ones[0], ones[2]], [1, 0, 0, 1]  # of group 0 alone
            hyper = [0.1, 0.9, 0.0, 0.1, 1.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 1.0]
        else:
            state = [t for one in ones for t in (one, one.clone(), torch.tensor(2.0))]
            slots = [3, 3, 0, 3]
            hyper = [0.1, 0.9, 0.99, 1e-8, 0.1, 0.0] * 2
        return cls(
            weights, biases, state, rule, [0, 1, -1, 0], slots, xs, targets, hyper * (steps or 1)
        )

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The number of a trainer of these arguments, until the block ends."""
        ops = torch.ops.torchbp_trainer
        trainer = ops.open(
            self.weights, self.biases, self.state, self.activation, 0.0, self.smoothing, self.rule,
            self.groups, self.slots,
        )  # fmt: skip
        try:
            yield trainer
        finally:
            ops.close(trainer, torch.empty(0))

    def run(self, *more: list[float]) -> torch.Tensor:
        """The steps, and again with other hyperparameters."""
        with self.opened() as trainer:
            for hyper in (self.hyper, *more):
                losses = torch.ops.torchbp_trainer.steps(trainer, self.xs, self.targets, hyper)
            return losses


def put(name: str, *path: Any) -> Callable[[Call], None]:
    """Replaces an argument, or an item of it."""

    def change(call: Call) -> None:
        if len(path) == 1:
            setattr(call, name, path[0])
        else:
            getattr(call, name)[path[0]] = path[1]

    return change


REFUSALS: dict[str, tuple[str, Callable[[Call], Any], str]] = {
    "float64": ("sgd", put("xs", torch.ones(5, 3).double()), "xs wants .* float32"),
    "dimensions": ("sgd", put("xs", torch.ones(3)), "xs wants shape"),
    "width": ("sgd", put("xs", torch.ones(5, 4)), r"xs wants shape \(N, 3\)"),
    "target dtype": ("sgd", put("targets", torch.ones(5)), "targets wants .* int64"),
    "target dimensions": (
        "sgd",
        put("targets", torch.ones(5, 1).long()),
        "targets wants the shape",
    ),
    "vector of weights": ("sgd", put("weights", 0, torch.ones(4)), "follow on one another"),
    "target shape": ("sgd", put("targets", torch.ones(4).long()), "targets wants the shape"),
    "target range": ("sgd", put("targets", torch.full((5,), 2)), "target 2 in row . is out"),
    "no weights": ("sgd", put("weights", []), "weights wants at least one"),
    "biases": ("sgd", lambda call: call.biases.pop(), "biases wants none or 2"),
    "weight dtype": ("sgd", put("weights", 0, torch.ones(4, 3).half()), "weights wants .* float32"),
    "weight strides": ("sgd", put("weights", 0, torch.ones(3, 4).T), "weights wants a contiguous"),
    "weight shape": ("sgd", put("weights", 1, torch.ones(2, 5)), "follow on one another"),
    "bias shape": ("sgd", put("biases", 0, torch.ones(3)), r"biases wants shape \(4\)"),
    "state shape": ("sgd", put("state", 0, torch.ones(3, 3)), "state wants tensors like"),
    "state dtype": ("sgd", put("state", 0, torch.ones(4, 3).half()), "state wants .* float32"),
    "state strides": ("sgd", put("state", 0, torch.ones(3, 4).T), "state wants a contiguous"),
    "less state": ("sgd", lambda call: call.state.pop(), "state wants more than 1"),
    "more state": ("sgd", lambda call: call.state.append(torch.ones(2)), "state wants 2 tensors"),
    "no buffer": ("sgd", put("hyper", 7, 0.9), "hyper has a momentum, and state no buffers"),
    "step": ("adamw", put("state", 2, torch.tensor(1)), "state wants .* float32"),
    "activation": ("sgd", put("activation", "gelu"), "activation wants"),
    "rule": ("sgd", put("rule", "adam"), "rule wants sgd or adamw, got adam"),
    "groups": ("sgd", lambda call: call.groups.pop(), "groups and slots want"),
    "slots": ("adamw", put("slots", 0, 2), "slots wants"),
    "less slots": ("sgd", lambda call: call.slots.pop(), "groups and slots want"),
    "more slots": ("sgd", lambda call: call.slots.append(0), "groups and slots want"),
    "negative smoothing": ("sgd", put("smoothing", -0.1), "label_smoothing wants"),
    "smoothing": ("sgd", put("smoothing", 1.1), "label_smoothing wants"),
    "hyper": ("sgd", lambda call: call.hyper.pop(), "hyper wants"),
    "hyper of steps": ("sgd", lambda call: call.hyper.extend([0.0] * 12), "hyper wants 12 numbers"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case: str) -> None:
    rule, spoil, message = REFUSALS[case]
    if EMULATED and case == "target range":
        pytest.skip("nobody waits for a GPU to raise: the loss is nan")
    call = Call.of(rule)
    spoil(call)
    before = copy.deepcopy(call)
    with pytest.raises(RuntimeError, match=f"torchbp::.*{message}"):
        call.run()
    for name in ("weights", "biases", "state"):
        assert_same(getattr(call, name), getattr(before, name), rtol=0, atol=0)


def test_momentum_that_begins_later_is_refused_before_the_first_step() -> None:
    call = Call.of("sgd", 3)
    call.hyper[24 + 7] = 0.9  # of the group without buffers, in the third step
    before = copy.deepcopy(call)
    with pytest.raises(RuntimeError, match="hyper has a momentum, and state no buffers"):
        call.run()
    assert_same(call.weights, before.weights, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_no_hyperparameters_are_those_of_the_step_before(rule: str) -> None:
    call = Call.of(rule, 3)
    call.hyper[24] *= 0.5  # the learning rate of the last step's first group
    other = copy.deepcopy(call)
    assert_same(call.run([]), other.run(call.hyper[24:]), rtol=0, atol=0)
    assert_same(call.weights, other.weights, rtol=0, atol=0)
    fresh = Call.of(rule)
    fresh.hyper = []
    with pytest.raises(RuntimeError, match="hyper wants 12 numbers"):
        fresh.run()


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_the_ends_of_label_smoothing_are_not_refused(smoothing: float) -> None:
    call = Call.of("sgd")
    call.smoothing = smoothing
    assert call.run().isfinite()


@pytest.mark.parametrize("shape", [(2, 5), (4, 5), (5, 3)], ids=str)
def test_targets_of_many_steps_refused(shape: tuple[int, int]) -> None:
    call = Call.of("sgd", 3)
    call.targets = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="targets wants the shape of xs without features"):
        call.run()


EPOCH: dict[str, tuple[torch.Tensor, torch.dtype, int, str]] = {
    "dtype": (torch.zeros(6, 1, 1, 3).byte(), torch.float64, 0, "images want dtype float32"),
    "begin": (torch.zeros(6, 1, 1, 3).byte(), torch.float32, 5, "begin wants 0 to 4, got 5"),
    "features": (
        torch.zeros(6, 1, 1, 4).byte(), torch.float32, 0, "wants 3 inputs, and an image has 4"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EPOCH)
def test_epoch_refusals(case: str) -> None:
    call = Call.of("sgd")
    plan = (torch.arange(4), None, None, torch.zeros(4).long(), [1.0], [0.0])

    def run(trainer: int, images: Any, dtype: Any, begin: Any) -> None:
        opened = torch.ops.torchbp_images.open(images, *plan, dtype, 1, False)
        try:
            torch.ops.torchbp_trainer.epoch(trainer, opened, begin, False, call.hyper)
        finally:
            torch.ops.torchbp_images.close(opened)

    *wrong, message = EPOCH[case]
    with call.opened() as trainer:
        run(trainer, torch.zeros(6, 1, 1, 3).byte(), torch.float32, 0)
        before = [weight.clone() for weight in call.weights]
        with pytest.raises(RuntimeError, match=f"torchbp::.*{message}"):
            run(trainer, *wrong)
        assert_same(call.weights, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weights", "biases", "state"])
@pytest.mark.parametrize("change", ["size", "strides", "dtype"])
def test_tensors_that_change_behind_a_trainer(name: str, change: str) -> None:
    call = Call.of("sgd")
    if change == "strides" and name == "biases":
        pytest.skip("a vector has none to change")
    with call.opened() as trainer:
        tensor = getattr(call, name)[0]
        if change == "size":
            tensor.resize_(2)
        elif change == "dtype":
            tensor.data = tensor.double()
        else:
            tensor.t_()
        with pytest.raises(RuntimeError, match="has changed in shape, layout or dtype"):
            torch.ops.torchbp_trainer.steps(trainer, call.xs, call.targets, call.hyper)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_same_step_again(rule: str) -> None:
    ops, call = torch.ops.torchbp_trainer, Call.of(rule)
    results = []
    for again in (False, True):
        own = copy.deepcopy(call)
        with own.opened() as trainer:
            with pytest.raises(RuntimeError, match=r"hyper wants 12 numbers, .*got 0"):
                ops.again(trainer, own.xs, own.targets)
            first = ops.steps(trainer, own.xs, own.targets, own.hyper)
            if again:
                second = ops.again(trainer, own.xs, own.targets)
            else:
                second = ops.steps(trainer, own.xs, own.targets, own.hyper)
            results.append([first, second, *own.weights, *own.biases, *own.state])
            with pytest.raises(RuntimeError, match=r"x wants shape \(N, D\), got \(1, 5, 3\)"):
                ops.again(trainer, own.xs[None], own.targets[None])
    assert_same(results[0], results[1], rtol=0, atol=0)


def test_a_trainer_that_was_closed() -> None:
    with pytest.raises(RuntimeError, match="there is no trainer 0"):
        torch.ops.torchbp_trainer.steps(0, torch.ones(5, 3), torch.zeros(5).long(), [])


def test_unchanged() -> None:
    """What the step asks before it runs: identity, not equality."""
    value, group = [1.5], {"lr": 0.5}
    owner = SimpleNamespace(state=value)
    holds: tuple[tuple[Any, Any, Any], ...]
    holds = ((group, "lr", group["lr"]), (value, 0, value[0]), (owner, "state", value))
    weight, wanted = torch.nn.Parameter(torch.zeros(1)), torch._C.TensorBase.requires_grad
    holds += ((weight, wanted, True),)
    sizes = ((group, None, 1), (value, None, 1))
    keys = [torch.zeros(1) for _ in range(3)]
    state: dict[Tensor, dict[str, Any]] = {key: {} for key in keys[:2]}
    of_keys = [(state, key, state[key]) for key in (*keys[1::-1], keys[1])]  # in any order
    assert _C.unchanged((*holds, *sizes, *of_keys))
    for broken in (
        (state, keys[0], {}), (state, keys[2], {}), (state, keys[0].clone(), state[keys[0]]),
        (group, "lr", float("0.5")), (group, "momentum", 0.5), (value, 1, 1.5), (value, 0, None),
        (owner, "state", [1.5]), (group, None, 2), (value, None, 0), (weight, wanted, False),
    ):  # fmt: skip
        assert not _C.unchanged((*holds, *sizes, *of_keys, broken))
    with pytest.raises(AttributeError):
        _C.unchanged(((owner, "missing", None),))
    with pytest.raises(TypeError, match="requires_grad"):
        _C.unchanged(((owner, wanted, True),))
    with pytest.raises(TypeError, match="conditions wants a tuple"):
        _C.unchanged([])  # type: ignore[arg-type]
