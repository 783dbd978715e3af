"""Find out why a gradient is wrong, and what else a custom Function gets wrong.

`gradcheck` takes the arguments of `torch.autograd.gradcheck` and, where that fails, says which
elements are wrong, in what pattern, and why: a cause out of `CAUSES`, named only if it was tested.

`check_function` checks all that a custom Function, operation or module is expected to do, a row of
a table for each of `CHECKS`; `python -m torchbp.testing` does it from the command line, and
`parametrize_checks` makes a test of each row.
"""

from __future__ import annotations

from .battery import CHECKS, check_function, parametrize_checks
from .gradcheck import GradcheckError, gradcheck
from .outcome import CheckFunctionError, FunctionReport, Row
from .report import CAUSES, Cause, Checked, Element, Report

__all__ = [
    "CAUSES",
    "CHECKS",
    "Cause",
    "CheckFunctionError",
    "Checked",
    "Element",
    "FunctionReport",
    "GradcheckError",
    "Report",
    "Row",
    "check_function",
    "gradcheck",
    "parametrize_checks",
]
