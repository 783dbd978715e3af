"""The README's examples run as they are printed, print what they say, and draw its pictures."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
DRAWS = "to_svg("


def run(block: str) -> str:
    """What a block prints; where it draws, it needs a layout."""
    if DRAWS in block and importlib.util.find_spec("fast_sugiyama") is None:
        pytest.skip("fast-sugiyama is not installed (Python 3.10)")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "<README>", "exec"), {})
    return printed.getvalue()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1])
def test_python_example(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHBP_CACHE", str(tmp_path / "cache"))  # not the user's own
    said = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert run(block).splitlines() == said


def test_the_picture_is_what_the_code_below_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (block for block in BLOCKS if DRAWS in block)
    ((source, text),) = re.findall(r'<img src="([^"]+)" alt="([^"]+)">', TEXT)
    assert text
    monkeypatch.chdir(tmp_path)
    run(block)
    (drawn,) = tmp_path.iterdir()
    assert drawn.read_text(encoding="utf-8") == (README.parent / source).read_text("utf-8")


def test_links_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT)
    assert "docs/lecture.md" in targets
    for target in targets:
        assert (README.parent / target).exists(), target
