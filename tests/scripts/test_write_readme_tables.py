"""scripts/write_readme_tables.py: the README's tables are those of the binary; drift is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchbp
from scripts import write_readme_tables
from torchbp.functions.table import Row

TEXT = "# Title\n\n<!-- gates:begin -->\nold\n<!-- gates:end -->\n\nThe rest.\n"


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(TEXT)
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
    before, after = TEXT.split("old")
    assert text.startswith(before)
    assert text.endswith(after)
    assert "old" not in text
    for row in torchbp.ROWS.values():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{row.name}`"))
        for column in row.columns.values():
            assert column.replace("|", r"\|") in line
    for name in torchbp.functional.__all__:
        assert f"| `{name}`" in text, f"{name} is in no table"


def test_every_line_of_a_table_has_the_same_cells(readme: Path) -> None:
    write_readme_tables.main([str(readme)])
    lines = [line for line in readme.read_text().splitlines() if line.startswith("|")]
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


@pytest.mark.parametrize(
    "text", ["", TEXT + TEXT, TEXT.replace("end", "END"), "".join(reversed(TEXT))]
)
def test_readme_without_its_markers_is_refused(
    text: str, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme.write_text(text)
    assert write_readme_tables.main([str(readme)]) == 1
    assert "wants <!-- gates:begin -->" in capsys.readouterr().err
    assert readme.read_text() == text
