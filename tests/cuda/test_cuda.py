"""The CUDA kernels against float64 on the CPU and PyTorch's own on the GPU, over the table of ops.

Elementwise results are within 4 ulp of the exact ones (CUDA's exp and tanh are within 2);
gradients, products and reductions are at most twice as far off in norm as PyTorch's.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import torchbp
import torchbp.functional as F
from tests.compare import assert_close_in_norm, assert_within_ulps
from tests.functions.test_softmax_ce import (
    OPTIONS,
    in_float64,
    in_two,
    loss_and_grad,
    problem,
    sizes,
)
from tests.machine import EMULATED, GPU
from tests.ops import CASES, DTYPES, OPS, Case
from torchbp.data import BatchLoader

pytestmark = pytest.mark.gpu

REAL = pytest.mark.skipif(EMULATED, reason="the emulator has no streams, and is slow")

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def gradients(
    case: Case, inputs: list[Tensor], upstream: Tensor, ours: bool = True
) -> tuple[Tensor, ...]:
    """(output, gradients...) of a case, back on the CPU."""
    inputs = [tensor.detach() for tensor in inputs]
    free = [inputs[i].requires_grad_() for i in case.differentiable]
    y = (case.ours if ours else case.reference)(*inputs)
    dy = upstream.to(y).expand(y.shape)
    return tuple(t.detach().cpu() for t in (y, *torch.autograd.grad(y, free, dy)))


def compare(case: Case, inputs: list[Tensor], upstream: Tensor) -> None:
    device = [tensor.to(GPU) for tensor in inputs]
    exact = gradients(
        case, [t.double() if t.is_floating_point() else t for t in inputs], upstream.double(), False
    )
    ours = gradients(case, device, upstream.to(GPU))
    theirs = gradients(case, device, upstream.to(GPU), ours=False)
    if OPS[case.op].elementwise:
        assert_within_ulps(ours[0], exact[0], 4)
    for mine, torchs, wanted in zip(ours, theirs, exact, strict=True):
        assert_close_in_norm(mine, wanted, torchs)


@EACH_DTYPE
@EACH_CASE
def test_forward_and_backward(case: Case, dtype: torch.dtype) -> None:
    inputs = case.make(dtype)
    compare(case, inputs, torch.randn_like(case.reference(*inputs)))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@EACH_CASE
def test_layouts(case: Case, layout: str) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if t.dim() == 0:
            return t
        if layout == "transposed":
            return t.mT.contiguous().mT if t.dim() > 1 else t
        if layout == "sliced":
            return torch.stack([t, t], -1)[..., 0]
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t

    inputs = [laid_out(t) for t in case.make(torch.float32)]
    compare(case, inputs, torch.ones(()))  # of stride 0, as after sum()


@pytest.mark.parametrize(
    "n", [2**12 + 3, *(pytest.param(n, marks=REAL) for n in (2**20 + 3, 2**24))]
)
@EACH_DTYPE
def test_large_tensors(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, device=GPU).to(dtype)
    torch.testing.assert_close(F.relu(x), torch.relu(x), rtol=0, atol=0)
    torch.testing.assert_close(F.multiply(x, x), x * x, rtol=0, atol=0)


#: Classes, and rows, of each of the kernels: a thread, a warp, and a block of 512 or 1024 threads
#: to a row; more rows than a block has at a time, none, and one. What does not divide 16 bytes
#: makes rows that begin anywhere. 60,000 float32 do not fit in shared memory.
CLASSES = [
    *((classes, (0, 1, 131)) for classes in (2, 3, 10, 31, 32)),
    *((classes, (1, 6)) for classes in (33, 1000, 1023)),
    (4096, (1, 2)),
    *((classes, (2,)) for classes in (8200, 50257, 60001)),
]


def moved(function: Any, offset: int = 0) -> Any:
    """A loss, computed on the GPU: of logits that begin `offset` elements into their memory."""

    def run(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
        x = input.to(GPU)
        x = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
        if weight is not None:
            options["weight"] = weight.to(GPU)
        loss: Tensor = function(x, target.to(GPU), **options)
        return loss.cpu()

    return run


@pytest.mark.parametrize(("classes", "rows"), CLASSES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@EACH_DTYPE
def test_cross_entropy(
    classes: int, rows: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Loss and gradient of each kernel, in one and in two, to the bounds of the CPU's."""
    if EMULATED and not (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and classes < 8000)
        or (dtype == torch.float64 and classes < 1000)
    ):
        pytest.skip("the emulator is slow")
    for n in rows:
        input, target, given = problem(n, classes, dtype, options) if n else empty(classes, dtype)
        wide, exactly = in_float64(target, given)
        for reduction in {given.get("reduction", "mean"), "none"}:
            of_rows, exact_rows = ({**o, "reduction": reduction} for o in (given, exactly))
            exact = loss_and_grad(TF.cross_entropy, input.double(), wide, exact_rows)
            theirs = loss_and_grad(moved(TF.cross_entropy), input, target, of_rows)
            for function, offset in ((F.cross_entropy, 0), (in_two, 0), (F.cross_entropy, 1)):
                ours = loss_and_grad(moved(function, offset), input, target, of_rows)
                assert torch.equal(ours[0].isnan(), exact[0].isnan())  # a mean of nothing
                for i, size in enumerate(sizes(input, wide, exact_rows) if n else ()):
                    roundings = 4 + (classes**0.5 if dtype == torch.float64 else 0)
                    error, peer = ((v[i].double() - exact[i]).norm() for v in (ours, theirs))
                    allowed = 2 * peer + roundings * torch.finfo(dtype).eps * size.norm()
                    where = f"{function.__name__}, {n} rows, {reduction}, {('loss', 'grad')[i]}"
                    assert error <= allowed, f"{where}: {error:.3g} off, allowed {allowed:.3g}"


