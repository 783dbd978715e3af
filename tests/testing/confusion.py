"""What gradcheck says of each animal of the zoo."""

from __future__ import annotations

import functools
import warnings

import torch

from tests.testing.zoo import ZOO
from torchbp.testing import GradcheckError, Report, gradcheck

__all__ = ["examined", "report_of"]


@functools.cache
def report_of(name: str) -> Report | None:
    """The report of a broken function; None if it passes. Its inputs must be as they were."""
    animal = ZOO[name]
    given = animal.inputs()
    before = [x.detach().clone() for x in given]
    torch.manual_seed(0)
    report = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of float32 inputs
        try:
            gradcheck(animal.fn, given, **animal.options)
        except GradcheckError as error:
            report = error.report
    for x, value in zip(given, before, strict=True):
        assert torch.equal(x.detach(), value), f"{name}: an input is changed"
    return report


def examined() -> dict[str, str]:
    """The cause that is named for each; "passed" if there is none."""
    reports = {name: report_of(name) for name in ZOO}
    return {name: "passed" if report is None else report.cause for name, report in reports.items()}
