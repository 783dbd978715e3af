"""Sets of points in the plane, in two classes: the cases that are hard for a linear classifier.

`annulus`, `three_modes` and `quadrants` are the hard cases of the lecture (Neural Networks and
Backpropagation, Fundamentals of Data Science, 2023); `spirals` and `moons` are the usual two. Each
gives points `x`, float32 [n, 2], and classes `y`, int64 [n], from a seed. In the first three the
classes are equally likely and decided by the point itself; `noise`, the standard deviation of a
normal displacement, is added afterwards, so that without it the rule in the docstring holds
exactly.
"""

from __future__ import annotations

import math

import torch

Points = tuple[torch.Tensor, torch.Tensor]

MODES = 1.3 * torch.tensor(
    [[math.cos(a), math.sin(a)] for a in (math.pi / 2 + k * math.tau / 3 for k in range(3))]
)


def annulus(n: int = 1000, noise: float = 0.0, seed: int = 0) -> Points:
    """Class 1 if and only if 1 <= ||x|| <= 2, in the disc ||x|| <= sqrt(6), half of which that is.

    Args:
        n: number of points.
        noise: standard deviation of the displacement added to each coordinate.
        seed: seed of the generator.

    Returns:
        x: float32 [n, 2].
        y: int64 [n], 0 or 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> x, y = annulus(n=500)
        >>> x.shape, y.shape
        (torch.Size([500, 2]), torch.Size([500]))
        >>> r = x.norm(dim=1)
        >>> bool(((y == 1) == ((1 <= r) & (r <= 2))).all())
        True
    """
    generator = _generator("annulus", n, noise, seed)
    x = _disc(n, math.sqrt(6), generator)
    r = x.norm(dim=1)
    return _displace(x, noise, generator), ((r >= 1) & (r <= 2)).long()


def three_modes(n: int = 1000, noise: float = 0.0, seed: int = 0) -> Points:
    """Class 1 has three modes, discs of radius 1 around `MODES`; everything else in ||x|| <=
    sqrt(6) is class 0.

    Arguments, result and errors are those of `annulus`.

    Example:
        >>> x, y = three_modes(n=500)
        >>> bool(((y == 1) == (torch.cdist(x, MODES).amin(dim=1) <= 1)).all())
        True
    """
    generator = _generator("three_modes", n, noise, seed)
    x = _disc(n, math.sqrt(6), generator)
    return _displace(x, noise, generator), (torch.cdist(x, MODES).amin(dim=1) <= 1).long()


def quadrants(n: int = 1000, noise: float = 0.0, seed: int = 0) -> Points:
    """Class 1 in two opposite quadrants, the first and the third, of the square [-2, 2]^2.

    Arguments, result and errors are those of `annulus`.

    Example:
        >>> x, y = quadrants(n=500)
        >>> bool(((y == 1) == (x[:, 0] * x[:, 1] > 0)).all())
        True
    """
    generator = _generator("quadrants", n, noise, seed)
    x = 4 * torch.rand(n, 2, generator=generator) - 2
    return _displace(x, noise, generator), (x[:, 0] * x[:, 1] > 0).long()


def spirals(n: int = 1000, noise: float = 0.05, seed: int = 0) -> Points:
    """Two arms of a spiral, one a class, each the other turned by half a circle, within ||x|| <= 2.

    At angle `t`, from a quarter turn to two turns, an arm is at radius `t / (2 pi)`. Arguments,
    result and errors are those of `annulus`.

    Example:
        >>> x, y = spirals(n=500)
        >>> int(y.sum())
        250
    """
    generator = _generator("spirals", n, noise, seed)
    y = _halves(n, generator)
    # Length along the arm grows as t^2: the root spreads the points evenly along it.
    t = math.tau * torch.sqrt(1 / 16 + (4 - 1 / 16) * torch.rand(n, generator=generator))
    x = (
        torch.stack([torch.cos(t + math.pi * y), torch.sin(t + math.pi * y)], dim=1)
        * (t / math.tau)[:, None]
    )
    return _displace(x, noise, generator), y


def moons(n: int = 1000, noise: float = 0.1, seed: int = 0) -> Points:
    """Two half circles of radius 1 that reach into each other, as scikit-learn's `make_moons`.

    Class 0 is the upper half of the circle around (0, 0), class 1 the lower half of that around (1,
    0.5). Arguments, result and errors are those of `annulus`.

    Example:
        >>> x, y = moons(n=500, noise=0.0)
        >>> bool((x[y == 0].norm(dim=1) - 1).abs().max() < 1e-6)
        True
    """
    generator = _generator("moons", n, noise, seed)
    y = _halves(n, generator)
    t = math.pi * torch.rand(n, generator=generator)
    side = 1 - 2 * y  # 1 for class 0, -1 for class 1
    x = torch.stack([y + side * torch.cos(t), 0.5 * y + side * torch.sin(t)], dim=1)
    return _displace(x, noise, generator), y


def _generator(name: str, n: int, noise: float, seed: int) -> torch.Generator:
    """Check the arguments that all sets share; give the generator."""
    for key, value in (("n", n), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: {key} must be an integer, got {type(value).__name__}")
    if n < 1:
        raise ValueError(f"{name}: n must be at least 1, got {n}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"{name}: seed must be in [0, 2^63), got {seed}")
    if not isinstance(noise, (int, float)) or isinstance(noise, bool):
        raise TypeError(f"{name}: noise must be a number, got {type(noise).__name__}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"{name}: noise must be finite and at least 0, got {noise}")
    return torch.Generator().manual_seed(seed)


def _disc(n: int, radius: float, generator: torch.Generator) -> torch.Tensor:
    """Points uniform in a disc: float32 [n, 2]."""
    r = radius * torch.rand(n, generator=generator).sqrt()
    t = math.tau * torch.rand(n, generator=generator)
    return torch.stack([r * torch.cos(t), r * torch.sin(t)], dim=1)


def _halves(n: int, generator: torch.Generator) -> torch.Tensor:
    """n // 2 ones and the rest zeros, shuffled: int64 [n]."""
    return (torch.randperm(n, generator=generator) < n // 2).long()


def _displace(x: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    return x + noise * torch.randn(x.shape, generator=generator) if noise else x