def empty(classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A problem of no rows."""
    return torch.empty(0, classes, dtype=dtype), torch.empty(0, dtype=torch.int64), {}


@pytest.mark.parametrize("classes", [1, 10, 100, 3000, 60001])
def test_gradient_of_probabilities(classes: int) -> None:
    """Alone, and together with that of the logits."""
    x, q = torch.randn(3, classes), torch.randn(3, classes).softmax(1)
    weight = torch.rand(classes) + 0.5
    functions: Any = ((moved(F.cross_entropy), torch.float32), (TF.cross_entropy, torch.float64))
    for free in ((1,), (0, 1)):
        grads = []
        for function, dtype in functions:
            inputs = [t.to(dtype).requires_grad_(i in free) for i, t in enumerate((x, q))]
            loss = function(*inputs, weight=weight.to(dtype), label_smoothing=0.1)
            grads.append(torch.autograd.grad(loss, [inputs[i] for i in free]))
        for mine, exact in zip(*grads, strict=True):
            # A dozen roundings of log(p), which is at most 20, times 1.5 / 3.
            torch.testing.assert_close(
                mine.double(), exact, rtol=1e-5, atol=2e-6 * exact.abs().max()
            )


@pytest.mark.parametrize("classes", [10, 100, 3000])
@pytest.mark.parametrize("upstream", [1.0, -2.5, 65536.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"reduction": "sum"}, {"soft": True}])
def test_upstream_gradients(classes: int, upstream: float, options: dict[str, Any]) -> None:
    """Scaled by what only the GPU sees, once and again where the graph is kept."""
    input, target, options = problem(3000 // classes + 1, classes, torch.float32, options)
    if not target.is_floating_point():
        target[::3] = -100
    grads = []
    for function in (moved(F.cross_entropy), TF.cross_entropy):
        x = input.clone().requires_grad_()
        loss = function(x, target, **options) * upstream
        first, second = (torch.autograd.grad(loss, x, retain_graph=k)[0] for k in (True, False))
        assert torch.equal(first, second) or first.isnan().any()
        grads.append(second)
    grads[1][target == -100 if target.dim() == 1 else slice(0)] = 0  # torch: nan * 0 where nan
    # Ten roundings of what is at most 1 before it is scaled.
    atol = 1e-6 * abs(upstream) if math.isfinite(upstream) else 0
    torch.testing.assert_close(*grads, rtol=1e-5, atol=atol, equal_nan=True)


@REAL
@pytest.mark.parametrize("classes", [10, 100, 3000])
def test_the_same_at_each_run(classes: int) -> None:
    """Whichever block ends last."""
    x, target = torch.randn(9000, classes, device=GPU), torch.arange(9000, device=GPU) % classes
    losses = [F.cross_entropy(x, target).item() for _ in range(3)]
    assert len(set(losses)) == 1


@pytest.mark.parametrize("classes", [3, 40, 3000])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_logits_of_any_size(classes: int, options: dict[str, Any]) -> None:
    """The gradient has the digits of log(sum) where the logits are large, and PyTorch's nan."""
    input = torch.randn(8, classes)
    input[1], input[2], input[3] = input[1] * 1e4, 1e6, 3e38
    input[4, 0], input[5, 1], input[6] = -torch.inf, torch.nan, -torch.inf
    target = torch.arange(8) % classes
    grads = []
    for function, dtype in ((F.cross_entropy, torch.float32), (TF.cross_entropy, torch.float64)):
        device = GPU if dtype == torch.float32 else "cpu"
        x = input.to(device, dtype, copy=True).requires_grad_()
        loss = function(x, target.to(device), reduction="none", **options)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        grads.append(grad.cpu().double())
    # Ten roundings of p and q, which are at most 1, and of the distance to the largest logit.
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6, equal_nan=True)


