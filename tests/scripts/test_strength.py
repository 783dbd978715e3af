"""scripts/reliability_sanitizers.py, _mutation.py and _versions.py: planted faults are found, and
what was not measured is not claimed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import torchbp
from scripts import (
    reliability_mutants,
    reliability_mutation,
    reliability_sanitizers,
    reliability_versions,
)
from scripts.reliability_equivalent import EQUIVALENT
from scripts.reliability_frame import ROOT, end
from scripts.reliability_mutants import (
    Mutant,
    cells,
    conditions,
    cxx_variants,
    header_with_mutants,
    mutants,
    native_mutants,
    native_numbers,
    planted_code,
    python_mutants,
    row_mutants,
    source_with_mutants,
    table_rows,
    variants,
)
from scripts.reliability_mutation import Mutation, stages
from scripts.reliability_sanitizers import Sanitizers, compiler, library, line_of, watch
from scripts.reliability_tree import SANITIZERS, Tree
from scripts.reliability_versions import WANTED, Versions

# ---- sanitizers ----------------------------------------------------------------------------------

BUGS = {
    "address": ("int* p = new int[2]; p += n; return *p;", "heap-buffer-overflow"),
    "undefined": ("int big = 0x7fffffff; return (big + n) != 0;", "signed integer overflow"),
    "thread": (
        "static int count; std::thread other([] { ++count; }); ++count; other.join(); return 0;",
        "data race",
    ),
}


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_a_bug_is_reported_and_its_absence_is_not(sanitizer: str, tmp_path: Path) -> None:
    """The options, the preloaded libraries and where a report goes, on the smallest program."""
    if library(reliability_sanitizers.RUNTIMES[sanitizer]) is None:
        pytest.skip(f"{compiler()} has no {sanitizer} sanitizer")
    code, says = BUGS[sanitizer]
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "bug.cpp"
    source.write_text(
        f"#include <thread>\nint f(int n) {{ {code} }}\n"
        "int main(int n, char**) { return n > 2 ? f(n) & 0 : 0; }\n"
    )
    program = tmp_path / "bug"
    command = [str(compiler()), "-g1", f"-fsanitize={sanitizer}", "-pthread", "-o", str(program)]
    subprocess.run([*command, str(source)], check=True)
    variables = {"PATH": "/usr/bin:/bin"}
    quiet = watch(sanitizer, ROOT, [str(program)], variables)
    assert (quiet.status, quiet.reports) == (0, ())
    found = watch(sanitizer, ROOT, [str(program), "1", "2"], variables)
    assert found.status != 0
    assert len(found.reports) == 1
    assert says in found.reports[0]
    assert "in csrc/bug.cpp:2" in found.reports[0]


def test_the_line_of_a_report() -> None:
    report = (
        "=====\n==12==ERROR: AddressSanitizer: heap-use-after-free on address 0x6 at pc 0x7 bp\n"
    )
    report += "    #0 0x1 in column /a/b/csrc/cpu/level.h:39\n"
    said = "ERROR: AddressSanitizer: heap-use-after-free on address 0x6"
    assert line_of(report) == f"{said} in csrc/cpu/level.h:39"
    assert line_of("") == "an empty report"


@pytest.mark.parametrize(
    ("status", "output", "reports", "right"),
    [
        (0, "12 passed in 1 s", (), True),
        (0, "12 passed in 1 s", ("a race",), False),  # in a child process, say
        (1, "FAILED tests/x.py::y - z\n1 failed, 11 passed", (), False),
        (5, "12 deselected in 1 s", (), False),
        (0, "", (), False),
    ],
)
def test_what_fails_a_run(
    monkeypatch: pytest.MonkeyPatch, status: int, output: str, reports: tuple[str, ...], right: bool
) -> None:
    found = reliability_sanitizers.Watched(status, output, reports)
    monkeypatch.setattr(reliability_sanitizers, "watch", lambda *_: found)
    monkeypatch.setattr(Tree, "copy", lambda self: None)
    piece = {"sanitizer": "address", "tests": "tests/x.py", "which": "", "simd": "baseline"}
    assert (Sanitizers().measure(piece)["failures"] == []) is right


@pytest.mark.parametrize("says", ["data race", ""])
@pytest.mark.parametrize("reported", [True, False])
def test_a_planted_bug_has_to_be_reported(
    monkeypatch: pytest.MonkeyPatch, says: str, reported: bool
) -> None:
    reports = ("WARNING: data race",) if reported else ()
    found = reliability_sanitizers.Watched(66 if reported else 0, "", reports)
    monkeypatch.setattr(reliability_sanitizers, "watch", lambda *_: found)
    monkeypatch.setattr(Tree, "copy", lambda self: None)
    piece = {"sanitizer": "thread", "planted": "race", "arguments": "2, True", "says": says}
    assert (Sanitizers().measure(piece)["failures"] == []) is (reported is bool(says))


def test_what_is_not_built_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tree, "current", property(lambda self: self.folder.name == "address"))
    figure = Sanitizers()
    pieces = figure.pieces()
    assert {piece["sanitizer"] for piece in pieces} == set(SANITIZERS)
    for piece in pieces:
        assert (figure.obstacle(piece) is None) is (piece["sanitizer"] == "address")
    assert {piece["sanitizer"] for piece in figure.pieces(0.1)} == {"address"}


# ---- mutants -------------------------------------------------------------------------------------


def test_every_column_of_every_row_has_mutants() -> None:
    places = {mutant.place for mutant in row_mutants()}
    assert places == {
        f"{row.name}.{column}" for row in torchbp.ROWS.values() for column in row.columns
    }
    texts = [str(mutant) for mutant in mutants()]
    assert len(texts) == len(set(texts))
    assert len(set(native_numbers().values())) == len(native_numbers())


def test_the_mutants_of_a_column() -> None:
    assert variants("dy * (1 - y)", arithmetic=True) == [
        "dy", "1 - y", "dy * 1", "dy * y", "dy * (1 + y)", "dy * (2 - y)", "dy * (0 - y)",
        "-(dy * (1 - y))", "0",
    ]  # fmt: skip
    assert "where(x <= 0, 0, x)" in variants("where(x < 0, 0, x)", arithmetic=True)
    assert "where(a > b, a, b)" in variants("where((a > b) | isnan(a), a, b)", arithmetic=True)


def test_a_row_with_other_columns_is_refused() -> None:
    header = (ROOT / reliability_mutants.GATES).read_text()
    assert len(cells(header)) == sum(len(row.columns) for row in torchbp.ROWS.values())
    short = re.sub(r"ROW\(exp, *none,", "ROW(exp,", header)
    with pytest.raises(ValueError, match=r"wants 6 columns, got 5: exp"):
        cells(short)


def test_the_mutants_of_a_check_in_cpp() -> None:
    assert list(cxx_variants("a == b")) == ["true", "!(a == b)"]
    assert list(cxx_variants("f(a, b) && n >= 1")) == [
        "true", "!(f(a, b) && n >= 1)", "true && n >= 1", "f(a, b) && true", "f(a, b) && n > 1",
    ]  # fmt: skip
    text = 'void f() {\n  check_like("x, (", a);\n  // check_like(b);\n  int c = check(d);\n'
    text += "  STD_TORCH_CHECK(n < 2 || (m), g);\n}\n"
    found = conditions("a.h", text)
    assert [(one.text, one.call, one.function) for one in found] == [
        ('check_like("x, (", a)', True, "f"), ("n < 2 || (m)", False, "f"),
    ]  # fmt: skip


def test_every_check_in_cpp_has_a_mutant() -> None:
    """As many as a plain search finds; `false` is the end of a search, and no condition."""
    for name in ("csrc/ops.h", "csrc/check.h", "csrc/cpu/train.cpp", "csrc/optim_ops.h"):
        text = (ROOT / name).read_text()
        found = [one for one in conditions(name, text) if not one.call]
        assert len(found) == len(re.findall(r"^\s*STD_TORCH_CHECK\(", text, re.M))
    dropped = {mutant.place for mutant in native_mutants() if mutant.after in ("true", "nothing")}
    assert "csrc/ops.h:check_linear" in dropped
    assert "csrc/check.h:check_like" in dropped


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_mutants_compile(tmp_path: Path) -> None:
    """The rows and the checks with all of their mutants, as the build of make mutants has them."""
    header = (ROOT / reliability_mutants.GATES).read_text()
    numbers = native_numbers()
    by_cell: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for mutant in row_mutants():
        row, column = mutant.place.split(".")
        by_cell.setdefault((row, column), []).append((numbers[mutant], mutant.after))
    folder = tmp_path / "csrc"
    folder.mkdir()
    for path in (ROOT / "csrc").glob("*.h"):
        (folder / path.name).write_text(path.read_text())
    (folder / "gates.h").write_text(header_with_mutants(header, by_cell))
    check = source_with_mutants("csrc/check.h", (ROOT / "csrc/check.h").read_text(), numbers)
    (folder / "check.h").write_text(check)
    (folder / "try.cpp").write_text(
        '#define TORCHBP_LEVEL tried\n#include "columns.h"\n'
        "void f(const float (&in)[2], float (&out)[1]) "
        "{ torchbp::tried::sigmoid_backward::apply(in, out, 0.f); }\n"
    )
    includes = [f"-I{path}" for path in torch_includes()]
    command = [str(compiler()), "-std=c++20", "-fsyntax-only", *includes, str(folder / "try.cpp")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:2000]
    assert check.count("torchbp_mutant ==") >= 8


def torch_includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return include_paths()


def test_the_table_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for `_C.rows()` there is the table; with a mutant, it has that text."""
    monkeypatch.setattr(reliability_mutants, "ORIGINAL", reliability_mutants.GATES)
    monkeypatch.delenv("TORCHBP_MUTANT", raising=False)
    assert table_rows() == [dict(row) for row in torchbp._C.rows()]
    mutant = next(m for m in row_mutants() if m.place == "tanh.forward")
    monkeypatch.setenv("TORCHBP_MUTANT", json.dumps(asdict(mutant)))
    changed = {row["name"]: row for row in table_rows()}
    assert changed["tanh"]["forward"] == mutant.after


