"""Figures to try the frame of scripts/reliability.py with: fast, and told by files what to do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torchbp
from scripts.reliability_frame import Figure, Measured, Piece, Result


class Squares(Figure):
    """The squares of 0, 1, ..., 9, each a piece of two cases."""

    name = "squares"
    title = "Squares of numbers"
    claim = "Squares are not 49."
    unit = "numbers"
    sample = 0.2
    sources = ("tests/scripts/reliability_fixture.py",)
    numbers = 7

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        return [
            {"number": number, "level": "baseline" if number < 3 else None}
            for number in range(round(self.numbers * fraction))
        ]

    def size(self, piece: Piece) -> int:
        return 2

    def measure(self, piece: Piece) -> Result:
        print("what a figure prints is not an answer")
        square = piece["number"] ** 2
        wrong = ["a square is 49"] if square == 49 else []
        return {"square": square, "level": torchbp.cpu_level(), "failures": wrong}

    def tables(self, measured: Measured) -> list[str]:
        return [", ".join(str(result["square"]) for _, result in measured)]


class Wrong(Squares):
    name = "wrong"
    numbers = 10


class Hindered(Squares):
    name = "hindered"

    def obstacle(self, piece: Piece | None = None) -> str:
        return "it needs a larger machine"


class Dying(Squares):
    """As Squares, but 4 raises and 5 ends the process, unless a file is there."""

    name = "dying"
    cured = Path("to be set")

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        return [{**piece, "cured": str(self.cured)} for piece in super().pieces(fraction)]

    def measure(self, piece: Piece) -> Result:
        if not Path(piece["cured"]).exists():
            if piece["number"] == 4:
                raise ValueError("four")
            if piece["number"] == 5:
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().measure(piece)
