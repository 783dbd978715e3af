"""The figure "versions" of scripts/reliability.py: one binary on each torch that it is meant for.

    make torch-versions                                    # build/torch-2.11.0, ...: gigabytes each
    TORCHBP_TORCH_VENVS=~/a:~/b python scripts/reliability.py --only versions   # yours as well

What is measured are the versions that an environment was found for; the others are not claimed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torchbp
from scripts.reliability_frame import ROOT, Figure, Measured, Piece, Result
from scripts.reliability_sanitizers import NO_COMPILER, last_line, passed_in
from scripts.reliability_tree import checksum, importing
from scripts.write_readme_tables import table

__all__ = ["WANTED", "Environment", "Versions", "environments"]

#: The oldest torch whose stable ABI is used (setup.py, TARGET), the one that is pinned, the newest.
WANTED = ("2.11", "2.13", "2.15")

#: Environments, separated as in PATH: folders that venv made, or interpreters.
VARIABLE = "TORCHBP_TORCH_VENVS"

#: Where make torch-versions puts its own.
MADE = ROOT / "build"

#: What asks an environment who it is.
QUESTION = """
import json, sys
from importlib.metadata import version
print(json.dumps({"torch": version("torch"), "python": sys.implementation.cache_tag}))
"""

#: What says which torch and which binary the tests run on.
IDENTITY = """
import json, pathlib, torch, torchbp
from scripts.reliability_tree import checksum
binary = checksum([pathlib.Path(torchbp._C.__file__).read_bytes()])
print(json.dumps({"torch": torch.__version__, "binary": binary}))
"""

OP_TESTS = (
    ("tests/test_functional.py", ""),
    ("tests/functions", NO_COMPILER),
    ("tests/functions", "compile or export"),
    ("tests/cpu", "not elements"),
    ("tests/nn", ""),
    ("tests/optim", ""),
    ("tests/test_lecture.py", ""),
)


@dataclass(frozen=True)
class Environment:
    """An interpreter, and the torch that is installed for it."""

    python: str
    torch: str


def interpreters() -> list[str]:
    """This one, those that were named, those that make torch-versions made."""
    named = [Path(word) for word in os.environ.get(VARIABLE, "").split(os.pathsep) if word]
    found = [*named, *sorted(MADE.glob("torch-*"))]
    binaries = [path / "bin" / "python" if path.is_dir() else path for path in found]
    # Not resolved: an environment's python is a link to the one that it was made from.
    return list(dict.fromkeys([sys.executable, *(str(path.absolute()) for path in binaries)]))


@cache
def asked(python: str) -> Environment | None:
    """What is installed there; None if that is no Python that can load this binary."""
    try:
        result = subprocess.run(
            [python, "-c", QUESTION], capture_output=True, text=True, timeout=60
        )
        answer = json.loads(result.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if answer["python"] != sys.implementation.cache_tag:
        return None
    return Environment(python, answer["torch"])


def environments() -> dict[str, Environment]:
    """Version as in WANTED -> an environment that has it."""
    found: dict[str, Environment] = {}
    for environment in filter(None, map(asked, interpreters())):
        for version in WANTED:
            if environment.torch.startswith(f"{version}."):
                found.setdefault(version, environment)
    return found


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = importing(ROOT, {"OMP_NUM_THREADS": "1"})
    return subprocess.run(
        [python, *arguments], cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, errors="replace",
    )  # fmt: skip


class Versions(Figure):
    name = "versions"
    title = "Torch versions"
    claim = (
        f"The same binary, built with one torch, passes the tests of the operations on torch "
        f"{', '.join(WANTED[:-1])} and {WANTED[-1]}."
    )
    unit = "runs"
    sample = 0.05
    sources = (
        "tests/*.py", "tests/cpu/*.py", "tests/functions/*.py", "tests/nn/*.py", "tests/optim/*.py",
        "torchbp/**/*.py", "scripts/reliability_versions.py",
    )  # fmt: skip

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        found = environments()
        every: list[Piece] = [
            {
                "torch": version,
                "found": found[version].torch if version in found else None,
                "tests": tests,
                "which": which,
            }
            for version in WANTED
            for tests, which in OP_TESTS
        ]
        if fraction == 1:
            return every
        return [
            piece for piece in every if piece["found"] and piece["tests"] == "tests/test_lecture.py"
        ]

    def size(self, piece: Piece) -> int:
        return 1

    def obstacle(self, piece: Piece | None = None) -> str | None:
        if piece is not None and piece["found"] is None:
            return f"no environment has torch {piece['torch']}: make torch-versions, or {VARIABLE}"
        return None

    def measure(self, piece: Piece) -> Result:
        python = environments()[piece["torch"]].python
        label = f"torch {piece['found']}, {piece['tests']}"
        shown = run(python, "-c", IDENTITY)
        try:
            identity = json.loads(shown.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            return {"tests": 0, "failures": [f"{label}: {last_line(shown.stdout)}"]}
        ours = checksum([Path(torchbp._C.__file__).read_bytes()])
        if identity["binary"] != ours or not identity["torch"].startswith(f"{piece['torch']}."):
            wrong = f"{label}: ran on torch {identity['torch']} and binary {identity['binary']}"
            return {"tests": 0, "failures": [wrong]}
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"]
        result = run(python, "-m", "pytest", *options, "-k", piece["which"], piece["tests"])
        ran = passed_in(result.stdout)
        failures = [
            f"{label}: {line}"
            for line in result.stdout.splitlines()
            if line.startswith(("FAILED", "ERROR"))
        ]
        if not failures and (result.returncode or not ran):
            failures = [f"{label}: exit status {result.returncode}: {last_line(result.stdout)}"]
        return {"tests": ran, "failures": failures}

    def tables(self, measured: Measured) -> list[str]:
        rows = []
        for version in WANTED:
            own = [(piece, result) for piece, result in measured if piece["torch"] == version]
            failures = sum(len(result["failures"]) for _, result in own)
            rows.append(
                [
                    f"{version} ({', '.join(dict.fromkeys(piece['found'] for piece, _ in own))})"
                    if own
                    else version,
                    f"{sum(result['tests'] for _, result in own):,}" if own else "not run",
                    str(failures) if own else "",
                ]
            )
        return [table(["torch", "tests passed", "failures"], rows)]
