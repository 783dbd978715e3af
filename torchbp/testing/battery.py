"""One battery of checks for any custom Function, registered operation or module."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.autograd import Function

from torchbp.graph.calling import check_function as check_callable
from torchbp.graph.calling import unchanged

from .outcome import FunctionReport, Row
from .rows import ROWS
from .subject import Failed, NotApplicable, Settings, Subject, Unsupported, first_line

if TYPE_CHECKING:
    import pytest

__all__ = [
    "CHECKS",
    "check_function",
    "chosen",
    "parametrize_checks",
    "rows_of",
    "settings_of",
    "those_required",
]

#: What is checked, by name, in the order in which it runs.
CHECKS: dict[str, str] = {name: check.text for name, check in ROWS.items()}

#: What Python itself says of a mistake, and of no feature that is missing.
_BUG = re.compile(
    r"INTERNAL ASSERT|unsupported operand|index out of range|NoneType|positional argument"
    r"|not subscriptable|object is not (callable|iterable)|unexpected keyword|not enough values"
    r"|too many values|zip\(\) argument"
)


def check_function(
    fn: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    reference: Callable[..., Any] | None = None,
    checks: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    require: Iterable[str] | bool = (),
    atol: float = 1e-7,
    rtol: float = 1e-7,
    nondet_tol: float = 0.0,
    kinks: Literal["raise", "skip"] = "raise",
    seed: int = 0,
    backend: str = "aot_eager",
    max_time: float | None = None,
    max_memory: float | None = None,
    raise_exception: bool = True,
) -> FunctionReport:
    """Check all that a custom Function, registered operation or module is expected to do.

    Each check compares with something else than what it checks: with the function called plainly,
    with central differences, or with the reference. A feature that the function refuses by a clear
    error is "not supported", and no failure unless it is required; one that gives a wrong result
    without an error is a failure. The checks are independent, and work on copies of the inputs; the
    random state is left as it is. What `torch.compile` has cached is forgotten, and meanwhile
    nothing that the function prints or logs is shown.

    Args:
        fn: a function, an `autograd.Function` or its `apply`, an operation of `torch.ops`, a
            `torch.library.custom_op`, or a module, whose parameters are checked as inputs are.
        inputs: a tensor, or a tuple of arguments. If none requires grad, the gradients of all that
            are floating are checked, else of those that do. They are best small (gradients are
            checked element by element) and away from kinks; most checks take them in float64.
        reference: a function of the same arguments that is right, or a module with parameters of
            the same names: values, gradients, time and memory are compared with it.
        checks: names out of `CHECKS`; None for all.
        skip: names to leave out.
        require: names of features that have to be supported; True for all.
        atol, rtol: between two ways of computing the same in float64, as in
            `torch.testing.assert_close`. Differences and half types have tolerances of their own.
        nondet_tol: how far two runs at the same inputs may differ, as in
            `torch.autograd.gradcheck`.
        kinks: "skip" leaves elements out where the function is not differentiable; see `gradcheck`.
        seed: of the random numbers that the function draws.
        backend: of `torch.compile`: "inductor" takes longer and checks the generated code too.
        max_time, max_memory: how many times the time or memory of the reference is too much; None
            only measures.
        raise_exception: raise if a check fails.

    Returns:
        the table, each row a `Row`; `str()` of it fits a terminal, `to_html` makes a page.

    Raises:
        CheckFunctionError: a check failed; its `report` is the table.
        TypeError: `fn` cannot be called, or returns no floating tensor.
        ValueError: a name that is not in `CHECKS`, or another bad option.

    What `fn` raises when it is called plainly with the inputs is passed on.

    Example:
        >>> import torch
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     def backward(ctx, grad_output):
        ...         return grad_output.mul_(2)
        >>> checks = ["gradient", "vmap", "mutation"]
        >>> found = check_function(Double, torch.randn(3), checks=checks, raise_exception=False)
        >>> [row.name for row in found.failed]
        ['gradient', 'mutation']
        >>> found["mutation"].text
        'backward changes the upstream gradient in place'
        >>> found["vmap"].status
        'not supported'
    """
    names = chosen("check_function", checks, skip)
    required = those_required("check_function", require)
    settings = settings_of(
        "check_function", fn, reference,
        atol, rtol, nondet_tol, kinks, seed, backend, max_time, max_memory,
    )  # fmt: skip
    subject = Subject(fn, inputs, settings)
    rows = tuple(rows_of(subject, names, required))
    report = FunctionReport(subject.name, subject.described, rows)
    if raise_exception:
        report.raise_for_failures()
    return report


def rows_of(subject: Subject, names: Iterable[str], required: frozenset[str]) -> Iterator[Row]:
    """The row of each check, one after the other."""
    for name in names:
        begun = perf_counter()
        row = _checked(subject, name)
        if row.status == "not supported" and name in required:
            row = replace(row, status="failed", text=f"required, and not supported: {row.text}")
        yield replace(row, seconds=perf_counter() - begun)


def _checked(subject: Subject, name: str) -> Row:
    check = ROWS[name]
    try:
        with unchanged(subject.fn, subject.args), _quiet():
            text = check.run(subject)
    except NotApplicable as error:
        return Row(name, "not applicable", str(error))
    except Unsupported as error:
        return Row(name, "not supported", str(error))
    except Failed as error:
        return Row(name, "failed", error.text, error.silent, error.report)
    except Exception as error:
        if check.feature and _refuses(error):
            return Row(name, "not supported", f"raises {first_line(error)}")
        return Row(name, "failed", f"raises {first_line(error)}")
    measured = (
        name in ("speed", "memory")
        and (subject.settings.max_time if name == "speed" else subject.settings.max_memory) is None
    )
    return Row(name, "measured" if measured else "passed", text or "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says beside its errors, compilers above all."""
    before, heard = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(heard), redirect_stderr(heard):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _refuses(error: Exception) -> bool:
    """Whether an error says that something is not supported, and is no mistake in the code."""
    module = type(error).__module__
    if module.startswith(("torch._dynamo", "torch._export", "torch.export", "torch.fx")):
        return True
    kinds = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)
    return (
        isinstance(error, kinds)
        and not isinstance(error, RecursionError)
        and not _BUG.search(str(error))
    )


