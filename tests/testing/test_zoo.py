"""gradcheck names the faults of the zoo, and finds none where there is none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from scripts import write_confusion
from tests.graph.cases import CASES
from tests.ops import OPS, Case
from tests.testing.confusion import examined, report_of
from tests.testing.zoo import ZOO
from torchbp.testing import CAUSES, gradcheck

# Gradients that really are not the derivative: torch's gradcheck fails as well.
WRONG = {"detached", "without grad", "float32 inside", "F.dropout"}

# The term is inside of log_softmax, one operation, and the forward cannot be opened further.
MISSED = {"cross-entropy without the target"}


def test_the_zoo_is_large_and_named() -> None:
    assert len(ZOO) >= 30
    assert {animal.fault for animal in ZOO.values()} == set(CAUSES)


def test_nothing_passes_and_nine_of_ten_are_named_right() -> None:
    found = examined()
    assert "passed" not in found.values()
    right = sum(found[name] == animal.fault for name, animal in ZOO.items())
    assert right >= 0.9 * len(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_report(name: str) -> None:
    """The report fits a terminal and agrees with itself."""
    report = report_of(name)
    assert report is not None
    assert ZOO[name].fault in report.causes or name in MISSED
    assert set(report.causes) <= set(CAUSES)
    assert report.cause == report.causes[0]
    assert all(len(line) <= 100 for line in str(report).splitlines())
    for checked in report.inputs:
        assert checked.count == int(checked.wrong.sum())
        for element in checked.worst:
            assert element.input.startswith(checked.name)


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert write_confusion.main(["--check"]) == 0
    page = tmp_path / "gradcheck.md"
    monkeypatch.setattr(write_confusion, "PAGE", page)
    assert write_confusion.main(["--check"]) == 1
    page.write_text(write_confusion.page().replace("wrong-sign", "wrong sign"))
    assert write_confusion.main(["--check"]) == 1


def test_enough_functions_of_torch() -> None:
    assert sum(name.startswith(("torch.", "F.")) for name in set(CASES) - WRONG) >= 60


@pytest.mark.parametrize("name", sorted(set(CASES) - WRONG))
def test_no_false_alarm(name: str) -> None:
    function, make = CASES[name]
    torch.manual_seed(0)
    given = make()
    if not all(isinstance(x, torch.Tensor) for x in given):
        pytest.skip("gradcheck looks at tensors that are arguments")
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in given]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert gradcheck(function, inputs)


@pytest.mark.parametrize("case", [case for op in OPS.values() for case in op.main_cases], ids=str)
def test_no_false_alarm_of_ours(case: Case) -> None:
    torch.manual_seed(0)
    ours, _, inputs = case.split()
    assert gradcheck(ours, [x.requires_grad_() for x in inputs], strict=True, check_forward_ad=True)
