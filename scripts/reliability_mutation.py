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

from scripts.reliability_frame import Figure, Measured, Piece, Result
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

__all__ = ["EQUIVALENT", "STAGES", "Mutation"]

#: Mutants that no test can notice, and why: what they change is the same for every input, or is
#: refused (by the same class of error, in the same words) by another check. One that is killed all
#: the same, or that is no mutant any more, has to leave the list.
EQUIVALENT: dict[str, str] = {}

_RAW = "tests/functions/test_raw.py"
_OPS = ["tests/functions/test_table.py", "tests/test_functional.py"]
_NOT_COMPILED = "not compile and not export and not inductor and not fresh"

#: kind, or file of a mutant -> what is run, the fastest first, until something fails.
STAGES: dict[str, list[list[str]]] = {
    "row": [
        ["tests/functions/test_table.py", "--deselect",
         "tests/functions/test_table.py::test_every_column_can_be_evaluated_first_thing_in_a_process"],
        ["tests/test_functional.py", "-k", "{row}"],
        ["tests/cpu/test_math.py", "tests/test_lecture.py"],
        ["tests/functions/test_gate.py", "-k", f"{{row}} and {_NOT_COMPILED}"],
        [*_OPS, "tests/test_fuzz.py", "tests/functions/test_gate.py", "-k", _NOT_COMPILED],
    ],
    "native": [
        [_RAW],
        [*_OPS, "tests/functions/test_check.py", "-k", "not compiled"],
        ["tests/functions/test_register.py", "tests/functions/test_softmax_ce.py",
         "tests/cpu/test_products.py", "tests/nn", "-k", _NOT_COMPILED],
    ],
    "csrc/cpu/train.cpp": [
        ["tests/optim/test_step.py", "-k", "refus or closed or logits"],
        ["tests/optim/test_step.py", "-k", _NOT_COMPILED],
    ],
    "csrc/cpu/optim.cpp": [
        ["tests/optim/test_optimizers.py", "-k", "refus"],
        ["tests/optim/test_optimizers.py", "-k", _NOT_COMPILED],
    ],
    "csrc/cpu/images.cpp": [
        ["tests/data/test_loader.py", "-k", "bad_arguments"], ["tests/data/test_loader.py"],
    ],
    "csrc/cpu/backend.cpp": [[_RAW],
                             ["tests/cpu/test_levels.py", "-k", "unknown or best"],
                             ["tests/functions/test_softmax_ce.py"],
                             ["tests/functions/test_check.py", "-k", "not compiled"]],
    "python": [
        ["tests/functions/test_check.py", "-k", "not compiled"],
        ["tests/functions/test_softmax_ce.py", "tests/functions/test_register.py",
         "tests/test_functional.py", "tests/nn"],
        ["tests/functions/test_check.py", "tests/functions/test_gate.py", "tests/test_fuzz.py",
         "tests/cpu/test_products.py"],
    ],
}  # fmt: skip


def stages(mutant: Mutant) -> list[list[str]]:
    """What is run against a mutant."""
    path = mutant.place.partition(":")[0]
    row = mutant.place.partition(".")[0]
    own = STAGES.get(path, STAGES[mutant.kind])
    return [[word.replace("{row}", row) for word in stage] for stage in own]


class Killer:
    """The process of reliability_killer.py in a copy of the project."""

    def __init__(self, tree: Tree, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.reliability_killer", kind],
            cwd=tree.folder,
            env=tree.python({"OMP_NUM_THREADS": "1"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, mutant: Mutant | None, tests: list[str]) -> Result:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        number = native_numbers().get(mutant, 0) if mutant is not None else 0
        request = {
            "mutant": None if mutant is None else asdict(mutant), "number": number, "tests": tests,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("scripts/reliability_killer.py died")
        return dict(json.loads(answer))


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
        "setup.py", "csrc/**/*.h", "csrc/**/*.cpp", "torchbp/functions/*.py",
        "torchbp/functional.py", "tests/*.py", "tests/functions/*.py", "tests/cpu/*.py",
        "tests/nn/*.py", "tests/optim/*.py", "tests/data/test_loader.py",
        "scripts/reliability_mut*.py", "scripts/reliability_killer.py",
    )  # fmt: skip
    equivalent: ClassVar[dict[str, str]] = EQUIVALENT
    _killers: ClassVar[dict[str, Killer]] = {}

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        every = mutants() if native_tree().current or fraction == 1 else python_mutants()
        kinds = list(dict.fromkeys(mutant.kind for mutant in every))
        # Nothing changed: what fails there, kills nothing.
        found: list[Piece] = [
            {"kind": kind, "part": part, "alive": False}
            for kind in kinds
            for part in sorted(STAGES)
            if part == kind or (kind == "native" and part.startswith("csrc"))
        ]
        if fraction < 1:
            step = max(1, round(len(mutants()) * 0.01 / max(fraction, 1e-9) / 2))
            found, every = [], every[:: max(step, round(1 / fraction))][:3]
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

    def _killer(self, kind: str) -> Killer:
        tree = python_tree() if kind == "python" else native_tree()
        if kind not in self._killers:
            tree.copy()
            if kind == "python":
                tree.borrow()
            self._killers[kind] = Killer(tree, kind)
        return self._killers[kind]

    def measure(self, piece: Piece) -> Result:
        killer = self._killer(piece["kind"])
        if not piece["alive"]:
            return self._nothing_planted(piece, killer)
        mutant = Mutant(**{name: piece[name] for name in Mutant.__dataclass_fields__})
        reason = self.equivalent.get(str(mutant))
        for stage, tests in enumerate(stages(mutant)):
            found = killer.run(mutant, tests)
            if found["status"] in (0, 5):  # all passed, or there is none of that name
                continue
            if found["status"] in (3, 4) or found["status"] == 70:
                raise RuntimeError(f"{mutant}: pytest says {found['last']}")
            by = found["by"] or f"signal {-found['status']}"
            wrong = [] if reason is None else [f"{mutant}: listed as equivalent, killed by {by}"]
            return {"killed": True, "by": by, "stage": stage, "failures": wrong}
        wrong = [] if reason is not None else [f"{mutant}: survives"]
        return {"killed": False, "by": "", "stage": -1, "failures": wrong}

    def _nothing_planted(self, piece: Piece, killer: Killer) -> Result:
        wrong, passed = [], 0
        for tests in STAGES[piece["part"]]:
            found = killer.run(None, [word.replace("{row}", "relu") for word in tests])
            passed += found["passed"]
            if found["status"] != 0:
                wrong.append(f"without a mutant, {' '.join(tests)}: {found['by'] or found['last']}")
        return {"killed": False, "by": "", "stage": -1, "passed": passed, "failures": wrong}

    def failures(self, measured: Measured) -> list[str]:
        known = {str(mutant) for mutant in mutants()}
        gone = [
            f"{text}: listed as equivalent, and no mutant"
            for text in self.equivalent
            if text not in known
        ]
        return [*super().failures(measured), *gone]

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
                    str(len(same)), str(sum(bool(r["failures"]) for _, r in own)),
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
