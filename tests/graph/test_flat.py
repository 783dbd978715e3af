"""torchbp.graph.flat: what is printed runs as it stands, and returns what autograd computes."""

from __future__ import annotations

import ast
import inspect
import keyword
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import torchbp
import torchbp.functional as F
from examples import flat_code as lecture
from tests.graph.cases import CASES, MODULES, M, rand, total
from torchbp.graph import Ledger, flat, trace
from torchbp.graph.flat import FlatCode, flat_code


def compiled(text: str) -> Callable[..., Any]:
    """The function that a text defines, with nothing but what it imports itself."""
    space: dict[str, Any] = {}
    exec(compile(text, "<flat>", "exec"), space)
    (function,) = (
        value
        for value in space.values()
        if inspect.isfunction(value) and value.__code__.co_filename == "<flat>"
    )
    return function  # type: ignore[no-any-return]


def check(
    fn: Callable[..., Any],
    *inputs: Any,
    tensors: tuple[Tensor, ...] = (),
    names: list[str] | None = None,
    tolerance: float = 1e-12,
) -> str:
    """Print a function, run the text, and compare with autograd; random upstream gradients.

    Args:
        tensors: the tensors that `fn` captured, in the order in which the text takes them; those
            of a module are found by name.
    """
    text = seeded(flat, fn, *inputs, names=names)
    function = compiled(text)
    parameters = inspect.signature(function).parameters
    upstream = [name for name, p in parameters.items() if p.default is None]

    theirs = tree_map_only(
        Tensor, lambda v: v.detach().clone().requires_grad_(v.is_floating_point()), inputs
    )
    arguments = [value for value in tree_leaves(theirs) if isinstance(value, Tensor)]
    count = len(parameters) - len(upstream)
    if isinstance(fn, M):
        held = {**dict(fn.named_parameters()), **dict(fn.named_buffers())}
        named = {flat_name(name): value for name, value in held.items()}
        tensors = tuple(named[name] for name in list(parameters)[len(arguments) : count])
    arguments += tensors
    assert len(arguments) == count
    ours = [value.detach().clone() for value in arguments]

    output = seeded(fn, *tree_map_only(Tensor, torch.clone, theirs))
    outputs = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
    roots = [value for value in outputs if value.requires_grad]
    grads = [
        rand(*root.shape).to(root.dtype) if upstream else torch.ones_like(root) for root in roots
    ]
    leaves = [value for value in arguments if value.requires_grad]
    wanted = torch.autograd.grad(roots, leaves, grads, allow_unused=True)

    before = [value.clone() for value in ours]
    given = dict(zip(upstream, grads, strict=True)) if upstream else {}
    got = seeded(function, *ours, **given)
    reached = [value.detach() for value in outputs] + [grad for grad in wanted if grad is not None]
    torch.testing.assert_close(list(got), reached, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(ours, before, rtol=0, atol=0)  # nothing is changed in place
    return text


def seeded(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    return fn(*args, **kwargs)


def flat_name(name: str) -> str:
    """What the text calls a parameter."""
    name = name.replace(".", "_")
    return f"layer{name}" if name[0].isdigit() else name


def body(text: str) -> list[str]:
    """The lines between `def` and `return`, without comments and empty lines."""
    lines = (line.partition("#")[0].strip() for line in text.split("def ", 1)[1].splitlines()[1:])
    return [line for line in lines if line and not line.startswith(("return", ")"))]


# ---- every function and module that trace knows --------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_function(name: str) -> None:
    fn, inputs = CASES[name]
    # float32 inside one of them; elsewhere the same formulas in another order of operations.
    check(fn, *inputs(), tolerance=1e-6 if name == "float32 inside" else 1e-11)


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    make, shape = MODULES[name]
    check(make().double(), rand(*shape), tolerance=1e-11)


# ---- the lecture ---------------------------------------------------------------------------------


def neuron(w0: Tensor, x0: Tensor, w1: Tensor, x1: Tensor, w2: Tensor) -> Tensor:
    s0 = w0 * x0
    s1 = w1 * x1
    s2 = s0 + s1
    s3 = s2 + w2
    L = F.sigmoid(s3)
    return L


NEURON = """\
import torch


def neuron(w0, x0, w1, x1, w2):
    # Forward pass: compute output
    s0 = w0 * x0
    s1 = w1 * x1
    s2 = s0 + s1
    s3 = s2 + w2
    L = torch.sigmoid(s3)

    # Backward pass: compute grads
    grad_L = 1.0
    grad_s3 = grad_L * (1 - L) * L
    grad_w2 = grad_s3
    grad_s2 = grad_s3
    grad_s0 = grad_s2
    grad_s1 = grad_s2
    grad_w1 = grad_s1 * x1
    grad_x1 = grad_s1 * w1
    grad_w0 = grad_s0 * x0
    grad_x0 = grad_s0 * w0

    return L, grad_w0, grad_x0, grad_w1, grad_x1, grad_w2
"""


@pytest.mark.parametrize("sigmoid", [F.sigmoid, torch.sigmoid])
def test_the_sigmoid_neuron_is_the_lectures(
    sigmoid: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifteen lines of the slide, `sigmoid` being PyTorch's; and its numbers."""
    monkeypatch.setattr(F, "sigmoid", sigmoid)
    inputs = [torch.tensor(v, dtype=torch.float64) for v in lecture.INPUTS.values()]
    text = check(neuron, *inputs)
    assert text == NEURON
    assert body(text) == [
        line.replace("sigmoid(", "torch.sigmoid(")
        for line in body(inspect.getsource(lecture.f).replace('"""', "#"))
        if (" = " in line and not line.startswith("L =")) or line.startswith("L = ")
    ]
    _, *grads = compiled(text)(*inputs)
    assert [round(grad.item(), 4) for grad in grads] == [-0.1966, 0.3932, -0.3932, -0.5898, 0.1966]


def test_the_lectures_first_graph() -> None:
    text = check(lambda x, y, z: (x + y) * z, *torch.tensor([-2.0, 5, -4], dtype=torch.float64))
    assert body(text) == [
        "add1 = x + y",
        "L = add1 * z",
        "grad_L = 1.0",
        "grad_z = grad_L * add1",
        "grad_add1 = grad_L * z",
        "grad_x = grad_add1",
        "grad_y = grad_add1",
    ]


def two_layer_net(x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    z1 = TF.linear(x, w1, b1)
    h1 = torch.relu(z1)
    scores = TF.linear(h1, w2, b2)
    data_loss = TF.cross_entropy(scores, y)
    penalty = F.l2_penalty([w1, w2])
    reg = 0.1 * penalty
    loss = data_loss + reg
    return loss


TWO_LAYERS = """\
import torch
import torch.nn.functional as F


def two_layer_net(x, y, w1, b1, w2, b2):
    # x: [5, 4], y: [5] int64, w1: [6, 4], b1: [6], w2: [3, 6], b2: [3]
    # Forward pass: compute output
    z1 = F.linear(x, w1, b1)  # [5, 6]
    h1 = torch.relu(z1)  # [5, 6]
    scores = F.linear(h1, w2, b2)  # [5, 3]
    data_loss = F.cross_entropy(scores, y)
    penalty = (w1 * w1).sum() + (w2 * w2).sum()
    reg = penalty * 0.1
    loss = data_loss + reg

    # Backward pass: compute grads
    grad_loss = 1.0
    grad_data_loss = grad_loss
    grad_reg = grad_loss
    grad_penalty = grad_reg * 0.1
    grad_w1 = grad_penalty * 2 * w1  # [6, 4]
    grad_w2 = grad_penalty * 2 * w2  # [3, 6]
    grad_scores = grad_data_loss * (F.softmax(scores, 1) - F.one_hot(y, 3)) / len(scores)  # [5, 3]
    grad_w2 += grad_scores.T @ h1  # [3, 6]
    grad_b2 = grad_scores.sum(0)  # [3]
    grad_h1 = grad_scores @ w2  # [5, 6]
    grad_z1 = torch.where(h1 <= 0, 0, grad_h1)  # [5, 6]
    grad_x = grad_z1 @ w1  # [5, 4]
    grad_w1 += grad_z1.T @ x  # [6, 4]
    grad_b1 = grad_z1.sum(0)  # [6]

    return loss, grad_x, grad_w1, grad_b1, grad_w2, grad_b2
"""


def network() -> tuple[Tensor, ...]:
    classes = torch.tensor([0, 2, 1, 1, 0])
    return rand(5, 4), classes, rand(6, 4), rand(6), rand(3, 6), rand(3)


def test_a_two_layer_network_reads_as_one_would_write_it() -> None:
    assert check(two_layer_net, *network()) == TWO_LAYERS


def test_matmul_and_broadcasting() -> None:
    def layer(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        s1 = x @ w1
        h1 = s1 + b1
        return h1

    lines = body(check(layer, rand(5, 4), rand(4, 3), rand(3)))
    for line in ("grad_b1 = grad_h1.sum(0)", "grad_w1 = x.T @ grad_s1", "grad_x = grad_s1 @ w1.T"):
        assert line in lines


# ---- names ---------------------------------------------------------------------------------------


def test_parameters_are_arguments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 3)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc1(x)
            hidden = self.norm(hidden)
            return hidden.relu()

    model = Net().double().eval()
    text = check(model, rand(5, 4))
    (signature,) = (line for line in text.splitlines() if line.startswith("def "))
    assert signature == "def net("
    function = compiled(text)
    assert list(inspect.signature(function).parameters) == [
        "x", "fc1_weight", "fc1_bias", "norm_running_mean", "norm_running_var", "norm_weight",
        "norm_bias", "grad_y",
    ]  # fmt: skip
    assert "hidden2 = F.batch_norm(hidden, " in text


def test_captured_numbers_are_written_and_tensors_are_arguments() -> None:
    number, matrix = 2.5, rand(3, 3)
    weight = nn.Parameter(rand(3, 3))
    text = check(
        lambda x: (x @ weight @ matrix * number).sum(), rand(2, 3), tensors=(weight, matrix)
    )
    assert "def f(x, weight, matrix):" in text
    assert "* 2.5" in text
    assert "return L, grad_x, grad_weight" in text


def test_a_variable_that_is_used_again_is_numbered() -> None:
    def loop(x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x)
        return x.sum()

    lines = body(check(loop, rand(3)))
    assert lines[:3] == ["x2 = torch.tanh(x)", "x3 = torch.tanh(x2)", "x4 = torch.tanh(x3)"]


@pytest.mark.parametrize(
    "names",
    [
        ["lambda", "torch", "F"],
        ["grad_x", "x", "grad_L"],
        ["x", "grad_x", "grad_grad_x"],
        ["mul1", "mul2", "sum1"],
        ["len", "float", "L"],
        ["a b", "a.b", "a[b]"],
        ["0.weight", "", "§"],
    ],
)
def test_names_never_clash(names: list[str]) -> None:
    text = check(lambda a, b, c: (a * b * c + a).sum(), rand(3), rand(3), rand(3), names=names)
    assigned = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)]
    arguments = [n.arg for n in ast.walk(ast.parse(text)) if isinstance(n, ast.arg)]
    for name in [*(n.id for n in assigned), *arguments]:
        assert name.isidentifier()
        assert not keyword.iskeyword(name)
    assert len(set(arguments)) == 3


# ---- what the code is made of --------------------------------------------------------------------


def test_shapes_are_comments() -> None:
    for line in flat(two_layer_net, *network()).splitlines():
        name = line.strip().partition(" = ")[0]
        if name in ("z1", "h1", "grad_z1", "grad_h1"):
            assert line.endswith("  # [5, 6]")


def test_several_outputs_have_an_upstream_gradient_each() -> None:
    def fn(x: Tensor) -> dict[str, Tensor]:
        double = 2 * x
        total = double.sum()
        return {"double": double, "total": total, "count": torch.tensor(3)}

    text = check(fn, rand(3))
    function = compiled(text)
    assert list(inspect.signature(function).parameters) == ["x", "grad_double", "grad_total"]
    x = rand(3)
    double, total, count, grad_x = function(x)  # ones, where none are given
    torch.testing.assert_close((double, total, count), (2 * x, 2 * x.sum(), torch.tensor(3)))
    assert grad_x.tolist() == [4, 4, 4]


def test_an_output_that_is_not_differentiated() -> None:
    ledger = trace(lambda x, y: (x * 2, y * 3), rand(3), rand(3), grad_output=[torch.ones(3), None])
    function = compiled(flat_code(ledger).text)
    assert list(inspect.signature(function).parameters) == ["x", "y", "grad_y2"]
    assert len(function(rand(3), rand(3))) == 3


def test_an_input_that_does_not_reach_the_output_has_no_gradient() -> None:
    check(lambda x, y: torch.broadcast_tensors(x, y)[0] * 2, rand(3), rand(2, 1))
    text = check(lambda x, y: x * 2, rand(3), rand(3))
    assert text.rstrip().endswith("return y2, grad_x")


def test_dropout_draws_its_mask() -> None:
    text = check(lambda x: TF.dropout(x, 0.25).sum(), rand(20))
    assert "mask1 = F.dropout(torch.ones_like(x), 0.25)" in text
    assert "grad_x = grad_dropout1 * mask1" in text


def test_random_operations_without_a_rule_draw_once() -> None:
    check(lambda x: TF.rrelu(x, training=True), rand(30))
    check(lambda x: TF.dropout2d(x, 0.5), rand(4, 5, 2, 2))
    attention = TF.scaled_dot_product_attention
    check(lambda q, k, v: attention(q, k, v, dropout_p=0.5), *(rand(2, 4, 3) for _ in range(3)))


def test_accumulation_is_in_place_only_in_a_tensor_of_its_own() -> None:
    lines = body(check(lambda x: x + x * 3, rand(3)))
    assert "grad_x = grad_y" in lines
    assert lines[-1] == "grad_x = grad_x + grad_mul1 * 3"
    lines = body(check(lambda x: x * 3 + x.exp(), rand(3)))
    assert "grad_x = grad_exp1 * exp1" in lines
    assert lines[-1] == "grad_x += grad_mul1 * 3"


def test_changes_in_place_are_written_out() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.clone()
        row, column = y[1], y[:, 0]
        row.mul_(column.clone())
        y[0, 1:] = row[1:].clone() * 2
        y.t().add_(1)
        return y.exp() * row * column.unsqueeze(1)

    check(fn, rand(3, 3), tolerance=1e-10)


def test_tensors_without_gradient_that_are_changed_through_views() -> None:
    def fn(x: Tensor) -> Tensor:
        mask = torch.zeros(3, 3, dtype=torch.float64)
        mask[0] = 1
        row = mask[1]
        row.fill_(5)
        mask.fill_diagonal_(2)
        return (x * mask * row).sum()

    check(fn, rand(3, 3))


def test_in_place_by_an_argument() -> None:
    lines = body(check(lambda x: nn.ReLU(inplace=True)(x * 2) + nn.ELU(0.5, True)(x + 1), rand(9)))
    assert lines[:5] == [
        "mul1 = x * 2",
        "relu1 = F.relu(mul1)",
        "add1 = x + 1",
        "elu1 = F.elu(add1, 0.5)",
        "y = relu1 + elu1",
    ]
    check(nn.Dropout(0.5, inplace=True), rand(9))


def test_an_input_that_is_changed_in_place() -> None:
    text = check(lambda x: x.mul_(3).square().sum(), rand(3))
    assert "x2 = x * 3" in text


def test_without_grad_and_detached() -> None:
    def fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.relu(F.linear(x, x, activation="tanh"))
        return (x * target * x.detach() * x.data).sum()

    check(fn, rand(3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types(dtype: torch.dtype) -> None:
    """The same formulas with a rounding after each: a few units in the last place of the type."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return TF.gelu(torch.tanh(x @ w)) * torch.sigmoid(x) + x.float().exp().to(dtype)

    x, w = (torch.linspace(-1, 1, 16).view(4, 4).to(dtype) for _ in range(2))
    check(fn, x, w, tolerance=8 * torch.finfo(dtype).eps)


def test_mixed_types() -> None:
    check(lambda x, i: (x.float() * i + x).sum(), rand(3), torch.tensor([1, 2, 3]), tolerance=1e-6)
    check(lambda x, s: x.float() * s, rand(3), rand(), tolerance=1e-6)


LOSSES: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weight": {"weight": torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)},
    "smoothing": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 1},
    "nothing ignored": {"ignore_index": -1},
}


@pytest.mark.parametrize("loss", [TF.cross_entropy, F.cross_entropy])
@pytest.mark.parametrize("kind", LOSSES)
def test_cross_entropy(kind: str, loss: Callable[..., Tensor]) -> None:
    options = LOSSES[kind]
    tensors = tuple(value for value in options.values() if isinstance(value, Tensor))
    target = torch.tensor([0, 3, 1, 2, 2])
    check(lambda x, t: loss(x, t, **options), rand(5, 4), target, tensors=tensors)


def test_cross_entropy_of_probabilities_and_of_images() -> None:
    check(TF.cross_entropy, rand(5, 4), rand(5, 4).softmax(1))
    check(lambda x, t: TF.cross_entropy(x, t), rand(2, 4, 3), torch.ones(2, 3).long())
    check(lambda x, t: TF.cross_entropy(x, t), rand(5, 4), torch.tensor([0, -100, 1, 1, 2]))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[torch.tensor([0, 0, 1])].sin(),
        lambda x: x[x > 0].sin(),
        lambda x: x[:, [1, 0]].sin() * x[-1, ..., None, 0],
        lambda x: x.sum((0, 1)) + x.mean((0,)) + x.sum(1, keepdim=True),
        lambda x: 2**x + x**2 - x**-1 + (-2.0) ** torch.tensor(2.0) * x**0.5 + 1 - x + x**0,
        lambda x: torch.where(x > 1, x, 2.0) + x.clamp(max=1) + x.masked_fill(x > 1, 0.0),
        lambda x: x.select(1, 2) * x.narrow(1, 0, 1).squeeze() * x.unbind(1)[0],
        lambda x: torch.maximum(x, x.flip(0)) * torch.min(x) + x.amax(1, keepdim=True),
        lambda x: x.movedim(0, 1) @ x.permute(0, 1) @ x.mT @ x.transpose(0, 1).contiguous(),
        lambda x: torch.addmm(x, x, x.T, beta=2, alpha=3) if len(x) == 4 else x.norm() + x.var(),
        lambda x: x.expand(2, 4, 4).mul(torch.arange(4)).std() + x.prod(),
        lambda x: x.reshape(2, 8).split([3, 5], 1)[1].cumsum(0).logsumexp(0),
        lambda x: TF.softplus(x * 30) + TF.hardtanh(x, -0.5, 1.5) + TF.gelu(x, approximate="tanh"),
        lambda x: torch.stack(list(x), 1).tril(1).roll(1, 0).triu(),
        lambda x: torch.sort(x, 1, descending=True).values + torch.topk(x, 4)[0],
        lambda x: x @ x[0] + x[0] @ x + (x[0] @ x[1]) * torch.outer(x[0], x[1])[0],
        lambda x: x.view(2, 2, 4) @ x.view(2, 4, 2) @ x.view(2, 2, 4)[0],
        lambda x: x.double().type(torch.float32).to(torch.float64).half().to(x) * x,
        lambda x: torch.add(x, x, alpha=3) - torch.sub(x, 2.0, alpha=0.5) + torch.rsub(x, x),
        lambda x: torch.ops.aten.sin(x) + torch.special.expit(x) + torch.fmax(x, x.T),
    ],
)
def test_ways_of_writing(fn: Callable[[Tensor], Tensor]) -> None:
    check(fn, rand(4, 4).abs() + 0.5, tolerance=1e-10)


# ---- custom Functions ----------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The older form, with a wrong gradient that is to be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return 3 * ctx.factor * grad, None


class SumAndProduct(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.size = inputs[0].square().sum()  # no gate

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, grad_product: Tensor) -> Any:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return grad_sum + y * grad_product, grad_sum + x * grad_product


def test_custom_functions_are_imported() -> None:
    def old(x: Tensor) -> Tensor:
        return Scaled.apply(Scaled.apply(x, 2.0), 5.0)  # type: ignore[no-untyped-call, no-any-return]

    text = check(old, rand(3))
    assert f"from {__name__} import Scaled\n" in text

    def new(x: Tensor, y: Tensor) -> Tensor:
        total, product = SumAndProduct.apply(x, y)  # type: ignore[no-untyped-call]
        return total.exp() * product

    assert "(total, product), vjp1 = torch.func.vjp(" in check(new, rand(3), rand(3))
    check(lambda x, y: SumAndProduct.apply(x, y)[1], rand(3), rand(3))  # type: ignore[no-untyped-call]


def test_names_of_functions_are_free() -> None:
    def torch(scaled: Tensor, Scaled_: Tensor) -> Tensor:
        Scaled_2 = Scaled.apply(scaled * Scaled_, 2.0)  # type: ignore[no-untyped-call]
        return Scaled_2  # type: ignore[no-any-return]

    assert "def f(" in check(torch, rand(3), rand(3))
    check(lambda a, b: Scaled.apply(a * b, 2.0), rand(3), rand(3), names=["Scaled", "F"])  # type: ignore[no-untyped-call]


def test_torchbp_is_written_as_what_it_computes() -> None:
    model = torchbp.nn.MLP([4, 6, 3], activation="leaky_relu").double()
    lines = body(check(model, rand(5, 4)))
    assert lines[:3] == [
        "z = F.linear(input, layer0_weight, layer0_bias)",
        "h = F.leaky_relu(z)",
        "y = F.linear(h, layer2_weight, layer2_bias)",
    ]


def test_a_frozen_first_layer_has_no_gradient() -> None:
    model = torchbp.nn.MLP([4, 6, 3]).double()
    model[0].requires_grad_(False)
    x = rand(5, 4)
    first, last = ([layer.weight, layer.bias] for layer in (model[0], model[2]))
    tensors = (x, first[0], last[0], first[1], last[1])
    lines = body(check(lambda: model(x), tensors=tensors))
    assert not [line for line in lines if line.startswith(("grad_h", "grad_z"))]


# ---- lines and nodes -----------------------------------------------------------------------------


def code(ledger: Ledger) -> FlatCode:
    made = flat_code(ledger)
    assert made.text == "".join(f"{text}\n" for text, _, _ in made.lines)
    assert all("\n" not in text for text, _, _ in made.lines)
    return made


def test_each_line_says_which_node_it_belongs_to() -> None:
    ledger = trace(two_layer_net, *network())
    made = code(ledger)
    assert made.text == TWO_LAYERS
    found = {
        (node, direction): text.strip().partition(" = ")[0].partition(" +=")[0]
        for text, node, direction in made.lines
        if node is not None
    }
    for node in ledger.nodes:
        if node.kind == "gate":
            assert (node.name, "forward") in found
            assert (node.name, "backward") in found
    assert found["relu1", "forward"] == "h1"
    assert found["relu1", "backward"] == "grad_z1"
    assert found["linear1", "backward"] == "grad_b1"


@pytest.mark.parametrize(
    "name", ["in place through a view", "torch.unbind", "torch.max with its index", "torchbp.mlp",
             "torchbp.maxout", "torchbp.l2_penalty", "F.sdpa", "F.dropout", "torch.getitem"]
)  # fmt: skip
def test_each_gate_that_has_a_gradient_has_its_lines(name: str) -> None:
    fn, inputs = CASES[name]
    ledger = trace(lambda *args: total(fn(*args)), *inputs())
    found = {(node, direction) for _, node, direction in code(ledger).lines}
    for node in ledger.nodes:
        if node.kind == "gate" and any(u is not None for u in node.upstreams):
            assert (node.name, "forward") in found
            if any(edge.product is not None for edge in ledger.operands(node)):
                assert (node.name, "backward") in found


# ---- bad input -----------------------------------------------------------------------------------


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return x @ x


def gradient(x: Tensor) -> Tensor:
    return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]


def hidden(x: Tensor) -> Tensor:
    class Local(Scaled):
        pass

    return Local.apply(x, 2.0)  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flat(3, rand(3)), TypeError, "flat: fn wants a function or module, got int"),  # type: ignore[arg-type]
        (lambda: flat(lambda x: x > 0, rand(3)), ValueError, "flat: fn wants an output that"),
        (lambda: flat(torch.exp, rand(3), names=["a", "b"]), TypeError, "flat: names wants 1 str"),
        (lambda: flat(hidden, rand(3)), RuntimeError, "Local1 cannot.* no Local to import"),
        (lambda: flat(lambda x: torch.linalg.qr(x, "complete")[0], rand(4, 2)), RuntimeError,
         "flat: autograd cannot differentiate"),
        (lambda: flat(lambda x: x * torch.rand(3, generator=torch.Generator()), rand(3)),
         RuntimeError, "the gate rand1 cannot .*Generator"),
        (lambda: flat(autocast, rand(3, 3)), RuntimeError, "gate matmul1 .* autocast is on"),
        (lambda: flat(gradient, rand(3)), RuntimeError, "the call that made it was not seen"),
        (lambda: flat_code(Ledger([], [], {}, [])), RuntimeError, "does not hold the calls"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 4, requires_grad=True)
    kept, state = x.detach().clone(), torch.get_rng_state()
    flat(model, x)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


# ---- random graphs -------------------------------------------------------------------------------

SHAPES = [(), (3,), (2, 3), (2, 1), (1, 3)]
UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.sin, torch.tanh, torch.sigmoid, F.relu, lambda v: v * 0.5, lambda v: 1 - v,
    lambda v: v.sum(), lambda v: v.mean(-1, keepdim=True) if v.dim() else v, lambda v: v.square(),
    lambda v: v.reshape(-1)[:1], lambda v: v.detach(), lambda v: v.clone().mul_(2), torch.neg,
]  # fmt: skip
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.sub, torch.mul, torch.maximum, F.multiply, torch.minimum,
    lambda a, b: a / (b * b + 1), lambda a, b: torch.where(a > b, a, b),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    """Values used any number of times, broadcast, and combined at random."""
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    steps = [
        (data.draw(st.sampled_from([*UNARY, *BINARY])), data.draw(st.integers(0, 99)),
         data.draw(st.integers(0, 99)))
        for _ in range(data.draw(st.integers(1, 12)))
    ]  # fmt: skip

    def fn(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for operation, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(operation(a, b) if operation in BINARY else operation(a))  # type: ignore[operator, arg-type, call-arg]
        return values[-1], sum(value.sum() for value in values)  # type: ignore[return-value]

    torch.manual_seed(0)
    check(fn, *(rand(*shape) for shape in shapes), tolerance=1e-9)


WAYS: list[Callable[[Tensor, Tensor, int], Tensor | None]] = [
    lambda a, b, k: a[k % 3],
    lambda a, b, k: a[..., k % 3],
    lambda a, b, k: a[k % 2 :],
    lambda a, b, k: a.t(),
    lambda a, b, k: a.view(-1),
    lambda a, b, k: a * 2,
    lambda a, b, k: a.detach().clone(),
    lambda a, b, k: nothing(a.mul_(0.5)),
    lambda a, b, k: nothing(a.add_(b.sum() * 0.1)),
    lambda a, b, k: nothing(a.copy_(b.clone())),
    lambda a, b, k: nothing(a.fill_(0.25 * (k % 5))),
    lambda a, b, k: nothing(a.sigmoid_()),
    lambda a, b, k: a.__setitem__(k % 3, 0.3),
    lambda a, b, k: a.__setitem__((..., k % 3), b.mean().clone()),
]


def nothing(value: Any) -> None:
    """For a change in place, whose result is not used."""


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(WAYS), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
        max_size=8,
    ),
)
def test_random_changes_of_shared_memory(
    differentiable: bool, steps: list[tuple[Callable[..., Tensor | None], int, int, int]]
) -> None:
    """Views of one tensor, with or without a gradient, written to in any order."""

    def fn(x: Tensor) -> Tensor:
        base = x.clone() if differentiable else torch.arange(9.0, dtype=x.dtype).view(3, 3) / 10
        values = [base]
        for way, i, j, k in steps:
            try:
                made = way(values[i % len(values)], values[j % len(values)], k)
            except (IndexError, RuntimeError) as error:  # of a shape that this cannot be done with
                if "leaf Variable" in str(error):  # which only autograd minds: the text would go on
                    raise
                continue
            values += [] if made is None else [made]
        return sum((v * (i + 1)).sum() for i, v in enumerate(values)) * (x * base).sum()

    torch.manual_seed(0)
    x = rand(3, 3).requires_grad_()
    try:
        torch.autograd.grad(fn(x), x)
    except RuntimeError:
        assume(False)  # autograd has lost a value that it needs
    check(fn, x.detach(), tolerance=1e-9)
