"""The figure "specials" of scripts/reliability.py: NaN, infinities, zeros of both signs, subnormals
and the largest numbers, in every operation, dtype and direction, beside PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, reduce

import torch
from torch import Tensor

from scripts.reliability_accuracy import levels
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.compare import ulps_off
from tests.machine import LEVELS
from tests.ops import DTYPES, OPS, Case, run
from torchbp.graph.text import dtype_name

__all__ = ["Specials"]

#: The upstream gradients that meet each input.
UPSTREAM = (1.0, -2.5, 0.0, torch.inf, torch.nan)

#: Gates, called with each of their parameters on inputs of one shape.
CALLS: dict[str, Case] = {
    str(case): case
    for op in OPS.values()
    if op.elementwise
    for case in op.cases
    if "matri" in case.name and len({given.shape for given in case.inputs}) == 1
}

#: The others, in which one number of one input, or of the upstream gradient, is special: without
#: what is only there for its size.
SIZES = ("wide", "256 pieces", "odd length", "many classes", "no ", "cube", "image", "vector")
PRODUCTS: dict[str, Case] = {
    str(case): case
    for op in OPS.values()
    if not op.elementwise
    for case in op.cases
    if op.name == "matmul" or not case.name.startswith(SIZES)
}


def values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    positive = [0.0, least, info.tiny - least, info.tiny, 1.0, info.max, torch.inf, torch.nan]
    return torch.tensor([*positive, *(-value for value in positive)], dtype=torch.float64).to(dtype)


def cells(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """(inputs, upstream): every combination."""
    upstream = torch.tensor(UPSTREAM, dtype=dtype)
    grids = torch.meshgrid(*[values(dtype)] * len(case.inputs), upstream, indexing="ij")
    *inputs, dy = (grid.flatten() for grid in grids)
    return inputs, dy


def differs(ours: Tensor, theirs: Tensor, size: Tensor | None) -> Tensor:
    """Where the two are more than four roundings apart, or zeros of different signs."""
    signs = (ours == 0) & (theirs == 0) & (ours.signbit() != theirs.signbit())
    return (ulps_off(ours, theirs, size) > 4) | signs


def alike(ours: Tensor, theirs: Tensor) -> Tensor:
    """Where both are NaN, the same infinity, or finite and a few roundings of sums apart."""
    theirs = theirs.to(ours.dtype)
    roundings = 8 if ours.dtype.itemsize == 2 else 128
    near = roundings * torch.finfo(ours.dtype).eps * (1 + theirs.double().abs())
    close = ours.isfinite() & ((ours.double() - theirs.double()).abs() <= near)
    return (ours.isnan() & theirs.isnan()) | (ours == theirs) | close


def spread(
    case: Case, inputs: list[Tensor], dy: Tensor, exact: list[Tensor], eps: float
) -> list[Tensor]:
    """How far `exact`, [y, *grads] in float64, moves when every number of `inputs` and `dy` does,
    by up to 4 `eps` of itself. Where sums cancel, nobody who rounds comes closer."""
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        by = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        return x * (1 + 4 * eps * by)

    farthest = [torch.zeros_like(value) for value in exact]
    for _ in range(8):
        near = [moved(x) for x in inputs]
        other = run(case.reference, near, moved(dy), case.differentiable)
        farthest = [
            torch.maximum(far, (value - truth).abs())
            for far, value, truth in zip(farthest, other, exact, strict=True)
        ]
    return farthest


def counts_nothing(case: Case, inputs: list[Tensor], result: Tensor) -> Tensor:
    """Where a gradient of cross_entropy is that of a row that is ignored: 0, whatever is in it."""
    ignored = case.inputs[1].ignored if case.op == "cross_entropy" else None
    if ignored is None or result.dim() != 2:
        return torch.zeros_like(result, dtype=torch.bool)
    return (inputs[1] == ignored).unsqueeze(1).expand_as(result)


def special(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, float, list[Tensor], Tensor]]:
    """(where, value, inputs, upstream): the first and the last number of each floating tensor."""
    torch.manual_seed(0)
    inputs = case.make(dtype)
    upstream = torch.randn_like(case.ours(*inputs))
    for i, tensor in enumerate([*inputs, upstream]):
        if not tensor.is_floating_point():
            continue
        name = f"input {i}" if i < len(inputs) else "dy"
        for place in sorted({0, tensor.numel() - 1} if tensor.numel() else ()):
            for value in values(dtype):
                own = [x.clone() for x in (*inputs, upstream)]
                own[i].view(-1)[place] = value
                yield name, value.item(), own[:-1], own[-1]


@cache
def cells_of_product(call: str) -> int:
    case = PRODUCTS[call]
    return (1 + len(case.differentiable)) * sum(1 for _ in special(case, torch.float32))


class Specials(Figure):
    name = "specials"
    title = "Special values"
    claim = (
        "Every gate on NaN, the infinities, zeros of both signs, the least and the largest "
        "subnormal, the least normal, 1 and the largest number, in every combination and with "
        "upstream gradients 1, -2.5, 0, infinity and NaN: forward and gradients as PyTorch has "
        "them to 4 ulp or, where it has something else, its float64 to 2 ulp, or NaN of a NaN. "
        "Products, cross-entropy and the penalty with one of these as the first or the last number "
        "of an input or of the upstream gradient: finite numbers where PyTorch in the same dtype "
        "or in float64 has the same ones, or where sums cancel no further from its float64 than "
        "that moves with inputs 4 units of their last place away, or next to the end of the range "
        "infinity or NaN, and 0 for rows that are ignored; infinity or NaN where it has either. "
        "Where they differ, or have zeros of different signs, is listed."
    )
    unit = "cells"
    sample = 0.2
    sources = (
        "scripts/reliability_specials.py",
        "tests/compare.py",
        "tests/ops.py",
        "torchbp/functional.py",
        "torchbp/functions/*.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        tried = levels()
        work = [(call, level) for level in tried for call in CALLS]
        products = [str(op.main_case) for op in OPS.values() if str(op.main_case) in PRODUCTS]
        if fraction < 1:
            work += [(call, tried[-1]) for call in products]
        else:
            work += [(call, level) for level in tried for call in PRODUCTS]
        return [
            {"call": call, "dtype": dtype_name(dtype), "level": level}
            for call, level in work
            for dtype in DTYPES
        ]

    def size(self, piece: Piece) -> int:
        if piece["call"] in PRODUCTS:
            return cells_of_product(piece["call"])
        inputs = len(CALLS[piece["call"]].inputs)
        return int(len(values(torch.float32)) ** inputs * len(UPSTREAM) * (1 + inputs))

    def measure(self, piece: Piece) -> Result:
        if piece["call"] in PRODUCTS:
            return self.measure_product(piece)
        case, dtype = CALLS[piece["call"]], getattr(torch, piece["dtype"])
        inputs, dy = cells(case, dtype)
        free = case.differentiable
        ours = run(case.ours, inputs, dy, free)
        theirs = run(case.reference, inputs, dy, free)
        wide = run(case.reference, [x.double() for x in inputs], dy.double(), free)
        of_nan = reduce(torch.logical_or, [x.isnan() for x in inputs])
        found, wrong = [], []
        for i, (mine, other, truth) in enumerate(zip(ours, theirs, wide, strict=True)):
            # 1 - y of a y next to 1 is a rounding error of size dy.
            size = dy if i and OPS[case.op].cancels else None
            apart = differs(mine, other, size)
            right = (ulps_off(mine, other, size) <= 4) | (ulps_off(mine, truth, size) <= 2)
            right |= mine.isnan() & of_nan
            direction = "forward" if i == 0 else f"gradient {i}" if len(inputs) > 1 else "gradient"
            if bool(apart.any()):
                place = int(apart.nonzero()[0])
                found.append(
                    {
                        "direction": direction,
                        "count": int(apart.sum()),
                        "inputs": [x[place].item() for x in inputs],
                        "dy": dy[place].item(),
                        "ours": mine[place].item(),
                        "theirs": other[place].item(),
                        "exact": truth[place].item(),
                    }
                )
            wrong += [
                f"{case} in {piece['dtype']}, {piece['level']}, {direction}: inputs "
                f"{[x[place].item() for x in inputs]}, dy {dy[place].item()}: "
                f"{mine[place].item()!r}, PyTorch has {other[place].item()!r}"
                for place in (~right).nonzero().flatten().tolist()
            ]
        return {"differences": found, "failures": wrong}

    def measure_product(self, piece: Piece) -> Result:
        case, dtype = PRODUCTS[piece["call"]], getattr(torch, piece["dtype"])
        free = case.differentiable
        found: dict[str, Result] = {}
        wrong = []
        for where, value, inputs, dy in special(case, dtype):
            mine = run(case.ours, inputs, dy, free)
            other = run(case.reference, inputs, dy, free)
            wide = [x.double() if x.is_floating_point() else x for x in inputs]
            exact = run(case.reference, wide, dy.double(), free)
            for i, (own, theirs, truth) in enumerate(zip(mine, other, exact, strict=True)):
                same = alike(own, theirs)
                if bool(same.all()):
                    continue
                direction = "forward" if i == 0 else f"gradient {free[i - 1]}"
                place = tuple((~same).nonzero()[0].tolist())
                one = found.setdefault(
                    f"{direction}, {where}",
                    {
                        "direction": f"{direction}, {where}",
                        "count": 0,
                        "inputs": [value],
                        "dy": dy.view(-1)[0].item(),
                        "ours": own[place].item(),
                        "theirs": theirs[place].item(),
                        "exact": truth[place].item(),
                    },
                )
                one["count"] += int((~same).sum())
                right = same | alike(own, truth)
                # Infinity or NaN depends on the order of products and sums; so does whether any of
                # them overflows, where the result nearly does.
                right |= ~own.isfinite() & ~(theirs.isfinite() & truth.isfinite())
                largest = torch.finfo(dtype).max
                nearly = (truth.abs() > largest / 4096) | ~(theirs.isfinite() | truth.isfinite())
                right |= nearly & (abs(value) == largest)
                right |= (own == 0) & counts_nothing(case, inputs, own)
                # PyTorch's elu loses NaN, as it does alone.
                right |= own.isnan() & (not math.isfinite(value) and case.name.startswith("elu"))
                if not bool(right.all()):
                    far = spread(case, wide, dy.double(), exact, torch.finfo(dtype).eps)[i]
                    right |= own.isfinite() & ((own.double() - truth).abs() <= far)
                wrong += [
                    f"{case} in {piece['dtype']}, {piece['level']}, {direction}{place}: {value} in "
                    f"{where}: {own[place].item()!r}, PyTorch has {theirs[place].item()!r}, in "
                    f"float64 {truth[place].item()!r}"
                    for place in map(tuple, (~right).nonzero().tolist()[:1])
                ]
        return {"differences": list(found.values()), "failures": wrong}

    def tables(self, measured: Measured) -> list[str]:
        head = ["call", "", "dtypes", "levels", "cells", "first input", "dy"]
        head += ["ours", "PyTorch", "its float64"]
        # One row for all levels, and for a product for all dtypes: the first that differs.
        rows: dict[tuple[str, ...], tuple[list[str], set[str], set[str]]] = {}
        for piece, result in measured:
            for one in result["differences"]:
                product = piece["call"] in PRODUCTS
                said = [
                    "" if product else str(one["count"]),
                    ", ".join(f"{x:.6g}" for x in one["inputs"]),
                    "" if one["direction"].startswith("forward") else f"{one['dy']:.6g}",
                    *(f"{one[who]:.6g}" for who in ("ours", "theirs", "exact")),
                ]
                key: tuple[str, ...] = (code(piece["call"]), one["direction"])
                key += () if product else (piece["dtype"], *said)
                _, dtypes, tried = rows.setdefault(key, (said, set(), set()))
                dtypes.add(piece["dtype"])
                tried.add(piece["level"])

        def listed(found: set[str], all_: list[str]) -> str:
            return ", ".join(one for one in all_ if one in found)

        names = [dtype_name(dtype) for dtype in DTYPES]
        lines = [
            [*key[:2], listed(dtypes, names), listed(tried, list(LEVELS)), *said]
            for key, (said, dtypes, tried) in sorted(rows.items())
        ]
        if not lines:
            return ["No cell differs from PyTorch."]
        return ["Cells that differ from PyTorch in the same dtype:", table(head, lines)]
