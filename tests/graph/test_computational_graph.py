"""torchbp.graph.ComputationalGraph: the lecture's graphs, any graph against autograd, bad use."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchbp
import torchbp.functional as F
from tests.compare import assert_same
from tests.ops import DTYPES
from torchbp import ROWS, functions
from torchbp.graph import ComputationalGraph
from torchbp.graph.computational_graph import Node

Shape = tuple[int, ...]


def f64(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def value(node: Node) -> Tensor:
    assert node.value is not None
    return node.value


def grad(node: Node) -> Tensor:
    assert node.grad is not None
    return node.grad


def local(node: Node) -> tuple[Tensor, ...]:
    assert node.local is not None
    return node.local


def downstream(node: Node) -> tuple[Tensor, ...]:
    assert node.downstream is not None
    return node.downstream


def items(tensors: tuple[Tensor, ...]) -> list[float]:
    return [tensor.item() for tensor in tensors]


def names(graph: ComputationalGraph) -> list[str]:
    return [node.name for node in graph.nodes]


def product() -> ComputationalGraph:
    """The lecture's (x + y) z, with its names."""
    graph = ComputationalGraph()
    x, y, z = map(graph.input, "xyz")
    graph.gate("multiply", graph.gate("add", x, y, name="q"), z, name="f")
    return graph


# ---- the lecture's numbers -----------------------------------------------------------------------


def test_product_of_a_sum_node_by_node() -> None:
    """f = (x + y) z at -2, 5, -4: q = 3, f = -12; df/dx = -4, df/dy = -4, df/dz = 3."""
    graph = product()
    assert graph.forward(x=-2, y=5, z=-4).item() == -12
    assert items(tuple(map(value, graph))) == [-2, 5, -4, 3, -12]
    graph.backward()
    assert {node.name: grad(node).item() for node in graph} == {
        "x": -4, "y": -4, "z": 3, "q": -4, "f": 1
    }  # fmt: skip
    q, f = graph["q"], graph["f"]
    assert items(local(f)) == [-4, 3]
    assert items(downstream(f)) == [-4, 3]
    assert items(local(q)) == [1, 1]
    assert items(downstream(q)) == [-4, -4]
    assert local(graph["x"]) == downstream(graph["x"]) == ()
    for node in graph:
        assert node.upstream is node.grad


NEURON = {"w0": 2.0, "x0": -1.0, "w1": -3.0, "x1": -2.0, "w2": -3.0}


def primitive_neuron(w0: Any, x0: Any, w1: Any, x1: Any, w2: Any) -> Any:
    return 1 / (1 + torch.exp(-(w0 * x0 + w1 * x1 + w2)))


def fused_neuron(w0: Any, x0: Any, w1: Any, x1: Any, w2: Any) -> Any:
    return torch.sigmoid(w0 * x0 + w1 * x1 + w2)


def ran(fn: Callable[..., Any], **inputs: Any) -> ComputationalGraph:
    """The graph of fn after a forward and a backward in float64."""
    graph = ComputationalGraph.from_function(fn)
    graph.forward(**{name: f64(number) for name, number in inputs.items()})
    graph.backward()
    return graph


def test_sigmoid_neuron_over_primitive_gates() -> None:
    """1.00, -0.53, -0.53, -0.20, 0.20 flow back through 1/x, 1 + x, e^x and -x; f = 0.73."""
    graph = ran(primitive_neuron, **NEURON)
    chain = ["reciprocal1", "shift1", "exp1", "scale1", "add2"]
    assert [f"{value(graph[name]).item():.2f}" for name in chain] == [
        "0.73", "1.37", "0.37", "-1.00", "1.00"
    ]  # fmt: skip
    assert [f"{grad(graph[name]).item():.2f}" for name in chain] == [
        "1.00", "-0.53", "-0.53", "-0.20", "0.20"
    ]  # fmt: skip
    got = {node.name: grad(node).item() for node in graph.inputs}
    sigma = 1 / (1 + math.exp(-1))
    slope = (1 - sigma) * sigma
    exact = {"w0": -slope, "x0": 2 * slope, "w1": -2 * slope, "x1": -3 * slope, "w2": slope}
    assert got == pytest.approx(exact, rel=1e-14)
    assert {name: f"{number:.4f}" for name, number in got.items()} == {
        "w0": "-0.1966", "x0": "0.3932", "w1": "-0.3932", "x1": "-0.5898", "w2": "0.1966"
    }  # fmt: skip


