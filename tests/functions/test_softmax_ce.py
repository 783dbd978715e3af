"""SoftmaxCE: every kernel of csrc/cpu (few, not so few and many classes), and the gradient that
forward writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchbp.functional as F
from tests.compare import assert_same, assert_within_ulps
from torchbp.functions import SoftmaxCE

TF = torch.nn.functional

#: Both sides of what the kernels are made for: 4 (a tile), 32, 128 and 2048 classes.
CLASSES = [1, 2, 3, 4, 5, 10, 31, 32, 33, 100, 127, 128, 129, 1000, 2048, 2049, 5000]

#: Rows that leave a block of 16 or 64 lanes unfinished.
ROWS = [1, 17, 130]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "ignored": {"ignore_index": 0},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and weight": {"label_smoothing": 0.1, "weight": True, "ignore_index": 0},
    "probabilities": {"soft": True},
    "probabilities and weight": {"soft": True, "label_smoothing": 0.2, "weight": True},
}


def problem(n: int, classes: int, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, ...]:
    """Logits, target and the arguments of cross_entropy."""
    options = dict(options)
    input = (torch.randn(n, classes) * 4).to(dtype)
    target = torch.randint(classes, (n,))
    if options.pop("soft", False):
        target = torch.randn(n, classes).softmax(1).to(dtype)
    elif "ignore_index" in options:
        target[-1] = classes - 1  # not every row is ignored
    if options.pop("weight", False):
        options["weight"] = (torch.rand(classes) + 0.5).to(dtype)
    return input, target, options


def in_float64(target: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    wide = target.double() if target.is_floating_point() else target
    return wide, {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}


def loss_and_grad(function: Any, input: Tensor, target: Tensor, options: Any) -> tuple[Tensor, ...]:
    x = input.detach().clone().requires_grad_()
    loss = function(x, target, **options)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def in_two(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """cross_entropy by the Function whose backward computes the gradient."""
    loss: Tensor = SoftmaxCE.apply(
        input, target, options.get("weight"), options.get("ignore_index", -100),
        options.get("reduction", "mean"), options.get("label_smoothing", 0.0),
    )[0]  # fmt: skip
    return loss


def sizes(input: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What rounding is relative to: of the loss itself, and of p and w q, whose difference, which
    may be small, is the gradient."""
    n, classes = input.shape
    p = input.double().softmax(1)
    q = target if target.is_floating_point() else TF.one_hot(target, classes).double()
    weight = options.get("weight", torch.ones(classes, dtype=torch.double))
    w = weight if target.is_floating_point() else weight[target][:, None]
    w = w.expand_as(q).clone()
    if not target.is_floating_point():
        w[target == options.get("ignore_index", -100)] = 0
    total = 1.0
    if options.get("reduction", "mean") == "mean":
        total = n if target.is_floating_point() else w[:, 0].sum()
    return TF.cross_entropy(input.double(), target, **options), (w * (p + q)).norm() / total


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("n", ROWS)
def test_kernels(n: int, classes: int, options: dict[str, Any]) -> None:
    """Loss and gradient of each kernel, in one and in two, against float64.

    At most twice torch's error and four roundings of what is subtracted: those of an exponential, a
    sum, a quotient and a product.
    """
    if classes == 1 and "ignore_index" in options:
        pytest.skip("nothing would be left")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        input, target, given = problem(n, classes, dtype, options)
        wide, exactly = in_float64(target, given)
        for reduction in {given.get("reduction", "mean"), "none"}:
            rows, exact_rows = ({**o, "reduction": reduction} for o in (given, exactly))
            exact = loss_and_grad(TF.cross_entropy, input.double(), wide, exact_rows)
            theirs = loss_and_grad(TF.cross_entropy, input, target, rows)
            for function in (F.cross_entropy, in_two):
                ours = loss_and_grad(function, input, target, rows)
                for i, size in enumerate(sizes(input, wide, exact_rows)):
                    # In float64 the reference itself errs, by what adding up its classes gives.
                    roundings = 4 + (classes**0.5 if dtype == torch.float64 else 0)
                    error, peer = ((v[i].double() - exact[i]).norm() for v in (ours, theirs))
                    allowed = 2 * peer + roundings * torch.finfo(dtype).eps * size.norm()
                    where = f"{function.__name__}, {dtype}, {reduction}, {('loss', 'gradient')[i]}"
                    assert error <= allowed, f"{where}: {error:.3g} off, allowed {allowed:.3g}"