CHECK = "torchbp/functions/check.py"


class Here(Tree):
    """These sources themselves, which a mutant of Python needs no copy of."""

    def __init__(self) -> None:
        super().__init__("here", {})
        self.folder = ROOT


HERE = Here()


def test_a_mutant_of_a_check_in_python() -> None:
    text = (ROOT / CHECK).read_text()
    mutant = Mutant("python", f"{CHECK}:device", "value.device != other.device", "False")
    assert mutant in python_mutants()
    device = torchbp.functions.check.device
    given = "op", "b", torch.ones(1, device="meta"), "a", torch.ones(1)
    FunctionType(planted_code(text, mutant), {})(*given)
    with pytest.raises(ValueError, match="op: b wants the device of a"):
        device(*given)
    with pytest.raises(ValueError, match="no such mutant"):
        planted_code(text, Mutant("python", f"{CHECK}:device", "a", "b"))


def test_killed_and_surviving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that sees a mutant kills it, one that does not lets it live; in the figure's words, a
    survivor is a failure, and so is one that is listed as equivalent and killed.
    """
    before = "not isinstance(value, Integral) or isinstance(value, bool)"
    mutant = Mutant("python", f"{CHECK}:integer", before, "False")
    assert mutant in python_mutants()
    sees, blind = tmp_path / "test_sees.py", tmp_path / "test_blind.py"
    sees.write_text(
        "import pytest\nfrom torchbp.functions import check\n"
        "def test():\n    with pytest.raises(TypeError):\n        check.integer('op', 'n', 1.5)\n"
    )
    blind.write_text("def test():\n    import torchbp\n")
    killer = reliability_mutation.Killer(HERE, [str(sees), str(blind)])
    whole, noticed, missed = (
        killer.run(None), killer.run(mutant, "test_sees.py"), killer.run(mutant, "test_blind.py"),
    )  # fmt: skip
    end(killer.process)
    assert (whole["killed"], whole["ran"]) == (False, 2)
    assert noticed["killed"]
    assert noticed["by"].endswith("test_sees.py::test")
    assert (missed["killed"], missed["ran"]) == (False, 1)

    class Answers:
        def __init__(self, answer: dict[str, Any]) -> None:
            self.answer = answer

        def run(self, mutant: Mutant, word: str) -> dict[str, Any]:
            return self.answer

    piece = {**asdict(mutant), "part": CHECK, "alive": True}

    def failures(answer: dict[str, Any], equivalent: dict[str, str]) -> list[str]:
        figure = Mutation()
        monkeypatch.setattr(Mutation, "_killer", lambda self, kind, tests: Answers(answer))
        monkeypatch.setattr(Mutation, "equivalent", equivalent)
        return figure.failures([(piece, figure.measure(piece))])

    reason = {str(mutant): "it is the same"}
    assert failures(noticed, {}) == []
    assert failures(missed, {}) == [f"{mutant}: survives"]
    assert failures(missed, reason) == []
    (line,) = failures(noticed, reason)
    assert line.startswith(f"{mutant}: listed as equivalent, killed by ")


def test_the_list_of_equivalents(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(EQUIVALENT) <= {str(mutant) for mutant in mutants()}
    assert all(EQUIVALENT.values())
    monkeypatch.setattr(Mutation, "equivalent", {"a.forward: x -> y": "it is the same"})
    assert Mutation().failures([]) == ["a.forward: x -> y: listed as equivalent, and no mutant"]


def test_what_runs_against_a_mutant_is_there() -> None:
    for mutant in mutants():
        for stage, _ in stages(mutant):
            for word in stage:
                if word.startswith("tests/"):
                    assert (ROOT / word.partition("::")[0]).exists(), word


def test_tests_that_cannot_run_kill_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_none.py").write_text("import no_such_module\n")
    with pytest.raises(RuntimeError, match=r"errors, 0 tests|pytest ended with"):
        reliability_mutation.Killer(HERE, [str(tmp_path / "test_none.py")])


# ---- torch versions ------------------------------------------------------------------------------


def interpreter(folder: Path, answer: str) -> Path:
    """An environment whose Python says this of itself."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    return folder


