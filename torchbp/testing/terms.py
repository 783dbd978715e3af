"""A missing factor or summand that is a simple expression in the inputs or the output: for
forwards that cannot be opened, because they are one operation, or compute outside of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .case import Case
from .probe import real
from .report import Cause

__all__ = ["missing"]

#: What is tried, of a number u: an input or the output.
_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "1": torch.ones_like,
    "{u}": lambda u: u,
    "2 {u}": lambda u: 2 * u,
    "{u}^2": lambda u: u * u,
    "3 {u}^2": lambda u: 3 * u * u,
    "1 / {u}": lambda u: 1 / u,
    "1 / {u}^2": lambda u: 1 / (u * u),
    "1 / (2 {u})": lambda u: 0.5 / u,
    "sign({u})": torch.sign,
    "1 - {u}": lambda u: 1 - u,
    "1 + {u}": lambda u: 1 + u,
    "1 - {u}^2": lambda u: 1 - u * u,
    "1 + {u}^2": lambda u: 1 + u * u,
    "{u} (1 - {u})": lambda u: u * (1 - u),
    "exp({u})": torch.exp,
    "sin({u})": torch.sin,
    "cos({u})": torch.cos,
    "sigmoid({u})": torch.sigmoid,
}


def missing(case: Case, i: int) -> list[Cause]:
    """A factor, or a summand of the diagonal, with which the gradient of input `i` passes."""
    name = case.probe.names[i]
    outputs = []
    for point in case.points:
        case.probe.set(point.values)
        outputs.append(case.probe.value().cpu())
    case.probe.restore()
    pairs = list(zip(case.analytic(i), case.numeric(i), strict=True))
    for text, numbers, along_rows in _numbers(case, outputs, i):
        for expression, term in _TERMS.items():
            terms = [term(u) for u in numbers]
            if not all(bool(t.isfinite().all()) for t in terms):
                continue
            shaped = [t[:, None] if along_rows else t for t in terms]
            said = expression.format(u=text)
            if case.everywhere([a * t for (a, _), t in zip(pairs, shaped, strict=True)], i):
                return [
                    Cause(
                        "missing-term",
                        f"the gradient of {name} lacks the factor {said}; with it it passes",
                    )
                ]
            if any(a.shape[0] != a.shape[1] for a, _ in pairs):
                continue
            for sign, word in ((1, "+"), (-1, "-")):
                sums = [a + sign * torch.diag(t) for (a, _), t in zip(pairs, terms, strict=True)]
                if case.everywhere(sums, i):
                    return [
                        Cause(
                            "missing-term",
                            f"the gradient of {name} lacks the term {word} {said}, times "
                            "the upstream; with it it passes",
                        )
                    ]
    return []


def _numbers(case: Case, outputs: list[Tensor], i: int) -> Iterator[tuple[str, list[Tensor], bool]]:
    """What a factor may be made of: the output, along the rows of the Jacobian; inputs of the same
    size as the output, along its rows, or as the input, along its columns."""
    rows, columns = case.points[0].analytic[i].shape
    yield "y", outputs, True
    for k, name in enumerate(case.probe.names):
        values = [real(point.values[k]).cpu() for point in case.points]
        if len(values[0]) == columns:
            yield name, values, False
        if len(values[0]) == rows:
            yield name, values, True
    if rows == columns:
        yield "y", outputs, False
