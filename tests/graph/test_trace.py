"""torchbp.graph.trace: the gradients are autograd's, the values are the function's, and upstream
times local is what each gate sends back."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import torchbp.functional as F
from tests.compare import assert_same
from tests.graph.cases import CASES, MODULES, M, rand, total
from torchbp.graph import Ledger, trace


def check(fn: Callable[..., Any], inputs: tuple[Any, ...]) -> Ledger:
    """Trace a function, and compare gradients, values and sums with autograd's."""
    torch.manual_seed(7)
    copies = [
        value.detach().clone().requires_grad_(value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for value in tree_flatten(inputs)[0]
    ]
    structure = tree_flatten(inputs)[1]
    named = dict(fn.named_parameters()) if isinstance(fn, M) else {}
    parameters = {f"module.{name}": p for name, p in named.items() if p.requires_grad}
    differentiable = [c for c in copies if isinstance(c, Tensor) and c.requires_grad]
    loss = total(fn(*tree_unflatten(copies, structure)))
    wanted = torch.autograd.grad(loss, [*differentiable, *parameters.values()], allow_unused=True)

    torch.manual_seed(7)
    ledger = trace(_Total(fn) if isinstance(fn, M) else lambda *args: total(fn(*args)), *inputs)
    names = [node.name for node in ledger.nodes if node.kind == "input"]
    assert len(names) == sum(isinstance(value, Tensor) for value in copies)
    names = [name for name in names if name in ledger.grads]
    assert ledger.grads.keys() == {*names, *parameters}
    for name, theirs in zip([*names, *parameters], wanted, strict=True):
        ours = ledger.grads[name]
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    consistent(ledger)
    return ledger


class _Total(nn.Module):
    def __init__(self, module: M) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Tensor:
        return total(self.module(*inputs))


def consistent(ledger: Ledger) -> None:
    """What each value's uses send back adds up to its upstream gradient; where a local gradient is
    shown, upstream times it is the product."""
    sums: dict[tuple[int, int], Tensor] = {}
    for edge in ledger.edges:
        assert edge.source < len(ledger.nodes)
        if edge.product is None:
            continue
        assert edge.product.tensor is not None
        key = edge.source, edge.output
        value = ledger.nodes[edge.source].values[edge.output]
        product = edge.product.tensor
        sums[key] = sums[key] + product if key in sums else product
        if value is not None:
            assert product.shape == value.shape
        if edge.local is not None:
            target = ledger.nodes[edge.target]
            assert target.upstream is not None
            assert target.upstream.tensor is not None
            assert edge.local.tensor is not None
            made = (target.upstream.tensor * edge.local.tensor.conj()).sum_to_size(product.shape)
            made = made if product.is_complex() else made.real if made.is_complex() else made
            torch.testing.assert_close(made.to(product.dtype), product, rtol=1e-6, atol=1e-9)
    for (number, output), added in sums.items():
        node = ledger.nodes[number]
        upstream = node.upstreams[output]
        assert upstream is not None, node
        if number in ledger.outputs:
            continue  # it also has what came from outside
        assert upstream.tensor is not None
        torch.testing.assert_close(added, upstream.tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_function(name: str) -> None:
    fn, inputs = CASES[name]
    check(fn, inputs())


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    make, shape = MODULES[name]
    module = make().double()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    check(module, (rand(*shape),))
    assert_same(
        dict(module.state_dict()), before, rtol=0, atol=0
    ) if name != "BatchNorm1d" else None
    assert all(p.grad is None for p in module.parameters())


def test_enough_is_tested() -> None:
    assert sum(not name.startswith("torchbp") for name in [*CASES, *MODULES]) >= 80


# ---- the lecture ---------------------------------------------------------------------------------


def numbers(ledger: Ledger, name: str) -> tuple[float, float]:
    node = ledger[name]
    assert node.value is not None
    assert node.upstream is not None
    return node.value.sample.item(), node.upstream.sample.item()


def test_the_lectures_first_graph() -> None:
    """f = (x + y) z at -2, 5, -4: q = 3, f = -12; df/dx = df/dy = -4, df/dz = 3."""
    ledger = trace(lambda x, y, z: (x + y) * z, *torch.tensor([-2.0, 5.0, -4.0]))
    assert [node.name for node in ledger.nodes] == ["x", "y", "z", "add1", "mul1"]
    wanted = {"x": (-2, -4), "y": (5, -4), "z": (-4, 3), "add1": (3, -4), "mul1": (-12, 1)}
    assert {name: numbers(ledger, name) for name in wanted} == wanted
    locals_ = [edge.local.sample.item() for edge in ledger.edges if edge.local is not None]
    assert locals_ == [1, 1, -4, 3]
    products = [edge.product.sample.item() for edge in ledger.edges if edge.product is not None]
    assert products == [-4, -4, -4, 3]
    assert ledger["add1"].pattern == "distributor"
    assert ledger["mul1"].pattern == "swap multiplier"


def test_the_sigmoid_neuron() -> None:
    """The chain 1.00, -0.53, -0.53, -0.20, 0.20 over primitive gates, and the exact gradients."""
    inputs = {"w0": 2.0, "x0": -1.0, "w1": -3.0, "x1": -2.0, "w2": -3.0}
    ledger = trace(
        lambda w0, x0, w1, x1, w2: 1 / (torch.exp(-(w0 * x0 + w1 * x1 + w2)) + 1),
        *(torch.tensor(v, dtype=torch.float64) for v in inputs.values()),
    )
    chain = [node for node in ledger.nodes if node.kind == "gate"][-4:]
    assert [round(numbers(ledger, node.name)[1], 2) for node in chain[::-1]] == [
        1,
        -0.53,
        -0.53,
        -0.2,
    ]
    exact = {"w0": -0.1966, "x0": 0.3932, "w1": -0.3932, "x1": -0.5898, "w2": 0.1966}
    assert {name: round(grad.item(), 4) for name, grad in ledger.grads.items()} == exact  # type: ignore[union-attr]
    fused = trace(lambda s: F.sigmoid(s), torch.tensor(1.0, dtype=torch.float64))
    (edge,) = fused.edges
    assert edge.local is not None
    s = 1 / (1 + math.exp(-1))
    assert edge.local.sample.item() == pytest.approx((1 - s) * s, rel=1e-12)


def test_relu_of_the_lecture() -> None:
    x, upstream = torch.tensor([1.0, -2, 3, -1]), torch.tensor([4.0, -1, 5, 9])
    for relu in (torch.relu, F.relu, TF.relu):
        ledger = trace(relu, x, names=["x"], grad_output=upstream)
        (edge,) = ledger.edges
        assert edge.local is not None
        assert edge.local.sample.tolist() == [1, 0, 1, 0]
        assert ledger.grads["x"].tolist() == [4, 0, 5, 0]  # type: ignore[union-attr]
        assert edge.jacobian_shape == (4, 4)
        assert edge.jacobian_bytes == 64
        assert ledger.nodes[1].pattern == "mask"


def test_matmul_has_a_rule_and_a_jacobian_that_is_not_made() -> None:
    x, w = torch.randn(64, 128), torch.randn(128, 32)
    ledger = trace(lambda x, w: (x @ w).sum(), x, w)
    first, second, _ = ledger.edges
    assert (first.local, first.rule) == (None, "dL/da = dL/dy b^T")
    assert second.rule == "dL/db = a^T dL/dy"
    assert first.jacobian_shape == (64, 32, 64, 128)
    assert first.jacobian_bytes == 64 * 32 * 64 * 128 * 4
    assert ledger["matmul1"].pattern == "transpose-and-multiply"
    value = ledger["x"].value
    assert value is not None
    assert value.tensor is None
    assert value.mean == pytest.approx(x.mean().item(), abs=1e-6)
    assert value.std == pytest.approx(x.std(correction=0).item(), rel=1e-5)


def test_a_value_used_twice_adds_its_gradients() -> None:
    ledger = trace(lambda x: x * 4 + x * 2, torch.tensor(3.0))
    assert ledger["x"].uses == 2
    assert ledger.grads["x"] == 6
    assert "adder" in str(ledger)
    assert ledger["mul1"].pattern == "scale"


# ---- custom Functions ----------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad  # wrong, and shown as it is


def test_the_copy_gate_of_the_lecture() -> None:
    upstream = torch.tensor([4.0, 2.0])
    x = torch.tensor(7.0)
    ledger = trace(lambda x: (x.clone(), x.clone()), x, grad_output=tuple(upstream))
    for edge, sent in zip(ledger.edges, upstream, strict=True):
        assert edge.local is not None
        assert edge.product is not None
        assert (edge.local.sample.item(), edge.product.sample.item()) == (1, sent)
    assert ledger.grads["x"] == 6


def test_a_custom_function_is_one_gate() -> None:
    ledger = trace(lambda x: Twice.apply(Twice.apply(x)), torch.tensor(1.0))  # type: ignore[no-untyped-call]
    assert [node.operation for node in ledger.nodes] == ["", "Twice", "Twice"]
    assert [node.value.sample.item() for node in ledger.nodes if node.value] == [1, 2, 4]
    assert ledger.grads["x"] == 9


def test_torchbp_chain_shows_each_value() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    ledger = trace(lambda x, w: F.sigmoid(F.relu(F.matmul(x, w))).sum(), x, w)
    assert [n.operation for n in ledger.nodes if n.kind == "gate"] == [
        "matmul", "relu", "sigmoid", "sum",
    ]  # fmt: skip
    value = ledger["relu1"].value
    assert value is not None
    assert value.tensor is not None
    torch.testing.assert_close(value.tensor, (x @ w).relu())


# ---- what stays as it was ------------------------------------------------------------------------


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: id(value) for name, value in model.named_buffers()}
    x = torch.randn(5, 4)
    kept = x.clone()
    trace(lambda x: model(x).sum(), x)
    assert_same(dict(model.state_dict()), before, rtol=0, atol=0)
    assert {name: id(value) for name, value in model.named_buffers()} == buffers
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert model.training
    assert torch.equal(x, kept)
    assert not x.requires_grad


def test_an_argument_may_be_changed_in_place() -> None:
    x = torch.tensor([1.0, 2.0])
    ledger = trace(lambda x: x.mul_(3).square().sum(), x)
    assert [node.name for node in ledger.nodes] == ["x", "mul1", "square1", "sum1"]
    assert ledger.grads["x"].tolist() == [18, 36]  # type: ignore[union-attr]
    assert x.tolist() == [1, 2]


def test_a_change_by_an_argument_is_seen() -> None:
    """As by a name: what went in is what was there before."""
    ledger = trace(lambda x: nn.ReLU(inplace=True)(x * 2).sum(), torch.tensor([1.0, -2.0]))
    assert [node.name for node in ledger.nodes] == ["x", "mul1", "relu1", "sum1"]
    assert ledger.grads["x"].tolist() == [2, 0]  # type: ignore[union-attr]


def test_a_value_is_seen_after_a_change_through_a_view() -> None:
    def fn(x: Tensor) -> Tensor:
        mask = torch.zeros(2)
        mask[0:1].fill_(3)
        return (x * mask).sum()

    ledger = trace(fn, torch.tensor([1.0, 2.0]))
    assert ledger.grads["x"].tolist() == [3, 0]  # type: ignore[union-attr]
    (edge, _) = ledger.operands(ledger["mul1"])
    assert edge.local is not None
    assert edge.local.sample.tolist() == [3, 0]
    (_, edge) = ledger.operands(ledger["mul1"])
    mask = ledger.nodes[edge.source].value
    assert mask is not None
    assert mask.sample.tolist() == [3, 0]


def test_nothing_is_kept_alive() -> None:
    """What the function computed is gone when trace returns, without the garbage collector."""
    made: list[weakref.ref[Tensor]] = []

    def fn(x: Tensor) -> Tensor:
        y = F.relu(x)
        made.append(weakref.ref(y))
        return y.sum()

    gc.disable()
    try:
        ledger = trace(fn, torch.randn(3))
        assert made[0]() is None
    finally:
        gc.enable()
    assert ledger["relu1"].shape == (3,)


def test_the_random_state_is_put_back() -> None:
    before = torch.get_rng_state()
    trace(lambda x: TF.dropout(x).sum(), torch.randn(9, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_names() -> None:
    model = nn.Linear(2, 1)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return (model(x) - target).square().sum()

    ledger = trace(loss, torch.randn(3, 2), torch.randn(3, 1))
    kinds = {node.name: node.kind for node in ledger.nodes if node.kind != "gate"}
    assert kinds == {
        "x": "input", "target": "input", "model.weight": "parameter", "model.bias": "parameter",
    }  # fmt: skip
    named = trace(torch.mul, torch.tensor(2.0), torch.tensor(3.0), names=["a", "b"])
    assert {k: v.item() for k, v in named.grads.items() if v is not None} == {"a": 3, "b": 2}


def test_source_lines() -> None:
    ledger = trace(lambda x: x.exp().sum(), torch.randn(3))  # this very line
    source = ledger["exp1"].source
    assert source is not None
    assert source.endswith("# this very line")
    assert "test_trace.py:" in source


def test_json_and_table() -> None:
    ledger = trace(
        lambda x, w: F.relu(x @ w).sum(), torch.randn(3, 4), torch.full((4, 2), torch.inf)
    )
    data = json.loads(ledger.to_json())
    assert [node["name"] for node in data["nodes"]] == ["x", "w", "matmul1", "relu1", "sum1"]
    assert data["nodes"][1]["values"][0]["values"][0][0] == "inf"
    text = str(ledger)
    for word in ("matmul1", "transpose-and-multiply", "dL/da = dL/dy b^T"):
        assert word in text
    assert repr(ledger) == "Ledger(3 gates, 2 inputs and parameters)"


# ---- bad input -----------------------------------------------------------------------------------

X = torch.randn(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trace(3, X), TypeError, "fn wants a function or module, got int"),  # type: ignore[arg-type]
        (lambda: trace(lambda x: x > 0, X), ValueError, "depends on a floating input"),
        (lambda: trace(lambda x: 3, X), ValueError, "depends on a floating input"),
        (lambda: trace(torch.exp, X), ValueError, r"one element alone, got shape \(3,\)"),
        (lambda: trace(lambda x: (x.sum(), x.exp()), X), TypeError, "for each of 2 outputs"),
        (lambda: trace(torch.exp, X, grad_output=torch.ones(2)), ValueError, r"wants shape \(3,\)"),
        (lambda: trace(torch.exp, X, grad_output=[3.0]), TypeError, "wants tensors, got float"),
        (lambda: trace(torch.exp, X, grad_output=[X, X]), TypeError, "of 1 outputs, got 2"),
        (lambda: trace(torch.exp, X, grad_output=[None]), ValueError, "one output at least"),
        (lambda: trace(torch.exp, X, names=["a", "b"]), TypeError, "names wants 1 strings"),
        (lambda: trace(torch.add, X, X, names=["a", "a"]), TypeError, "each name once"),
        (lambda: trace(lambda x: torch.linalg.qr(x, "complete")[0].sum(), rand(4, 2)), RuntimeError,
         "autograd cannot differentiate"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
