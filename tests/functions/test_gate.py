"""torchbp.functions.gate over the table of operations: derivatives of every order and mode, under
torch.autograd, torch.func and torch.compile.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import torchbp.functional as F
from tests.compare import assert_same
from tests.ops import OPS, Case, Op
from tests.proofs import MODES, NOT_COMPARABLE, SMALL, compare_case

WITH_ELEMENTS = [case for case in SMALL if all(0 not in i.shape for i in case.inputs)]
MAIN = [case for op in OPS.values() for case in op.main_cases]

EACH_SMALL_CASE = pytest.mark.parametrize("case", SMALL, ids=str)
EACH_CHECKED_CASE = pytest.mark.parametrize(
    "case", [case for case in SMALL if str(case) not in NOT_COMPARABLE], ids=str
)
EACH_FULL_CASE = pytest.mark.parametrize("case", WITH_ELEMENTS, ids=str)
EACH_MAIN_CASE = pytest.mark.parametrize("case", MAIN, ids=str)


def require_grad(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.requires_grad_() for tensor in inputs)


# ---- finite differences --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@EACH_CHECKED_CASE
def test_jacobians(case: Case, mode: str) -> None:
    """The whole Jacobian, and that of the gradient, column by column."""
    compare_case(case, mode)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.smooth], ids=str)
def test_third_derivative(op: Op) -> None:
    for case in op.main_cases:
        ours, reference, inputs = case.split()

        def third(function: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> list[Tensor]:
            variables = require_grad([tensor.clone() for tensor in inputs])
            value = function(*variables).sum()
            for _ in range(3):
                if not value.requires_grad:
                    break
                grads = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)
                value = sum((g.sin().sum() for g in grads if g is not None), torch.zeros(()))
            return [value.detach(), *(g.detach() for g in grads if g is not None)]

        assert_same(third(ours), third(reference))


# ---- forward mode, and mixes ---------------------------------------------------------------------


@EACH_FULL_CASE
def test_forward_mode_of_each_subset(case: Case) -> None:
    """Tangents for some of the inputs: those without one arrive in jvp as None."""
    ours, reference, inputs = case.split()
    for subset in subsets(len(inputs)):
        tangents = [torch.randn_like(inputs[i]) for i in subset]

        def tangent(function: Callable[..., Tensor]) -> Tensor:
            with forward_ad.dual_level():
                duals = list(inputs)
                for i, t in zip(subset, tangents, strict=True):  # noqa: B023
                    duals[i] = forward_ad.make_dual(inputs[i], t)
                return forward_ad.unpack_dual(function(*duals)).tangent

        assert_same(tangent(ours), tangent(reference))


@EACH_FULL_CASE
def test_gradients_of_each_subset(case: Case) -> None:
    """Frozen inputs: the others' gradients are right."""
    ours, reference, inputs = case.split()
    for create_graph in (False, True):
        for subset in subsets(len(inputs)):
            results = []
            for function in (ours, reference):
                values = [t.clone().requires_grad_(i in subset) for i, t in enumerate(inputs)]
                y = function(*values)
                wanted = [values[i] for i in subset]
                grads = torch.autograd.grad(
                    y, wanted, torch.ones_like(y), create_graph=create_graph
                )
                results.append([g.detach() for g in grads])
            assert_same(results[0], results[1])


def subsets(n: int) -> Iterator[tuple[int, ...]]:
    """Of a few inputs every subset but none; of many each alone, all, and all but one."""
    if n <= 3:
        for size in range(1, n + 1):
            yield from itertools.combinations(range(n), size)
        return
    yield tuple(range(n))
    for i in range(n):
        yield (i,)
        yield tuple(j for j in range(n) if j != i)


# ---- torch.func ----------------------------------------------------------------------------------


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number that weighs the elements differently."""

    def loss(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return (y * torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape).cos()).sum()

    return loss


@EACH_FULL_CASE
def test_func_first_order(case: Case) -> None:
    ours, reference, inputs = case.split()
    each = tuple(range(len(inputs)))
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    y, pull, *_ = vjp(ours, *inputs)
    wanted_y, wanted_pull, *_ = vjp(reference, *inputs)
    assert_same(y, wanted_y)
    assert_same(pull(torch.cos(y)), wanted_pull(torch.cos(y)))
    assert_same(jvp(ours, tuple(inputs), tangents), jvp(reference, tuple(inputs), tangents))
    assert_same(grad(scalar(ours), each)(*inputs), grad(scalar(reference), each)(*inputs))
    for jacobian in (jacrev, jacfwd):
        assert_same(jacobian(ours, each)(*inputs), jacrev(reference, each)(*inputs))


@pytest.mark.parametrize("inner", [jacrev, jacfwd], ids=["of_jacrev", "of_jacfwd"])
@pytest.mark.parametrize("outer", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@EACH_MAIN_CASE
def test_func_second_order(case: Case, outer: Any, inner: Any) -> None:
    """The Hessian, its mixed blocks too, by all four orders of the modes (torch.func.hessian is
    jacfwd of jacrev).
    """
    ours, reference, inputs = case.split()
    each = tuple(range(len(inputs)))
    mine = outer(inner(scalar(ours), each), each)(*inputs)
    assert_same(mine, jacrev(jacrev(scalar(reference), each), each)(*inputs))


@EACH_MAIN_CASE
def test_func_hessian(case: Case) -> None:
    ours, reference, inputs = case.split()
    assert_same(hessian(scalar(ours))(*inputs), hessian(scalar(reference))(*inputs))


def test_in_a_fresh_process() -> None:
    """A second-order column is the first thing that runs: PyTorch may import a part of itself."""
    program = """
