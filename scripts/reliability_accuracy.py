"""The figure "accuracy" of scripts/reliability.py: every unary gate over every number of a dtype,
forward and gradient, at every SIMD level, against float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.compare import ulps_off
from tests.machine import LEVELS, cpu_flags
from torchbp import ROWS
from torchbp.functions.gate import GATES
from torchbp.functions.table import Row

__all__ = ["Accuracy", "levels"]

UNARY = {name: row for name, row in ROWS.items() if len(row.inputs) == 1}

#: A value for each parameter that a row may have. It counts as rounded to float32, in which both
#: torchbp and PyTorch compute with it.
PARAMETERS = {
    name: torch.tensor(value, dtype=torch.float32).item()
    for name, value in {"a": -1.7, "c": 0.3, "negative_slope": 0.01, "alpha": 1.3}.items()
}

#: dtype -> (a dtype of integers of its size, how many numbers there are, the most ulps that
#: forward may be off). Half types compute in float32 and round once: half an ulp, and little more.
DTYPES = {
    "float32": (torch.int32, 2**32, 2.0),
    "bfloat16": (torch.int16, 2**16, 0.51),
    "float16": (torch.int16, 2**16, 0.51),
}

#: The most ulps that a gradient may be off.
GRADIENT = 4.0

TORCH = "torch"
BLOCK = 2**24  # float32 numbers in a piece
CHUNK = 2**15  # numbers at a time, so that their float64 stay in the cache

#: Where the formulas change or saturate; samples have the numbers around them too.
EDGES = (
    0.0, 2**-149, 2**-126, 2**-24, 0.34657359, 0.5, 0.6931472, 1.0, 2.0, 9.010913, 16.635532,
    17.328680, 20.0, 40.0, 87.0, 87.33655, 88.72284, 89.0, 103.97208, 104.0, 3.4028235e38,
)  # fmt: skip
AROUND = 64


def levels() -> list[str]:
    """The SIMD levels of this machine."""
    flags = cpu_flags()
    return [level for level, needed in LEVELS.items() if needed <= flags]


def dtype_of(piece: Piece) -> torch.dtype:
    return getattr(torch, piece["dtype"])  # type: ignore[no-any-return]


# ---- What is computed ----------------------------------------------------------------------------


def parameters(row: Row) -> tuple[float, ...]:
    return () if row.parameter is None else (PARAMETERS[row.parameter],)


def ours(row: Row, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dx), from the kernels."""
    y = getattr(torch.ops.torchbp, row.name)(x, *parameters(row))
    return y, gradient(row, {"x": x, "y": y}, dy)


def gradient(row: Row, known: dict[str, Tensor], dy: Tensor) -> Tensor:
    saved = [known[name] for name in row.saves]
    dx: Tensor = getattr(torch.ops.torchbp, f"{row.name}_backward")(dy, *saved, *parameters(row))
    return dx


def theirs(row: Row, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dx), from PyTorch."""
    x = x.detach().requires_grad_()
    y = GATES[row.name].formula(x, *parameters(row))
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def exact(row: Row, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's forward in float64; and the gradient column, in float64 on what forward saved."""
    known = {"x": x, "y": y}
    values: dict[str, Any] = {name: known[name].double() for name in row.saves}
    if row.parameter is not None:
        values[row.parameter] = PARAMETERS[row.parameter]
    forward: Tensor = GATES[row.name].formula(x.double(), *parameters(row))
    return forward, row.evaluate("dx", dy=dy.double(), **values)


# ---- Numbers to compute with ---------------------------------------------------------------------


def chunks(piece: Piece) -> Iterator[Tensor]:
    """The inputs of a piece."""
    dtype = dtype_of(piece)
    integers = DTYPES[piece["dtype"]][0]
    bits = torch.iinfo(integers).bits
    if "sample" in piece:
        yield from sampled(strata(piece["sample"])).view(dtype).split(CHUNK)
        return
    for begin in range(piece["begin"], piece["end"], CHUNK):
        # Those from half of all on are negative integers; no chunk has some of both.
        low = begin - 2**bits * (begin >= 2 ** (bits - 1))
        size = min(CHUNK, piece["end"] - begin)
        yield torch.arange(low, low + size, dtype=integers).view(dtype)


def strata(fraction: float) -> int:
    """How many float32 numbers of each sign and exponent a sample has."""
    return max(1, round(2**23 * fraction))


