"""The raw operations of torch.ops.torchbp: calls of each, and those that have no gradient.

A new operation that is no row of the table of gates is tested by adding calls of it here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests.ops import RAW_OPS
from torchbp.functions.table import ROWS, Row

__all__ = ["REFUSING", "Sample", "bound", "randn", "requiring_grad", "samples_of"]

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
        samples: dict[str, list[Sample]] = {name: [(a, b), (x.T, dy.T), (x, randn(3, 8)[:, ::2])]}
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
            (dy, x, None, saved, activation, parameter, False, True, True),
            (dy, None, weight, saved, activation, parameter, True, False, True),
            (dy, None, None, saved, activation, parameter, False, False, True),
        ]
        if activation == "none":
            samples["linear_backward"].append(
                (dy, x, weight, None, activation, parameter, True, True, True)
            )
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


def bound(name: str, sample: Sample) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An operation as a function of the tensors that have a gradient alone, and those tensors.

    Of several outputs it returns the first: the others are kept for backward.
    """
    if name == "softmax_ce":  # the class weights have no gradient
        sample = (*requiring_grad(sample[:2]), *sample[2:])
    else:
        sample = requiring_grad(sample)

    def is_free(value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad

    free = list(filter(is_free, tree_leaves(sample)))

    def run(*values: Tensor) -> Tensor:
        it = iter(values)
        args = tree_map(lambda leaf: next(it) if is_free(leaf) else leaf, sample)
        result = getattr(ops, name)(*args)
        return result if isinstance(result, Tensor) else result[0]

    return run, free
