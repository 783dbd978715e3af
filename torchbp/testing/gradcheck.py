"""gradcheck that says why: torch's own check, and where it fails, the tested cause."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError

from torchbp.graph.calling import check_function

from .case import Options, Tolerance
from .diagnosis import examined
from .probe import Probe, as_tuple
from .report import Report

__all__ = ["GradcheckError", "gradcheck"]


class GradcheckError(TorchGradcheckError):
    """A gradient is wrong.

    Attributes:
        report: a `Report`: where, by how much, and why.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[type, tuple[Report]]:
        return type(self), (self.report,)


def gradcheck(
    func: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_batched_forward_grad: bool = False,
    check_forward_ad: bool = False,
    check_backward_ad: bool = True,
    fast_mode: bool = False,
    masked: bool | None = None,
    check_double_backward: bool = True,
    strict: bool = False,
    kinks: Literal["raise", "skip"] = "raise",
) -> bool:
    """Check a gradient against central differences, and say what is wrong with it.

    What `torch.autograd.gradcheck` checks is checked by it, with its arguments. Beyond that: the
    backward must leave the incoming gradient as it is, be linear in it, and double backward must be
    right wherever it does not raise; one random direction is looked at, so that a passing call
    costs about what torch's does.

    A cause is named only if it was tested: the fault undone, the gradient passes, at these inputs
    and at others. A custom Function inside of a larger function is looked at by itself.

    Args:
        func: takes the inputs and returns a tensor, or a tuple or list of them.
        inputs: a tensor, or a tuple of arguments; the tensors that require grad are checked. They
            should be float64, and have the same values afterwards.
        eps, atol, rtol, raise_exception, nondet_tol, check_undefined_grad, check_grad_dtypes,
            check_batched_grad, check_batched_forward_grad, check_forward_ad, check_backward_ad,
            fast_mode, masked: as in `torch.autograd.gradcheck`.
        check_double_backward: check the gradient of the gradient too, unless differentiating twice
            raises an error, as `once_differentiable` makes it. For each element of it, use
            `torch.autograd.gradgradcheck`.
        strict: a gradient that is larger than its operand is an error, even if autograd would sum
            it to the operand's shape silently.
        kinks: "raise" if the function is not differentiable between x - eps and x + eps; "skip"
            leaves the elements out where that is so, and warns.

    Returns:
        True if all is right; False if not and `raise_exception` is False.

    Raises:
        GradcheckError: something is wrong; a `torch.autograd.gradcheck.GradcheckError`, whose
            `report` has the cause, its name one of `torchbp.testing.CAUSES`.
        TypeError: `func` cannot be called.
        ValueError: no input requires grad, or `kinks` is neither "raise" nor "skip".

    What `func` or its backward raises is passed on.

    Example:
        >>> import torch
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     def backward(ctx, grad_output):
        ...         return grad_output
        >>> x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        >>> try:
        ...     gradcheck(Double.apply, x)
        ... except GradcheckError as error:
        ...     print(error.report.cause, error.report.factor)
        wrong-factor 0.5
    """
    check_function("gradcheck", func)
    if kinks not in ("raise", "skip"):
        raise ValueError(f'gradcheck: kinks wants "raise" or "skip", got {kinks!r}')
    options = Options(
        eps,
        Tolerance(atol, rtol),
        nondet_tol,
        strict,
        kinks,
        check_double_backward and check_backward_ad,
        {
            "eps": eps,
            "atol": atol,
            "rtol": rtol,
            "nondet_tol": nondet_tol,
            "check_undefined_grad": check_undefined_grad,
            "check_grad_dtypes": check_grad_dtypes,
            "check_batched_grad": check_batched_grad,
            "check_batched_forward_grad": check_batched_forward_grad,
            "check_forward_ad": check_forward_ad,
            "check_backward_ad": check_backward_ad,
            "fast_mode": fast_mode,
            "masked": masked,
        },
    )
    given = as_tuple(inputs)
    if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
        raise ValueError(
            "gradcheck: inputs wants at least one tensor that requires grad, got "
            + (", ".join(type(value).__name__ for value in given) or "none")
        )
    probe = Probe(func, given, eps)
    try:
        report = examined(probe, options)
    finally:
        probe.restore()
    if report is None:
        return True
    if not raise_exception:
        return False
    raise GradcheckError(report)