def sampled(each: int) -> Tensor:
    """Bit patterns of float32: `each` of every sign and exponent, and those around the edges."""
    generator = torch.Generator().manual_seed(each)
    exponents = torch.arange(-256, 256)[:, None] * 2**23
    places = (torch.arange(each) + torch.rand(512, each, generator=generator)) * (2**23 / each)
    edges = torch.tensor(EDGES, dtype=torch.float32).view(torch.int32)[:, None]
    around = (edges + torch.arange(-AROUND, AROUND + 1)).clamp(0, 0x7FFFFFFF).flatten()
    patterns = (exponents + places.long().clamp(max=2**23 - 1)).flatten()
    return torch.cat([patterns, around, around - 2**31]).to(torch.int32)


def upstream(x: Tensor) -> Tensor:
    """A gradient for each input: 1 to 2 in size, of any digits and sign, always the same."""
    integers = torch.int32 if x.dtype == torch.float32 else torch.int16
    mixed = x.view(integers).int() * -1640531535  # 2^32 over the golden ratio: spreads all bits
    return (
        (((mixed >> 9) & 0x007FFFFF) | (mixed & -(2**31)) | 0x3F800000)
        .view(torch.float32)
        .to(x.dtype)
    )


# ---- How far off it is ---------------------------------------------------------------------------


