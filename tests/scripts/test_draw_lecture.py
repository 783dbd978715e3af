"""scripts/draw_lecture.py: docs/lecture.md and its pictures are what the code in it gives; numbers
are the lecture's; links lead to the lines that they quote; drift is seen."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from examples import flat_code
from scripts import draw_lecture
from scripts.lecture_examples import EXAMPLES, GLOSSARY, Number, Term

pytest.importorskip("fast_sugiyama", reason="fast-sugiyama is not installed (Python 3.10)")

DOCS = draw_lecture.ROOT / "docs"
Made = tuple[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The page as it would be written now, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("lecture")
    return draw_lecture.page(folder), folder


def test_page_and_pictures_are_up_to_date(made: Made) -> None:
    assert draw_lecture.differences(*made) == []


def test_each_picture_is_small_and_stands_on_the_page_with_a_text(made: Made) -> None:
    text, folder = made
    shown = re.findall(r"!\[([^\]]+)\]\(lecture/([^)]+)\)", text)
    assert sorted(name for _, name in shown) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        assert path.stat().st_size < 60_000, path.name
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_each_example_shows_its_code_and_what_it_gives(made: Made) -> None:
    text, _ = made
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [section.split("\n")[0] for section in sections[:-1]] == [e.title for e in EXAMPLES]
    for section, example in zip(sections, EXAMPLES, strict=False):
        assert f"```python\n{example.code}```" in section
        assert "| torchbp |" in section
        assert "![" in section or "```text" in section


def test_flat_code_on_the_page_is_the_lectures(made: Made) -> None:
    text, _ = made
    (function,) = ast.parse(inspect.getsource(flat_code.f)).body
    assert isinstance(function, ast.FunctionDef)
    lines = [ast.unparse(line) for line in function.body if isinstance(line, ast.Assign)]
    assert len(lines) == 15
    section = text.partition("\n## Flat code\n")[2].partition("\n## ")[0]
    code = section.partition("import torch\n")[2].partition("```")[0]
    found = [
        ast.unparse(line) for line in ast.walk(ast.parse(code)) if isinstance(line, ast.Assign)
    ]
    assert found == [line.replace("sigmoid(", "torch.sigmoid(") for line in lines]


def test_each_link_leads_to_a_file_and_to_the_line_that_it_quotes() -> None:
    text = draw_lecture.PAGE.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert len(targets) > len(GLOSSARY)
    for target in targets:
        assert (DOCS / target).is_file(), target
    quoted = re.findall(r"\[`([^`]+)`\]\(([^)#]+)#L(\d+)\)", text)
    assert len(quoted) == len(GLOSSARY)
    for code, target, number in quoted:
        line = (DOCS / target).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert code.replace(r"\|", "|") in re.sub(" {2,}", " ", line)


def test_a_term_wants_one_line() -> None:
    for letters, count in (("no such line", 0), ("return", "[1-9]")):
        with pytest.raises(ValueError, match=f"gate: {count}.* lines of csrc/math.h have"):
            draw_lecture.link(Term("gate", "", "csrc/math.h", letters))


@pytest.mark.parametrize(
    ("lecture", "ours", "same"),
    [
        ("0.4", "0.3932", True),
        ("0.39", "0.3932", True),
        ("0.3", "0.3932", False),
        ("-0.53", "0.5344", False),
        ("1.00", "1", True),
        ("3", "3.4", True),  # as exact as the lecture says
        ("[4, 0]", "[4, -0.0]", True),
        ("[4, 0]", "[4, 1]", False),
        ("[4, 0]", "[[4, 0]]", False),
        ("[4, 0]", "[4, 0, 0]", False),
        ("[[1, 2], [3, 4]]", "torch.tensor([[1.0, 2], [3, 4]])", True),
        ("[2, 3]", "torch.empty(2, 3).shape", True),
        ("router", "'router'", True),
        ("router", "'adder'", False),
    ],
)
def test_numbers_are_the_lectures(lecture: str, ours: str, same: bool) -> None:
    space = {"torch": torch}
    for wrong in (False, True):
        given = Number("y", lecture, ours, wrong=wrong)
        if same != wrong:
            row = draw_lecture.compared(given, space)
            assert row[:2] == ["y", f"~~{lecture}~~" if wrong else lecture]
        else:
            with pytest.raises(ValueError, match=r"y: the lecture has .*, and we "):
                draw_lecture.compared(given, space)


def test_a_formula_is_worked_out() -> None:
    given = Number("f", "-1/x^2", "-0.25", "-1 / x**2")
    assert draw_lecture.compared(given, {"x": 2}) == ["f", "-1/x^2 = -0.25", "-0.25"]
    with pytest.raises(ValueError, match=r"f: the lecture has -0\.1111, and we -0\.25"):
        draw_lecture.compared(given, {"x": 3})


def test_drift_is_seen(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, folder = made

    def page(where: Path) -> str:
        shutil.copytree(folder, where, dirs_exist_ok=True)
        return text

    written, pictures = tmp_path / "lecture.md", tmp_path / "lecture"
    for name, value in {"page": page, "PAGE": written, "PICTURES": pictures}.items():
        monkeypatch.setattr(draw_lecture, name, value)
    assert draw_lecture.main(["--check"]) == 1
    assert not written.exists()
    assert not pictures.exists()

    def assert_mended() -> None:
        assert draw_lecture.main(["--check"]) == 1
        assert draw_lecture.main([]) == 0
        assert draw_lecture.main(["--check"]) == 0
        assert written.read_text(encoding="utf-8") == text
        assert {p.name for p in pictures.iterdir()} == {p.name for p in folder.iterdir()}

    assert_mended()
    written.write_text(text.replace("-12", "-13"), encoding="utf-8")
    assert_mended()
    (pictures / "simple.svg").unlink()
    assert_mended()
    (pictures / "another.svg").write_text("<svg/>")
    assert_mended()
    picture = pictures / "simple.svg"
    picture.write_text(picture.read_text().replace(">-12<", ">-13<"))
    assert_mended()


def test_a_wrong_number_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(folder: Path) -> str:
        raise ValueError("df/dx: the lecture has -4, and we -5")

    monkeypatch.setattr(draw_lecture, "page", page)
    assert draw_lecture.main([]) == 1
    assert capsys.readouterr().err == "df/dx: the lecture has -4, and we -5\n"
