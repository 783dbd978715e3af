"""torchbp.optim.optimizers: SGD and AdamW against torch.optim's."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

import torchbp.optim
from tests.compare import assert_close_in_norm, assert_same
from tests.ops import IN_PLACE_OPS

ops: Any = torch.ops.torchbp

Options = dict[str, Any]

SGD_OPTIONS: list[Options] = [
    {"lr": 0.1, "momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in product((0, 0.9), (0, 0.3), (0, 0.05), (False, True), (False, True))
    if not (n and (m == 0 or d != 0))
]
ADAMW_OPTIONS: list[Options] = [
    {"lr": 0.01, "betas": b, "weight_decay": w, "eps": e, "maximize": x}
    for b, w, e, x in product(
        ((0.9, 0.999), (0.3, 0.9), (0.0, 0.0)), (0, 0.1), (1e-8, 1e-2), (False, True)
    )
]
EACH_OPTION = pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", o) for o in SGD_OPTIONS] + [("AdamW", o) for o in ADAMW_OPTIONS],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
EACH = pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}), ("AdamW", {"lr": 0.1})],
    ids=["SGD", "AdamW"],
)
STEPS = 200
SHAPES = ((7, 5), (37,), (), (2, 3, 4, 5), (0, 3))


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def parameters(values: list[Tensor], dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    """Parameters of their own memory and of the layout of `values`."""
    return [torch.nn.Parameter(torch.empty_like(v, dtype=dtype).copy_(v)) for v in values]


def run(
    optimizer: Optimizer, gradients: list[list[Tensor]], before: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Step with the given gradients, each in the parameter's dtype; returns the parameters."""
    ps = [p for group in optimizer.param_groups for p in group["params"]]
    for i, grads in enumerate(gradients):
        if before:
            before(i)
        for p, g in zip(ps, grads, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in ps]


def state_of(optimizer: Optimizer) -> list[Tensor]:
    return [
        value
        for group in optimizer.param_groups
        for p in group["params"]
        for _, value in sorted(optimizer.state[p].items())
        if value is not None
    ]


class Calls(TorchDispatchMode):
    """Counts the operations of torchbp that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        trainer = torch.ops.torchbp_trainer
        self.count += func.namespace == "torchbp" or func in (
            trainer.steps.default, trainer.again.default, trainer.epoch.default
        )  # fmt: skip
        return func(*args, **(kwargs or {}))


@contextmanager
def calls(count: int) -> Iterator[None]:
    """What runs in here calls torchbp's operations that often."""
    with Calls() as recorder:
        yield
    assert recorder.count == count


def ours(name: str) -> Any:
    return getattr(torchbp.optim, name)


def theirs(name: str) -> Any:
    return getattr(torch.optim, name)


@EACH_OPTION
def test_200_steps_as_torch(name: str, options: Options) -> None:
    """The gradients are given, so that no error feeds on itself: float64 stays at its rounding, and
    float32 no further from float64 than torch's own.
    """
    start, gradients = tensors(), [tensors() for _ in range(STEPS)]
    exact = theirs(name)(parameters(start), foreach=False, **options)
    mine = ours(name)(parameters(start), **options)
    with calls(STEPS - (bool(exact.defaults.get("momentum")) or name == "AdamW")):
        run(mine, gradients)
    # A sum of 200 terms of size 1, each rounded to 1e-16.
    assert_same(run(exact, gradients), run_result(mine), rtol=1e-12, atol=1e-12)
    assert_same(state_of(exact), state_of(mine), rtol=1e-12, atol=1e-12)

    single = [kind(name)(parameters(start, torch.float32), **options) for kind in (ours, theirs)]
    for own, other, wanted in zip(
        *(run(optimizer, gradients) for optimizer in single), run_result(exact), strict=True
    ):
        assert_close_in_norm(own, wanted, other)


