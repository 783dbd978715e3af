"""`compile_step` on a GPU, in one block of threads and as a graph, against torch.

On the emulator there are no graphs: there the operations run that a graph is recorded from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tests.compare import assert_same
from tests.machine import EMULATED, GPU
from tests.optim.test_step import ADAMW, SGD, autograd_step, everything, torch_model, vector
from torchbp import compile_step, nn
from torchbp.data import BatchLoader
from torchbp.optim import CompiledStep, on_gpu
from torchbp.optim import step as step_module

pytestmark = pytest.mark.gpu

EMULATOR = pytest.mark.skipif(not EMULATED, reason="wants a graph of somebody else")
REAL = pytest.mark.skipif(EMULATED, reason="the emulator has no graphs")
EACH_RULE = pytest.mark.parametrize(("rule", "options"), [("SGD", SGD), ("AdamW", ADAMW)])

Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator's GPU is called the CPU."""
    if EMULATED:
        monkeypatch.setattr(step_module, "is_gpu", lambda device: True)


@pytest.fixture(params=["block", "graph", pytest.param("alone", marks=EMULATOR)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How steps run: in a block what fits there, as a graph whatever it is, or as they would while
    somebody else records a graph."""
    if request.param != "block":
        monkeypatch.setattr(on_gpu, "_fits", lambda *_: False)
    if request.param == "alone":
        monkeypatch.setattr(on_gpu.Runner, "_as_recorded", on_gpu.Runner._by_itself)
    return str(request.param)


def batches(steps: int, rows: int = 32, sizes: tuple[int, int] = (20, 4)) -> list[Batch]:
    """On the CPU; a row now and then does not count."""
    result = []
    for _ in range(steps):
        target = torch.randint(sizes[1], (rows,))
        target[torch.rand(rows) < 0.1] = -100
        result.append((torch.randn(rows, sizes[0]), target))
    return result


def there(data: list[Batch]) -> list[Batch]:
    return [(x.to(GPU), target.to(GPU)) for x, target in data]


def compiled(start: torch.nn.Module, rule: str, smoothing: float = 0.0, **options: Any) -> Any:
    """A step of a copy of a model, on the GPU."""
    model = copy.deepcopy(start).to(GPU)
    return compile_step(model, getattr(torch.optim, rule)(model.parameters(), **options), smoothing)


def all_of(step: CompiledStep) -> list[Tensor]:
    return [t.cpu() for t in everything(step.model, step.optimizer)]


RULES: tuple[tuple[str, dict[str, Any], bool, float], ...] = (
    ("SGD", {"lr": 0.05}, True, 0.0),
    ("SGD", SGD, False, 0.25),
    ("SGD", {"lr": 0.05, "momentum": 0.5, "dampening": 0.2, "maximize": True}, True, 0.25),
    ("SGD", {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1}, True, 0.0),
    ("AdamW", ADAMW, True, 0.0),
    ("AdamW", {"lr": 3e-3, "betas": (0.3, 0.9), "eps": 1e-4, "maximize": True}, False, 0.25),
)


ACTIVATIONS = ("relu", "leaky_relu", "elu", "sigmoid", "tanh", "tanh")


@pytest.mark.parametrize(
    ("activation", "rule", "options", "bias", "smoothing"),
    [(activation, *rule) for activation, rule in zip(ACTIVATIONS, RULES, strict=True)],
)
def test_20_steps_as_float64(
    path: str, activation: str, rule: str, options: dict[str, Any], bias: bool, smoothing: float
) -> None:
    """At most twice as far off as torch in float32, of two orders of the rows."""
    data = batches(20)
    start = torch_model(activation, bias)
    results = []
    for dtype, flip in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model = copy.deepcopy(start).to(dtype)
        optimizer = getattr(torch.optim, rule)(model.parameters(), **options)
        losses = []
        for x, target in data:
            batch = (x.flip(0), target.flip(0)) if flip else (x, target)
            loss = autograd_step(model, optimizer, batch[0].to(dtype), batch[1], smoothing)
            losses.append(loss.double())
        results.append((vector(model), torch.stack(losses)))
    step = compiled(start, rule, smoothing, **options)
    losses = [step(x, target) for x, target in there(data)]
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)

    mine = vector(step.model.cpu()), torch.stack(losses).cpu().double()
    exact, *torchs = results
    for result, wanted, *others in zip(mine, exact, *torchs, strict=True):
        drift = max(float((other - wanted).norm()) for other in others)
        assert float((result - wanted).norm()) <= 2 * drift


SHAPES: tuple[tuple[list[int], int], ...] = (
    ([5, 3], 7),  # one layer
    ([1, 1, 2], 1),
    ([7, 129, 3], 10),
    ([130, 33, 65, 17], 66),
    ([64, 100, 100, 100, 100, 10], 32),  # whose state stays in global memory
    ([3, 128, 128, 5], 8),
)


@EACH_RULE
@pytest.mark.parametrize(("sizes", "rows"), SHAPES, ids=str)
def test_blocks_and_graphs_agree(
    monkeypatch: pytest.MonkeyPatch, rule: str, options: dict[str, Any], sizes: list[int], rows: int
) -> None:
    start = nn.MLP(sizes, "tanh")
    data = there(batches(3, rows, (sizes[0], sizes[-1])))
    results = []
    for fits in (True, False):
        step = compiled(start, rule, **options)
        step(*data[0])  # makes the optimizer's state
        step._prepare()
        if fits:
            assert on_gpu._fits(step._trainer, rows, step._weights[0])
        else:
            monkeypatch.setattr(on_gpu, "_fits", lambda *_: False)
        losses = [step(*batch).cpu() for batch in data[1:]]
        results.append([*losses, *all_of(step), step.logits().cpu()])
    assert_same(results[0], results[1], rtol=1e-4, atol=1e-6)  # float32, sums of 130


@pytest.mark.parametrize(
    ("sizes", "rows", "fits"),
    [
        ([64, 100, 100, 100, 100, 10], 32, True),
        ([64, 100, 100, 100, 100, 10], 128, False),
        ([64, 64, 64, 10], 128, True),
        ([100, 128, 128, 10], 128, False),
        ([20, 4000, 4], 32, False),
        ([3072, 512, 256, 10], 128, False),
        ([2, 70_000, 4], 1, False),
    ],
)
def test_what_fits_into_a_block(sizes: list[int], rows: int, fits: bool) -> None:
    """Of the 227 KiB of an H100, and with a thread for each tile."""
    if not EMULATED and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another GPU has another limit")
    step = compiled(nn.MLP(sizes), "SGD", lr=0.1)
    assert on_gpu._fits(step._trainer, rows, step._weights[0]) == fits


@EACH_RULE
@pytest.mark.parametrize("scheduled", [False, True])
def test_scan_is_steps(path: str, rule: str, options: dict[str, Any], scheduled: bool) -> None:
    data = there(batches(6))
    start = nn.MLP([20, 16, 4], "tanh")
    results = []
    for at_once in (True, False):
        step = compiled(start, rule, **options)
        scheduler = LambdaLR(step.optimizer, lambda i: 1 / (i + 1)) if scheduled else None
        if at_once:
            losses = step.scan(*map(torch.stack, zip(*data, strict=True)), scheduler)
        else:
            each = []
            for batch in data:
                each.append(step(*batch))
                if scheduler:
                    scheduler.step()
            losses = torch.stack(each)
        results.append([losses.cpu(), *all_of(step)])
        lr = step.optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(options["lr"] / (7 if scheduled else 1))
    # Of a graph the first step runs as operations, for which cuBLAS may choose another kernel.
    exact = path == "block" or EMULATED
    assert_same(results[0], results[1], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)


@EACH_RULE
def test_groups_and_frozen_parameters(path: str, rule: str, options: dict[str, Any]) -> None:
    """Some thawed later, so that AdamW counts their steps from there; and mixed with autograd."""
    data = batches(12)
    start = nn.MLP([20, 16, 12, 4], "tanh")
    results = []
    for mine in (True, False):
        model = copy.deepcopy(start)
        if mine:
            model = model.to(GPU)
        vectors = [p for p in model.parameters() if p.dim() == 1]
        matrices = [p for p in model.parameters() if p.dim() == 2]
        groups: list[dict[str, Any]] = [
            {"params": vectors, "weight_decay": 0.0},
            {"params": matrices[1:], "lr": 0.02},
            {"params": matrices[:1], "maximize": True},
        ]
        if rule == "SGD":
            groups[0] |= {"momentum": 0.0, "nesterov": False}
        optimizer = getattr(torch.optim, rule)(groups, **options)
        matrices[0].requires_grad_(False)
        model[2].bias.requires_grad_(False)
        step = compile_step(model, optimizer)
        for i, (x, target) in enumerate(data):
            if i == 5:
                model[2].bias.requires_grad_()
            if i == 8:
                matrices[0].requires_grad_()
            if mine and i % 4 < 3:
                step(x.to(GPU), target.to(GPU))
            else:
                on = model[0].weight.device
                autograd_step(model, optimizer, x.to(on), target.to(on))
        results.append(all_of(step))
    assert_same(results[0], results[1], rtol=1e-3, atol=1e-5)  # float32, 12 steps


def test_all_frozen(path: str) -> None:
    step = compiled(nn.MLP([20, 16, 4]), "SGD", lr=0.1)
    step.model.requires_grad_(False)
    before = all_of(step)
    ((x, target),) = there(batches(1))
    wanted = torch.nn.functional.cross_entropy(step.model(x), target)
    for _ in range(3):
        assert_same(step(x, target), wanted, rtol=1e-5, atol=1e-6)
    assert_same(all_of(step), before, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("ignored", [False, True])
def test_small_and_ignored_batches(path: str, rows: int, ignored: bool) -> None:
    first, other = batches(1), batches(1, rows)
    if ignored:
        other[0][1].fill_(-100)
    start = nn.MLP([20, 16, 4], "tanh")
    results = []
    for mine in (True, False):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        step = compiled(start, "SGD", **SGD)
        for _ in range(3):
            for x, target in (*first, *other):
                if mine:
                    loss = step(x.to(GPU), target.to(GPU))
                else:
                    loss = autograd_step(model, optimizer, x, target)
        results.append([loss.cpu(), *(all_of(step) if mine else everything(model, optimizer))])
    assert_same(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert bool(results[0][0].isnan()) == (ignored or not rows)


def test_a_class_out_of_range(path: str) -> None:
    """An IndexError where the classes are looked at, else a loss of nan and no gradient."""
    data = there(batches(3))
    bad = [(x, target.clone()) for x, target in data]
    for _, target in bad:
        target[5] = 4
    step = compiled(nn.MLP([20, 16, 4], "tanh"), "AdamW", **ADAMW)
    before = all_of(step)
    with pytest.raises(IndexError, match="got 4 at position 5"):
        step(*bad[0])
    assert_same(all_of(step), before, rtol=0, atol=0)
    for batch in data:
        step(*batch)
    before = all_of(step)
    with pytest.raises(IndexError, match="got 4 at position 5"):
        step.scan(*map(torch.stack, zip(*bad, strict=True)))
    assert_same(all_of(step), before, rtol=0, atol=0)
    if path != "block" and EMULATED:
        return  # the operations look at them
    other = copy.deepcopy(step)
    x, target = bad[0]
    assert step(x, target).isnan()
    other(x, target.where(target != 4, -100))
    assert_same(all_of(step), all_of(other), rtol=1e-5, atol=1e-7)


def test_logits(path: str) -> None:
    step = compiled(nn.MLP([20, 16, 4]), "SGD", **SGD)
    for x, target in there(batches(3)):
        with torch.no_grad():
            wanted = step.model(x)
        step(x, target)
        kept = step.logits()
        assert_same(kept, wanted, rtol=1e-5, atol=1e-6)
    step(x, target)
    assert_same(kept, wanted, rtol=1e-5, atol=1e-6)  # a copy


@pytest.mark.parametrize("drop_last", [False, True])
def test_epoch_of_images(path: str, monkeypatch: pytest.MonkeyPatch, drop_last: bool) -> None:
    """As iterating over the loader gives it, also where the images are made a few at a time."""
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    data = SimpleNamespace(images=images, targets=torch.randint(0, 5, (50,)))
    start = nn.MLP([48, 9, 5], "tanh")
    monkeypatch.setattr(step_module, "_CHUNK", 2 * 16 * 48)
    results = []
    for at_once in (True, False):
        loader = BatchLoader(
            data, batch_size=16, flip=True, shift=1, drop_last=drop_last, device=GPU
        )
        step = compiled(start, "SGD", **SGD)
        scheduler = LambdaLR(step.optimizer, lambda i: 1 / (i + 1))
        losses = []
        for _ in range(3):
            if at_once:
                losses.append(step.epoch(loader, scheduler))
            else:
                for x, target in loader:
                    losses.append(step(x, target).reshape(1))
                    scheduler.step()
        assert loader.epoch == 3
        results.append([torch.cat(losses).cpu(), *all_of(step)])
    assert len(results[0][0]) == (9 if drop_last else 12)
    assert_same(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_parameters_that_move(path: str) -> None:
    """What was recorded, or looked up, of where they were is of no use any more."""
    data = there(batches(8))
    start = nn.MLP([20, 16, 4], "tanh")
    results = []
    for moves in (True, False):
        step = compiled(start, "SGD", **SGD)
        for i, batch in enumerate(data):
            if i == 5 and moves:
                for p in step.model.parameters():
                    p.data = p.data.clone()
                    buffer = step.optimizer.state[p]["momentum_buffer"]
                    buffer.data = buffer.data.clone()
            step(*batch)
        results.append(all_of(step))
    assert_same(results[0], results[1], rtol=1e-5, atol=1e-6)


BAD: dict[str, tuple[Callable[[Tensor, Tensor], Any], type[Exception], str]] = {
    "no tensor": (lambda x, t: (x, t.tolist()), TypeError, "target wants a torch.Tensor, got list"),
    "float64": (lambda x, t: (x.double(), t), TypeError, "x wants float32, got float64"),
    "int32": (lambda x, t: (x, t.int()), TypeError, "target wants int64, got int32"),
    "width": (lambda x, t: (x[:, 1:], t), ValueError, r"x wants shape \(B, 20\)"),
    "rows": (lambda x, t: (x, t[1:]), ValueError, r"target wants shape \(32,\), got \(31,\)"),
    "meta": (lambda x, t: (x.to("meta"), t), ValueError, "x wants .*, got meta"),
    "sparse": (lambda x, t: (x.to_sparse(), t), ValueError, "x wants a dense tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_change_nothing(path: str, case: str) -> None:
    spoil, error, message = BAD[case]
    step = compiled(nn.MLP([20, 16, 4]), "AdamW", **ADAMW)
    for batch in there(batches(4)):
        before = all_of(step)
        with pytest.raises(error, match=f"^compile_step: .*{message}"):
            step(*spoil(*batch))
        assert_same(all_of(step), before, rtol=0, atol=0)
        step(*batch)


@REAL
def test_another_device() -> None:
    """Whose trainers have the same place in a list of their own."""
    step = compiled(nn.MLP([20, 16, 4]), "SGD", **SGD)
    ((x, target),) = batches(1)
    for _ in range(2):
        step(x.to(GPU), target.to(GPU))
    with pytest.raises(ValueError, match="x wants cuda:0, as the model, got cpu"):
        step(x, target)
    with pytest.raises(ValueError, match="target wants cuda:0, as the model, got cpu"):
        step(x.to(GPU), target)
    model = nn.MLP([20, 16, 4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].cuda()
    with pytest.raises(ValueError, match="wants the device of the first weight, cuda:0, got cpu"):
        compile_step(model, optimizer)


@REAL
def test_graphs_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each number of rows, whatever the hyperparameters are."""
    monkeypatch.setattr(on_gpu, "_fits", lambda *_: False)
    step = compiled(nn.MLP([20, 16, 4], "tanh"), "AdamW", **ADAMW)
    small = there(batches(4, 5))
    for i, batch in enumerate([*there(batches(6)), *small]):
        step.optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
        step.optimizer.param_groups[0]["weight_decay"] = 0.1 * (i % 2)
        step(*batch)
    runner = step._runner
    assert sorted(runner._graphs) == [5, 32]
    graphs = [runner._graphs[rows].graph for rows in (5, 32)]
    step(*small[0])
    assert graphs == [runner._graphs[rows].graph for rows in (5, 32)]


@REAL
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_inside_somebody_elses_graph(path: str, rule: str) -> None:
    options = SGD if rule == "SGD" else ADAMW
    step, other = (compiled(nn.MLP([20, 16, 4], "tanh"), rule, **options) for _ in range(2))
    other.model.load_state_dict(step.model.state_dict())
    ((x, target),) = there(batches(1))
    for each in (step, other):
        for _ in range(3):
            each(x, target)
    graph = torch.cuda.CUDAGraph()
    if rule == "AdamW":
        with pytest.raises(ValueError, match="the same step of AdamW"), torch.cuda.graph(graph):
            step(x, target)
        return
    with torch.cuda.graph(graph):
        step(x, target)
    for _ in range(3):
        graph.replay()
        other(x, target)
    assert_same(all_of(step), all_of(other), rtol=1e-4, atol=1e-6)


@REAL
def test_runs_on_the_current_stream(path: str) -> None:
    data = there(batches(6, 64))
    start = nn.MLP([20, 64, 4], "tanh")
    results = []
    stream = torch.cuda.Stream()
    for current in (stream, torch.cuda.current_stream()):
        step = compiled(start, "SGD", **SGD)
        current.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(current):
            losses = [step(*batch) for batch in data]
        current.synchronize()
        results.append([*map(Tensor.cpu, losses), *all_of(step)])
    assert_same(results[0], results[1], rtol=1e-5, atol=1e-6)
