"""torchbp.functions.register: every raw operation of torch.ops.torchbp, called by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchbp.functional
from tests.compare import assert_same
from tests.ops import OPS, RAW_OPS, Op
from torchbp.functions.table import ROWS, Row

Sample = tuple[Any, ...]

ops: Any = torch.ops.torchbp
randn = partial(torch.randn, dtype=torch.float64)


def row_samples(row: Row) -> dict[str, list[Sample]]:
    """What the table of gates says of its operations' arguments."""
    parameter = (0.25,) if row.parameter else ()
    name = row.name
    x = randn(3, 4)
    if len(row.inputs) == 2:
        a, b, dy = randn(3, 1), randn(4), randn(3, 4)
        samples: dict[str, list[Sample]] = {name: [(a, b), (x.T, x.T), (x, randn(3, 8)[:, ::2])]}
        for suffix in ("", "_a", "_b"):
            samples[f"{name}_backward{suffix}"] = [(dy, a, b), (dy, x, b), (x.T, dy.T, dy.T)]
        return samples
    saved = (randn(3, 4).abs(),) if row.saves else ()
    return {
        name: [(t, *parameter) for t in (x, x.T, randn(()), randn(0, 2))],
        f"{name}_backward": [(t, *saved, *parameter) for t in (randn(3, 4), randn(4, 3).T)],
    }


def product_samples() -> dict[str, list[Sample]]:
    x, weight, bias, dy = randn(5, 3), randn(4, 3), randn(4), randn(5, 4)
    second = randn(2, 4)
    samples: dict[str, list[Sample]] = {name: [] for name in RAW_OPS if name not in gate_ops()}
    samples["linear"] += [
        (x, weight, bias, "none", 0.0),
        (randn(2, 2, 3), weight, None, "relu", 0.0),
        (randn(3, 5).T, weight, bias, "elu", 1.0),
        (randn(3), weight, bias, "leaky_relu", 0.01),
    ]
    for activation, parameter in (("none", 0.0), ("tanh", 0.0), ("elu", 1.0)):
        y, z = ops.linear(x, weight, bias, activation, parameter)
        saved = z if z.numel() else y
        samples["linear_backward"] += [
            (dy, x, weight, saved, activation, parameter, True, True, True),
            (dy, x, weight, saved, activation, parameter, False, True, False),
        ]
        network = (x, [weight, second], [bias, randn(2)], activation, parameter)
        if activation == "none":
            continue
        samples["mlp"] += [network, (randn(2, 2, 3), [weight], [], activation, parameter)]
        _, *kept = ops.mlp(*network)
        for needs in ((True, [1, 1], [1, 1]), (False, [1, 0], [0, 1]), (False, [0, 1], [])):
            samples["mlp_backward"].append(
                (randn(5, 2), x, [weight, second], kept, activation, parameter, *needs)
            )
    target, q, classes = torch.tensor([0, 3, 1, -100, 2]), dy.softmax(1), randn(4).abs()
    for reduction, upstream in ((0, randn(5)), (1, randn(())), (2, randn(()))):
        for goal, w, smoothing in ((target, None, 0.0), (target, classes, 0.1), (q, classes, 0.1)):
            call = (dy, goal, w, -100, reduction, smoothing)
            samples["softmax_ce"].append(call)
            if reduction != 0:
                samples["softmax_ce_with_gradient"].append(call)
            _, lse, total = ops.softmax_ce(*call)
            samples["softmax_ce_backward"].append(
                (upstream, dy, goal, w, lse, total, -100, reduction, smoothing, True, goal is q)
            )
    z = randn(5, 3, 4)
    samples["max_pieces"] += [(z,), (z.transpose(0, 2),), (randn(2, 6),)]
    samples["max_pieces_backward"] += [(dy, ops.max_pieces(z)[1], 3)]
    pixels, rows = torch.randint(0, 256, (4, 2, 5, 3), dtype=torch.uint8), torch.tensor([3, 0, 3])
    flip, shift = torch.tensor([0, 1, 1]).byte(), torch.tensor([[0, 1], [-2, 0], [1, -1]]).int()
    affine = ([0.1, 0.2], [-1.0, 2.0])
    samples["image_batch"] += [
        (pixels, rows, flip, shift, *affine, torch.float32),
        (
            pixels.transpose(1, 3).contiguous().transpose(1, 3),
            rows,
            None,
            None,
            *affine,
            torch.half,
        ),
    ]
    samples["l2_penalty"] += [([x, weight.T, bias],), ([randn(())],), ([randn(0), x],)]
    return samples


