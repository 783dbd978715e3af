"""The figure "determinism" of scripts/reliability.py: the same bits from every call, on one thread
or several, at every SIMD level.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from scripts.reliability_accuracy import levels
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.ops import (
    DTYPES,
    OPS,
    Case,
    Input,
    ce_case,
    classes,
    l2_penalty_case,
    linear_case,
    matmul_case,
    maxout_case,
    mlp_case,
    run,
)
from torchbp.graph.text import dtype_name

__all__ = ["Determinism"]

REPEATS = 1000
THREADS = (1, 2, 4)
BIG = 3 * 32768 + 77  # several grains of work, and a rest

#: op -> a case that is large enough to be shared between threads.
LARGE: dict[str, Case] = {
    **{
        op.name: replace(
            op.main_case, name="large", inputs=(Input((BIG,)),) * len(op.main_case.inputs)
        )
        for op in OPS.values()
        if op.elementwise
    },
    "matmul": matmul_case("large", (257, 300), (300, 129)),
    "linear": linear_case("large", (257, 300), 129, activation="relu"),
    "maxout": maxout_case("large", (300, 8), 3, 200),
    "cross_entropy": ce_case("large", (1500, 100), classes(1500, high=100)),
    "mlp": mlp_case("large", (257, 300), [129, 65, 10]),
    "l2_penalty": l2_penalty_case("large", (BIG,), (BIG,)),
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


class Determinism(Figure):
    name = "determinism"
    title = "Determinism"
    claim = (
        f"Every operation, forward and gradients, gives the same bits in {REPEATS:,} calls, a "
        "third of them on 1, 2 and 4 threads each, in every dtype and at every SIMD level: on a "
        "small input and, a tenth of the calls, on one large enough to be shared between threads."
    )
    unit = "calls"
    sample = 0.006
    sources = (
        "scripts/reliability_determinism.py",
        "tests/ops.py",
        "torchbp/functional.py",
        "torchbp/functions/*.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        calls = max(2 * len(THREADS), round(REPEATS * fraction))
        return [
            {"op": op, "dtype": dtype_name(dtype), "level": level, "calls": calls}
            for level in levels()
            for op in OPS
            for dtype in DTYPES
        ]

    def size(self, piece: Piece) -> int:
        return int(piece["calls"])

    def measure(self, piece: Piece) -> Result:
        op, dtype = piece["op"], getattr(torch, piece["dtype"])
        large = max(len(THREADS), piece["calls"] // 10)
        wrong = []
        try:
            for case, calls in (
                (OPS[op].main_case, piece["calls"] - large),
                (LARGE[op], large),
            ):
                torch.manual_seed(0)
                inputs = case.make(dtype)
                torch.set_num_threads(1)
                first = run(case.ours, inputs, None, case.differentiable)
                upstream = torch.randn_like(first[0])
                first = run(case.ours, inputs, upstream, case.differentiable)
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    differing = set()
                    for _ in range(-(-calls // len(THREADS))):
                        again = run(case.ours, inputs, upstream, case.differentiable)
                        differing |= {
                            i
                            for i, (a, b) in enumerate(zip(first, again, strict=True))
                            if not same_bits(a, b)
                        }
                    wrong += [
                        f"{case} in {piece['dtype']}, {piece['level']}, {threads} threads: "
                        f"{'gradient ' + str(i - 1) if i else 'the output'} differs"
                        for i in sorted(differing)
                    ]
        finally:
            torch.set_num_threads(1)
        return {"failures": wrong}

    def tables(self, measured: Measured) -> list[str]:
        tried = list(dict.fromkeys(piece["level"] for piece, _ in measured))
        rows = []
        for op in OPS:
            cells = []
            for level in tried:
                own = [r for p, r in measured if p["op"] == op and p["level"] == level]
                wrong = sum(bool(result["failures"]) for result in own)
                said = f"same bits in {len(own)} dtypes" if own else ""
                cells.append(f"**differs in {wrong} of {len(own)} dtypes**" if wrong else said)
            if any(cells):
                rows.append([code(op), *cells])
        return [table(["operation", *tried], rows)]
