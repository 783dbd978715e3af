"""The CUDA kernels against float64 on the CPU and PyTorch's own on the GPU, over the table of ops.

Elementwise results are within 4 ulp of the exact ones (CUDA's exp and tanh are within 2);
gradients, products and reductions are at most twice as far off in norm as PyTorch's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import torchbp
import torchbp.functional as F
from tests.compare import assert_close_in_norm, assert_within_ulps
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


@pytest.mark.parametrize("classes", [2, 10, 1000, 50257])
def test_many_classes(classes: int) -> None:
    input, target = torch.randn(64, classes), torch.randint(classes, (64,))
    exact = torch.nn.functional.cross_entropy(input.double(), target)
    loss = F.cross_entropy(input.to(GPU), target.to(GPU))
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-6, atol=0)


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


def test_class_index_out_of_range_raises_and_the_device_goes_on() -> None:
    input, target = torch.randn(4, 3, device=GPU), torch.tensor([0, 1, 3, 2], device=GPU)
    with pytest.raises(IndexError, match=r"from 0 to 2 .*got 3 at position 2"):
        F.cross_entropy(input, target)
    assert F.relu(input).sum().isfinite()


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