def run_result(optimizer: Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(name: str, options: Options, dtype: torch.dtype) -> None:
    """One step from the same state: half an ulp at most from the same step in float32."""
    start, gradients = tensors(), [tensors() for _ in range(2)]
    gradients = [[g.to(dtype) for g in grads] for grads in gradients]
    half = ours(name)(parameters(start, dtype), **options)
    run(half, gradients[:1])
    wide = theirs(name)([torch.nn.Parameter(p.float()) for p in run_result(half)], **options)
    wide.load_state_dict(copy.deepcopy(half.state_dict()))  # it would share the step counts
    with calls(1):
        run(half, gradients[1:])
    run(wide, gradients[1:])
    for own, wanted in zip(
        run_result(half) + state_of(half), run_result(wide) + state_of(wide), strict=True
    ):
        info = torch.finfo(own.dtype)
        assert_same(own.double(), wanted.double(), rtol=0.51 * info.eps, atol=info.tiny)


@EACH
def test_switch_between_ours_and_torch_at_any_step(name: str, options: Options) -> None:
    """Through state_dict, which is a checkpoint too."""
    start, gradients = tensors(), [tensors() for _ in range(12)]
    values = run(theirs(name)(parameters(start), **options), gradients)
    ps, state = parameters(start), None
    for i, kind in enumerate((ours, theirs, ours, theirs)):
        optimizer = kind(name)(ps, **options)
        if state:
            optimizer.load_state_dict(pickle.loads(pickle.dumps(state)))
        run(optimizer, gradients[3 * i : 3 * i + 3])
        state = optimizer.state_dict()
    assert_same([p.detach() for p in ps], values)


@EACH
def test_groups_and_missing_gradients(name: str, options: Options) -> None:
    """Each group has its options; who has no gradient stays as it is, state included."""
    start = tensors()
    more = {"lr": 0.03, "weight_decay": 0.0, "maximize": True}
    results = []
    for kind in (ours, theirs):
        ps = parameters(start)
        groups: list[dict[str, Any]] = [
            {"params": ps[:2]},
            {"params": ps[2:4], **more},
            {"params": ps[4:]},
        ]
        if name == "SGD":
            groups[1]["momentum"] = 0.0
        optimizer = kind(name)(groups, **options)
        torch.manual_seed(1)
        for i in range(20):
            for k, p in enumerate(ps):
                # The last one never has any, another only from step 10 on.
                p.grad = None if k == 4 or (k == 1 and i < 10) else torch.randn_like(p)
            optimizer.step()
        results.append([p.detach() for p in ps] + state_of(optimizer))
    assert_same(results[0], results[1])


@EACH
def test_no_gradient_at_all(name: str, options: Options) -> None:
    optimizer = ours(name)(parameters(tensors()), **options)
    with calls(0):
        assert optimizer.step() is None


@EACH
def test_hyperparameters_are_read_in_every_step(name: str, options: Options) -> None:
    """Schedulers set them in param_groups."""
    start, gradients = tensors(), [tensors() for _ in range(6)]

    def result(kind: Any) -> list[Tensor]:
        optimizer = kind(name)(parameters(start), **options)

        def change(i: int) -> None:
            group = optimizer.param_groups[0]
            group["lr"], group["weight_decay"] = 0.1 / (i + 1), 0.01 * i
            if name == "SGD":
                group["momentum"] = 0.5 + 0.05 * i

        return run(optimizer, gradients, change)

    assert_same(result(ours), result(theirs))


@EACH
def test_learning_rate_in_a_tensor(name: str, options: Options) -> None:
    start, gradients = tensors(), [tensors() for _ in range(4)]
    lr = torch.tensor(0.25, dtype=torch.float64)
    mine = ours(name)(parameters(start), **{**options, "lr": lr})
    other = theirs(name)(parameters(start), **{**options, "lr": 0.25})
    with calls(3):
        run(mine, gradients)
    assert_same(run_result(mine), run(other, gradients))
    assert mine.param_groups[0]["lr"] is lr


@EACH
def test_closure(name: str, options: Options) -> None:
    def losses(kind: Any) -> list[float]:
        p = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        optimizer = kind(name)([p], **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        with torch.no_grad():  # the closure differentiates all the same
            return [optimizer.step(closure).item() for _ in range(5)]

    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-12)


@EACH
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks(name: str, options: Options, everywhere: bool) -> None:
    """Called once a step, around it, also where torch does the step."""
    for kind in (ours, theirs):
        (p,) = parameters([torch.ones(3)])
        p.grad = torch.ones(3)
        optimizer = kind(name)([p], **options)
        seen: list[Any] = []

        def pre(opt: Any, args: Any, kwargs: Any) -> None:
            seen.append(("pre", p[0].item()))  # noqa: B023

        def post(opt: Any, args: Any, kwargs: Any) -> None:
            seen.append(("post", p[0].item()))  # noqa: B023

        if everywhere:
            handles = [
                register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)
            ]  # fmt: skip
        else:
            handles = [
                optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)
            ]  # fmt: skip
        values = [1.0]
        for _ in range(3):
            optimizer.step()
            values.append(p[0].item())
        for handle in handles:
            handle.remove()
        optimizer.step()
        wanted = [pair for i in range(3) for pair in (("pre", values[i]), ("post", values[i + 1]))]
        assert seen == wanted