# ---- what the caller says


def _names(op: str, argument: str, names: Iterable[str]) -> list[str]:
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in ROWS:
            raise ValueError(f"{op}: {argument} wants names out of {', '.join(ROWS)}, got {name!r}")
    return given


def chosen(op: str, checks: Iterable[str] | None, skip: Iterable[str]) -> list[str]:
    """The names of the checks that run, in their order."""
    wanted = ROWS if checks is None else _names(op, "checks", checks)
    left_out = _names(op, "skip", skip)
    return [name for name in ROWS if name in wanted and name not in left_out]


def those_required(op: str, require: Iterable[str] | bool) -> frozenset[str]:
    """The names of the features that have to be supported."""
    if isinstance(require, bool):
        return frozenset(ROWS if require else ())
    return frozenset(_names(op, "require", require))


def settings_of(
    op: str,
    fn: Any,
    reference: Any,
    atol: float,
    rtol: float,
    nondet_tol: float,
    kinks: Literal["raise", "skip"],
    seed: int,
    backend: str,
    max_time: float | None,
    max_memory: float | None,
) -> Settings:
    """The options, if they are good."""
    if not (isinstance(fn, type) and issubclass(fn, Function)):
        check_callable(op, fn)
    if reference is not None and not callable(reference):
        raise TypeError(
            f"{op}: reference wants a function or module, got {type(reference).__name__}"
        )
    if kinks not in ("raise", "skip"):
        raise ValueError(f'{op}: kinks wants "raise" or "skip", got {kinks!r}')
    for name, value in (("atol", atol), ("rtol", rtol), ("nondet_tol", nondet_tol)):
        if not value >= 0:
            raise ValueError(f"{op}: {name} wants a number that is not negative, got {value!r}")
    for name, limit in (("max_time", max_time), ("max_memory", max_memory)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{op}: {name} wants a positive number or None, got {limit!r}")
        if limit is not None and reference is None:
            raise ValueError(f"{op}: {name} wants a reference to compare with, got none")
    return Settings(reference, atol, rtol, nondet_tol, kinks, seed, backend, max_time, max_memory)


# ---- pytest


def parametrize_checks(
    fn: Callable[..., Any],
    inputs: Tensor | Sequence[Any] | Callable[[], Any],
    *,
    checks: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    require: Iterable[str] | bool = (),
    argument: str = "check",
    **options: Any,
) -> pytest.MarkDecorator:
    """Make one test of each check: a `pytest.mark.parametrize`.

    The test gets a function that runs the check: it raises CheckFunctionError if that fails, and
    skips the test, with the reason, if the feature is not supported (unless required) or does not
    apply.

    Args:
        fn, checks, skip, require: as in `check_function`.
        inputs: as in `check_function`, or a function that makes them when a test runs.
        argument: what the argument of the test is called.
        options: further arguments of `check_function`.

    Raises:
        ValueError: a name that is not in `CHECKS`.

    Example:
        >>> import torch
        >>> @parametrize_checks(torch.sin, lambda: torch.randn(3), require=["vmap", "compile"])
        ... def test_sin(check):
        ...     check()
    """
    import pytest

    names = chosen("parametrize_checks", checks, skip)
    required = those_required("parametrize_checks", require)

    def runs(name: str) -> Callable[[], FunctionReport]:
        def check() -> FunctionReport:
            given: Any = inputs() if callable(inputs) else inputs
            report = check_function(
                fn, given, checks=[name], require=required & {name},
                **{**options, "raise_exception": True},
            )  # fmt: skip
            row = report[name]
            if row.status in ("not supported", "not applicable"):
                pytest.skip(f"{row.status}: {row.text}")
            return report

        return check

    return pytest.mark.parametrize(argument, [pytest.param(runs(n), id=n) for n in names])