def test_a_graph_is_not_unique() -> None:
    """Primitive gates or one sigmoid gate, whose local gradient is (1 - 0.73) 0.73 = 0.2."""
    primitive, fused = ran(primitive_neuron, **NEURON), ran(fused_neuron, **NEURON)
    assert len(fused) == len(primitive) - 3
    sigmoid = fused["sigmoid1"]
    assert f"{value(sigmoid).item():.2f} {local(sigmoid)[0].item():.1f}" == "0.73 0.2"
    torch.testing.assert_close(
        value(sigmoid), value(primitive["reciprocal1"]), rtol=1e-15, atol=1e-15
    )
    for ours, theirs in zip(fused.inputs, primitive.inputs, strict=True):
        # Four gates against one, each with a rounding or two.
        torch.testing.assert_close(grad(ours), grad(theirs), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("operation", "pattern", "a", "b", "upstream", "y", "gradients"),
    [
        ("add", "distributor", 3, 4, 2, 7, [2, 2]),
        ("multiply", "swap multiplier", 2, 3, 5, 6, [15, 10]),
        ("maximum", "router", 4, 5, 9, 5, [0, 9]),
    ],
)
def test_patterns_in_gradient_flow(
    operation: str, pattern: str, a: float, b: float, upstream: float, y: float,
    gradients: list[float],
) -> None:  # fmt: skip
    """Add distributes, multiply swaps its multipliers, maximum routes."""
    graph = ComputationalGraph()
    gate = graph.gate(operation, graph.input("a"), graph.input("b"))
    assert graph.forward(a=a, b=b).item() == y
    graph.backward(upstream)
    assert gate.pattern == pattern
    assert grad(gate).item() == upstream
    assert [grad(node).item() for node in graph.inputs] == items(downstream(gate)) == gradients
    assert [upstream * part for part in items(local(gate))] == gradients


def test_copy_adds_its_gradients() -> None:
    """A value used twice, with gradients 4 and 2, gets 6."""
    graph = ran(lambda x: x * 4 + x * 2, x=7.0)
    assert grad(graph["x"]).item() == 6
    assert graph["x"].pattern == "adder"
    assert graph["scale1"].pattern is None


def test_a_node_may_have_two_patterns() -> None:
    graph = ComputationalGraph.from_function(lambda x, y: (q := x + y) * q)
    assert graph["add1"].pattern == "distributor and adder"
    assert graph["multiply1"].pattern == "swap multiplier"
    assert graph["x"].pattern is None


# ---- against autograd ----------------------------------------------------------------------------

REFERENCES: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "multiply": torch.mul,
    "maximum": torch.maximum,
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "scale": lambda x, a: a * x,
    "shift": lambda x, c: x + c,
    "relu": torch.relu,
    "leaky_relu": TF.leaky_relu,
    "elu": TF.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
SHAPES: list[tuple[Shape, Shape]] = [
    ((), ()),
    ((3, 4), (3, 4)),
    ((3, 4), (4,)),
    ((3, 1), (2, 3, 4)),
    ((3, 1), (1, 4)),
    ((), (3, 4)),
    ((1,), (0, 3)),
]
EACH_ROW = pytest.mark.parametrize("operation", list(ROWS))
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gate_graph(operation: str) -> ComputationalGraph:
    """A graph of one gate, named "gate", with -0.5 for a parameter."""
    row = ROWS[operation]
    graph = ComputationalGraph()
    parameter: dict[str, Any] = {} if row.parameter is None else {row.parameter: -0.5}
    graph.gate(operation, *map(graph.input, row.inputs), name="gate", **parameter)
    return graph