@pytest.mark.parametrize("classes", [3, 10, 40, 300, 3000])
def test_special_values(classes: int) -> None:
    """NaN and infinities stay in their row, and appear where torch has them."""
    inf, nan = torch.inf, torch.nan
    input = torch.randn(70, classes)
    input[1] = -inf
    input[2, 1] = inf
    input[3, -1] = nan
    input[4, 0] = nan
    input[5, :-1] = -inf
    input[6] *= 1e4
    input[7] = 3e38
    input[8, 0] = -3e38
    input[9, 1:] = -200
    input[10] = nan
    target = torch.randint(classes, (70,))
    target[5], target[10] = classes - 1, 2
    ignored = target == 2
    for reduction in ("none", "sum"):
        options = {"reduction": reduction, "ignore_index": 2}
        theirs = loss_and_grad(TF.cross_entropy, input, target, options)
        theirs[1][ignored] = 0  # torch has nan * 0 there where a logit is nan
        for function in (F.cross_entropy, in_two):
            mine = loss_and_grad(function, input, target, options)
            assert_same(mine, theirs, 1e-5, 2e-3 if reduction == "sum" else 1e-6)
    finite = [0, 5, 6, 7, 8, 9]
    input, target = input[finite], target[finite]
    assert_same(
        loss_and_grad(F.cross_entropy, input, target, {}),
        loss_and_grad(TF.cross_entropy, input, target, {}),
        1e-5,
        1e-6,
    )


