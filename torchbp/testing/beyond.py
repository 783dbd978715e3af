"""What torch's gradcheck does not look at in a backward that it passes, and forward mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchbp.graph.calling import name_of

from .case import Options, report_of
from .circumstances import is_wide, kinks_of, noise_of
from .probe import Probe, as_tuple, nodes_of, real
from .report import Cause, Report

__all__ = ["double_backward", "forward_mode", "not_linear"]


def _direction(probe: Probe, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            leaf.shape,
            generator=generator,
            dtype=torch.complex128 if leaf.is_complex() else torch.float64,
        ).to(leaf.device, leaf.dtype)
        for leaf in probe.leaves
    ]


def not_linear(probe: Probe, options: Options) -> Report | None:
    """A gradient that is right for each element of the upstream alone, and not for all at once."""
    upstream = probe.upstream(3)
    outputs = probe.outputs()
    if not probe.size or not any(output.requires_grad for output in outputs):
        return None
    once, twice = probe.vjp(upstream, outputs, retain=True), probe.vjp(2 * upstream, outputs)
    close = [
        torch.allclose(2 * a, b, rtol=max(1e-6, options.tolerance.rtol), atol=1e-6, equal_nan=True)
        for a, b in zip(once, twice, strict=True)
    ]
    if all(close):
        return None
    names = ", ".join(n for n, fine in zip(probe.names, close, strict=True) if not fine)
    text = (
        f"the gradient of {names} is not linear in the upstream gradient: twice the upstream does "
        "not give twice the gradient. With a one at one element of the upstream and zeros "
        "elsewhere it is right"
    )
    return report_of(probe, options, None, [Cause("unknown", text)])


def double_backward(probe: Probe, options: Options) -> Report | None:
    """The gradient of the gradient in a random direction; each element if that is wrong."""
    if not all(map(is_wide, probe.leaves)) or not probe.size:
        return None
    if not all(dtype.is_floating_point and dtype is torch.float64 for dtype in probe.dtypes):
        return None
    if any(leaf.is_complex() for leaf in probe.leaves):
        return None
    count = len(probe.leaves)
    outputs = probe.outputs()
    upstream = [part.requires_grad_() for part in probe.split(probe.upstream(4), outputs)]
    if not any(output.requires_grad for output in outputs):
        return None
    args = probe.args

    def gradient(*given: Any) -> tuple[Tensor, ...]:
        made = as_tuple(probe.fn(*given[: len(args)]))
        chosen = [made[i] for i in probe.chosen]
        pairs = [(y, v) for y, v in zip(chosen, given[len(args) :], strict=True) if y.requires_grad]
        leaves = [x for x in given[: len(args)] if isinstance(x, Tensor) and x.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            leaves,
            [v for _, v in pairs],
            create_graph=True,
            allow_unused=True,
        )
        return tuple(g for g in found if g is not None)

    names = [*probe.all_names, *(f"upstream{n or ''}" for n in range(len(upstream)))]
    try:
        second = Probe(gradient, [*args, *upstream], options.eps, names)
        outputs = second.outputs()
        if any("Error" in node.name() for node in nodes_of(outputs)):
            return None  # once_differentiable
        analytic = second.vjp(second.upstream(5), outputs)
    except (RuntimeError, NotImplementedError):
        return None  # it says so itself
    finally:
        probe.restore()
    direction = _direction(second, 6)
    weights = second.upstream(5)
    sides = []
    for sign in (1, -1):
        second.set(
            [x + sign * options.eps * d for x, d in zip(second.start, direction, strict=True)]
        )
        try:
            sides.append(second.value())
        except RuntimeError:
            return None
        finally:
            second.restore()
    numeric = float(weights @ (sides[0] - sides[1])) / (2 * options.eps)
    along = sum(float(a @ real(d)) for a, d in zip(analytic, direction, strict=True))
    size = options.tolerance.atol * second.size**0.5 + options.tolerance.rtol * abs(numeric)
    if not abs(along - numeric) > size:  # or not a number: there is a pole near by
        return None
    point = second.point()
    wrong = [
        options.tolerance.wrong(a, n) for a, n in zip(point.analytic, point.numeric, strict=True)
    ]
    kinks = kinks_of(second, options, point)
    if not point.finite or not any(bool((w & ~k).any()) for w, k in zip(wrong, kinks, strict=True)):
        return None
    if noise_of(second, options, point) is not None:
        return None
    lost = all(not bool(a.any()) for a in point.analytic[:count])
    what = (
        "it is zero, without an error: backward computes with numbers that autograd cannot see "
        "through. If it is to be differentiated once only, mark it once_differentiable"
        if lost
        else "the gradient itself is right, and its derivative by autograd is not that by "
        "differences: does backward use a tensor computed in forward that is not an output, or "
        "a custom Function of its own?"
    )
    return report_of(
        second,
        options,
        point,
        [Cause("double-backward-wrong", what)],
        of="double backward",
        name=name_of(probe.fn),
    )


def forward_mode(probe: Probe, options: Options, error: RuntimeError) -> Report:
    """What forward mode gives, against the differences."""
    from torch.autograd import forward_ad

    columns: list[Tensor] = []
    dropped = False
    for number, leaf in enumerate(probe.leaves):
        width = real(leaf).numel()
        made = []
        for j in range(width):
            flat = torch.zeros(width, dtype=torch.float64)
            flat[j] = 1
            shape = (*leaf.shape, 2) if leaf.is_complex() else leaf.shape
            unit = flat.reshape(shape)
            tangent = (torch.view_as_complex(unit) if leaf.is_complex() else unit).to(leaf)
            with forward_ad.dual_level(), torch.random.fork_rng(probe.devices):
                torch.manual_seed(0)
                dual = forward_ad.make_dual(leaf.detach(), tangent)
                place = probe.where[number]
                args = [dual if i == place else x for i, x in enumerate(probe.args)]
                outputs = [as_tuple(probe.fn(*args))[i] for i in probe.chosen]
                parts = []
                for y in outputs:
                    found = forward_ad.unpack_dual(y).tangent
                    dropped |= found is None
                    parts.append(real(torch.zeros_like(y) if found is None else found))
                made.append(torch.cat(parts).cpu())
        empty = torch.zeros(probe.size, 0, dtype=torch.float64)
        columns.append(torch.stack(made, 1) if made else empty)
    point = probe.point()
    point = replace(point, analytic=columns)
    wrong = not all(map(options.tolerance.fits, columns, point.numeric))
    if not wrong:
        said = str(error).strip()
        cause = Cause("tangent-wrong", f"each tangent is right alone; torch says: {said}")
    elif dropped and not any(bool(c.any()) for c in columns):
        cause = Cause(
            "tangent-wrong",
            "the tangent is dropped, without an error: the output passes for a constant",
        )
    else:
        cause = Cause(
            "tangent-wrong",
            "the tangents of forward mode (jvp) are not those of central differences; backward "
            "passes with the same differences",
        )
    return report_of(probe, options, point, [cause], of="forward mode")
