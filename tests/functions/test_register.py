"""torchbp.functions.register: every raw operation of torch.ops.torchbp, called by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import torchbp.functional
from tests.compare import assert_same
from tests.ops import OPS, RAW_OPS, Op
from tests.peers import CASES, Case, subsets
from tests.proofs import MODES, compare
from tests.raw import REFUSING, Sample, bound, randn, requiring_grad, samples_of
from torchbp.functions.table import ROWS

ops: Any = torch.ops.torchbp

#: What cross_entropy runs where softmax_ce_with_gradient does not do: each row's own loss, a
#: gradient for the target, no gradient at all, torch.func and torch.compile, CUDA.
CROSS_ENTROPY_IN_TWO = {"softmax_ce", "softmax_ce_backward"}

EACH_RAW_OP = pytest.mark.parametrize("name", RAW_OPS)


@EACH_RAW_OP
def test_there_is_a_sample(name: str) -> None:
    assert samples_of(name), f"tests/raw.py: no sample for {name}"


@EACH_RAW_OP
def test_opcheck(name: str) -> None:
    """Schema, fake kernel (shapes, dtypes, strides), autograd registration and torch.compile, the
    last with and without inputs that require grad.
    """
    op = getattr(ops, name).default
    for sample in samples_of(name):
        torch.library.opcheck(op, sample)
    if name not in REFUSING and not name.startswith("softmax_ce"):
        torch.library.opcheck(op, requiring_grad(samples_of(name)[0]))


@pytest.mark.parametrize("name", RAW_OPS)
def test_raw_op_is_differentiable_or_refuses(name: str) -> None:
    for sample in samples_of(name):
        run, free = bound(name, sample)
        if name in REFUSING:
            with pytest.raises(RuntimeError, match=f"torchbp::{name} .* records no gradient"):
                run(*free)
            with torch.no_grad():
                run(*free)
            continue
        for mode in MODES:
            compare(run, free, mode)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_raw_op_with_a_parameter_of_its_own_refuses(name: str) -> None:
    """Its gradient would be that of the default; forward alone is right."""
    x, weight = randn(5, 3), randn(4, 3)
    parts: tuple[Any, ...] = (weight, None) if name == "linear" else ([weight, randn(2, 4)], [])
    before = getattr(ops, name)(x, *parts, "elu", 0.5)
    x.requires_grad_()
    getattr(ops, name)(x, *parts, "elu", 1.0)
    with pytest.raises(RuntimeError, match=f"torchbp::{name} .* for the default parameter alone"):
        getattr(ops, name)(x, *parts, "elu", 0.5)
    with torch.no_grad():
        assert_same(getattr(ops, name)(x, *parts, "elu", 0.5), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(REFUSING))
def test_fused_kernel_refuses_a_tangent(name: str) -> None:
    """Forward mode is not dropped silently, and what carries no tangent passes."""

    def dual(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(dual, value))
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        return value

    op = getattr(ops, name)
    with torch.autograd.forward_ad.dual_level():
        for sample in samples_of(name):
            op(*sample)
            with pytest.raises(RuntimeError, match=f"torchbp::{name} .* records no gradient"):
                op(*map(dual, sample))


@EACH_RAW_OP
def test_vmap_of_raw_op(name: str) -> None:
    """Each tensor batched alone, and all of them together."""
    op = getattr(ops, name)
    for sample in samples_of(name):
        tensors = [t for t in tree_leaves(sample) if isinstance(t, Tensor)]
        every = [[i] for i in range(len(tensors))] + [list(range(len(tensors)))]
        for batched in every:
            check_vmap(op, sample, batched)


def check_vmap(op: Callable[..., Any], sample: Sample, batched: list[int]) -> None:
    flat, spec = torch.utils._pytree.tree_flatten(sample)
    places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    places = [places[i] for i in batched]
    # Two versions of each tensor, the second with its rows or elements in another order.
    versions = [
        [v.flip(0) if second and i in places and v.dim() else v for i, v in enumerate(flat)]
        if second else list(flat)
        for second in (False, True)
    ]  # fmt: skip
    stacked = [torch.stack([versions[0][i], versions[1][i]], -1) for i in places]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(flat)
        for i, value in zip(places, values, strict=True):
            full[i] = value
        result = op(*torch.utils._pytree.tree_unflatten(full, spec))
        return tuple(tree_leaves(result))

    mine = torch.vmap(run, in_dims=-1)(*stacked)
    wanted = [run(*(version[i] for i in places)) for version in versions]
    for k, part in enumerate(mine):
        assert_same(part, torch.stack([result[k] for result in wanted]))


class Recorder(TorchDispatchMode):
    """Notes the operations of torchbp that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchbp":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_functional_runs_its_kernels(op: Op) -> None:
    """The fast path is taken: forward and a first backward run these operations and no others."""
    ours, _, inputs = op.main_case.split()
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with Recorder() as recorder:
        torch.autograd.grad(ours(*inputs).sum(), inputs)
    assert recorder.names == op.raw