import torch, torchbp.functional as F
x = torch.tensor([-1.0])
print(torch.func.jacrev(torch.func.jacrev(lambda x: F.elu(x).sum()))(x).item())
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-500:]
    assert float(result.stdout) == pytest.approx(math.exp(-1))


BATCH = 3


def batches(case: Case) -> Iterator[tuple[tuple[int | None, ...], list[Tensor]]]:
    """Inputs batched alone and together, in front and at the end; classes and weights too."""
    n = len(case.inputs)
    choices: list[tuple[int | None, ...]] = [(0,) * n, (-1,) * n]
    if n > 1:
        for i in range(n):
            choices.append(tuple(0 if j == i else None for j in range(n)))
            choices.append(tuple(None if j == i else -1 for j in range(n)))
    for in_dims in choices:
        samples = [case.make() for _ in range(BATCH)]
        yield (
            in_dims,
            [
                parts[0] if dim is None else torch.stack(parts, dim)
                for parts, dim in zip(zip(*samples, strict=True), in_dims, strict=True)
            ],
        )


@EACH_SMALL_CASE
def test_vmap(case: Case) -> None:
    for in_dims, inputs in batches(case):
        assert_same(
            vmap(case.ours, in_dims)(*inputs), loop(case.reference, in_dims, inputs), 1e-9, 1e-9
        )


@EACH_FULL_CASE
def test_vmap_of_grad(case: Case) -> None:
    """The gradient of each sample by itself."""
    free = tuple(case.differentiable)
    for in_dims, inputs in batches(case):
        mine = vmap(grad(scalar(case.ours), free), in_dims)(*inputs)
        wanted = loop(grad(scalar(case.reference), free), in_dims, inputs)
        assert_same(mine, wanted)


@EACH_MAIN_CASE
def test_vmap_of_vmap_and_of_jvp(case: Case) -> None:
    ours, reference, inputs = case.split()
    twice = [torch.randn(2, BATCH, *tensor.shape, dtype=tensor.dtype) for tensor in inputs]
    assert_same(vmap(vmap(ours))(*twice), vmap(vmap(reference))(*twice))

    def push(function: Callable[..., Tensor]) -> Callable[..., Any]:
        return lambda *tangents: jvp(function, tuple(inputs), tangents)[1]

    tangents = [torch.randn(BATCH, *tensor.shape, dtype=tensor.dtype) for tensor in inputs]
    assert_same(vmap(push(ours))(*tangents), vmap(push(reference))(*tangents))


@EACH_MAIN_CASE
def test_grad_of_vmap(case: Case) -> None:
    ours, reference, inputs = case.split()
    many = [torch.stack([tensor, tensor + 0.25, tensor - 0.25]) for tensor in inputs]
    each = tuple(range(len(inputs)))
    mine, wanted = (grad(scalar(vmap(function)), each)(*many) for function in (ours, reference))
    assert_same(mine, wanted)


def loop(
    function: Callable[..., Any], in_dims: tuple[int | None, ...], inputs: list[Tensor]
) -> Any:
    """What vmap means."""
    results = [
        function(
            *(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True))
        )
        for i in range(BATCH)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


# ---- torch.compile and torch.export --------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, **{"fullgraph": True, "backend": "aot_eager", **options})


def value_and_grads(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.cos(y.detach()))]


@EACH_MAIN_CASE
def test_compile(case: Case) -> None:
    ours, reference, inputs = case.split()
    program = compiled(ours)
    assert_same(value_and_grads(program, inputs), value_and_grads(reference, inputs))
    with torch.no_grad():
        assert_same(program(*inputs), reference(*inputs))


@EACH_MAIN_CASE
def test_compile_of_vmap_of_grad(case: Case) -> None:
    free = tuple(case.differentiable)
    samples = [case.make() for _ in range(BATCH)]
    inputs = [torch.stack(parts) for parts in zip(*samples, strict=True)]
    mine = compiled(vmap(grad(scalar(case.ours), free)))(*inputs)
    assert_same(mine, loop(grad(scalar(case.reference), free), (0,) * len(inputs), inputs))