def gate_ops() -> set[str]:
    return {name for row in ROWS.values() for name in row_samples(row)}


def samples_of(name: str) -> list[Sample]:
    samples = product_samples()
    for row in ROWS.values():
        samples |= row_samples(row)
    return samples[name]


#: Fused gradients, which record no gradient of their own and say so.
REFUSING = {"max_pieces", "max_pieces_backward"}
REFUSING |= {"linear_backward", "mlp_backward", "softmax_ce_backward", "softmax_ce_with_gradient"}
REFUSING |= {
    f"{row.name}_backward{which}"
    for row in ROWS.values()
    if len(row.inputs) == 2
    for which in ("", "_a", "_b")
}

#: Operations on bytes: there is nothing to differentiate.
ON_BYTES = {"image_batch"}

#: What cross_entropy runs where softmax_ce_with_gradient does not do: each row's own loss, a
#: gradient for the target, no gradient at all, torch.func and torch.compile, CUDA.
CROSS_ENTROPY_IN_TWO = {"softmax_ce", "softmax_ce_backward"}

EACH_RAW_OP = pytest.mark.parametrize("name", RAW_OPS)


def requiring_grad(sample: Sample) -> Sample:
    """The same arguments, with copies (of the same layout) that require grad."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            copy = torch.empty_like(value).copy_(value)
            return copy.requires_grad_()
        return value

    return tuple(map(one, sample))


@EACH_RAW_OP
def test_there_is_a_sample(name: str) -> None:
    assert samples_of(name), f"tests/functions/test_register.py: no sample for {name}"


@EACH_RAW_OP
def test_opcheck(name: str) -> None:
    """Schema, fake kernel (shapes, dtypes, strides), autograd registration and torch.compile, the
    last with and without inputs that require grad.
    """
    op = getattr(ops, name).default
    for sample in samples_of(name):
        torch.library.opcheck(op, sample)
    if name not in REFUSING | ON_BYTES and not name.startswith("softmax_ce"):
        torch.library.opcheck(op, requiring_grad(samples_of(name)[0]))


@pytest.mark.parametrize("name", [name for name in RAW_OPS if name not in ON_BYTES])
def test_raw_op_is_differentiable_or_refuses(name: str) -> None:
    op = getattr(ops, name)
    for sample in samples_of(name):
        if name == "softmax_ce":  # the class weights have no gradient
            sample = (*requiring_grad(sample[:2]), *sample[2:])
        else:
            sample = requiring_grad(sample)
        free = [t for t in tree_leaves(sample) if isinstance(t, Tensor) and t.requires_grad]
        if name in REFUSING:
            with pytest.raises(RuntimeError, match=f"torchbp::{name} .* records no gradient"):
                op(*sample)
            with torch.no_grad():
                op(*sample)
            continue

        def run(*values: Tensor) -> Tensor:
            it = iter(values)
            args = [
                [next(it) for _ in arg] if isinstance(arg, list)
                else next(it) if isinstance(arg, Tensor) and arg.requires_grad
                else arg
                for arg in sample  # noqa: B023
            ]  # fmt: skip
            result = op(*args)
            return result if isinstance(result, Tensor) else result[0]

        assert torch.autograd.gradcheck(run, free, check_forward_ad=True)


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
    assert mentioned | ON_BYTES | CROSS_ENTROPY_IN_TWO == set(RAW_OPS)


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
