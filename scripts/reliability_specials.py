"""The figure "specials" of scripts/reliability.py: NaN, infinities, zeros of both signs, subnormals
and the largest numbers, in every gate, dtype and direction, beside PyTorch.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from scripts.reliability_accuracy import levels
from scripts.reliability_determinism import results
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.compare import ulps_off
from tests.ops import DTYPES, OPS, Case
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


class Specials(Figure):
    name = "specials"
    title = "Special values"
    claim = (
        "Every gate on NaN, the infinities, zeros of both signs, the least and the largest "
        "subnormal, the least normal, 1 and the largest number, in every combination and with "
        "upstream gradients 1, -2.5, 0, infinity and NaN: forward and gradients as PyTorch has "
        "them to 4 ulp or, where it has something else, its float64 to 2 ulp, or NaN of a NaN. "
        "Where they differ, or have zeros of different signs, is listed."
    )
    unit = "cells"
    sample = 1.0  # it takes seconds
    sources = (
        "scripts/reliability_specials.py",
        "tests/compare.py",
        "tests/ops.py",
        "torchbp/functional.py",
        "torchbp/functions/*.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        return [
            {"call": call, "dtype": dtype_name(dtype), "level": level}
            for level in levels()
            for call in CALLS
            for dtype in DTYPES
        ]

    def size(self, piece: Piece) -> int:
        inputs = len(CALLS[piece["call"]].inputs)
        return int(len(values(torch.float32)) ** inputs * len(UPSTREAM) * (1 + inputs))

    def measure(self, piece: Piece) -> Result:
        case, dtype = CALLS[piece["call"]], getattr(torch, piece["dtype"])
        inputs, dy = cells(case, dtype)
        twin = Case(case.op, case.name, case.reference, case.reference, case.inputs)
        ours, theirs = results(case, inputs, dy), results(twin, inputs, dy)
        wide = results(twin, [x.double() for x in inputs], dy.double())
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

    def tables(self, measured: Measured) -> list[str]:
        head = ["call", "", "dtype", "levels", "cells", "first input", "dy"]
        head += ["ours", "PyTorch", "its float64"]
        rows: dict[tuple[str, ...], list[str]] = {}
        for piece, result in measured:
            for one in result["differences"]:
                said = [
                    str(one["count"]),
                    ", ".join(f"{x:.6g}" for x in one["inputs"]),
                    "" if one["direction"] == "forward" else f"{one['dy']:.6g}",
                    *(f"{one[who]:.6g}" for who in ("ours", "theirs", "exact")),
                ]
                key = (code(piece["call"]), one["direction"], piece["dtype"], *said)
                rows.setdefault(key, []).append(str(piece["level"]))
        lines = [[*key[:3], ", ".join(tried), *key[3:]] for key, tried in sorted(rows.items())]
        if not lines:
            return ["No cell differs from PyTorch."]
        return ["Cells that differ from PyTorch in the same dtype:", table(head, lines)]
