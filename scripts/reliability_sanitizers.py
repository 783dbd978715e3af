"""The figure "sanitizers" of scripts/reliability.py: the tests on builds that watch every access.

make asan       # build with AddressSanitizer, then this figure's part of it
make ubsan      # undefined behaviour
make tsan       # races between threads
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scripts.reliability_accuracy import levels
from scripts.reliability_frame import Figure, Measured, Piece, Result
from scripts.reliability_tree import SANITIZERS, Tree, sanitizer_tree
from scripts.write_readme_tables import code, table

__all__ = ["Sanitizers", "Watched", "environment", "last_line", "passed_in", "watch"]

#: What drives the kernels. Tests that compile run Python and not kernels, most of their time.
NO_COMPILER = "not compile and not inductor and not fresh and not export"
OP_TESTS = (
    ("tests/test_functional.py", ""),
    ("tests/test_fuzz.py", ""),
    ("tests/test_lecture.py", ""),
    ("tests/cpu/test_math.py", ""),
    ("tests/cpu/test_products.py", ""),
    ("tests/functions/test_check.py", ""),
    # Watched, these take minutes: in halves.
    ("tests/functions/test_gate.py", "jacobians"),
    ("tests/functions/test_gate.py", "not jacobians"),
    ("tests/functions/test_register.py", "opcheck"),
    ("tests/functions/test_register.py", "not opcheck"),
    ("tests/functions/test_softmax_ce.py", ""),
    ("tests/functions/test_table.py", ""),
    ("tests/nn", ""),
    ("tests/optim/test_optimizers.py", ""),
    ("tests/optim/test_step.py", ""),
    ("tests/data/test_loader.py", ""),
)

#: Those of them that split work among threads, or lead a team.
THREADED = (
    ("tests/test_functional.py", "threads"),
    ("tests/cpu/test_products.py", ""),
    ("tests/functions/test_softmax_ce.py", "threads"),
    ("tests/data/test_loader.py", "threads"),
    ("tests/optim/test_optimizers.py", "threads or memory"),
    ("tests/optim/test_step.py", "threads or team or epoch or scan"),
)
THREADS = (2, 4)

#: sanitizer -> (operation of tests/sanitizers/planted.cpp, arguments, what the report has to say).
PLANTED = {
    "address": (("past_the_end", "torch.ones(8)", "heap-buffer-overflow"),),
    "undefined": (
        ("overflow", "2**62", "signed integer overflow"),
        ("misaligned", "torch.ones(8)", "misaligned address"),
    ),
    "thread": (
        ("race", "100_000, False", "data race"),
        ("race", "100_000, True", "data race"),
        ("no_race", "100_000, False", ""),
        ("no_race", "100_000, True", ""),
    ),
}
EXIT_STATUS = 66

RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python keeps what it has allocated until it ends, and torch too.
    "address": ("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0"),
    "undefined": ("UBSAN_OPTIONS", "print_stacktrace=1"),
    # memcpy and the like are watched wherever they are called from: only our own calls count, as
    # what else PyTorch does is not seen.
    "thread": ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1"),
}


def compiler() -> str | None:
    """The C++ compiler that setup.py uses."""
    return shutil.which(os.environ.get("CXX") or "c++")


@cache
def library(name: str) -> str | None:
    """The compiler's own copy of a library, if it has one."""
    found = compiler()
    if found is None:
        return None
    shown = subprocess.run([found, f"-print-file-name={name}"], capture_output=True, text=True)
    path = shown.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@cache
