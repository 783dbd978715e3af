"""The figure "leaks" of scripts/reliability.py: many calls of every operation, and no more memory
in use after them than before.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
from array import array
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.reliability_malformed import MALFORMED, silent
from scripts.write_readme_tables import code, table
from tests.ops import DTYPES, OPS, Case, run

__all__ = ["KINDS", "Leaks", "Memory"]

CALLS = 100_000  # of each operation
BLOCKS = 10
WARMING = 2  # blocks before the first that counts: caches fill

#: What a call may leave behind, in the median of the blocks. The least that malloc gives is 32
#: bytes, so that a leak in a thirtieth of the calls is seen.
LIMITS = {"malloc": 1.0, "objects": 0.01, "resident": 4.0}
#: And what a block may, however few calls it has: Python's own caches settle slowly.
OF_BLOCK = {"malloc": 512, "objects": 64, "resident": 32768}


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


@cache
def _mallinfo() -> Any:
    """glibc's mallinfo2, or None where there is none."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Mallinfo
    return function


@dataclass(frozen=True)
class Memory:
    """What the process uses: bytes from malloc (of all tensors, and of all that C++ makes), objects
    of Python, bytes that are resident.
    """

    malloc: int
    objects: int
    resident: int

    @staticmethod
    def now() -> Memory:
        gc.collect()
        info = _mallinfo()()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Memory(
            info.uordblks + info.hblkhd,
            sys.getallocatedblocks(),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )


def growth(calls: list[Callable[[], Any]], times: int) -> dict[str, float]:
    """What each call leaves behind, by the block in the middle: what happens once does not count.

    Args:
        calls: called in turn; as often each in every block.
        times: how many calls there are to be, or a few more.
    """
    rounds = -(-times // (BLOCKS * len(calls)))
    block = rounds * len(calls)
    # Made beforehand, and no objects: what is written down does not count as growth.
    seen = [array("q", bytes(8 * (BLOCKS + 1))) for _ in LIMITS]
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    try:
        for number in range(-WARMING, BLOCKS + 1):
            if number >= 0:
                for values, value in zip(seen, astuple(Memory.now()), strict=True):
                    values[number] = value
            if number < BLOCKS:
                for _ in range(rounds):
                    for call in calls:
                        call()
    finally:
        gc.unfreeze()
    steps = ([after - before for before, after in pairwise(values)] for values in seen)
    grown = [statistics.median(step) / block for step in steps]
    return dict(zip(LIMITS, grown, strict=True)) | {"block": block}


# ---- What is called ------------------------------------------------------------------------------


def prepared(op: str) -> list[tuple[Case, list[Tensor]]]:
    """Every case of an operation in every dtype."""
    torch.manual_seed(0)
    return [(case, case.make(dtype)) for case in OPS[op].cases for dtype in DTYPES]


def forward(op: str) -> list[Callable[[], Any]]:
    return [partial(case.ours, *inputs) for case, inputs in prepared(op)]


def backward(op: str) -> list[Callable[[], Any]]:
    return [
        partial(run, case.ours, inputs, None, case.differentiable) for case, inputs in prepared(op)
    ]


def raising(op: str) -> list[Callable[[], Any]]:
    """Every malformed call."""
    call, draw = MALFORMED[op], Random(0)
    right = {name: make(draw, torch.float32) for name, make in call.right.items()}
    for value in right.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_(len(call.wrong) > 1 and value is next(iter(right.values())))

    def fail(**arguments: Any) -> None:
        try:
            call.function(**{**right, **arguments})
        except (TypeError, ValueError, IndexError, RuntimeError):
            return
        raise AssertionError(f"{op} takes {arguments}")

    return [
        partial(fail, **{name: make(draw, torch.float32)})
        for name, wrong in call.wrong.items()
        for make in wrong
    ]


KINDS: dict[str, Callable[[str], list[Callable[[], Any]]]] = {
    "forward": forward, "backward": backward, "raising": raising,
}  # fmt: skip
#: Of the calls, how many are of a kind.
SHARES = {"forward": 0.25, "backward": 0.5, "raising": 0.25}


class Leaks(Figure):
    name = "leaks"
    title = "Leaks"
    claim = (
        f"{CALLS:,} calls of every operation, half of them forward and backward, a quarter without "
        "gradients and a quarter that raise, over all cases of the tests in every dtype and all "
        "malformed calls: no growth of what malloc "
        f"gave by {LIMITS['malloc']:g} byte a call, of Python's objects by one in "
        f"{1 / LIMITS['objects']:.0f} calls, of resident memory by {LIMITS['resident']:g} bytes a "
        f"call (or {OF_BLOCK['malloc']} bytes, {OF_BLOCK['objects']} objects and "
        f"{OF_BLOCK['resident'] // 1024} KiB a block), in the median of {BLOCKS} blocks of calls "
        f"after {WARMING} that warm up."
    )
    unit = "calls"
    sample = 0.02
    sources = (
        "scripts/reliability_leaks.py",
        "scripts/reliability_malformed.py",
        "tests/ops.py",
        "torchbp/functional.py",
        "torchbp/functions/*.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        return [
            {"op": op, "kind": kind, "calls": round(CALLS * fraction * share)}
            for op in OPS
            for kind, share in SHARES.items()
        ]

    def size(self, piece: Piece) -> int:
        return int(piece["calls"])

    def obstacle(self, piece: Piece | None = None) -> str | None:
        return None if _mallinfo() is not None else "it needs glibc 2.33, whose malloc counts"

    @silent()
    def measure(self, piece: Piece) -> Result:
        grown = growth(KINDS[piece["kind"]](piece["op"]), piece["calls"])
        units = {"malloc": "bytes of malloc", "objects": "objects", "resident": "resident bytes"}
        wrong = [
            f"{piece['op']}, {piece['kind']}: {grown[name]:.3g} {unit} a call are left behind"
            for name, unit in units.items()
            if grown[name] >= LIMITS[name] + OF_BLOCK[name] / grown["block"]
        ]
        return {**grown, "failures": wrong}

    def tables(self, measured: Measured) -> list[str]:
        head = ["operation", "malloc, bytes a call", "objects a call", "resident, bytes a call"]
        rows = []
        for op in OPS:
            own = [result for piece, result in measured if piece["op"] == op]
            if own:
                most = (max(result[name] for result in own) for name in LIMITS)
                rows.append([code(op), *(f"{max(value, 0):.4f}" for value in most)])
        return ["The largest growth of the three kinds of call:", table(head, rows)]