@EACH
def test_scheduler_does_not_warn(name: str, options: Options) -> None:
    (p,) = parameters([torch.ones(3)])
    optimizer = ours(name)([p], **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == options["lr"] / 8


@EACH
def test_profiler_sees_step_and_zero_grad(name: str, options: Options) -> None:
    (p,) = parameters([torch.ones(3)])
    p.grad = torch.ones(3)
    optimizer = ours(name)([p], **options)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.events() or ()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= names


@EACH
def test_compiled_step(name: str, options: Options) -> None:
    """torch.compile traces torch's own step."""
    start, gradients = tensors()[:2], [tensors()[:2] for _ in range(3)]
    torch._dynamo.reset()
    results = []
    for kind in (ours, theirs):
        optimizer = kind(name)(parameters(start), **options)
        run(optimizer, gradients[:2])
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        results.append(run(optimizer, gradients[2:]))
    # Compiled, 1 - beta2^3 = 0.003 comes from float32 numbers near 1: right to 2e-5 of lr = 0.1.
    assert_same(results[0], results[1], rtol=0, atol=2e-6)


@EACH
def test_copies(name: str, options: Options) -> None:
    start, gradients = tensors(), [tensors() for _ in range(4)]
    optimizer = ours(name)(parameters(start), **options)
    run(optimizer, gradients[:2])
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    wanted = run(optimizer, gradients[2:])
    for other in others:
        assert_same(run(other, gradients[2:]), wanted, rtol=0, atol=0)
        with calls(1):
            run(other, gradients[:1])


@EACH
def test_zero_grad(name: str, options: Options) -> None:
    ps = parameters(tensors())
    optimizer = ours(name)(ps, **options)
    for p in ps[:2]:
        p.grad = torch.ones_like(p)
    grad = ps[0].grad
    optimizer.zero_grad(set_to_none=False)
    assert ps[0].grad is grad
    assert not grad.any()  # type: ignore[union-attr]
    optimizer.zero_grad()
    assert all(p.grad is None for p in ps)


@EACH
def test_graph_that_holds_a_parameter_notices(name: str, options: Options) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ours(name)([p], **options)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def layouts() -> dict[str, tuple[list[Tensor], bool]]:
    """Parameters, and whether the operation takes them."""
    flat = torch.randn(24)
    return {
        "transposed": ([torch.randn(4, 3).T], True),
        "channels last": ([torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)], True),
        "permuted": ([torch.randn(2, 3, 4).permute(2, 0, 1)], True),
        "one element": ([torch.randn(1, 1)], True),
        "views of one tensor": ([flat[:10], flat[10:]], True),
        "complex": ([torch.randn(3, dtype=torch.complex64)], False),
        "mixed dtypes": ([torch.randn(3), torch.randn(3, dtype=torch.float64)], True),
        "gaps": ([torch.randn(4, 6)[:, ::2]], False),
    }


@EACH
@pytest.mark.parametrize("case", layouts())
def test_layouts(name: str, options: Options, case: str) -> None:
    """Where the operation refuses, torch does the step."""
    values, taken = layouts()[case]
    results = []
    for kind in (ours, theirs):
        # Not copies: a copy would have no gaps.
        ps = [torch.nn.Parameter(v.detach()) for v in values]
        before = [v.clone() for v in values]
        optimizer = kind(name)(ps, **options)
        torch.manual_seed(1)
        with calls(2 * taken if kind is ours else 0) if taken else calls_any():
            for _ in range(3):
                for p in ps:
                    p.grad = torch.empty_like(p).copy_(torch.randn_like(p))
                optimizer.step()
        results.append([p.detach().clone() for p in ps])
        for v, b in zip(values, before, strict=True):
            v.copy_(b)
    # Float32, three steps.
    assert_same(results[0], results[1], rtol=1e-5, atol=1e-6)