def error(got: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
    """|got - wanted| in ulps of got's dtype at wanted, by `ulps_off` where one is not finite; and
    where it is largest.

    Where both are, faster: 2^exponent are the upper bits of a float64, and a correctly rounded
    result has its half ulp instead of 0.
    """
    info = torch.finfo(got.dtype)
    power = (wanted.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    off = (got.double() - wanted).abs_().div_(power.clamp_(info.tiny, info.max).mul_(info.eps))
    place = int(off.argmax())  # of the first NaN, or else of an infinity, if there is one
    least, most = (bound.item() for bound in wanted.aminmax())  # NaN of NaN
    if not (math.isfinite(off[place].item()) and -info.max <= least and most <= info.max):
        strange = ~(off.isfinite() & (wanted.abs() <= info.max))
        # Most of them are the same infinity or NaN: no ulps, without picking them out one by one.
        same = (got == wanted.to(got.dtype)) | (got.isnan() & wanted.isnan())
        off.masked_fill_(strange & same, 0.0)
        strange &= ~same
        if strange.any():
            off[strange] = ulps_off(got[strange], wanted[strange])
        place = int(off.argmax())
    return off, place


def worst(got: Tensor, wanted: Tensor, x: Tensor, dy: Tensor) -> Result:
    off, place = error(got, wanted)
    return {
        "ulps": off[place].item(),
        **{
            name: value[place].item()
            for name, value in {"x": x, "dy": dy, "got": got, "exact": wanted}.items()
        },
    }


def unrounded(got: Tensor, wide: Tensor) -> int:
    """How many results in a half type are not the float32 result rounded to nearest."""
    rounded = wide.to(got.dtype)
    return int(((got != rounded) & ~(got.isnan() & rounded.isnan())).sum())


class Accuracy(Figure):
    name = "accuracy"
    title = "Accuracy"
    claim = (
        "Every unary gate over every number of a dtype. Forward is at most 2 ulp off in float32, "
        "against PyTorch's float64; in half types it is the float32 result rounded to nearest, and "
        "so at most 0.51 ulp off. A gradient is at most 4 ulp off the gradient column of "
        "the row in float64 on the same saved values; the upstream gradient is another number "
        "between 1 and 2, of either sign, for each input. ulp: the distance between neighbouring "
        "numbers of the dtype at the exact result. In bold: more than is allowed."
    )
    unit = "results, each forward and gradient"
    sample = 2e-5
    sources = (
        "scripts/reliability_accuracy.py",
        "tests/compare.py",
        "torchbp/functions/activations.py",
        "torchbp/functions/arithmetic.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        cut: list[Piece] = []
        for level in (*levels(), TORCH):
            for dtype, (_, numbers, _) in DTYPES.items():
                for gate in UNARY:
                    about: Piece = {"gate": gate, "dtype": dtype, "of": "torchbp", "level": level}
                    if level == TORCH:
                        about |= {"of": TORCH, "level": None}
                    if dtype == "float32" and fraction < 1:
                        cut.append({**about, "sample": fraction})
                        continue
                    cut += [
                        {**about, "begin": begin, "end": min(begin + BLOCK, numbers)}
                        for begin in range(0, numbers, BLOCK)
                    ]
        return cut

    def size(self, piece: Piece) -> int:
        if "sample" in piece:
            return 512 * strata(piece["sample"]) + 2 * len(EDGES) * (2 * AROUND + 1)
        return int(piece["end"] - piece["begin"])

    def measure(self, piece: Piece) -> Result:
        row = UNARY[piece["gate"]]
        found: dict[str, Result] = {}
        differ = {"forward": 0, "gradient": 0}
        for x in chunks(piece):
            dy = upstream(x)
            y, dx = (theirs if piece["of"] == TORCH else ours)(row, x, dy)
            wanted_y, wanted_dx = exact(row, x, y, dy)
            for direction, got, wanted in (
                ("forward", y, wanted_y),
                ("gradient", dx, wanted_dx),
            ):
                here = worst(got, wanted, x, dy)
                if direction not in found or here["ulps"] > found[direction]["ulps"]:
                    found[direction] = here
            if x.dtype != torch.float32 and piece["of"] != TORCH:
                wide_y, _ = ours(row, x.float(), dy.float())
                wide_dx = gradient(row, {"x": x.float(), "y": y.float()}, dy.float())
                differ["forward"] += unrounded(y, wide_y)
                differ["gradient"] += unrounded(dx, wide_dx)
        return {**found, "unrounded": differ}

    def failures(self, measured: Measured) -> list[str]:
        lines = []
        for (gate, dtype, who), result in merged(measured).items():
            for direction in ("forward", "gradient") if who != TORCH else ():
                about = f"{gate} in {dtype}, {who}, {direction}"
                found = result[direction]
                if found["ulps"] > limit(dtype, direction):
                    lines.append(
                        f"{about}: {found['ulps']:.3g} ulp off at x = {found['x']!r}, "
                        f"dy = {found['dy']!r}: {found['got']!r} instead of {found['exact']!r}"
                    )
                if result["unrounded"][direction]:
                    lines.append(
                        f"{about}: {result['unrounded'][direction]} results are not the float32 "
                        "result rounded to nearest"
                    )
        return lines

    def tables(self, measured: Measured) -> list[str]:
        rows = merged(measured)
        tried = [level for level in LEVELS if any(who == level for _, _, who in rows)]
        head = ["gate", "", *tried, "worst input", "PyTorch", "its worst input"]
        given = ", ".join(f"{name} = {value:.9g}" for name, value in PARAMETERS.items())
        parts = [f"Largest error in ulp; {given}."]
        for dtype in DTYPES:
            lines = []
            for gate in UNARY:
                own = [rows[gate, dtype, level] for level in tried if (gate, dtype, level) in rows]
                for direction in ("forward", "gradient"):
                    found = [result[direction] for result in own]
                    cells = [ulps(result, limit(dtype, direction)) for result in found]
                    cells += [""] * (len(tried) - len(cells))
                    cells.append(place(max(found, key=severity), dtype) if found else "")
                    peer = rows.get((gate, dtype, TORCH))
                    cells += [ulps(peer[direction]), place(peer[direction], dtype)] if peer else []
                    if own or peer:
                        lines.append([code(gate), direction, *cells, *[""] * (2 - 2 * bool(peer))])
            if lines:
                parts += [f"### {dtype}", table(head, lines)]
        return parts


def severity(found: Result) -> float:
    return float(found["ulps"])


def merged(measured: Measured) -> dict[tuple[str, str, str], Result]:
    """(gate, dtype, level or "torch") -> the worst of its pieces in each direction."""
    rows: dict[tuple[str, str, str], Result] = {}
    for piece, result in measured:
        who = TORCH if piece["of"] == TORCH else str(piece["level"])
        key = piece["gate"], piece["dtype"], who
        if key not in rows:
            rows[key] = {**result, "unrounded": {**result["unrounded"]}}
            continue
        for direction in ("forward", "gradient"):
            rows[key]["unrounded"][direction] += result["unrounded"][direction]
            worse = max(rows[key][direction], result[direction], key=severity)
            rows[key][direction] = worse
    return rows


def limit(dtype: str, direction: str) -> float:
    return DTYPES[dtype][2] if direction == "forward" else GRADIENT


def ulps(found: Result, allowed: float = float("inf")) -> str:
    text = f"{found['ulps']:.3f}" if found["ulps"] < 100 else f"{found['ulps']:.3g}"
    return f"**{text}**" if found["ulps"] > allowed else text


def place(found: Result, dtype: str) -> str:
    """The worst input, in as many digits as tell numbers of its dtype apart; none of no error."""
    digits = {"float32": 9, "bfloat16": 4, "float16": 5}[dtype]
    return f"{found['x']:.{digits}g}" if found["ulps"] else ""