@EACH_DTYPE
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid"])
@pytest.mark.parametrize("shape", [(16, 8, 32), (9, 32, 24), (5, 7, 6), (1, 16, 16)])
def test_products(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    """Sizes with an epilogue and without, transposed and sliced, to PyTorch's bounds."""
    n, inputs, outputs = shape
    x, weight, bias = torch.randn(n, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    dy = torch.randn(n, outputs)
    f: Any = {"none": lambda z: z}.get(activation) or getattr(torch, activation)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias, activation=activation)

    def theirs(*t: Tensor) -> Tensor:
        result: Tensor = f(TF.linear(*t))
        return result

    def run(function: Any, *tensors: Tensor) -> list[Tensor]:
        free = [t.detach().requires_grad_() for t in tensors[:3]]
        y = function(*free)
        return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, free, tensors[3]))]

    values = [t.to(dtype) for t in (x, weight, bias, dy)]
    exact = run(theirs, *(t.double() for t in values))
    for lay in (lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t, shifted):
        on_device = [lay(t.to(GPU)) for t in values]
        for mine, wanted, peer in zip(
            run(ours, *on_device), exact, run(theirs, *on_device), strict=True
        ):
            assert_close_in_norm(mine, wanted, peer)


def shifted(t: Tensor) -> Tensor:
    """The same, one element into its memory: never aligned to 16 bytes."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("outputs", [16, 24])
def test_relu_of_a_product_keeps_nan(outputs: int) -> None:
    x, weight = torch.randn(8, 16, device=GPU), torch.randn(outputs, 16, device=GPU)
    x[3, 5] = torch.nan
    y = F.linear(x, weight, torch.zeros(outputs, device=GPU), activation="relu")
    assert y.isnan().all(1).tolist() == [i == 3 for i in range(8)]
    assert (y[~y.isnan()] >= 0).all()


# Of the hidden widths, 136 leaves part of each row of its mask empty, and rows of 5, 9, 10 and 12
# are not all aligned. On the emulator a product with ReLU's gradient is wrong for 40 and 48.
RELU_SIZES = (
    (8, 32, 24, 16),
    (16, 40, 136, 8, 8),
    (8, 48, 16, 10),
    (7, 5, 9, 3),
    (4, 12, 8, 4),
    (8, 16),
)


def relu_network(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """dy, x, the weights and the hidden layers' outputs, of which half are 0 and some -0."""
    rows = 21
    dy, x = torch.randn(rows, sizes[-1]), torch.randn(rows, sizes[0])
    weights = [torch.randn(n, m) / m**0.5 for m, n in itertools.pairwise(sizes)]
    hidden = [torch.relu(torch.randn(rows, n)) for n in sizes[1:-1]]
    for h in hidden:
        h[torch.rand(h.shape) < 0.1] = -0.0
    return tuple(t.to(dtype) for t in (dy, x, *weights, *hidden))


def relu_network_backward(
    layers: int, dy: Tensor, x: Tensor, *weights_and_hidden: Tensor
) -> list[list[Tensor]]:
    """The chain rule: of each layer from the last to the first dx, dW and db."""
    weights, hidden = weights_and_hidden[:layers], (x, *weights_and_hidden[layers:])
    result = []
    for i in reversed(range(layers)):
        dx = dy @ weights[i]
        result.append([dx, dy.mT @ hidden[i], dy.sum(0)])
        dy = dx.masked_fill(hidden[i] <= 0, 0)
    return result


def relu_gradients(
    layers: int, tensors: tuple[Tensor, ...], need_x: bool, needs: list[int]
) -> list[Tensor]:
    dy, x, *rest = tensors
    return list(
        torch.ops.torchbp_kernels.mlp_backward(
            dy, x, rest[:layers], rest[layers:], "relu", 0.0, need_x, needs, needs
        )
    )


