"""scripts/write_readme_tables.py: the README's tables are those of the binary and of the measured
times; drift is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import torchbp
from scripts import write_readme_tables
from torchbp.functions.table import Row

TEXT = """\
# Title

<!-- gates:begin -->
old
<!-- gates:end -->

The rest.

<!-- benchmark:begin -->
old
<!-- benchmark:end -->
"""

TIMES: dict[str, Any] = {
    "machine": {"processor": "a processor", "cores": 2, "simd": "avx2"},
    "versions": {"torch": "2.13.0", "jax": "0.6"},
    "date": "2026-01-31",
    "quick": False,
    "results": [
        {
            "case": "batches",
            "about": "an epoch | of input",
            "threads": threads,
            "contestants": {
                "torchbp": {"seconds": 0.25 / threads, "ratio": 1.0},
                "torch": {"seconds": 2.6, "ratio": 10.4 * threads},
                "torch, shift too": {"seconds": 3.0, "ratio": 12.0 * threads},
            },
            "floor": 0.025,
            "others": 0.2 * (threads - 1),
        }
        for threads in (1, 2)
    ],
}


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TIMES in a file, in place of docs/benchmark.json."""
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(TIMES))
    monkeypatch.setattr(write_readme_tables, "TIMES", path)
    return path


def test_readme_is_up_to_date() -> None:
    """The one test that fails on drift: run scripts/write_readme_tables.py."""
    root = Path(write_readme_tables.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "scripts/write_readme_tables.py", "--check"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_tables_stand_between_the_markers_and_nothing_else_changes(readme: Path) -> None:
    assert write_readme_tables.main([str(readme)]) == 0
    text = readme.read_text()
    before, between, after = TEXT.split("\nold\n")
    assert text.startswith(before)
    assert between in text
    assert text.endswith(after)
    assert "\nold\n" not in text
    for row in torchbp.ROWS.values():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{row.name}`"))
        for column in row.columns.values():
            assert column.replace("|", r"\|") in line
    for name in torchbp.functional.__all__:
        assert f"| `{name}`" in text, f"{name} is in no table"


def test_every_line_of_a_table_has_the_same_cells(readme: Path) -> None:
    write_readme_tables.main([str(readme)])
    gates, _, times = readme.read_text().partition("<!-- gates:end -->")
    times = times.replace(r"\|", "")
    assert {line.count("|") for line in times.splitlines() if line.startswith("|")} == {7}
    lines = [line for line in gates.splitlines() if line.startswith("|")]
    cells = [line.replace(r"\|", "").count("|") for line in lines]
    assert set(cells[: 2 + len(torchbp.ROWS)]) == {8}
    assert set(cells[2 + len(torchbp.ROWS) :]) == {5}


def test_check_tells_drift_and_writes_nothing(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write_readme_tables.main(["--check", str(readme)]) == 1
    assert "out of date: run scripts/write_readme_tables.py" in capsys.readouterr().err
    assert readme.read_text() == TEXT
    write_readme_tables.main([str(readme)])
    assert write_readme_tables.main(["--check", str(readme)]) == 0


def test_another_row_is_drift(readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_readme_tables.main([str(readme)])
    row = torchbp.ROWS["tanh"]
    text = {**row.columns, "dx": "dy", "name": "tanh", "inputs": "x", "parameter": "none"}
    changed = Row.parse({**text, "saves": "y"})
    monkeypatch.setattr(write_readme_tables, "ROWS", {**torchbp.ROWS, "tanh": changed})
    assert write_readme_tables.main(["--check", str(readme)]) == 1


def test_times_are_those_at_the_most_threads(readme: Path) -> None:
    assert write_readme_tables.main([str(readme)]) == 0
    _, _, text = readme.read_text().partition("<!-- benchmark:begin -->")
    text = " ".join(text.split("\n"))
    assert "Measured on 2 threads of an a processor (avx2); torch 2.13.0, jax 0.6; 2026" in text
    assert " Other processes took up to 20% of the machine meanwhile." in text
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| `batches`")]
    assert rows == [
        r"| `batches`<br>an epoch \| of input | **125 ms** |"
        " 2.60 s, **20.8x**<br>torch, shift too: 3.00 s, **24.0x** |  |  | 20% |"
    ]


def test_other_times_are_drift(
    readme: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_readme_tables.main([str(readme)])
    assert write_readme_tables.main(["--check", str(readme)]) == 0
    measured.write_text(json.dumps(TIMES).replace("20.8", "20.7"))
    assert write_readme_tables.main(["--check", str(readme)]) == 1
    assert "out of date" in capsys.readouterr().err


def test_times_of_a_quick_run_or_none_are_refused(
    readme: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured.write_text(json.dumps({**TIMES, "quick": True}))
    assert write_readme_tables.main([str(readme)]) == 1
    assert "is of a quick run" in capsys.readouterr().err
    measured.unlink()
    assert write_readme_tables.main([str(readme)]) == 1
    assert "benchmark.json: No such file" in capsys.readouterr().err
    assert readme.read_text() == TEXT


@pytest.mark.parametrize(
    "text", ["", TEXT + TEXT, TEXT.replace("end", "END"), "".join(reversed(TEXT))]
)
def test_readme_without_its_markers_is_refused(
    text: str, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme.write_text(text)
    assert write_readme_tables.main([str(readme)]) == 1
    assert ":begin --> and, after it, <!-- " in capsys.readouterr().err
    assert readme.read_text() == text