@contextmanager
def calls_any() -> Iterator[None]:
    yield


@pytest.mark.parametrize("grad", ["expanded", "transposed", "sparse"])
def test_gradients_of_other_layouts(grad: str) -> None:
    results = []
    for kind in (torchbp.optim.SGD, torch.optim.SGD):
        p = torch.nn.Parameter(torch.arange(12.0).view(4, 3))
        optimizer = kind([p], lr=0.1)
        p.grad = {
            "expanded": torch.ones(1, 1).expand(4, 3),
            "transposed": torch.arange(12.0).view(3, 4).T,
            "sparse": torch.eye(4, 3).to_sparse(),
        }[grad]
        for _ in range(3):
            optimizer.step()
        results.append(p.detach())
    assert_same(results[0], results[1], rtol=1e-6, atol=1e-6)


@EACH
@pytest.mark.parametrize("option", ["differentiable", "fused", "amsgrad", "capturable", "foreach"])
def test_options_of_torch(name: str, options: Options, option: str) -> None:
    """What the operation does not do is torch's, with its errors; `foreach` is a hint alone."""
    if name == "SGD" and option in ("amsgrad", "capturable"):
        pytest.skip("no option of SGD")
    start, gradients = tensors(), [tensors() for _ in range(3)]
    results: list[Any] = []
    for kind in (ours, theirs):
        optimizer = kind(name)(parameters(start), **options, **{option: True})
        try:
            with calls(2 if kind is ours and option == "foreach" else 0):
                results.append(run(optimizer, gradients))
        except Exception as error:
            results.append((type(error), str(error)))
    if isinstance(results[1], tuple):
        assert results[0] == results[1]
    else:
        assert_same(results[0], results[1])


def test_pause_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception is not paid for in every step, and the operation gets another chance."""
    monkeypatch.setattr(torchbp.optim.optimizers, "PAUSE", 2)
    p = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = torchbp.optim.SGD([p], lr=1.0)
    p.grad = torch.ones(1, 1).expand(4, 3)
    optimizer.step()
    p.grad = torch.ones(4, 3)
    counts = []
    for _ in range(4):
        with Calls() as recorder:
            optimizer.step()
        counts.append(recorder.count)
    assert counts == [0, 0, 1, 1]
    assert_same(p.detach(), torch.full((4, 3), -5.0))


@EACH
def test_grad_scaler(name: str, options: Options) -> None:
    """A step whose gradients are infinite is skipped."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ours(name)([p], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    after = p.detach().clone()
    optimizer.zero_grad()
    scaler.scale((p * torch.inf).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p, after)
    assert not torch.equal(p, torch.ones(3))


