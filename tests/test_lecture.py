"""The lecture's numbers, computed by torchbp.

Each test is named after what it shows, and its docstring is the lecture's statement (Neural
Networks and Backpropagation, Fundamentals of Data Science, 2023), with the error where it prints a
wrong number. Values that the lecture rounds to two decimals are compared after the same rounding.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchbp
from examples import flat_code
from torchbp import functional as F
from torchbp.functions import Multiply

ROOT = Path(__file__).parents[1]


def leaf(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor that requires grad."""
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def retained(tensor: Tensor) -> Tensor:
    """The same node of the graph, which keeps its gradient."""
    tensor.retain_grad()
    return tensor


def gradient(tensor: Tensor) -> Tensor:
    """The gradient that a node received."""
    assert tensor.grad is not None
    return tensor.grad


def two_decimals(values: Tensor) -> list[float]:
    # + 0.0 makes -0.0 a plain 0.0, as on the slides.
    return [round(value, 2) + 0.0 for value in values.flatten().tolist()]


# ---- the softmax classifier ----------------------------------------------------------------------


def test_softmax_turns_scores_into_probabilities() -> None:
    """Scores 3.2, 5.1, -1.7: exp gives 24.5, 164.0, 0.18; normalised 0.13, 0.87, 0.00."""
    scores = leaf([3.2, 5.1, -1.7])
    unnormalised = F.exp(scores)
    assert [f"{value:.3g}" for value in unnormalised.tolist()] == ["24.5", "164", "0.183"]
    probabilities = F.multiply(unnormalised, F.reciprocal(unnormalised.sum()))
    assert two_decimals(probabilities) == [0.13, 0.87, 0.00]
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-15)


def test_softmax_loss_is_minus_the_log_of_the_right_class() -> None:
    """L_i = -log P(Y = y_i | X = x_i) = -log(0.13) = 2.04 for the cat."""
    scores = leaf([[3.2, 5.1, -1.7]])
    loss = F.cross_entropy(scores, torch.tensor([0]))
    exact = math.log(math.exp(3.2) + math.exp(5.1) + math.exp(-1.7)) - 3.2
    assert loss.item() == pytest.approx(exact, abs=1e-15)
    assert f"{loss.item():.2f}" == "2.04"
    loss.backward()  # the probabilities compared with the correct ones, 1, 0, 0
    assert two_decimals(gradient(scores)) == [-0.87, 0.87, 0.00]


def test_softmax_loss_compares_with_the_correct_probabilities() -> None:
    """The correct probabilities are 1.00, 0.00, 0.00: their cross-entropy is the same loss."""
    scores = torch.tensor([[3.2, 5.1, -1.7]], dtype=torch.float64)
    correct = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    of_index = F.cross_entropy(scores, torch.tensor([0]))
    torch.testing.assert_close(F.cross_entropy(scores, correct), of_index, rtol=0, atol=1e-15)


# ---- regularisation, the full loss, gradient descent ---------------------------------------------


def test_l2_regularisation_prefers_spread_out_weights() -> None:
    """x = [1, 1, 1, 1]; w1 = [1, 0, 0, 0], w2 = [.25, .25, .25, .25]; w.x = 1; R = 1 and 0.25.

    R(W) is the sum of squares, without a factor 1/2: dR/dW = 2 W.
    """
    x = torch.ones(4, 1)
    spiky, spread = leaf([[1.0, 0, 0, 0]], torch.float32), leaf([[0.25] * 4], torch.float32)
    assert F.matmul(spiky, x).item() == F.matmul(spread, x).item() == 1
    assert F.l2_penalty([spiky]).item() == 1
    assert F.l2_penalty([spread]).item() == 0.25
    F.l2_penalty([spiky, spread]).backward()
    torch.testing.assert_close(gradient(spiky), 2 * spiky.detach(), rtol=0, atol=0)
    torch.testing.assert_close(gradient(spread), 2 * spread.detach(), rtol=0, atol=0)


