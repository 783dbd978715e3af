"""The figure "mutation" of scripts/reliability.py: whether the tests notice a fault.

python scripts/reliability.py --only mutation                 # all (build with make mutants)
python scripts/reliability.py --only mutation:python          # checks in Python
python scripts/reliability.py --only mutation:sigmoid.dx      # one column of one row
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import ClassVar

from scripts.reliability_equivalent import EQUIVALENT
from scripts.reliability_frame import Figure, Measured, Piece, Result, end
from scripts.reliability_mutants import (
    Mutant,
    mutants,
    native_mutants,
    native_numbers,
    native_tree,
    python_mutants,
    row_mutants,
)
from scripts.reliability_tree import Tree
from scripts.write_readme_tables import code, table

__all__ = ["STAGES", "Mutation"]

_RAW = "tests/functions/test_raw.py"
_TABLE = "tests/functions/test_table.py"
_NOT_COMPILED = "not compile and not export and not inductor and not fresh"
_IMAGES = [
    ["tests/data/test_loader.py", "-k", "bad_arguments or opened"],
    ["tests/data/test_loader.py"],
]

_STEPS = [
    ["tests/optim/test_step.py", "-k", "refus or behind or closed or logits or dismisses"],
    ["tests/optim/test_step.py", "-k", _NOT_COMPILED],
]

#: kind, or file of a mutant -> what is run, the fastest first, until something fails. Of the first
#: of a row's, only what names the row.
STAGES: dict[str, list[list[str]]] = {
    "row": [
        [_TABLE, "--deselect",
         f"{_TABLE}::test_every_column_can_be_evaluated_first_thing_in_a_process"],
        ["tests/test_functional.py"],
        ["tests/cpu/test_math.py", "tests/test_lecture.py"],
        ["tests/functions/test_gate.py", "-k", _NOT_COMPILED],
    ],
    "native": [
        [_RAW],
        [_TABLE, "tests/test_functional.py", "tests/functions/test_check.py",
         "-k", "not compiled"],
        ["tests/functions/test_register.py", "tests/functions/test_softmax_ce.py",
         "tests/cpu/test_products.py", "tests/nn", "-k", _NOT_COMPILED],
    ],
    "csrc/cpu/train.cpp": _STEPS,
    "csrc/trainer.h": _STEPS,
    "csrc/optim_ops.h": [
        ["tests/optim/test_optimizers.py", "-k", "refus"],
        ["tests/optim/test_optimizers.py", "-k", _NOT_COMPILED],
    ],
    "csrc/cpu/images.cpp": _IMAGES,
    "csrc/images.h": _IMAGES,
    "csrc/handles.h": [
        ["tests/data/test_loader.py", "-k", "opened"],
        ["tests/optim/test_step.py", "-k", "closed or behind"],
    ],
    "csrc/cpu/backend.cpp": [
        [_RAW], ["tests/cpu/test_levels.py", "-k", "unknown or best"],
        ["tests/functions/test_softmax_ce.py"],
        ["tests/cpu/test_levels.py", "-k", "baseline"],
    ],
    "python": [
        ["tests/functions/test_check.py", "-k", "not compiled"],
        ["tests/functions/test_mlp.py", "tests/cuda/test_late_errors.py",
         "tests/test_functional.py", "tests/nn"],
        ["tests/functions/test_softmax_ce.py", "tests/functions/test_register.py"],
        ["tests/functions/test_gate.py", "tests/test_fuzz.py", "-k", _NOT_COMPILED],
        ["tests/functions/test_check.py", "-k", "compiled"],
    ],
}  # fmt: skip


def mutant_of(piece: Piece) -> Mutant:
    return Mutant(**{name: piece[name] for name in Mutant.__dataclass_fields__})


def stages(mutant: Mutant) -> list[tuple[list[str], str]]:
    """What is run against a mutant: arguments of pytest, and a word that a test's name has."""
    row = mutant.place.partition(".")[0] if mutant.kind == "row" else ""
    own = STAGES.get(mutant.place.partition(":")[0], STAGES[mutant.kind])
    return [(tests, row if row and i == 1 else "") for i, tests in enumerate(own)]