@EACH
def test_special_values(name: str, options: Options) -> None:
    """NaN and infinities where torch has them."""
    specials = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38])
    values, grads = specials.repeat(8), specials.repeat_interleave(8)
    for decay in (0.0, 0.1):
        results = []
        for kind in (ours, theirs):
            optimizer = kind(name)(parameters([values]), **{**options, "weight_decay": decay})
            results.append(run(optimizer, [[grads], [grads]])[0])
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert torch.equal(results[0].isinf(), results[1].isinf())


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@EACH
def test_threads_change_nothing(
    name: str, options: Options, threads: Callable[[int], None]
) -> None:
    """Bit for bit, with borders between threads in the middle of a tensor and of a vector."""
    start = [torch.randn(300, 301), torch.randn(1037), torch.randn(70001)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        optimizer = ours(name)(parameters(start), **options)
        run(optimizer, gradients)
        results.append(run_result(optimizer) + state_of(optimizer))
    assert_same(results[1], results[0], rtol=0, atol=0)
    assert_same(results[2], results[0], rtol=0, atol=0)


def test_memory_in_common(threads: Callable[[int], None]) -> None:
    """Parameters that share memory are updated one after the other, as by torch."""
    threads(2)
    start = torch.randn(60001)
    results = []
    for kind in (torchbp.optim.SGD, torch.optim.SGD):
        memory = start.clone()
        ps = [torch.nn.Parameter(memory[:40001]), torch.nn.Parameter(memory[20000:])]
        for p in ps:
            p.grad = torch.ones_like(p)
        kind(ps, lr=0.5, weight_decay=0.5).step()
        results.append(memory)
    assert_same(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_large_memory_format_in_threads(threads: Callable[[int], None]) -> None:
    threads(2)
    start = [torch.randn(8, 16, 32, 33).to(memory_format=torch.channels_last)]
    gradients = [[torch.randn_like(start[0])] for _ in range(2)]
    results = [
        run(kind(parameters(start), lr=0.1, momentum=0.9), gradients)
        for kind in (torchbp.optim.SGD, torch.optim.SGD)
    ]
    assert_same(results[0], results[1], rtol=1e-6, atol=1e-6)


# ---- the operations themselves


def sgd_call(requires_grad: bool = False) -> tuple[Any, ...]:
    ps = [torch.randn(3, 4, requires_grad=requires_grad), torch.randn(5), torch.randn(2)]
    grads, buffers = [torch.randn_like(p) for p in ps], [torch.randn(2)]
    groups = [2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 0.2, 0.9, 0.0, 0.1, 1.0, 1.0]
    return ps, grads, buffers, groups


def adamw_call(requires_grad: bool = False) -> tuple[Any, ...]:
    ps = [torch.randn(3, 4, requires_grad=requires_grad), torch.randn(5)]
    grads = [torch.randn_like(p) for p in ps]
    steps = torch.tensor(3.0), torch.tensor(4.0, dtype=torch.float64)
    state = [t for p, s in zip(ps, steps, strict=True) for t in (*torch.rand(2, *p.shape), s)]
    return ps, grads, state, [2, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.0]


CALLS = {"sgd_": sgd_call, "adamw_": adamw_call}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, requires_grad: bool) -> None:
    """Schema (what is changed and what is not), fake kernel, autograd, torch.compile."""
    torch.library.opcheck(getattr(ops, name).default, CALLS[name](requires_grad))


def test_every_in_place_operation_is_tested() -> None:
    assert set(CALLS) == set(IN_PLACE_OPS)


REFUSALS: dict[str, tuple[str, Callable[[list[Any]], Any], str]] = {
    "fewer gradients": ("sgd_", lambda a: a[1].pop(), "grads wants 3 tensors, got 2"),
    "less state": ("sgd_", lambda a: a[2].pop(), "state wants the momentum buffer of each"),
    "more state": ("sgd_", lambda a: a[2].append(a[2][0]), "state wants 1 tensors, got 2"),
    "less groups": ("sgd_", lambda a: a[3].__setitem__(7, 0), "groups wants 3 .* in all, got 2"),
    "more groups": ("sgd_", lambda a: a[3].__setitem__(0, 3), "groups wants 3 .* in all, got more"),
    "negative": ("sgd_", lambda a: a[3].__setitem__(7, -1), "groups wants 3 .* in all, got 2"),
    "numbers": ("sgd_", lambda a: a[3].pop(), "groups wants 7 numbers each, got 13"),
    "dtype": ("sgd_", lambda a: a[1].__setitem__(2, torch.ones(2).double()), "grads has another"),
    "shape": ("sgd_", lambda a: a[1].__setitem__(2, torch.ones(3)), r"the shape and .* \(2\)"),
    "strides": ("sgd_", lambda a: a[1].__setitem__(0, torch.ones(4, 3).T), "grads wants the shape"),
    "gaps": ("sgd_", lambda a: a[0].__setitem__(1, torch.ones(10)[::2]), "without gaps"),
    "integers": ("sgd_", lambda a: a[0].__setitem__(1, torch.arange(5)), "wants dtype float64"),
    "step": ("adamw_", lambda a: a[2].__setitem__(5, torch.tensor(3)), "float64 number as step"),
    "steps": ("adamw_", lambda a: a[2].__setitem__(5, torch.ones(2)), "float64 number as step"),
    "moments": ("adamw_", lambda a: a[2].__setitem__(4, torch.ones(4)), "state wants the shape"),
    "squares": ("adamw_", lambda a: a[2].pop(), "state wants exp_avg, exp_avg_sq and step"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case: str) -> None:
    name, spoil, message = REFUSALS[case]
    arguments = [list(argument) for argument in CALLS[name]()]
    spoil(arguments)
    before = copy.deepcopy(arguments)
    with pytest.raises(RuntimeError, match=f"torchbp::{name}: .*{message}"):
        getattr(ops, name)(*arguments)
    assert_same(arguments, before, rtol=0, atol=0)