def drawn(operation: str, shapes: tuple[Shape, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """A normally distributed value for each input of a row."""
    named = zip(ROWS[operation].inputs, shapes, strict=False)
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in named}


def by_autograd(
    fn: Callable[..., Tensor], operation: str, inputs: dict[str, Tensor], upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(value, gradients) of fn, which takes the row's parameter last."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    y = fn(*leaves, *([] if ROWS[operation].parameter is None else [-0.5]))
    return y.detach(), torch.autograd.grad(y, leaves, upstream)


@EACH_ROW
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_every_row_is_a_gate(operation: str, shapes: tuple[Shape, Shape]) -> None:
    assert REFERENCES.keys() == ROWS.keys()
    graph, inputs = gate_graph(operation), drawn(operation, shapes, torch.float64)
    y = graph.forward(**inputs)
    upstream = torch.randn_like(y)
    graph.backward(upstream)
    exact_y, exact = by_autograd(REFERENCES[operation], operation, inputs, upstream)
    gate = graph["gate"]
    # Forwards and gradients of one gate are within a few ulps; sums are of at most eight.
    torch.testing.assert_close(y, exact_y, rtol=1e-14, atol=1e-15)
    for node, sent, wanted in zip(graph.inputs, downstream(gate), exact, strict=True):
        assert sent.shape == wanted.shape
        torch.testing.assert_close(sent, wanted, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(grad(node), sent, rtol=0, atol=0)
    # upstream x local = downstream, once summed to the shape of the operand.
    for part, wanted in zip(local(gate), exact, strict=True):
        assert part.shape == y.shape
        product = (upstream * part).sum_to_size(wanted.shape)
        torch.testing.assert_close(product, wanted, rtol=1e-13, atol=1e-14)


@EACH_ROW
@EACH_DTYPE
def test_numbers_are_the_kernels_own(operation: str, dtype: torch.dtype) -> None:
    graph, inputs = gate_graph(operation), drawn(operation, ((5, 7), (7,)), dtype)
    y = graph.forward(**inputs)
    upstream = torch.randn_like(y)
    graph.backward(upstream)
    exact_y, exact = by_autograd(getattr(F, operation), operation, inputs, upstream)
    assert_same(y, exact_y)
    for node, wanted in zip(graph.inputs, exact, strict=True):
        assert_same(grad(node), wanted)


class Operations(TorchDispatchMode):
    """Collects the names of torchbp's operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchbp":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_each_gate_runs_its_own_two_kernels() -> None:
    graph = ComputationalGraph.from_function(lambda x, y: F.maximum(F.multiply(F.tanh(x), y), x))
    with Operations() as ran_forward:
        graph.forward(x=1, y=2)
    assert ran_forward.names == ["tanh", "multiply", "maximum"]
    with Operations() as ran_backward:
        graph.backward()
    assert ran_backward.names == ["maximum_backward", "multiply_backward", "tanh_backward"]


def test_a_deep_graph() -> None:
    """No recursion: two thousand gates in a row."""
    graph = ComputationalGraph()
    node = graph.input("x")
    for _ in range(2000):
        node = node + 1
    assert graph.forward(x=0).item() == 2000
    graph.backward()
    assert grad(graph["x"]).item() == 1


RANDOM_GATES = [name for name in ROWS if name not in ("exp", "reciprocal")]


def random_graph(
    rng: random.Random,
) -> tuple[ComputationalGraph, dict[str, Tensor], dict[str, Tensor]]:
    """A graph of 25 gates after forward, its inputs, and torch's tensor for each node.

    Operands are any earlier nodes, so that there are diamonds, squares and dead ends. exp and
    reciprocal are put after tanh and sigmoid, to keep numbers within bounds.
    """
    graph = ComputationalGraph()
    inputs, theirs, nodes = {}, {}, []
    for i, shape in enumerate([(3, 4), (4,), (3, 1), ()]):
        nodes.append(graph.input(f"x{i}"))
        inputs[f"x{i}"] = torch.randn(shape, dtype=torch.float64)
        theirs[f"x{i}"] = inputs[f"x{i}"].clone().requires_grad_()

    def add_gate(operation: str, *operands: Node) -> Node:
        row = ROWS[operation]
        numbers = [] if row.parameter is None else [rng.choice([-0.5, 0.25, 1.5])]
        given: dict[str, Any] = {} if row.parameter is None else {row.parameter: numbers[0]}
        node = graph.gate(operation, *operands, **given)
        theirs[node.name] = REFERENCES[operation](
            *(theirs[operand.name] for operand in operands), *numbers
        )
        theirs[node.name].retain_grad()
        nodes.append(node)
        return node

    for _ in range(25):
        operation = rng.choice([*RANDOM_GATES, "exp", "reciprocal"])
        chosen = rng.choices(nodes, k=len(ROWS[operation].inputs))
        if operation == "exp":
            chosen = [add_gate("tanh", *chosen)]
        elif operation == "reciprocal":
            bounded = add_gate("sigmoid", add_gate("tanh", *chosen))
            chosen = [bounded]
        elif operation == "multiply":
            chosen = [add_gate("tanh", operand) for operand in chosen]
        add_gate(operation, *chosen)
    graph.output = nodes[-1]
    return graph, inputs, theirs


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_agree_with_autograd(seed: int) -> None:
    graph, inputs, theirs = random_graph(random.Random(seed))
    y = graph.forward(**inputs)
    upstream = torch.randn_like(y)
    graph.backward(upstream)
    theirs[graph.output.name].backward(upstream)
    order = names(graph)
    for node in graph:
        ours, wanted = theirs[node.name], theirs[node.name].grad
        # A hundred gates in float64 whose slopes are of order one.
        torch.testing.assert_close(value(node), ours.detach(), rtol=1e-12, atol=1e-12)
        exact = torch.zeros_like(ours) if wanted is None else wanted
        torch.testing.assert_close(grad(node), exact, rtol=1e-11, atol=1e-11)
        assert all(order.index(operand.name) < order.index(node.name) for operand in node.inputs)
        for part, operand in zip(downstream(node), node.inputs, strict=True):
            assert part.shape == value(operand).shape


def test_diamond_and_reuse() -> None:
    """q feeds both sides of a product, x both q and the product's other side."""

    def fn(x: Any, y: Any) -> Any:
        q = x * y
        return torch.tanh(q) * (q + x) * q

    graph = ran(fn, x=0.5, y=-1.5)
    leaves = f64(0.5).requires_grad_(), f64(-1.5).requires_grad_()
    y = fn(*leaves)
    exact = torch.autograd.grad(y, leaves)
    torch.testing.assert_close(value(graph.output), y.detach(), rtol=1e-14, atol=0)
    for node, wanted in zip(graph.inputs, exact, strict=True):
        torch.testing.assert_close(grad(node), wanted, rtol=1e-14, atol=0)


def test_where_the_output_does_not_depend_on_it_the_gradient_is_zero() -> None:
    """Even where the way there would be infinite times zero."""
    graph = ComputationalGraph()
    x, y = graph.input("x"), graph.input("y")
    dead = graph.gate("reciprocal", y, name="dead")
    graph.output = graph.gate("scale", x, a=3)
    graph.forward(x=torch.ones(2), y=torch.zeros(3))
    graph.backward(torch.ones(2))
    assert grad(x).tolist() == [3, 3]
    assert grad(y).tolist() == grad(dead).tolist() == downstream(dead)[0].tolist() == [0, 0, 0]
    assert torch.equal(value(dead), torch.full((3,), torch.inf))


def test_a_second_backward_and_a_second_forward_start_afresh() -> None:
    graph = product()
    graph.forward(x=-2, y=5, z=-4)
    for upstream in (None, 2, None):
        graph.backward(upstream)
        assert [grad(node).item() / (upstream or 1) for node in graph.inputs] == [-4, -4, 3]
    graph.output = "q"
    graph.backward()
    assert [grad(node).item() for node in graph] == [1, 1, 0, 1, 0]
    graph.forward(x=1, y=1, z=torch.ones(2))
    for node in graph:
        assert (node.grad, node.upstream, node.downstream) == (None, None, None)
    assert [part.tolist() for part in local(graph["f"])] == [[1, 1], [2, 2]]


def test_a_graph_without_gates_is_the_identity() -> None:
    graph = ComputationalGraph.from_function(lambda x: x)
    assert graph.forward(x=3).item() == 3
    graph.backward()
    assert grad(graph["x"]).item() == 1


# ---- what is read off an expression --------------------------------------------------------------

x0, y0 = f64([0.5, 1.5, 2.0]), f64([-1.0, 0.25, 3.0])
EXPRESSIONS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "add": (lambda x, y: x + y, ["add"]),
    "subtract": (lambda x, y: x - y, ["scale", "add"]),
    "multiply": (lambda x, y: x * y, ["multiply"]),
    "divide": (lambda x, y: x / y, ["reciprocal", "multiply"]),
    "number right": (lambda x, y: (x + 1) * 2 - 3, ["shift", "scale", "shift"]),
    "number left": (lambda x, y: 3 - 2 * (1 + x), ["shift", "scale", "scale", "shift"]),
    "over a number": (lambda x, y: x / 4, ["scale"]),
    "one over": (lambda x, y: 1 / x, ["reciprocal"]),
    "number over": (lambda x, y: 2.5 / x, ["reciprocal", "scale"]),
    "signs": (lambda x, y: +(-x), ["scale"]),
    "power 0": (lambda x, y: x**0, ["scale", "shift"]),
    "power 1": (lambda x, y: x**1 * y, ["multiply"]),
    "cube": (lambda x, y: x**3, ["multiply", "multiply"]),
    "numpy's numbers": (
        lambda x, y: numpy.float64(2) * x + numpy.float32(0.5), ["scale", "shift"]
    ),
    "torch's arithmetic": (
        lambda x, y: torch.sub(torch.mul(x, 2), torch.div(torch.add(x, y), torch.neg(y))),
        ["scale", "add", "scale", "reciprocal", "multiply", "scale", "add"],
    ),
    "torch's powers": (lambda x, y: torch.square(x) * torch.pow(y, 2), ["multiply"] * 3),
    "torch's gates": (
        lambda x, y: torch.maximum(
            torch.tanh(torch.exp(torch.sigmoid(x))), torch.relu(torch.reciprocal(y))
        ),
        ["sigmoid", "exp", "tanh", "reciprocal", "relu", "maximum"],
    ),
    "torch.nn.functional": (
        lambda x, y: TF.relu(TF.leaky_relu(TF.elu(TF.sigmoid(TF.tanh(y))), 0.1)),
        ["tanh", "sigmoid", "elu", "leaky_relu", "relu"],
    ),
    "torch.nn": (
        lambda x, y: torch.nn.LeakyReLU(0.3)(torch.nn.ELU(0.5)(y)), ["elu", "leaky_relu"]
    ),
    "methods": (
        lambda x, y: x.exp().reciprocal().relu().maximum(y).sigmoid().tanh(),
        ["exp", "reciprocal", "relu", "maximum", "sigmoid", "tanh"],
    ),
    "torchbp.functional": (
        lambda x, y: F.add(F.multiply(F.exp(x), F.reciprocal(y)), F.maximum(x, y)),
        ["exp", "reciprocal", "multiply", "maximum", "add"],
    ),
    "torchbp's activations": (
        lambda x, y: F.relu(F.leaky_relu(F.elu(F.sigmoid(F.tanh(y)), 0.5), 0.1)),
        ["tanh", "sigmoid", "elu", "leaky_relu", "relu"],
    ),
    "torchbp's numbers": (lambda x, y: F.scale(F.shift(x, 2.0), -3.0), ["shift", "scale"]),
    "torchbp's modules": (lambda x, y: torchbp.nn.LeakyReLU(0.3)(y), ["leaky_relu"]),
    "torchbp's Functions": (lambda x, y: functions.ELU.apply(y, 0.5), ["elu"]),
    "torchbp's operations": (lambda x, y: torch.ops.torchbp.tanh(y), ["tanh"]),
}  # fmt: skip


def test_a_module_is_read_like_a_function() -> None:
    graph = ComputationalGraph.from_function(
        torch.nn.Sequential(torch.nn.ELU(0.5), torch.nn.Tanh())
    )
    assert [node.operation for node in graph] == [None, "elu", "tanh"]
    assert [node.name for node in graph.inputs] == ["input"]


@pytest.mark.parametrize("case", list(EXPRESSIONS))
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_expressions_become_gates(case: str, autocast: bool) -> None:
    fn, operations = EXPRESSIONS[case]
    with torch.autocast("cpu", enabled=autocast):
        graph = ComputationalGraph.from_function(fn)
    assert sorted(node.operation for node in graph if node.operation) == sorted(operations)
    leaves = x0.clone().requires_grad_(), y0.clone().requires_grad_()
    y = fn(*leaves)
    torch.testing.assert_close(graph.forward(x=x0, y=y0), y.detach(), rtol=1e-13, atol=1e-14)
    graph.backward(torch.ones(3, dtype=torch.float64))
    exact = torch.autograd.grad(y.sum(), leaves, allow_unused=True, materialize_grads=True)
    for node, wanted in zip(graph.inputs, exact, strict=True):
        torch.testing.assert_close(grad(node), wanted, rtol=1e-13, atol=1e-14)


def test_inputs_have_the_names_of_the_parameters() -> None:
    def fn(x: Any, /, slope: float = 0.1, *, z: Any) -> Any:
        return TF.leaky_relu(x, slope) + z

    graph = ComputationalGraph.from_function(fn)
    assert [node.name for node in graph.inputs] == ["x", "z"]
    assert graph["leaky_relu1"].parameter == 0.1
    assert graph.forward(x=-1, z=1).item() == pytest.approx(0.9)


class NotAGate(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: torch.sin(x), r"torch\.sin: no gate .* exp, reciprocal, .*, maximum$"),
        (NotAGate(), r"torch\.sin: no gate"),
        (lambda x: torch.add(x, x, alpha=2), r"torch\.add: .* keyword"),
        (lambda x: torch.nn.functional.relu(x, inplace=True), r"relu: .* in place"),
        (lambda x: torch.stack([x, x]), r"torch\.stack: no gate"),
        (lambda x: F.matmul(x, x), "matmul: x wants a torch.Tensor, got Node"),
        (lambda x: F.linear(x, torch.ones(2, 2)), r"torchbp\.linear: no gate"),
        (lambda x: F.scale(x, x), r"scale: a wants a number, got Node"),
        (lambda x: F.add(x, torch.ones(2)), r"add: b wants a node or a name, got Tensor.*input"),
        (
            lambda x: functions.Add.apply(x, 2.0),
            r"add: b wants a node .* float: for a number use .*shift",
        ),
        (lambda x: x + torch.ones(2), "a tensor is no node: make it an input"),
        (lambda x: torch.ones(2) * x, "a tensor is no node: make it an input"),
        (lambda x: x / torch.ones(2), "a tensor is no node: make it an input"),
        (lambda x: torch.ones(2) - x, "a tensor is no node: make it an input"),
        (lambda x: x + "1", "unsupported operand"),
        (lambda x: "1" - x, "unsupported operand"),
        (lambda x: [1] / x, "unsupported operand"),
        (lambda x: x * 1j, "unsupported operand"),
        (lambda x: x + True, "shift: c wants a number, got bool"),
        (lambda x: x**0.5, r"x \*\* exponent: wants a whole number, got float"),
        (lambda x: x**x, r"x \*\* exponent: wants a whole number, got Node"),
        (lambda x: 2**x, "unsupported operand"),
        (lambda x: x if x > 0 else -x, "x: a node cannot be compared"),
        (lambda x: x if x == 0 else -x, "x: a node cannot be compared"),
        (lambda x: x if x != 0 else -x, "x: a node cannot be compared"),
        (lambda x: max(x, 0), "x: a node cannot be compared"),
        (lambda x: x or 1, "x: a node has no truth value"),
        (lambda x: math.exp(x), "must be real number, not Node"),
        (lambda x: (x, x), "return one node, got tuple of 2"),
        (lambda x: None, "return one node, got NoneType"),
        (lambda x: 3.0, "return one node, got float"),
        (lambda *xs: xs[0], r"a name for each input, has \*xs"),
        (lambda **xs: xs["x"], r"a name for each input, has \*\*xs"),
        (3, "fn wants a Python function .* got 3"),
    ],
)
def test_what_is_no_graph_is_refused(fn: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ComputationalGraph.from_function(fn)


def test_exponents_are_small() -> None:
    for exponent in (-1, 9):
        with pytest.raises(ValueError, match=rf"x \*\* exponent: wants 0 to 8, got {exponent}"):
            ComputationalGraph().input("x") ** exponent


def test_a_refusal_of_a_function_leaves_other_errors_as_they_were() -> None:
    """What has no __torch_function__ is still told by the operation."""
    with pytest.raises(TypeError, match=r"relu: x wants a torch\.Tensor, got list"):
        F.relu([1.0])  # type: ignore[arg-type]


def test_a_function_of_another_graphs_node_is_refused() -> None:
    other = product()["q"]
    for fn in (lambda x: x + other, lambda x: F.maximum(x, other)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="b is 'q' of another graph"):
            ComputationalGraph.from_function(fn)
    with pytest.raises(ValueError, match="node is 'q' of another graph"):
        ComputationalGraph.from_function(lambda x: other)


# ---- building by name ----------------------------------------------------------------------------


def test_names_may_come_before_their_nodes() -> None:
    graph = ComputationalGraph()
    graph.gate("multiply", "q", "z", name="f")
    graph.gate("add", "x", "y", name="q")
    with pytest.raises(ValueError, match=r"f = multiply\(q, z\): no node 'z' in the graph of f, q"):
        graph.forward(x=-2, y=5, z=-4)
    for name in "zyx":
        graph.input(name)
    assert graph.forward(x=-2, y=5, z=-4).item() == -12
    assert names(graph)[-2:] == ["q", "f"]
    assert [node.name for node in graph.inputs] == ["z", "y", "x"]
    assert graph["f"].inputs == (graph["q"], graph["z"])


def test_cycles_are_found() -> None:
    graph = ComputationalGraph()
    graph.gate("add", "z", "a", name="x")
    graph.gate("exp", "x", name="q")
    graph.gate("scale", "q", name="z", a=2)
    graph.input("a")
    for use in (lambda: graph.nodes, lambda: graph.output, lambda: graph.forward(a=1)):
        with pytest.raises(ValueError, match="the graph has a cycle: ") as error:
            use()
        *path, last = str(error.value).removeprefix("the graph has a cycle: ").split(" -> ")
        assert last == path[0]
        assert "".join(path) in ("xqz", "qzx", "zxq")
    assert "q = exp(x)" in repr(graph)  # which does not need an order


def test_names() -> None:
    graph = ComputationalGraph()
    x = graph.input("x")
    graph.input("exp2")
    graph.gate("add", "exp3", x)
    assert [graph.gate("exp", x).name for _ in range(2)] == ["exp1", "exp4"]
    assert graph["exp1"] is next(node for node in graph._nodes.values() if node.name == "exp1")
    assert "exp1" in graph
    assert "exp3" not in graph
    assert len(graph) == 5
    with pytest.raises(KeyError, match="no node 'exp3' in the graph of x, exp2, add1, exp1, exp4"):
        graph["exp3"]
    for add in (lambda: graph.input("x"), lambda: graph.gate("exp", x, name="x")):
        with pytest.raises(ValueError, match="has a node 'x' already"):
            add()
    with pytest.raises(TypeError, match="input: name wants a string, got int"):
        graph.input(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exp: name wants at least one letter"):
        graph.gate("exp", x, name="")
    assert len(graph) == 5


def test_parameters_have_the_functions_defaults() -> None:
    graph = ComputationalGraph()
    x = graph.input("x")
    assert graph.gate("leaky_relu", x).parameter == 0.01
    assert graph.gate("elu", x).parameter == 1.0
    assert graph.gate("elu", x, alpha=2).parameter == 2.0
    assert graph.gate("relu", x).parameter is None


@pytest.mark.parametrize(
    ("operation", "operands", "keywords", "kind", "message"),
    [
        ("sin", "x", {}, ValueError, "operation wants one of 'exp', .*'maximum', got 'sin'"),
        (None, "x", {}, TypeError, "operation wants one of"),
        ("add", "x", {}, TypeError, r"add: wants 2 operands \(a, b\), got 1"),
        ("exp", "xx", {}, TypeError, r"exp: wants 1 operands? \(x\), got 2"),
        (
            "exp",
            [3.0],
            {},
            TypeError,
            "exp: x wants a node or a name, got float: .* scale or shift",
        ),
        ("add", ["x", torch.ones(1)], {}, TypeError, "add: b wants a node .* Tensor: .* an input"),
        ("add", ["x", None], {}, TypeError, "add: b wants a node or a name, got NoneType$"),
        ("scale", "x", {}, TypeError, "scale: wants the number a, got nothing"),
        ("scale", "x", {"c": 1}, TypeError, "scale: has the parameter a alone, got c"),
        ("scale", "x", {"a": 1, "c": 1}, TypeError, "scale: has the parameter a alone, got c"),
        ("scale", "x", {"a": "1"}, TypeError, "scale: a wants a number, got str"),
        ("relu", "x", {"alpha": 1}, TypeError, "relu: has no parameter, got alpha"),
    ],
)
def test_bad_gates_are_refused(
    operation: Any, operands: Any, keywords: dict[str, Any], kind: type[Exception], message: str
) -> None:
    graph = ComputationalGraph()
    graph.input("x")
    with pytest.raises(kind, match=message):
        graph.gate(operation, *operands, **keywords)
    assert len(graph) == 1
    graph.forward(x=1)  # as if nothing had been said


def test_output_is_the_one_unused_gate_or_what_it_is_set_to() -> None:
    graph = ComputationalGraph()
    with pytest.raises(ValueError, match="the graph has no nodes"):
        graph.forward()
    x = graph.input("x")
    assert graph.output is x
    q, r = graph.gate("exp", x, name="q"), graph.gate("tanh", x, name="r")
    graph.input("unused")
    with pytest.raises(ValueError, match=r"2 nodes that nobody uses \(q, r\): .* graph\.output ="):
        graph.forward(x=0, unused=0)
    graph.output = r
    assert graph.forward(x=0, unused=0).item() == 0
    graph.output = "q"
    assert graph.output is q
    assert graph.forward(x=0, unused=0).item() == 1
    with pytest.raises(TypeError, match="output: node wants a node or a name, got int"):
        graph.output = 3  # type: ignore[assignment]
    with pytest.raises(KeyError, match="no node 'z'"):
        graph.output = "z"
    assert graph.output is q


# ---- forward and backward ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({"x": 1.0}, TypeError, "forward: missing y, z; the inputs of the graph are x, y, z"),
        ({**dict.fromkeys("xyzvw", 1.0)}, TypeError, "forward: unknown v, w; .* are x, y, z"),
        ({"x": [1.0], "y": 1.0, "z": 1.0}, TypeError, r"forward: x wants a torch.Tensor or a numb"),
        ({"x": True, "y": 1.0, "z": 1.0}, TypeError, "forward: x wants a number, got bool"),
        ({"x": torch.ones(2).int(), "y": 1.0, "z": 1.0}, TypeError, "x wants dtype .* got int32"),
        (
            {"x": torch.ones(2), "y": torch.ones(3), "z": 1.0},
            ValueError,
            r"q = add\(x, y\): add: a and b want shapes that broadcast, got \(2,\) and \(3,\)",
        ),
        (
            {"x": torch.ones(2), "y": 1.0, "z": torch.ones(2).double()},
            TypeError,
            r"f = multiply\(q, z\): multiply: b wants the dtype of a, float32, got float64",
        ),
    ],
)
def test_bad_inputs_are_refused(inputs: Any, kind: type[Exception], message: str) -> None:
    graph = product()
    graph.forward(x=1, y=2, z=3)
    with pytest.raises(kind, match=message):
        graph.forward(**inputs)


