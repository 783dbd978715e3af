"""torchbp.data.toy: each set keeps the rule it is defined by, and beats a linear classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from torchbp.data import toy

SETS = {
    f.__name__: f for f in (toy.annulus, toy.three_modes, toy.quadrants, toy.spirals, toy.moons)
}
Make = Callable[..., tuple[torch.Tensor, torch.Tensor]]
every_set = pytest.mark.parametrize("make", SETS.values(), ids=SETS)


@every_set
def test_form_and_reproducibility(make: Make) -> None:
    x, y = make(n=301, seed=3)
    assert (x.dtype, x.shape) == (torch.float32, (301, 2))
    assert (y.dtype, y.shape) == (torch.int64, (301,))
    assert set(y.tolist()) == {0, 1}
    again, other = make(n=301, seed=3), make(n=301, seed=4)
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)
    assert not torch.equal(other[0], x)


@every_set
def test_global_generator_is_left_alone(make: Make) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), state)


@every_set
def test_noise_displaces_points_and_keeps_classes(make: Make) -> None:
    (x, y), (moved, same) = make(n=4000, noise=0.0), make(n=4000, noise=0.25)
    assert torch.equal(y, same)
    # The standard deviation of 8,000 normals, within five standard errors: 0.25 / sqrt(16000).
    assert (moved - x).std().item() == pytest.approx(0.25, abs=0.01)


@every_set
def test_classes_are_balanced(make: Make) -> None:
    _, y = make(n=4000)
    assert abs(y.double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(4000)


def test_annulus_is_the_lectures() -> None:
    x, y = toy.annulus(n=2000)
    for (a, b), label in zip(x.tolist(), y.tolist(), strict=True):
        assert label == int(1 <= math.hypot(a, b) <= 2)


def test_three_modes_are_three_discs() -> None:
    x, y = toy.three_modes(n=2000)
    centres = [(1.3 * math.cos(t), 1.3 * math.sin(t)) for t in (math.pi / 2, 3.6651914, 5.7595865)]
    assert min(math.dist(a, b) for a, b in pairwise([*centres, centres[0]])) > 2  # they are apart
    counts = [0, 0, 0]
    for point, label in zip(x.tolist(), y.tolist(), strict=True):
        distances = [math.dist(point, centre) for centre in centres]
        assert label == int(min(distances) <= 1) or abs(min(distances) - 1) < 1e-6
        counts[distances.index(min(distances))] += label
    assert min(counts) > 2000 / 6 - 5 * math.sqrt(2000 * 1 / 6 * 5 / 6)  # each mode has its sixth


def test_quadrants_are_opposite() -> None:
    x, y = toy.quadrants(n=2000)
    signs = {(a > 0, b > 0, label) for (a, b), label in zip(x.tolist(), y.tolist(), strict=True)}
    assert signs == {(True, True, 1), (False, False, 1), (True, False, 0), (False, True, 0)}


def test_spirals_are_two_arms_half_a_turn_apart() -> None:
    x, y = toy.spirals(n=2000, noise=0.0)
    for (a, b), label in zip(x.tolist(), y.tolist(), strict=True):
        radius, angle = math.hypot(a, b), math.atan2(b, a)
        assert 0.2499 < radius < 2.0001
        turns = radius - angle / math.tau - label / 2  # whole on the arm
        assert abs(turns - round(turns)) < 1e-5


def test_moons_are_half_circles() -> None:
    x, y = toy.moons(n=2000, noise=0.0)
    for (a, b), label in zip(x.tolist(), y.tolist(), strict=True):
        centre = (1.0, 0.5) if label else (0.0, 0.0)
        assert math.dist((a, b), centre) == pytest.approx(1, abs=1e-5)
        assert (b - centre[1]) * (-1 if label else 1) > -1e-6


def accuracy(model: torch.nn.Module, make: Make) -> float:
    """Of a model trained on one draw, on another."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    x, y = make(n=1000, seed=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    x, y = make(n=1000, seed=1)
    return (model(x).argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("make", [toy.annulus, toy.three_modes, toy.quadrants])
def test_a_linear_classifier_fails_and_an_mlp_succeeds(make: Make) -> None:
    torch.manual_seed(0)
    hidden = 32
    mlp = torch.nn.Sequential(
        torch.nn.Linear(2, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 2)
    )
    # No half plane gets more than 2/3 of quadrants right, x + y > 4/3, and of the others less; the
    # rest is five standard errors of 1,000 points.
    assert accuracy(torch.nn.Linear(2, 2), make) < 0.74
    assert accuracy(mlp, make) > 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 10.0}, TypeError, "n must be an integer, got float"),
        ({"n": True}, TypeError, "n must be an integer, got bool"),
        ({"noise": -0.1}, ValueError, "noise must be finite and at least 0, got -0.1"),
        ({"noise": math.nan}, ValueError, "noise must be finite and at least 0, got nan"),
        ({"noise": "0"}, TypeError, "noise must be a number, got str"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": None}, TypeError, "seed must be an integer, got NoneType"),
    ],
)
@every_set
def test_bad_arguments(
    make: Make, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{make.__name__}: {message}"):
        make(**arguments)


@every_set
def test_one_point(make: Make) -> None:
    x, y = make(n=1)
    assert (x.shape, y.shape) == ((1, 2), (1,))