def test_a_version_that_is_not_there_is_not_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tag = sys.implementation.cache_tag
    theirs = interpreter(tmp_path / "a", f'{{"torch": "2.15.1+cpu", "python": "{tag}"}}')
    other = interpreter(tmp_path / "b", '{"torch": "2.11.0", "python": "cpython-39"}')
    broken = interpreter(tmp_path / "c", "no torch")
    folders = ":".join(map(str, (theirs, other, broken, tmp_path / "missing")))
    monkeypatch.setenv(reliability_versions.VARIABLE, folders)
    monkeypatch.setattr(reliability_versions, "MADE", tmp_path / "none")
    found = reliability_versions.environments()
    own = ".".join(torch.__version__.split(".")[:2])
    assert set(found) == {"2.15", *({own} & set(WANTED))}
    assert found["2.15"].python == str(theirs / "bin" / "python")
    figure = Versions()
    for piece in figure.pieces():
        assert (figure.obstacle(piece) is None) is (piece["torch"] in found)
    assert "| 2.11 | not run |" in figure.tables([])[0]
    assert {piece["torch"] for piece in figure.pieces(0.05)} == set(found)


@pytest.mark.parametrize(
    "identity",
    [
        '{"torch": "2.13.0", "binary": "another"}',
        "ImportError: undefined symbol",
        "",
    ],
)
def test_another_binary_or_none_is_no_pass(monkeypatch: pytest.MonkeyPatch, identity: str) -> None:
    def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        out = identity if arguments[0] == "-c" else "9 passed"
        return subprocess.CompletedProcess([], 0, out)

    monkeypatch.setattr(reliability_versions, "run", run)
    here = reliability_versions.Environment("python", "2.13.0")
    monkeypatch.setattr(reliability_versions, "environments", lambda: {"2.13": here})
    piece = {"torch": "2.13", "found": "2.13.0", "tests": "tests/nn", "which": ""}
    assert len(Versions().measure(piece)["failures"]) == 1