class Killer:
    """A process of reliability_killer.py in a copy of the project, with its tests collected."""

    def __init__(self, tree: Tree, tests: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.reliability_killer", *tests],
            cwd=tree.folder,
            env=tree.python({"OMP_NUM_THREADS": "1"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._answer()
        except RuntimeError:
            end(self.process)
            raise

    def _answer(self) -> Result:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = dict(json.loads(line)) if line else {"error": "scripts/reliability_killer.py died"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def run(self, mutant: Mutant | None, word: str = "") -> Result:
        """{"killed", "by", "ran"}."""
        assert self.process.stdin is not None
        number = native_numbers().get(mutant, 0) if mutant is not None else 0
        request = {
            "mutant": None if mutant is None else asdict(mutant), "number": number, "word": word,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()


def python_tree() -> Tree:
    """A copy with the extension in use, for mutants of Python."""
    return Tree("python", {})


class Mutation(Figure):
    name = "mutation"
    title = "Strength of the tests"
    claim = (
        "A fault in any column of any row of `csrc/gates.h` (another sign, constant or comparison, "
        "a term dropped), or in any check of arguments in C++ or Python (dropped, negated, a part "
        "of it dropped, a comparison changed), is noticed by `make test`: every mutant is killed, "
        "but for those that are the same program."
    )
    unit = "mutants"
    sample = 0.01
    sources = (
        "setup.py", "csrc/*.h", "csrc/*.cpp", "csrc/cpu/*", "torchbp/functions/*.py",
        "torchbp/functional.py", "tests/*.py", "tests/functions/*.py", "tests/cpu/*.py",
        "tests/nn/*.py", "tests/optim/*.py", "tests/data/test_loader.py",
        "tests/cuda/test_late_errors.py",
        "scripts/reliability_mut*.py", "scripts/reliability_killer.py",
    )  # fmt: skip
    equivalent: ClassVar[dict[str, str]] = EQUIVALENT
    _killers: ClassVar[dict[str, Killer]] = {}

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        found: list[Piece]
        if fraction < 1:  # without a build those of Python alone
            every = mutants() if native_tree().current else python_mutants()
            every, found = every[:: round(1 / fraction)], []
        else:
            every = mutants()
            # Nothing changed: what fails there, kills nothing.
            parts = {kind: [kind] for kind in dict.fromkeys(mutant.kind for mutant in every)}
            parts["native"] += [part for part in STAGES if part.startswith("csrc")]
            found = [
                {"kind": kind, "part": part, "alive": False}
                for kind, own in parts.items()
                for part in own
            ]
        return [
            *found,
            *(
                {**asdict(mutant), "part": mutant.place.partition(":")[0], "alive": True}
                for mutant in every
            ),
        ]

    def size(self, piece: Piece) -> int:
        return 1

    def obstacle(self, piece: Piece | None = None) -> str | None:
        if piece is not None and piece["kind"] != "python" and not native_tree().current:
            return "the mutants in C++ are not built: make mutants"
        return None

    def _killer(self, kind: str, tests: list[str]) -> Killer:
        tree = python_tree() if kind == "python" else native_tree()
        key = " ".join([str(tree.folder), *tests])
        if key not in self._killers:
            tree.copy()
            if kind == "python":
                tree.borrow()
            self._killers[key] = Killer(tree, tests)
        return self._killers[key]

    def measure(self, piece: Piece) -> Result:
        if not piece["alive"]:
            return self._nothing_planted(piece)
        mutant = mutant_of(piece)
        for stage, (tests, word) in enumerate(stages(mutant)):
            found = self._killer(mutant.kind, tests).run(mutant, word)
            if found["killed"]:
                return {"killed": True, "by": found["by"], "stage": stage}
        return {"killed": False, "by": "", "stage": -1}

    def _nothing_planted(self, piece: Piece) -> Result:
        failures, ran = [], 0
        for tests in STAGES[piece["part"]]:
            found = self._killer(piece["kind"], tests).run(None)
            ran += found["ran"]
            if found["killed"]:
                failures.append(f"without a mutant, {' '.join(tests)}: {found['by']}")
        return {"killed": False, "by": "", "stage": -1, "ran": ran, "failures": failures}

    def _wrong(self, piece: Piece, result: Result) -> list[str]:
        """What is wrong with the result of a piece, by the list of equivalents as it is now."""
        if not piece["alive"]:
            return list(result["failures"])
        mutant = mutant_of(piece)
        listed = str(mutant) in self.equivalent
        if result["killed"]:
            by = result["by"]
            return [f"{mutant}: listed as equivalent, killed by {by}"] if listed else []
        return [] if listed else [f"{mutant}: survives"]

    def failures(self, measured: Measured) -> list[str]:
        known = {str(mutant) for mutant in mutants()}
        gone = [
            f"{text}: listed as equivalent, and no mutant"
            for text in self.equivalent
            if text not in known
        ]
        return [line for found in measured for line in self._wrong(*found)] + gone

    def tables(self, measured: Measured) -> list[str]:
        what = {
            "row": "rows of `csrc/gates.h`",
            "native": "checks in C++",
            "python": "checks in Python",
        }
        every = {"row": row_mutants(), "native": native_mutants(), "python": python_mutants()}
        rows, equivalents = [], []
        for kind, label in what.items():
            own = [(p, r) for p, r in measured if p["kind"] == kind and p["alive"]]
            same = [str(m) for m in every[kind] if str(m) in self.equivalent]
            killed = sum(r["killed"] for _, r in own)
            rows.append(
                [
                    label, f"{len(every[kind]):,}", f"{len(own):,}", f"{killed:,}",
                    str(len(same)), str(sum(bool(self._wrong(*found)) for found in own)),
                ]
            )  # fmt: skip
            equivalents += [[code(text), self.equivalent[text]] for text in same]
        head = ["mutants of", "there are", "tried", "killed", "the same program", "survive"]
        parts = [table(head, rows)]
        if equivalents:
            parts += [
                "The same program, and why:",
                table(["mutant", "why no test can notice it"], equivalents),
            ]
        return parts
