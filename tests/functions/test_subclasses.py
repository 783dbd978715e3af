"""Tensors whose class knows PyTorch's operations and no others: distributed and jagged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import torchbp
import torchbp.functional as F
from tests.compare import assert_same
from tests.peers import CASES, Case, layers, network

TF = nn.functional


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of one process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def values(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor.values() if tensor.is_nested else tensor


def value_and_gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y = f(*inputs)
    grads = torch.autograd.grad(values(y).square().sum(), inputs)
    return [values(tensor).detach() for tensor in (y, *grads)]


def assert_same_results(ours: Any, theirs: Any, inputs: Sequence[Tensor]) -> None:
    assert_same(value_and_gradients(ours, inputs), value_and_gradients(theirs, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distributed(case: Case, mesh: DeviceMesh) -> None:
    if case.name == "maxout" and torch.__version__ < (2, 13):  # type: ignore[operator]
        pytest.skip("PyTorch has no gradient of max for distributed tensors yet")
    inputs = [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in case.shapes]
    replicated = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor in inputs]
    assert_same_results(case.ours, case.theirs, replicated)
    with torch.no_grad():
        assert_same(values(case.ours(*replicated)), case.ours(*inputs))


def test_distributed_cross_entropy(mesh: DeviceMesh) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    target = distribute_tensor(torch.arange(6) % 4, mesh, [Shard(0)])
    assert_same_results(
        lambda x: F.cross_entropy(x, target, label_smoothing=0.1),
        lambda x: TF.cross_entropy(x, target, label_smoothing=0.1),
        [distribute_tensor(logits, mesh, [Shard(0)])],
    )


def test_tensor_parallel(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    converted = torchbp.convert(model)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    x = torch.randn(5, 8, dtype=torch.float64)
    results = []
    for each in (model, converted):
        parallel = parallelize_module(each, mesh, plan)
        loss = parallel(x).square().sum()
        grads = torch.autograd.grad(loss, list(parallel.parameters()))
        results.append([loss.detach(), *map(values, grads)])
    mine, wanted = results
    assert_same(mine, wanted)


def jagged(*shape: int) -> Tensor:
    rows = [torch.rand(n, *shape, dtype=torch.float64) + 0.5 for n in (3, 1, 5)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("name", ["exp", "reciprocal", "relu", "elu", "sigmoid", "tanh"])
def test_jagged(name: str) -> None:
    theirs = getattr(TF, name, None) or getattr(torch, name)
    assert_same_results(getattr(F, name), theirs, [jagged(4)])


@pytest.mark.parametrize("compiled", [False, True])
def test_jagged_through_layers(compiled: bool) -> None:
    def maybe(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f

    parameters = [torch.rand(shape, dtype=torch.float64) for shape in ((3, 4), (2, 3), (3,), (2,))]
    assert_same_results(maybe(network), maybe(layers), [jagged(4), *parameters])
