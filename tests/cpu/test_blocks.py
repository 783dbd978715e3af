"""csrc/cpu/blocks.cpp: the memory of results that is kept; and results that go past the caches."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import torchbp
import torchbp.functional as F
from tests.layouts import laid_out

MIB = 1 << 20
KEPT = MIB // 4  # float32 elements of a result that is kept


def resident() -> int:
    """Bytes of memory that this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for memory")


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "strided", "expanded"])
def test_what_is_gone_leaves_its_memory_to_the_next_of_its_size(layout: str) -> None:
    x = laid_out(layout, (64, KEPT // 32), torch.randn)
    y = F.relu(x)
    assert y.stride() == torch.relu(x).stride()
    where = y.data_ptr()
    other = F.sigmoid(x)
    assert other.data_ptr() != where
    del y
    assert F.exp(x[:1]).data_ptr() != where  # of another size
    z = F.relu(x)
    assert z.data_ptr() == where
    assert torch.equal(z, torch.relu(x))


def test_whoever_keeps_a_part_of_a_result_keeps_its_memory() -> None:
    x = torch.randn(KEPT)
    view, storage, array = F.relu(x)[-3:], F.relu(x).untyped_storage(), F.relu(x).numpy()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            list(pool.map(lambda i: F.scale(x, float(i)), range(4)))
    assert torch.equal(view, torch.relu(x)[-3:])
    assert torch.equal(torch.empty(0).set_(storage), torch.relu(x))  # type: ignore[call-overload]
    assert (array == torch.relu(x).numpy()).all()


def test_gradients_that_are_accumulated_and_kept() -> None:
    x = torch.randn(KEPT, requires_grad=True)
    for n in range(1, 4):
        F.scale(x, 2.0).backward(torch.ones(KEPT))
        assert x.grad is not None
        assert (x.grad == 2 * n).all()


def test_results_go_where_tensors_go(tmp_path: Path) -> None:
    x = torch.randn(KEPT)
    y = F.relu(x)
    torch.save(y, tmp_path / "y")
    assert torch.equal(torch.load(tmp_path / "y", weights_only=True), y)
    shared = F.relu(x).share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, y)
    assert torch.equal(F.relu(x).resize_(10), y[:10])
    with pytest.raises(RuntimeError, match="not resizable"):
        F.relu(x).resize_(2 * KEPT)
    assert F.relu(x[:-1]).resize_(2 * KEPT).shape == (2 * KEPT,)  # a small one is PyTorch's


@LINUX
def test_empty_cache_gives_memory_back() -> None:
    x = torch.randn(16 * KEPT)
    results = [F.relu(x) for _ in range(8)]  # 128 MiB
    torchbp.empty_cache()
    before = resident()
    results.clear()
    assert resident() > before - 16 * MIB
    torchbp.empty_cache()
    assert resident() < before - 112 * MIB


@LINUX
@pytest.mark.parametrize(("limit", "kept"), [(None, 256), ("64", 64), ("0", 0)])
def test_no_more_is_kept_than_the_limit(limit: str | None, kept: int) -> None:
    program = f"""
import torch, torchbp.functional as F
from tests.cpu.test_blocks import KEPT, MIB, resident
F.relu(torch.ones(2)), torch.relu(torch.ones(40 * KEPT))
x = torch.ones(40 * KEPT)  # of a size that glibc keeps nothing of
before = resident()
results = [F.relu(x) for _ in range(8)]
full = resident()
assert full - before > 300 * MIB, full - before
results.clear()
kept = (resident() - before) / MIB
assert {kept} - 41 <= kept <= {kept} + 8, kept  # whole results, and what else happened
"""
    environment = {**os.environ, "TORCHBP_CACHE_MIB": limit} if limit else dict(os.environ)
    if limit is None:
        environment.pop("TORCHBP_CACHE_MIB", None)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_streamed(dtype: torch.dtype, offset: int) -> None:
    """A result that goes past the caches has the bits of one that does not, at every alignment of
    a thread's part, the last elements too."""
    n = 32 * MIB // dtype.itemsize + 5
    x = torch.randn(n + offset).to(dtype)[offset:]
    y = F.leaky_relu(x)
    for part in (slice(0, 5000), slice(n // 2 - 3000, n // 2 + 3000), slice(n - 5000, n)):
        assert torch.equal(y[part], F.leaky_relu(x[part].clone()))
    assert torch.equal(F.scale(x, 2.0), 2 * x)
    small = torch.zeros((), dtype=dtype)
    grads = torch.ops.torchbp.multiply_backward(x, x, x + small)
    assert all(torch.equal(grad, x * x) for grad in grads)


def test_streamed_to_strides() -> None:
    """Two outputs of another layout than the inputs', which one pass writes side by side."""
    n = 3000
    a = torch.randn(n, n).t()
    y = F.multiply(a, a)
    assert y.stride() == a.stride()
    assert torch.equal(y, a * a)
    wide = torch.randn(n, 2 * n)[:, ::2]
    assert torch.equal(F.relu(wide), torch.relu(wide))