@pytest.mark.parametrize("classes", [10, 100, 1000, 5000])
def test_exponentials_over_the_whole_range(classes: int) -> None:
    """Each gradient off the target is exp(x - max) times a factor of its row, here that of class 1,
    whose exponential is exactly 1. Within 3 ulps: 1.2 of the exponential count twice where the
    product ends just below a power of two, and the product rounds.
    """
    input = -100 * torch.rand(1_000_000 // classes, classes)
    input[:, :2] = 0
    target = torch.zeros(len(input), dtype=torch.int64)
    _, grad = loss_and_grad(F.cross_entropy, input, target, {"reduction": "sum"})
    exact = input.double().exp() * grad[:, 1:2].double()
    normal = (exact > torch.finfo(torch.float32).tiny) & (input > -87)
    normal[:, 0] = False
    assert_within_ulps(grad[normal], exact[normal], 3)
    assert (grad[input < -88] == 0).all()


def test_the_logarithm_of_whole_numbers() -> None:
    """log-sum-exp of n zeros: the sum is exact, and the logarithm within 1 ulp."""
    for classes in [*range(1, 300), 511, 512, 513, 1000, 4095, 4097, 65537]:
        for dtype in (torch.float32, torch.float64):
            _, lse, _ = SoftmaxCE.apply(torch.zeros(1, classes, dtype=dtype), torch.tensor([0]))
            exact = torch.tensor([classes]).double().log()
            assert_within_ulps(lse, exact, 1)


@pytest.mark.parametrize("classes", [10, 40, 300])
def test_threads_do_not_matter(classes: int) -> None:
    """The result is bit for bit the same for any number of threads."""
    input, target, _ = problem(3001, classes, torch.float32, {})
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for function in (F.cross_entropy, in_two):
                results.append((function, loss_and_grad(function, input, target, {})))  # noqa: PERF401
    finally:
        torch.set_num_threads(threads)
    for function in (F.cross_entropy, in_two):
        first, *others = [result for of, result in results if of is function]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ---- the gradient that forward writes ------------------------------------------------------------


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Logits that require grad, target, and the gradient of their cross-entropy."""
    x, target = torch.randn(7, 10, dtype=torch.float64), torch.randint(10, (7,))
    _, grad = loss_and_grad(TF.cross_entropy, x, target, {})
    return x.requires_grad_(), target, grad


Logits = tuple[Tensor, Tensor, Tensor]


def test_handed_out_once(logits: Logits) -> None:
    """Two backward passes give two gradients: nobody's x.grad is another one's memory."""
    x, target, grad = logits
    loss = F.cross_entropy(x, target)
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    grads.append(torch.autograd.grad(loss, x)[0])
    for g in grads:
        assert_same(g, grad)
    assert len({g.data_ptr() for g in grads}) == 3
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_what_was_handed_out_is_left_alone(logits: Logits) -> None:
    x, target, grad = logits
    loss = F.cross_entropy(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, x, torch.tensor(3.0).double(), retain_graph=True)
    assert_same(second, 3 * grad)
    loss.backward()
    assert_same(x.grad, grad)
    assert_same(first, torch.zeros_like(first))
    assert_same(second, 3 * grad)


def test_accumulates(logits: Logits) -> None:
    x, target, grad = logits
    for i in range(1, 4):
        (F.cross_entropy(x, target) / 2).backward()
        assert_same(x.grad, i / 2 * grad)


def test_upstream_gradients(logits: Logits) -> None:
    """Any upstream gradient scales; nan and inf come through as in PyTorch."""
    x, target, _ = logits
    for upstream in (0.0, -2.5, torch.inf, torch.nan):
        dloss = torch.tensor(upstream, dtype=torch.float64)
        (mine,) = torch.autograd.grad(F.cross_entropy(x, target), x, dloss)
        (theirs,) = torch.autograd.grad(TF.cross_entropy(x, target), x, dloss)
        assert_same(mine, theirs)


def test_batched_upstream_gradients(logits: Logits) -> None:
    x, target, grad = logits
    dloss = torch.randn(3, dtype=torch.float64)
    loss = F.cross_entropy(x, target)
    (mine,) = torch.autograd.grad(loss, x, dloss, is_grads_batched=True)
    assert_same(mine, dloss[:, None, None] * grad)


def test_second_order(logits: Logits) -> None:
    """Through create_graph, with respect to logits and upstream gradient."""
    x, _, _ = logits
    dloss = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x)
    for options in OPTIONS.values():
        _, goal, given = problem(7, 10, torch.float64, options)
        both = []
        for function in (F.cross_entropy, TF.cross_entropy):
            (g,) = torch.autograd.grad(function(x, goal, **given), x, dloss, create_graph=True)
            both.append(torch.autograd.grad((g * v).sum(), (x, dloss)))
        assert_same(both[0], both[1])


def test_strides(logits: Logits) -> None:
    x, target, grad = logits
    wide = torch.stack([x.detach().T, torch.zeros(10, 7)], 1).double().requires_grad_()
    F.cross_entropy(wide[:, 0].T, target.repeat_interleave(2)[::2]).backward()
    assert wide.grad is not None
    assert_same(wide.grad[:, 0].T, grad)


def test_checkpointed(logits: Logits) -> None:
    x, target, grad = logits
    loss = torch.utils.checkpoint.checkpoint(F.cross_entropy, x, target, use_reentrant=False)
    loss.backward()
    assert_same(x.grad, grad)


@pytest.mark.parametrize("upstream", [torch.inf, -torch.inf, torch.nan])
def test_ignored_rows_have_no_gradient_whatever_arrives(upstream: float) -> None:
    """0 on the ignored row, as PyTorch has it, and what PyTorch has on the other."""
    target = torch.tensor([-100, 1])
    grads: list[torch.Tensor] = []
    for function in (F.cross_entropy, TF.cross_entropy):
        input = torch.tensor([[0.5, 1, 2], [3, -1, 0]]).requires_grad_()
        grads += torch.autograd.grad(function(input, target) * upstream, input)
    assert (grads[0][0] == 0).all()
    torch.testing.assert_close(*grads, equal_nan=True, rtol=0, atol=0)