@EACH_DTYPE
@pytest.mark.parametrize("sizes", RELU_SIZES, ids=str)
def test_backward_of_a_network_of_relus(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """To PyTorch's bounds, from the same hidden layers, so that all agree on which are 0."""
    layers = len(sizes) - 1
    tensors = relu_network(sizes, dtype)
    here = tuple(t.to(GPU) for t in tensors)
    exact = relu_network_backward(layers, *(t.double() for t in tensors))
    peers = relu_network_backward(layers, *here)
    dx, *gradients = relu_gradients(layers, here, True, [1] * layers)
    assert_close_in_norm(dx.cpu(), exact[-1][0], peers[-1][0].cpu())
    for i, (wanted, peer) in enumerate(zip(exact[::-1], peers[::-1], strict=True)):
        assert_close_in_norm(gradients[i].cpu(), wanted[1], peer[1].cpu())
        assert_close_in_norm(gradients[layers + i].cpu(), wanted[2], peer[2].cpu())


@EACH_DTYPE
@pytest.mark.parametrize("sizes", RELU_SIZES[:3], ids=str)
def test_relus_of_a_network_block_nan_and_pass_it(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """What arrives is nan in two rows: 0 where h <= 0, passed on where h is above 0 or nan."""
    layers = len(sizes) - 1
    tensors = relu_network(sizes, dtype)
    hidden = tensors[2 + layers :]
    for h in hidden:
        h[torch.rand(h.shape) < 0.1] = torch.nan
    tensors[0][[3, 17]] = torch.nan
    hidden[0][17] = 0  # nan ends here
    here = tuple(t.to(GPU) for t in tensors)
    dx = relu_gradients(layers, here, True, [0] * layers)[0].cpu()
    exact = relu_network_backward(layers, *(t.double() for t in tensors))[-1][0]
    peer = relu_network_backward(layers, *here)[-1][0].cpu()
    assert torch.equal(dx.isnan(), exact.isnan())
    assert dx[3].isnan().all()
    assert dx[17].eq(0).all()
    assert_close_in_norm(dx.nan_to_num(), exact.nan_to_num(), peer.nan_to_num())


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("needs", [[1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
def test_only_the_gradients_of_relus_that_are_asked_for(need_x: bool, needs: list[int]) -> None:
    sizes = (8, 32, 24, 16)
    tensors = tuple(t.to(GPU) for t in relu_network(sizes, torch.float32))
    everything = relu_gradients(3, tensors, True, [1] * 3)
    some = relu_gradients(3, tensors, need_x, needs)
    for got, wanted, need in zip(some, everything, [need_x, *needs, *needs], strict=True):
        # Sums of 21 and 32, which may be made in another order.
        torch.testing.assert_close(got, wanted if need else got.new_empty(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tf32", [False, True])
@REAL
def test_products_follow_the_setting_of_tf32(tf32: bool) -> None:
    x, weight = torch.randn(256, 512, device=GPU), torch.randn(128, 512, device=GPU)
    exact = torch.relu(x.double() @ weight.double().mT)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        y = F.linear(x, weight, torch.zeros(128, device=GPU), activation="relu")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    # Factors of 11 bits are off by 2^-12, those of 24 and their sum by far less.
    assert bool((y - exact).norm() > 2**-15 * exact.norm()) == tf32


RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
)


@EACH_DTYPE
@pytest.mark.parametrize(("name", "options"), RULES)
def test_optimizers(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """More parameters than one launch takes, of all sizes, as torch.optim does in float64."""
    if name == "AdamW" and dtype == torch.float16:
        pytest.skip("squares of gradients are below what the state can hold")
    sizes = [*range(3), 255, 256, 1023, 1024, 1025, 5000, *[7] * 150]
    values = [torch.randn(n).to(dtype) for n in sizes]
    ours = [value.to(GPU, copy=True).requires_grad_() for value in values]
    exact = [value.double().requires_grad_() for value in values]
    mine = getattr(torchbp.optim, name)(ours, **options)
    theirs = getattr(torch.optim, name)(exact, **options)
    for _ in range(3):
        for p, q in zip(ours, exact, strict=True):
            grad = torch.randn(q.shape).to(dtype)
            p.grad, q.grad = grad.to(GPU), grad.double()
        mine.step()
        theirs.step()
    assert not mine._pause  # PyTorch did none but the first
    # Of each step: one rounding of the parameter, and what its state has lost so far.
    rtol = 16 * torch.finfo(dtype).eps
    for p, q in zip(ours, exact, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=rtol, atol=rtol)


def test_one_parameter_given_twice() -> None:
    """Is updated twice, one step after the other."""
    p = torch.ones(2000, device=GPU)
    torch.ops.torchbp.sgd_([p, p], [p.clone(), p.clone()], [], [2, 0.5, 0, 0, 0.5, False, False])
    # 1 - 0.5 (1 + 0.5) = 0.25, then 0.25 - 0.5 (1 + 0.125)
    assert torch.equal(p.cpu(), torch.full((2000,), -0.3125))


@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("options", [{}, {"flip": True, "shift": 2, "flatten": False}])
@EACH_DTYPE
def test_batches(options: dict[str, Any], dtype: torch.dtype, width: int) -> None:
    """A GPU's batches are the CPU's, but for a rounding of the sum."""
    images = torch.randint(256, (50, 3, 7, width), dtype=torch.uint8)
    data = SimpleNamespace(images=images.transpose(2, 3), targets=torch.randint(10, (50,)))
    loader = BatchLoader(data, batch_size=16, dtype=dtype, **options)
    elsewhere = BatchLoader(data, batch_size=16, dtype=dtype, device=GPU, **options)
    read = elsewhere._reader_on_gpu(elsewhere._plan(0))
    for begin, (x, target) in zip(range(0, 50, 16), loader, strict=True):
        there, classes = read(begin)
        assert there.dtype == dtype
        assert torch.equal(classes.cpu(), target)
        rtol = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(there.cpu(), x, rtol=rtol, atol=rtol)
        assert torch.equal(there.cpu() == 0, x == 0)  # what was moved in


def test_a_data_set_that_was_changed_is_copied_again() -> None:
    data = SimpleNamespace(images=torch.zeros(2, 1, 4, 4).byte(), targets=torch.zeros(2).long())
    loader = BatchLoader(data, device=GPU, mean=[0.0], std=[1.0])
    first, _ = loader._reader_on_gpu(loader._plan(0))(0)
    data.images.fill_(255)
    second, _ = loader._reader_on_gpu(loader._plan(1))(0)
    assert (first == 0).all()
    assert (second == 1).all()


def test_an_image_that_is_not_there_is_nan() -> None:
    images, affine = torch.ones(2, 1, 4, 4).byte().to(GPU), torch.ones(2, 1).double().to(GPU)
    index = torch.tensor([1, 2, -1, 0]).to(GPU)
    x = torch.ops.torchbp_images.on_gpu(images, index, None, None, affine, torch.float32)
    assert x.isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    assert (x[[0, 3]] == 2).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [3, 300])
def test_class_index_out_of_range(classes: int, reduction: str) -> None:
    """Raises when the kernel has run, the first one, once; and the device goes on."""
    x = torch.randn(4, classes, device=GPU, requires_grad=True)
    bad = torch.tensor([0, 1, classes, -5], device=GPU)
    good = bad.clamp(0, classes - 1)
    with pytest.raises(IndexError, match=rf"from 0 to {classes - 1}.*got {classes} at position 2"):
        late(x, bad, good, reduction)
    late(x, good, good, reduction)


def late(x: Tensor, target: Tensor, then: Tensor, reduction: str) -> None:
    loss = F.cross_entropy(x, target, reduction=reduction)
    loss.cpu()
    F.cross_entropy(x, then, reduction=reduction)


@REAL
def test_a_class_index_out_of_range_counts_nothing() -> None:
    x = torch.randn(4, 3, device=GPU, requires_grad=True)
    loss = F.cross_entropy(x, torch.tensor([0, 1, 3, 2], device=GPU), reduction="sum")
    assert loss.isnan()
    with pytest.raises(IndexError):
        loss.backward()
    (mine,) = torch.autograd.grad(F.cross_entropy(x[:2], torch.tensor([0, 1], device=GPU)), x)
    assert mine.isfinite().all()


@REAL
def test_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    x = torch.randn(2**22, device=GPU)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        y = F.sigmoid(F.scale(x, 2.0))
    stream.synchronize()
    torch.testing.assert_close(y, torch.sigmoid(2 * x))


@REAL
def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="multiply: b wants the device of a, cuda:0, got cpu"):
        F.multiply(torch.ones(2, device=GPU), torch.ones(2))