def test_a_failed_forward_leaves_nothing_to_go_back_from() -> None:
    graph = product()
    graph.forward(x=1, y=2, z=3)
    with pytest.raises(ValueError, match="want shapes that broadcast"):
        graph.forward(x=torch.ones(2), y=2, z=torch.ones(3))
    with pytest.raises(RuntimeError, match="backward: f has no value: run forward first"):
        graph.backward()


def test_backward_wants_a_forward_before() -> None:
    graph = product()
    with pytest.raises(RuntimeError, match="backward: x has no value: run forward first"):
        graph.backward()
    for node in graph:
        assert (node.value, node.grad, node.local, node.downstream) == (None,) * 4
    graph.forward(x=1, y=2, z=3)
    graph.gate("exp", "f")
    with pytest.raises(RuntimeError, match="backward: exp1 has no value"):
        graph.backward()


@pytest.mark.parametrize(
    ("grad_output", "kind", "message"),
    [
        (None, ValueError, r"grad_output wants shape \(2,\), that of f, got nothing"),
        (2.0, ValueError, r"grad_output wants shape \(2,\), that of f, got a number"),
        (torch.ones(3), ValueError, r"grad_output wants shape \(2,\), got \(3,\)"),
        (torch.ones(()), ValueError, r"grad_output wants shape \(2,\), got \(\)"),
        (
            torch.ones(2).double(),
            TypeError,
            "grad_output wants the dtype of f, float32, got float6",
        ),
        ([1.0, 1.0], TypeError, "grad_output wants a number, got list"),
    ],
)
def test_bad_grad_output_is_refused(grad_output: Any, kind: type[Exception], message: str) -> None:
    graph = product()
    graph.forward(x=torch.ones(2), y=2, z=3)
    with pytest.raises(kind, match=message):
        graph.backward(grad_output)


