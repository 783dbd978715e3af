"""Find out why a gradient is wrong.

`gradcheck` takes the arguments of `torch.autograd.gradcheck` and, where that fails, says which
elements are wrong, in what pattern, and why: a cause out of `CAUSES`, named only if it was tested.
"""

from __future__ import annotations

from .gradcheck import GradcheckError, gradcheck
from .report import CAUSES, Cause, Checked, Element, Report

__all__ = ["CAUSES", "Cause", "Checked", "Element", "GradcheckError", "Report", "gradcheck"]
