"""The figure "proofs" of scripts/reliability.py: each row of the table of gates proved by SymPy;
each operation's whole Jacobian, and its gradient's, compared with central differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scripts.reliability_accuracy import levels
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.write_readme_tables import code, table
from tests.ops import (
    ACTIVATIONS,
    CASES,
    OPS,
    RAW_OPS,
    Case,
    ce_case,
    classes,
    linear_case,
    maxout_case,
    mlp_case,
    probabilities,
)
from tests.proofs import (
    MODES,
    NOT_COMPARABLE,
    TOLERANCE,
    Compared,
    compare,
    compare_case,
    equations,
)
from tests.raw import REFUSING, bound, samples_of
from torchbp import ROWS

__all__ = ["Proofs"]

#: The most elements of all inputs, whose second-order Jacobian has the square of that.
LIMIT = 2100

#: What fills vectors and the tiles of matrix products, and leaves a rest; the calls of the table of
#: operations that do are too large.
LARGER: tuple[Case, ...] = (
    *(linear_case(f"tiles {name}", (9, 19), 21, activation=name) for name in ACTIVATIONS),
    *(mlp_case(f"tiles {name}", (9, 19), [18, 10], name) for name in ACTIVATIONS if name),
    maxout_case("tiles", (9, 19), 3, 18),
    ce_case("vectors", (9, 37), classes(9, high=37)),
    ce_case("vectors smoothing", (9, 37), classes(9, high=37), True, label_smoothing=0.1),
    ce_case("vectors of probabilities", (9, 37), probabilities(9, 37)),
    ce_case("vectors none", (9, 37), classes(9, high=37), reduction="none"),
)

#: Call -> case.
CALLS: dict[str, Case] = {
    str(case): case
    for case in (*CASES, *LARGER)
    if str(case) not in NOT_COMPARABLE
    and sum(torch.Size(given.shape).numel() for given in case.inputs) <= LIMIT
}

#: What records a gradient of its own in torch.ops.torchbp.
DIFFERENTIABLE = [name for name in RAW_OPS if name not in REFUSING]


@dataclass
class Tally:
    """What came of several calls in one mode."""

    passed: int = 0
    of: int = 0
    elements: int = 0
    worst: float = 0.0

    def add(self, seen: Compared | None) -> None:
        self.of += 1
        if seen is not None:
            self.passed += 1
            self.elements += seen.elements
            self.worst = max(self.worst, seen.worst)


def calls_of(piece: Piece) -> list[str]:
    """The calls of an operation: of a sample, those alone that the slow tests run too."""
    of_op = [call for call, case in CALLS.items() if case.op == piece["op"]]
    if "sample" not in piece:
        return of_op
    return [str(case) for case in OPS[piece["op"]].main_cases if str(case) in of_op]


def checks(piece: Piece) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """(call, mode, the check) of an operation of torchbp.functional or of torch.ops.torchbp."""
    if "op" in piece:
        for call in calls_of(piece):
            for mode in MODES:
                torch.manual_seed(0)
                yield call, mode, partial(compare_case, CALLS[call], mode)
        return
    torch.manual_seed(0)
    for i, sample in enumerate(samples_of(piece["raw"])):
        function, free = bound(piece["raw"], sample)
        for mode in MODES:
            yield (
                f"torch.ops.torchbp.{piece['raw']}, call {i}",
                mode,
                partial(compare, function, free, mode),
            )


def outcome(check: Callable[[], Compared]) -> Compared | str:
    """What was compared, or what is wrong."""
    try:
        return check()
    except Exception as error:  # whatever it is, nothing is proved
        return first_line(error)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def refusal(name: str) -> str | None:
    """What an operation says that refuses to be differentiated; None if it does not."""
    torch.manual_seed(0)
    said = set()
    for sample in samples_of(name):
        function, free = bound(name, sample)
        try:
            function(*free)
        except RuntimeError as error:
            said.add(str(error).strip().splitlines()[0])
        else:
            return None
    return " ".join(sorted(said))


class Proofs(Figure):
    name = "proofs"
    title = "Proofs"
    claim = (
        "Every row of csrc/gates.h, as the binary holds it, is proved: SymPy differentiates the "
        "forward column, and each gradient and each second-order column is equal to what it gives, "
        "on every side of every kink. Every operation, with each activation, reduction and option, "
        "passes PyTorch's gradcheck and gradgradcheck in slow mode, in float64 and at every SIMD "
        "level: its Jacobian from backward and from forward mode, and the Jacobian of its gradient "
        "from both, differ from central differences in no element by more than "
        f"{TOLERANCE:g} (1 + |difference quotient|), and batched they are the same. So does every "
        "operation of torch.ops.torchbp that records a gradient; the others on numbers refuse."
    )
    unit = "columns and checks"
    sample = 0.02
    sources = (
        "scripts/reliability_proofs.py",
        "tests/ops.py",
        "tests/proofs.py",
        "tests/raw.py",
        "torchbp/functional.py",
        "torchbp/functions/*.py",
    )

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        if fraction < 1:
            level = levels()[-1]
            return [
                *({"row": row, "level": level} for row in ROWS),
                *({"op": op, "level": level, "sample": True} for op in OPS),
                *({"raw": name, "level": level} for name in RAW_OPS if name in REFUSING),
            ]
        cut: list[Piece] = [{"row": row, "level": levels()[-1]} for row in ROWS]
        for level in levels():
            cut += [{"op": op, "level": level} for op in OPS]
            cut += [{"raw": name, "level": level} for name in RAW_OPS]
        return cut

    def size(self, piece: Piece) -> int:
        if "row" in piece:
            return len(ROWS[piece["row"]].columns) - 1
        if "op" in piece:
            return len(calls_of(piece)) * len(MODES)
        return len(samples_of(piece["raw"])) * (1 if piece["raw"] in REFUSING else len(MODES))

    def measure(self, piece: Piece) -> Result:
        if "row" in piece:
            return measured_row(piece["row"])
        if piece.get("raw") in REFUSING:
            said = refusal(piece["raw"])
            name = f"torch.ops.torchbp.{piece['raw']}"
            wrong = [] if said else [f"{name}, {piece['level']}: takes inputs that require grad"]
            return {"refuses": said, "failures": wrong}
        tallies = {mode: Tally() for mode in MODES}
        wrong = []
        for call, mode, check in checks(piece):
            found = outcome(check)
            tallies[mode].add(found if isinstance(found, Compared) else None)
            if isinstance(found, str):
                wrong.append(f"{call}, {piece['level']}, {mode}: {found}")
        wrong += [
            f"{piece.get('op') or piece['raw']}, {piece['level']}, {mode}: nothing was compared"
            for mode, tally in tallies.items()
            if not tally.elements
        ]
        return {"modes": {mode: vars(tally) for mode, tally in tallies.items()}, "failures": wrong}

    def tables(self, measured: Measured) -> list[str]:
        parts = []
        rows = {piece["row"]: result for piece, result in measured if "row" in piece}
        if rows:
            proved = sum(not result["failures"] for result in rows.values())
            columns = [result["columns"] for result in rows.values()]
            right = sum(holds for of_row in columns for holds in of_row.values())
            number = sum(map(len, columns))
            equal = sum(result["equations"] for result in rows.values())
            parts += [
                f"{proved} of {len(rows)} rows proved: {right} of {number} columns, in {equal} "
                "equations.",
                table(
                    ["row", "columns proved", "sides of kinks", "equations"],
                    [
                        [
                            code(name),
                            ", ".join(
                                code(column) if holds else f"**not {code(column)}**"
                                for column, holds in result["columns"].items()
                            ),
                            str(result["sides"]),
                            str(result["equations"]),
                        ]
                        for name, result in rows.items()
                    ],
                ),
            ]
        for kind, head, names in (
            ("op", "operation", OPS),
            ("raw", "torch.ops.torchbp", DIFFERENTIABLE),
        ):
            lines = [
                [code(name), *cells([r for p, r in measured if p.get(kind) == name])]
                for name in names
                if any(piece.get(kind) == name for piece, _ in measured)
            ]
            if lines:
                tried = dict.fromkeys(piece["level"] for piece, _ in measured if kind in piece)
                parts += [
                    f"Checks passed at {', '.join(tried)}; the largest difference is relative to "
                    "numbers above 1.",
                    table([head, *MODES, "elements compared", "largest difference"], lines),
                ]
        complete = [p for p, _ in measured if "op" in p and "sample" not in p]
        if complete:
            parts.append("The calls:")
            lines = [
                [code(op), ", ".join(case.name for case in CALLS.values() if case.op == op)]
                for op in dict.fromkeys(piece["op"] for piece in complete)
            ]
            parts.append(table(["operation", "calls"], lines))
            left = [f"{code(call)} is left out: {why}." for call, why in NOT_COMPARABLE.items()]
            parts.append("\n".join(left))
        refusing: dict[str, list[str]] = {}
        for piece, result in measured:
            if piece.get("raw") in REFUSING and result["refuses"]:
                said = result["refuses"].replace(piece["raw"], "NAME")
                refusing.setdefault(said, []).append(piece["raw"])
        for said, names in refusing.items():
            listed = ", ".join(map(code, dict.fromkeys(names)))
            parts.append(f"These operations of torch.ops.torchbp refuse ({said}): {listed}.")
        return parts


def measured_row(name: str) -> Result:
    """{"columns": whether each holds, "sides", "equations", "failures"}."""
    row = ROWS[name]
    holds = {column: False for column in row.columns if column != "forward"}
    wrong, sides, count = [], set(), 0
    try:
        found = list(equations(row))
    except (AssertionError, NameError) as error:
        return {"columns": holds, "sides": 0, "equations": 0, "failures": [f"{name}: {error}"]}
    for equation in found:
        sides.add(str(equation.side))
        count += 1
        if not equation.holds:
            wrong.append(str(equation))
    for column in holds:
        of_column = [equation.holds for equation in found if equation.column == column]
        holds[column] = bool(of_column) and all(of_column)
        if not of_column:
            wrong.append(f"{name}, column {column}: nothing says what it should be")
    return {"columns": holds, "sides": len(sides), "equations": count, "failures": wrong}


def cells(results: list[Result]) -> list[str]:
    """Of an operation at all levels: passed in each mode, elements, largest difference."""
    parts, elements, worst = [], 0, 0.0
    for mode in MODES:
        own = [Tally(**result["modes"][mode]) for result in results]
        passed, of = sum(tally.passed for tally in own), sum(tally.of for tally in own)
        parts.append(f"{passed} of {of}" if passed == of else f"**{passed} of {of}**")
        elements += sum(tally.elements for tally in own)
        worst = max(worst, *(tally.worst for tally in own))
    return [*parts, f"{elements:,}", f"{worst:.1e}"]