def openmp(folder: Path) -> str:
    """tests/sanitizers/openmp.c of a copy of the project, compiled: how OpenMP's threads begin."""
    source, target = folder / "tests/sanitizers/openmp.c", folder / "build/openmp.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}")
        command = [str(compiler()), "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(beside)]
        subprocess.run([*command, str(source), "-ldl"], check=True)
        beside.replace(target)
    return str(target)


def environment(sanitizer: str, folder: Path, reports: Path) -> dict[str, str]:
    """What a process that loads sanitized code wants in its environment.

    Args:
        sanitizer: a key of SANITIZERS.
        folder: a copy of the project.
        reports: where reports are written, one file a process.
    """
    runtime = library(RUNTIMES[sanitizer])
    if runtime is None:
        raise RuntimeError(f"{compiler()} has no {RUNTIMES[sanitizer]}")
    # The runtime looks for the C++ library's throw before Python has loaded that library.
    preloaded = [runtime, library("libstdc++.so.6") or ""]
    if sanitizer == "thread":
        preloaded.append(openmp(folder))
    variable, options = OPTIONS[sanitizer]
    common = f"halt_on_error=1:exitcode={EXIT_STATUS}:log_path={reports / 'report'}"
    return {"LD_PRELOAD": " ".join(preloaded), variable: f"{options}:{common}"}


@dataclass(frozen=True)
class Watched:
    """What became of a process: its exit status, its output, and a line of each report."""

    status: int
    output: str
    reports: tuple[str, ...]


def watch(
    sanitizer: str, folder: Path, command: Sequence[str], variables: Mapping[str, str]
) -> Watched:
    """Run a command on sanitized code; whatever a report says counts, in child processes too."""
    with tempfile.TemporaryDirectory() as name:
        own = {**variables, **environment(sanitizer, folder, Path(name))}
        result = subprocess.run(
            command, cwd=folder, env=own, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, errors="replace",
        )  # fmt: skip
        found = [line_of(path.read_text(errors="replace")) for path in sorted(Path(name).iterdir())]
    return Watched(result.returncode, result.stdout, tuple(found))


def passed_in(output: str) -> int:
    """How many tests passed, as pytest says it."""
    passed = re.search(r"(\d+) passed", output)
    return int(passed.group(1)) if passed else 0


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def line_of(report: str) -> str:
    """What a report says, and where in our sources, as one line."""
    said = re.search(r"^.*(?:ERROR: |WARNING: |runtime error: |CHECK failed).*$", report, re.M)
    where = re.search(r"\S*/((?:csrc|tests)/\S+:\d+)", report)
    first = said.group(0) if said else (report.strip().splitlines() or ["an empty report"])[0]
    first = re.sub(r"^\S*==\d+==|^.*?(?=runtime error)|\(pid=\d+\)| at pc 0x.*$", "", first)
    return f"{first.strip()}{f' in {where.group(1)}' if where else ''}"


class Sanitizers(Figure):
    name = "sanitizers"
    title = "Sanitizers"
    claim = (
        "The tests of the operations pass, without one report, on builds that watch each access to "
        "memory (AddressSanitizer), arithmetic and conversions that C++ leaves undefined "
        "(UndefinedBehaviorSanitizer), and accesses that two threads do not order "
        "(ThreadSanitizer, with 2 and with 4 threads). In each build a planted bug of each kind is "
        "reported, and what has none is not."
    )
    unit = "runs"
    sample = 0.1
    sources = (
        "setup.py", "csrc/*.h", "csrc/*.cpp", "csrc/cpu/*", "tests/sanitizers/*",
        "torchbp/**/*.py", "tests/*.py", "tests/cpu/*.py", "tests/data/*.py",
        "tests/functions/*.py", "tests/nn/*.py", "tests/optim/*.py",
        "scripts/reliability_sanitizers.py", "scripts/reliability_tree.py",
    )  # fmt: skip

    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        if fraction < 1:  # a build takes minutes: of what there is
            return [
                piece for piece in self._planted() if sanitizer_tree(piece["sanitizer"]).current
            ]
        every = self._planted()
        for sanitizer in SANITIZERS:
            if sanitizer == "thread":
                every += [
                    {"sanitizer": sanitizer, "tests": tests, "which": which, "threads": threads}
                    for threads in THREADS
                    for tests, which in THREADED
                ]
                continue
            every += [
                {
                    "sanitizer": sanitizer,
                    "tests": tests,
                    "which": f"{NO_COMPILER} and {which}" if which else NO_COMPILER,
                    "simd": level,
                }
                for level in (levels()[0], levels()[-1])
                for tests, which in OP_TESTS
            ]
        return every

    def _planted(self) -> list[Piece]:
        return [
            {"sanitizer": sanitizer, "planted": name, "arguments": arguments, "says": says}
            for sanitizer, bugs in PLANTED.items()
            for name, arguments, says in bugs
        ]

    def size(self, piece: Piece) -> int:
        return 1

    def obstacle(self, piece: Piece | None = None) -> str | None:
        if compiler() is None:
            return "there is no C++ compiler"
        wanted = list(SANITIZERS) if piece is None else [piece["sanitizer"]]
        if not any(sanitizer_tree(sanitizer).current for sanitizer in wanted):
            return f"not built: make {', make '.join(SANITIZERS[name] for name in wanted)}"
        return None

    def measure(self, piece: Piece) -> Result:
        tree = sanitizer_tree(piece["sanitizer"])
        tree.copy()  # tests may have changed where no source has
        return self._planted_bug(piece, tree) if "planted" in piece else self._tests(piece, tree)

    def _planted_bug(self, piece: Piece, tree: Tree) -> Result:
        program = (
            "import torch, torchbp; torch.set_num_threads(2); "
            f"print(torch.ops.torchbp_planted.{piece['planted']}({piece['arguments']}))"
        )
        variables = tree.python({"OMP_NUM_THREADS": "2"})
        found = watch(piece["sanitizer"], tree.folder, [sys.executable, "-c", program], variables)
        said, says = "; ".join(found.reports), piece["says"]
        right = (
            says in said and found.status != 0 if says else not found.reports and found.status == 0
        )
        label = f"{piece['sanitizer']}, planted {piece['planted']}({piece['arguments']})"
        wanted = f"wants a report of {says!r}" if says else "wants no report"
        wrong = f"{label}: {wanted}, got {said or 'none'} (exit status {found.status})"
        return {"said": said, "tests": 0, "failures": [] if right else [wrong]}

    def _tests(self, piece: Piece, tree: Tree) -> Result:
        variables = {"OMP_NUM_THREADS": str(piece.get("threads", 1))}
        if "simd" in piece:
            variables["TORCHBP_CPU"] = piece["simd"]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-p", "no:xdist", "-k", piece["which"], piece["tests"]]
        found = watch(piece["sanitizer"], tree.folder, command, tree.python(variables))
        ran = passed_in(found.output)
        failures = [f"{label_of(piece)}: {report}" for report in found.reports]
        if found.status or not ran:
            last = [line for line in found.output.splitlines() if line.startswith(("FAILED", "E "))]
            said = last[-1] if last else last_line(found.output)
            failures.append(f"{label_of(piece)}: exit status {found.status}: {said}")
        return {"said": "", "tests": ran, "failures": failures}

    def tables(self, measured: Measured) -> list[str]:
        rows = []
        for sanitizer, target in SANITIZERS.items():
            own = [(piece, result) for piece, result in measured if piece["sanitizer"] == sanitizer]
            runs = [(piece, result) for piece, result in own if "planted" not in piece]
            how = dict.fromkeys(
                f"{piece['threads']} threads" if "threads" in piece else piece["simd"]
                for piece, _ in runs
            )
            planted = [
                f"{code(piece['planted'])}: {result['said'].partition(' in ')[0] or 'no report'}"
                for piece, result in own
                if "planted" in piece
            ]
            rows.append(
                [
                    code(f"make {target}"),
                    f"{sum(result['tests'] for _, result in runs):,}",
                    ", ".join(how),
                    str(sum(len(result["failures"]) for _, result in runs)) if runs else "",
                    "; ".join(dict.fromkeys(planted)),
                ]
            )
        head = ["build", "tests", "at", "reports and failures", "what a planted bug is called"]
        return [table(head, rows)]


def label_of(piece: Piece) -> str:
    how = f"{piece['threads']} threads" if "threads" in piece else piece["simd"]
    return f"{piece['sanitizer']}, {piece['tests']}, {how}"
