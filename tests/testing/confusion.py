"""What gradcheck says of each animal of the zoo."""

from __future__ import annotations

import functools
import warnings

import torch

from tests.testing.zoo import ZOO, Animal
from torchbp.testing import GradcheckError, Report, gradcheck

__all__ = ["examined", "report_of"]


def report_of(animal: Animal) -> Report | None:
    """The report of a broken function; None if it passes."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of float32 inputs
        try:
            gradcheck(animal.fn, animal.inputs(), **animal.options)
        except GradcheckError as error:
            return error.report
    return None


@functools.cache
def examined() -> dict[str, str]:
    """The cause that is named for each; "passed" if there is none."""
    reports = {name: report_of(animal) for name, animal in ZOO.items()}
    return {name: "passed" if report is None else report.cause for name, report in reports.items()}