@EACH_MAIN_CASE
def test_compile_of_jvp(case: Case) -> None:
    ours, reference, inputs = case.split()
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    mine = compiled(lambda x, t: jvp(ours, x, t))(tuple(inputs), tangents)
    assert_same(mine, jvp(reference, tuple(inputs), tangents))


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_compile_with_dynamic_shapes(op: Op) -> None:
    """One program for few rows and many, in which the operation occurs twice."""
    case = op.main_case
    same = op.elementwise or op.name == "cross_entropy"

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs) + function(*inputs)

    reference, program = twice(case.reference), compiled(twice(case.ours), dynamic=True)
    for i, rows in enumerate((7, 9, 12, 10_000)):  # equal sizes would be taken for the same
        inputs = [
            t[torch.randint(len(t), (rows,))] if same or i == 0 else t
            for i, t in enumerate(case.make())
        ]
        free = [inputs[i] for i in case.differentiable]

        def of_free(function: Callable[..., Tensor]) -> list[Tensor]:
            def bound(*values: Tensor) -> Tensor:
                full = list(inputs)  # noqa: B023
                for i, value in zip(case.differentiable, values, strict=True):
                    full[i] = value
                return function(*full)

            return value_and_grads(bound, free)  # noqa: B023

        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            with torch.no_grad():
                assert_same(program(*inputs), reference(*inputs))
            assert_same(of_free(program), of_free(reference))


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (lambda x: F.multiply(x, x), lambda x: x * x),
        (lambda x: F.add(x, x), lambda x: x + x),
        (lambda x: F.matmul(x, x), lambda x: x @ x),
        (lambda x: F.linear(x, x, activation="tanh"), lambda x: (x @ x.mT).tanh()),
        (lambda x: F.mlp(x, [x, x, x], activation="tanh"),
         lambda x: ((x @ x.mT).tanh() @ x.mT).tanh() @ x.mT),
        (lambda x: F.l2_penalty([x, x]), lambda x: 2 * x.square().sum()),
    ],
    ids=["multiply", "add", "matmul", "linear", "mlp", "l2_penalty"],
)  # fmt: skip
def test_compile_with_one_tensor_twice(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor]
) -> None:
    x = [torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)]
    assert_same(value_and_grads(compiled(ours), x), value_and_grads(reference, x))


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@EACH_MAIN_CASE
def test_export(case: Case) -> None:
    inputs = tuple(case.make())
    program = torch.export.export(Module(case.ours), inputs)
    assert_same(program.module()(*inputs), case.reference(*inputs))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    wanted = "aten.matmul" if case.op == "matmul" else "torchbp."
    assert any(name.startswith(wanted) for name in called), called
    assert not any(name.startswith("torchbp_kernels") for name in called), called


@EACH_MAIN_CASE
@pytest.mark.parametrize("grad", [False, True])
def test_export_for_onnx(case: Case, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.onnx exports, operations that it knows take the place of all of ours."""
    inputs = tuple(case.make())
    for i in case.differentiable if grad else ():
        inputs[i].requires_grad_()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(Module(case.ours), inputs)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("torchbp" in name for name in called), called
    assert_same(program.module()(*inputs), case.reference(*inputs))


@EACH_MAIN_CASE
def test_traced_graph_calls_public_operations(case: Case) -> None:
    """Without autograd too, where the Functions are not there to hide the library they call."""
    inputs = tuple(case.make())
    graph = make_fx(lambda *args: case.ours(*args), tracing_mode="fake")(*inputs)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert any(name.startswith(("torchbp.", "aten.")) for name in called), called
    assert not any(name.startswith("torchbp_kernels") for name in called), called


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_compiled_backward_is_fused(op: Op) -> None:
    """The compiled backward calls the kernels that the eager one does, and those of cross-entropy
    apart: only eager forward and backward share a kernel.
    """
    called: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    ours, _, inputs = op.main_case.split()
    value_and_grads(compiled(ours, backend=backend), inputs)
    assert not any(name.startswith("torchbp_kernels") for name in called), called
    names = {name.split(".")[1] for name in called if name.startswith("torchbp.")}
    in_two = frozenset({"softmax_ce", "softmax_ce_backward"})
    assert names == (in_two if op.name == "cross_entropy" else op.raw)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    """Our operations inside a program that inductor generates code for, float32."""

    def loss(function: Any, *inputs: Tensor) -> Tensor:
        x, weight, bias, target = inputs
        h = function.tanh(function.linear(x + 1, weight, bias))
        return function.cross_entropy(h * 2, target)

    inputs = [torch.randn(8, 5), torch.randn(6, 5), torch.randn(6)]
    target = torch.randint(6, (8,))
    program = compiled(lambda *free: loss(F, *free, target), backend="inductor")
    mine = value_and_grads(program, inputs)
    TF = torch.nn.functional
    assert_same(mine, value_and_grads(lambda *free: loss(TF, *free, target), inputs), 1e-5, 1e-6)