def test_every_raw_op_belongs_to_an_op() -> None:
    """A raw operation that no row of the table mentions would go untested."""
    mentioned = {name for op in OPS.values() for name in op.raw}
    mentioned |= {f"{row.name}_backward" for row in ROWS.values() if row.name in mentioned}
    mentioned |= {
        f"{row.name}_backward_{which}"
        for row in ROWS.values() if len(row.inputs) == 2 and row.name in mentioned
        for which in "ab"
    }  # fmt: skip
    assert mentioned | CROSS_ENTROPY_IN_TWO == set(RAW_OPS)


@pytest.mark.parametrize("name", [row.name for row in ROWS.values() if len(row.inputs) == 2])
@pytest.mark.parametrize("which", "ab")
def test_frozen_input_of_two(name: str, which: str) -> None:
    """With one input frozen the kernel for the other's gradient runs alone."""
    a, b = randn(3, 4).requires_grad_(which == "a"), randn(4).requires_grad_(which == "b")
    with Recorder() as recorder:
        y = OPS[name].main_case.ours(a, b)
        torch.autograd.grad(y.sum(), a if which == "a" else b)
    backward = set() if name == "add" else {f"{name}_backward_{which}"}
    assert recorder.names == {name} | backward


class Arguments(TorchDispatchMode):
    """Notes the arguments of the operations of torchbp that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Sample] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchbp":
            self.calls[func._opname] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs_of_linear(frozen: str) -> None:
    """The kernel is told what not to compute."""
    inputs = {"x": randn(5, 3), "weight": randn(4, 3), "bias": randn(4)}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    with Arguments() as recorded:
        y = torchbp.functional.linear(**inputs, activation="relu")
        torch.autograd.grad(y.sum(), [t for name, t in inputs.items() if name != frozen])
    assert recorded.calls["linear_backward"][-3:] == tuple(name != frozen for name in inputs)


def test_frozen_inputs_of_mlp() -> None:
    x, weights, biases = randn(5, 3), [randn(4, 3), randn(2, 4)], [randn(4), randn(2)]
    free = [weights[1].requires_grad_(), biases[0].requires_grad_()]
    with Arguments() as recorded:
        torch.autograd.grad(torchbp.functional.mlp(x, weights, biases).sum(), free)
    need_x, need_weights, need_biases = recorded.calls["mlp_backward"][-3:]
    assert not need_x
    assert list(map(bool, need_weights)) == [False, True]
    assert list(map(bool, need_biases)) == [True, False]


@pytest.mark.parametrize("frozen", ["input", "target"])
def test_frozen_inputs_of_cross_entropy(frozen: str) -> None:
    input, target = randn(5, 4), randn(5, 4).softmax(1)
    free = (target if frozen == "input" else input).requires_grad_()
    with Arguments() as recorded:
        loss = torchbp.functional.cross_entropy(input, target, reduction="none")
        torch.autograd.grad(loss.sum(), free)
    assert recorded.calls["softmax_ce_backward"][-2:] == (frozen != "input", frozen != "target")


#: Those that multiply matrices; PyTorch counts no product of two vectors.
PRODUCTS = [
    case
    for case in CASES
    if case.name.startswith(("matmul", "linear", "maxout", "mlp")) and case.shapes[1:] != ((3,),)
]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_flops_are_counted_as_pytorch_counts_them(case: Case) -> None:
    def count(f: Callable[..., Tensor], free: tuple[int, ...]) -> int:
        inputs = [
            torch.ones(shape).requires_grad_(i in free) for i, shape in enumerate(case.shapes)
        ]
        with FlopCounterMode(display=False) as counter:
            f(*inputs).sum().backward()
        return int(counter.get_total_flops())

    for free in subsets(len(case.shapes)):
        assert count(case.ours, free) == count(case.theirs, free) > 0, free