def test_one_element_of_any_shape_needs_no_grad_output() -> None:
    graph = product()
    graph.forward(x=torch.ones(1, 1), y=2, z=3)
    graph.backward()
    assert grad(graph["f"]).tolist() == [[1]]
    assert [grad(node).shape for node in graph.inputs] == [(1, 1), (), ()]


@EACH_DTYPE
def test_numbers_take_the_dtype_of_the_tensors(dtype: torch.dtype) -> None:
    graph = product()
    assert graph.forward(x=1, y=2, z=torch.ones(3, dtype=dtype)).dtype == dtype
    graph.backward(torch.ones(3, dtype=dtype))
    for node in graph:
        assert value(node).dtype == grad(node).dtype == dtype
        assert all(part.dtype == dtype for part in local(node) + downstream(node))


def test_without_tensors_numbers_take_torchs_default_dtype() -> None:
    graph = product()
    assert graph.forward(x=1, y=2, z=3).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert graph.forward(x=1, y=2, z=3).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_graph_is_its_own(mode: Callable[[], Any]) -> None:
    """It records no autograd graph, in any mode, and leaves its inputs as they are."""
    graph = product()
    with mode():
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        y, z = torch.nn.Parameter(torch.ones(2)), x * 2
        versions = None if x.is_inference() else [tensor._version for tensor in (x, y, z)]
        upstream = torch.ones(2, requires_grad=True)
        graph.forward(x=x, y=y, z=z)
        graph.backward(upstream)
        for node in graph:
            for tensor in (value(node), grad(node), *local(node), *downstream(node)):
                assert not tensor.requires_grad
                assert tensor.grad_fn is None
                assert type(tensor) is Tensor
    assert x.grad is y.grad is upstream.grad is None
    if versions is not None:
        assert versions == [tensor._version for tensor in (x, y, z)]
    assert torch.is_grad_enabled()