def classification(n: int = 12, features: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    """A small data set: points x [n, features] and classes y [n]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def test_full_loss_is_the_data_loss_plus_lambda_times_the_penalty() -> None:
    """L = 1/N sum of L_i + lambda sum of W_k^2."""
    x, y = classification()
    w = leaf(torch.linspace(-1, 1, 12).view(3, 4).tolist())
    lam = 0.1
    loss = F.cross_entropy(F.linear(x, w), y) + lam * F.l2_penalty([w])

    rows = w.tolist()
    scores = [[sum(a * b for a, b in zip(p, row, strict=True)) for row in rows] for p in x.tolist()]
    losses = [
        math.log(sum(math.exp(s) for s in row)) - row[label]
        for row, label in zip(scores, y.tolist(), strict=True)
    ]
    penalty = sum(value * value for row in rows for value in row)
    # 12 losses of about 1, each a dozen operations in float64.
    assert loss.item() == pytest.approx(sum(losses) / len(losses) + lam * penalty, rel=1e-14)


def test_vanilla_gradient_descent_decreases_the_loss_at_every_step() -> None:
    """while True: weights_grad = evaluate_gradient(...); weights += -step_size * weights_grad."""
    x, y = classification()
    weights = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    step_size, losses = 0.1, []
    for _ in range(50):
        loss = F.cross_entropy(F.linear(x, weights), y) + 0.01 * F.l2_penalty([weights])
        (weights_grad,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights += -step_size * weights_grad  # perform parameter update
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3))  # three classes, zero weights
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_weight_decay_of_twice_lambda_is_the_lectures_penalty() -> None:
    """lambda R(W) adds 2 lambda W to the gradient, which SGD's weight_decay = 2 lambda adds too."""
    x, y = classification()
    lam, start = 0.05, torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    in_loss, in_optimizer = start.clone().requires_grad_(), start.clone().requires_grad_()
    with_penalty = torch.optim.SGD([in_loss], lr=0.1, momentum=0.9)
    with_decay = torch.optim.SGD([in_optimizer], lr=0.1, momentum=0.9, weight_decay=2 * lam)
    for _ in range(20):
        with_penalty.zero_grad()
        with_decay.zero_grad()
        loss = F.cross_entropy(F.linear(x, in_loss), y) + lam * F.l2_penalty([in_loss])
        loss.backward()
        F.cross_entropy(F.linear(x, in_optimizer), y).backward()
        with_penalty.step()
        with_decay.step()
    assert (in_loss - start).abs().max() > 0.1
    torch.testing.assert_close(in_loss, in_optimizer, rtol=1e-12, atol=1e-14)


def test_two_layer_loss_with_both_penalties_has_right_gradients() -> None:
    """L = 1/N sum of L_i + lambda R(W1) + lambda R(W2), s = W2 max(0, W1 x).

    If we can compute dL/dW1 and dL/dW2 then we can learn W1 and W2.
    """
    x, y = classification()
    generator = torch.Generator().manual_seed(1)
    w1 = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    w2 = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    # The central difference moves a hidden unit by up to 1e-6 |x|: no unit may cross its kink.
    assert (x @ w1.T).abs().min() > 1e-3

    def by_layers(w1: Tensor, w2: Tensor) -> Tensor:
        scores = F.linear(F.linear(x, w1, activation="relu"), w2)
        return F.cross_entropy(scores, y) + 0.1 * F.l2_penalty([w1]) + 0.1 * F.l2_penalty([w2])

    def by_gates(w1: Tensor, w2: Tensor) -> Tensor:
        scores = F.matmul(F.relu(F.matmul(x, w1.mT)), w2.mT)
        return F.cross_entropy(scores, y) + 0.1 * F.l2_penalty([w1]) + 0.1 * F.l2_penalty([w2])

    def as_one(w1: Tensor, w2: Tensor) -> Tensor:
        return F.cross_entropy(F.mlp(x, [w1, w2]), y) + 0.1 * F.l2_penalty([w1, w2])

    for loss in (by_layers, by_gates, as_one):
        assert torch.autograd.gradcheck(loss, (w1, w2)), loss.__name__

    scores = torch.relu(x @ w1.T) @ w2.T
    reference = torch.nn.functional.cross_entropy(scores, y)
    reference = reference + 0.1 * (w1.square().sum() + w2.square().sum())
    expected = torch.autograd.grad(reference, (w1, w2))
    for loss in (by_layers, by_gates, as_one):
        got = torch.autograd.grad(loss(w1, w2), (w1, w2))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


# ---- backpropagation on scalars ------------------------------------------------------------------


def test_gradients_of_the_simple_example_node_by_node() -> None:
    """f(x, y, z) = (x + y) z at x = -2, y = 5, z = -4: upstream gradient times local gradient."""
    x, y, z = leaf(-2.0), leaf(5.0), leaf(-4.0)
    q = retained(F.add(x, y))
    f = retained(F.multiply(q, z))
    assert (q.item(), f.item()) == (3, -12)
    f.backward()
    assert gradient(f) == 1  # the base case, df/df
    assert gradient(q) == gradient(f) * z == -4  # df/dq = z
    assert gradient(z) == gradient(f) * q == 3  # df/dz = q
    assert gradient(x) == gradient(q) * 1 == -4  # dq/dx = 1
    assert gradient(y) == gradient(q) * 1 == -4  # dq/dy = 1


#: Another example: w = [2, -3, -3], x = [-1, -2].
W0, X0, W1, X1, W2 = 2.0, -1.0, -3.0, -2.0, -3.0
SIGMA = 1 / (1 + math.exp(-1))  # 0.73: w0 x0 + w1 x1 + w2 is 1


def test_gradients_of_the_neuron() -> None:
    """f = 1 / (1 + exp(-(w0 x0 + w1 x1 + w2))) = 0.73; x0: 0.2 x 2 = 0.4, w0: 0.2 x -1 = -0.2.

    The lecture rounds the upstream gradient to 0.2 first, so that its 0.4 is 0.3932. Two of its
    slides print w2 x2; w2 is a bias, as on the others and in its flat code.
    """
    w0, x0, w1, x1, w2 = (leaf(value) for value in (W0, X0, W1, X1, W2))
    s2 = retained(F.add(retained(F.multiply(w0, x0)), retained(F.multiply(w1, x1))))
    s3 = retained(F.add(s2, w2))
    f = F.sigmoid(s3)
    assert f"{f.item():.2f}" == "0.73"
    f.backward()
    assert f"{gradient(s3).item():.1f}" == f"{gradient(s2).item():.1f}" == "0.2"
    exact = {"x0": 0.3932, "w0": -0.1966, "w1": -0.3932, "x1": -0.5898, "w2": 0.1966}
    got = {"x0": x0, "w0": w0, "w1": w1, "x1": x1, "w2": w2}
    assert {name: round(gradient(tensor).item(), 4) for name, tensor in got.items()} == exact
    assert [f"{gradient(tensor).item():.1f}" for tensor in (x0, w0)] == ["0.4", "-0.2"]


def test_gradients_of_the_sigmoid_chain_gate_by_gate() -> None:
    """Through 1/x, +1, exp and *-1 the upstream gradients are 1.00, -0.53, -0.53, -0.20, 0.20."""
    s3 = leaf(1.0)
    negated = retained(F.scale(s3, -1.0))
    exponential = retained(F.exp(negated))
    shifted = retained(F.shift(exponential, 1.0))
    f = retained(F.reciprocal(shifted))
    values = torch.stack([s3, negated, exponential, shifted, f])
    assert two_decimals(values) == [1.00, -1.00, 0.37, 1.37, 0.73]
    f.backward()
    chain = torch.stack([gradient(node) for node in (f, shifted, exponential, negated, s3)])
    assert two_decimals(chain) == [1.00, -0.53, -0.53, -0.20, 0.20]
    e = math.exp(-1)
    exact = [1, -1 / (1 + e) ** 2, -1 / (1 + e) ** 2, -e / (1 + e) ** 2, e / (1 + e) ** 2]
    assert chain.tolist() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(
    ("gate", "derivative"),
    [
        (F.exp, math.exp),
        (F.reciprocal, lambda x: -1 / x**2),
        (lambda x: F.scale(x, 3.0), lambda x: 3.0),
        (lambda x: F.shift(x, 3.0), lambda x: 1.0),
    ],
    ids=["exp", "reciprocal", "scale", "shift"],
)
@pytest.mark.parametrize("at", [-2.5, -1.0, 0.5, 1.37])
def test_local_gradients_of_the_primitive_gates(gate: Any, derivative: Any, at: float) -> None:
    """d e^x/dx = e^x, d(1/x)/dx = -1/x^2, d(ax)/dx = a, d(c + x)/dx = 1."""
    x = leaf(at)
    gate(x).backward()
    assert gradient(x).item() == pytest.approx(derivative(at), rel=1e-14)


def test_graph_is_not_unique_the_fused_sigmoid_equals_the_chain() -> None:
    """A graph is not unique: d sigma/dx = (1 - sigma) sigma, here 1.00 x (1 - 0.73) 0.73 = 0.2."""
    points = [-20.0, -3.0, -1.0, 0.0, 1.0, 3.0, 20.0]
    chain_x, fused_x = leaf(points), leaf(points)
    upstream = torch.tensor([1.0, -2, 3, 0.5, 1, -1, 4], dtype=torch.float64)
    chain = F.reciprocal(F.shift(F.exp(F.scale(chain_x, -1.0)), 1.0))
    fused = F.sigmoid(fused_x)
    # A handful of roundings, of 1.1e-16 each; at 20, dx = (1 - y) y keeps those of y, next to 1.
    torch.testing.assert_close(fused, chain, rtol=1e-15, atol=0)
    chain.backward(upstream)
    fused.backward(upstream)
    torch.testing.assert_close(gradient(fused_x), gradient(chain_x), rtol=1e-14, atol=1e-15)
    at_one = gradient(fused_x)[4].item()
    assert at_one == pytest.approx((1 - SIGMA) * SIGMA, rel=1e-14)
    assert f"{at_one:.1f}" == "0.2"


# ---- patterns in gradient flow -------------------------------------------------------------------


def test_add_gate_distributes_its_gradient() -> None:
    """Add gate, gradient distributor: 3 + 4 with upstream 2 gives 2 and 2."""
    a, b = leaf(3.0), leaf(4.0)
    y = F.add(a, b)
    y.backward(torch.tensor(2.0, dtype=torch.float64))
    assert [y.item(), gradient(a).item(), gradient(b).item()] == [7, 2, 2]


def test_multiply_gate_swaps_its_multipliers() -> None:
    """Mul gate, "swap multiplier": 2 * 3 with upstream 5 gives 15 and 10."""
    a, b = leaf(2.0), leaf(3.0)
    y = F.multiply(a, b)
    y.backward(torch.tensor(5.0, dtype=torch.float64))
    assert [y.item(), gradient(a).item(), gradient(b).item()] == [6, 5 * 3, 5 * 2]


def test_copy_adds_its_gradients() -> None:
    """Copy gate, gradient adder: copies of 7 with upstreams 4 and 2 give 6."""
    x = leaf(7.0)
    torch.autograd.backward(
        [F.shift(x, 0.0), F.shift(x, 0.0)],
        [torch.tensor(4.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)],
    )
    assert gradient(x) == 6


def test_copy_by_broadcasting_adds_its_gradients() -> None:
    """Copy gate, gradient adder: one number copied to a row receives the sum of the row."""
    row, x = leaf([0.0, 0.0]), leaf(7.0)
    y = F.add(row, x)
    assert y.tolist() == [7, 7]
    y.backward(torch.tensor([4.0, 2.0], dtype=torch.float64))
    assert gradient(x) == 6


def test_max_gate_routes_its_gradient() -> None:
    """Max gate, gradient router: max(4, 5) with upstream 9 gives 0 and 9."""
    a, b = leaf(4.0), leaf(5.0)
    y = F.maximum(a, b)
    y.backward(torch.tensor(9.0, dtype=torch.float64))
    assert [y.item(), gradient(a).item(), gradient(b).item()] == [5, 0, 9]


# ---- flat code and the modular API ---------------------------------------------------------------

FLAT_CODE = """\
s0 = w0 * x0
s1 = w1 * x1
s2 = s0 + s1
s3 = s2 + w2
L = sigmoid(s3)
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
"""


def test_flat_code_is_the_lectures() -> None:
    """The forward lines, then their gradients in reverse order."""
    (function,) = ast.parse(inspect.getsource(flat_code.f)).body
    assert isinstance(function, ast.FunctionDef)
    assert [argument.arg for argument in function.args.args] == ["w0", "x0", "w1", "x1", "w2"]
    lines = [ast.unparse(line) for line in function.body if isinstance(line, ast.Assign)]
    assert lines == FLAT_CODE.splitlines()


def test_flat_code_computes_what_autograd_computes() -> None:
    """Each grad_NAME of the flat code is the gradient that the node NAME receives."""
    nodes = {name: leaf(value) for name, value in flat_code.INPUTS.items()}
    flat = flat_code.f(**{name: node.detach() for name, node in nodes.items()})
    nodes["s0"] = retained(F.multiply(nodes["w0"], nodes["x0"]))
    nodes["s1"] = retained(F.multiply(nodes["w1"], nodes["x1"]))
    nodes["s2"] = retained(F.add(nodes["s0"], nodes["s1"]))
    nodes["s3"] = retained(F.add(nodes["s2"], nodes["w2"]))
    nodes["L"] = F.sigmoid(nodes["s3"])
    nodes["L"].backward()
    compared = 0
    for name, node in nodes.items():
        if name in flat:
            assert flat[name] == node.detach(), name
        if f"grad_{name}" in flat:
            # The flat code multiplies (1 - L) L in another order: two roundings.
            torch.testing.assert_close(flat[f"grad_{name}"], gradient(node), rtol=1e-15, atol=0)
            compared += 1
    assert compared == 9


def test_flat_code_runs_as_a_script() -> None:
    """L = 0.73, grad_s3 = 0.20, grad_x0 = 0.39, grad_w0 = -0.20."""
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "flat_code.py"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    printed = dict(line.replace(" ", "").split("=") for line in run.stdout.splitlines())
    assert len(printed) == 5 + 5 + 9
    wanted = {"L": "0.7311", "grad_s3": "0.1966", "grad_x0": "0.3932", "grad_w0": "-0.1966"}
    assert {name: printed[name] for name in wanted} == wanted


class LectureMultiply(torch.autograd.Function):
    """The lecture's Function, word for word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        z = x * y
        return z

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        grad_x = y * grad_z  # dz/dx * dL/dz
        grad_y = x * grad_z  # dz/dy * dL/dz
        return grad_x, grad_y


@pytest.mark.parametrize(
    ("x", "y", "grad_z"), [(2.0, 3.0, 5.0), (-1.5, 0.0, 2.0), (0.1, 7.0, -3.0)]
)
def test_multiply_function_is_the_lectures(x: float, y: float, grad_z: float) -> None:
    """class Multiply: cache x and y; grad_x = y * grad_z, grad_y = x * grad_z (x, y, z scalars)."""
    results = []
    for function in (LectureMultiply, Multiply):
        a, b = leaf(x), leaf(y)
        z = function.apply(a, b)
        z.backward(torch.tensor(grad_z, dtype=torch.float64))
        results.append((z.item(), gradient(a).item(), gradient(b).item()))
    assert results[0] == results[1] == (x * y, y * grad_z, x * grad_z)


# ---- vectors and matrices ------------------------------------------------------------------------


def test_relu_backpropagates_without_its_jacobian() -> None:
    """x = [1, -2, 3, -1]: y = [1, 0, 3, 0]; dL/dy = [4, -1, 5, 9] gives dL/dx = [4, 0, 5, 0].

    The lecture's Jacobian is input x output, the transpose of PyTorch's (this one is symmetric).
    """
    x, upstream = leaf([1.0, -2.0, 3.0, -1.0]), torch.tensor([4.0, -1, 5, 9], dtype=torch.float64)
    y = F.relu(x)
    assert y.tolist() == [1, 0, 3, 0]
    y.backward(upstream)  # implicit
    explicit = torch.func.jacrev(F.relu)(x.detach()).T
    assert explicit.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert gradient(x).tolist() == (explicit @ upstream).tolist() == [4, 0, 5, 0]


def test_relu_saves_one_number_an_element_where_the_jacobian_has_a_row() -> None:
    """The Jacobian is sparse, its off-diagonal entries always zero: never form it explicitly."""
    n = 64
    x = torch.linspace(-1, 1, n, dtype=torch.float64, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.relu(x)
    jacobian = torch.func.jacrev(F.relu)(x.detach())
    assert (sum(saved), jacobian.numel()) == (n, n * n)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))


MATRICES = {
    "x": [[2.0, 1, -3], [-3, 4, 2]],
    "w": [[3.0, 2, 1, -1], [2, 1, 3, 2], [3, 2, 1, -2]],
    "upstream": [[2.0, 3, -3, 9], [-8, 1, 4, 6]],
}


def test_matrix_multiply_and_its_gradients() -> None:
    """y = x w; dL/dx = dL/dy w^T, dL/dw = x^T dL/dy.

    The lecture prints y = [[13, 9, -2, -6], [5, 2, 17, 1]], which is not the product of its x and
    w. The gradients do not depend on y.
    """
    x, w, upstream = (leaf(values) for values in MATRICES.values())
    y = F.matmul(x, w)
    assert y.tolist() == [[-1, -1, 2, 6], [5, 2, 11, 7]]
    y.backward(upstream.detach())
    assert gradient(x).tolist() == [[0, 16, -9], [-24, 9, -30]]
    assert gradient(w).tolist() == [[28, 3, -18, 0], [-30, 7, 13, 33], [-22, -7, 17, -15]]


def test_one_element_of_x_affects_its_row_of_y_alone() -> None:
    """x[n, d] affects the whole row y[n, :], and y[n, m] by w[d, m]."""
    x, w, _ = (torch.tensor(values, dtype=torch.float64) for values in MATRICES.values())
    y = F.matmul(x, w)
    for n, d in itertools.product(range(2), range(3)):
        moved = x.clone()
        moved[n, d] += 1
        expected = torch.zeros_like(y)
        expected[n] = w[d]
        assert torch.equal(F.matmul(moved, w) - y, expected), (n, d)


def test_one_element_of_w_affects_its_column_of_y_alone() -> None:
    """By similar logic: w[d, m] affects the column y[:, m], and y[n, m] by x[n, d]."""
    x, w, _ = (torch.tensor(values, dtype=torch.float64) for values in MATRICES.values())
    y = F.matmul(x, w)
    for d, m in itertools.product(range(3), range(4)):
        moved = w.clone()
        moved[d, m] += 1
        expected = torch.zeros_like(y)
        expected[:, m] = x[:, d]
        assert torch.equal(F.matmul(x, moved) - y, expected), (d, m)


def test_gradients_of_a_product_are_the_only_products_of_the_right_shape() -> None:
    """These formulas are easy to remember: they are the only way to make shapes match up."""
    x, w = leaf(MATRICES["x"]), leaf(MATRICES["w"])
    upstream = torch.tensor(MATRICES["upstream"], dtype=torch.float64)
    F.matmul(x, w).backward(upstream)
    for wanted, other in ((x, w), (w, x)):
        candidates = [
            F.matmul(a, b)
            for pair in ((upstream, other.detach()), (other.detach(), upstream))
            for a, b in itertools.product(*((matrix, matrix.T) for matrix in pair))
            if a.shape[1] == b.shape[0] and (a.shape[0], b.shape[1]) == wanted.shape
        ]
        assert len(candidates) == 1
        assert torch.equal(candidates[0], gradient(wanted))


# ---- neural networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("hidden", [[], [5], [5, 4]], ids=["1 layer", "2 layers", "3 layers"])
def test_mlp_is_the_lectures_network(hidden: list[int], bias: bool) -> None:
    """f = W x; f = W2 max(0, W1 x); f = W3 max(0, W2 max(0, W1 x)); in practice with a bias each.

    x in R^D, W1 in R^(H1 x D), W2 in R^(H2 x H1), W3 in R^(C x H2).
    """
    torch.manual_seed(0)
    sizes = [3, *hidden, 2]
    model = torchbp.nn.MLP(sizes, bias=bias, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    weights = [value for name, value in parameters.items() if name.endswith("weight")]
    biases = [value for name, value in parameters.items() if name.endswith("bias")]
    assert [tuple(weight.shape) for weight in weights] == list(zip(sizes[1:], sizes, strict=False))
    assert [tuple(b.shape) for b in biases] == ([(size,) for size in sizes[1:]] if bias else [])

    batch = torch.randn(6, 3, dtype=torch.float64)
    got = model(batch)
    for x, f in zip(batch, got, strict=True):
        h = x
        for i, weight in enumerate(weights):
            h = weight @ (h if i == 0 else h.clamp(min=0)) + (biases[i] if bias else 0)
        torch.testing.assert_close(f, h, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_two_linear_layers_collapse_to_one(bias: bool) -> None:
    """Without an activation, f = W2 W1 x = W3 x: we end up with a linear classifier again.

    W3 = W2 W1 is in R^(C x D); the lecture prints R^(C x H).
    """
    torch.manual_seed(0)
    d, h, c = 4, 5, 3
    first = torchbp.nn.Linear(d, h, bias=bias, dtype=torch.float64)
    second = torchbp.nn.Linear(h, c, bias=bias, dtype=torch.float64)
    x = torch.randn(6, d, dtype=torch.float64)
    w3 = F.matmul(second.weight, first.weight)
    assert w3.shape == (c, d)
    b3 = second.bias + F.matmul(second.weight, first.bias) if bias else None
    torch.testing.assert_close(second(first(x)), F.linear(x, w3, b3), rtol=1e-13, atol=1e-15)


def test_an_activation_keeps_two_layers_from_collapsing() -> None:
    """The activation function max(0, z) is why a second layer adds anything: f(-x) is not -f(x)."""
    torch.manual_seed(0)
    weights = [torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)]
    x = torch.randn(6, 4, dtype=torch.float64)
    odd = F.linear(F.linear(x, weights[0]), weights[1])
    torch.testing.assert_close(F.linear(F.linear(-x, weights[0]), weights[1]), -odd)
    assert (F.mlp(-x, weights) + F.mlp(x, weights)).abs().max() > 0.1