def test_inputs_may_change_after_forward_and_values_may_not() -> None:
    x = torch.tensor([1.0, 2.0])
    graph = ComputationalGraph.from_function(lambda x: x * x)
    graph.forward(x=x)
    x.zero_()
    graph.backward(torch.ones(2))
    assert grad(graph["x"]).tolist() == [2, 4]
    graph.forward(x=x).add_(1)
    with pytest.raises(RuntimeError, match="multiply1: its value was changed in place"):
        graph.backward(torch.ones(2))
    graph.forward(x=x)
    value(graph["x"]).add_(1)
    with pytest.raises(RuntimeError, match="x: its value was changed in place"):
        _ = graph["multiply1"].local


def test_gradients_of_different_nodes_are_different_tensors() -> None:
    graph = ran(lambda x, y: (x + y) + 1, x=1.0, y=2.0)
    places = {grad(node).data_ptr() for node in graph}
    assert len(places) == len(graph)


def test_listing() -> None:
    graph = ComputationalGraph.from_function(lambda x, w: TF.leaky_relu(x, 0.1) * w)
    assert str(graph["x"]) == "x"
    graph.forward(x=torch.tensor([1.0, -2.0]), w=torch.ones(3, 1))
    graph.backward(torch.ones(3, 2))
    assert str(graph).splitlines() == [
        "node                                                     value           grad",
        "x                                                      [1, -2]       [3, 0.3]",
        "w                                                float32[3, 1]  float32[3, 1]",
        "leaky_relu1 = leaky_relu(x, negative_slope=0.1)      [1, -0.2]         [3, 3]",
        "multiply1 = multiply(leaky_relu1, w)             float32[3, 2]  float32[3, 2]",
    ]
    assert repr(graph["leaky_relu1"]) == (
        "leaky_relu1 = leaky_relu(x, negative_slope=0.1)  value [1, -0.2]  grad [3, 3]"
    )
    assert re.fullmatch(r"node +value +grad", repr(ComputationalGraph()))


def test_nodes_are_hashable_and_no_tensor() -> None:
    graph = product()
    assert len({*graph.nodes, graph["x"]}) == len(graph) == 5
    assert not isinstance(graph["x"], Tensor)
