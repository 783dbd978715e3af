"""The table of gates as Python sees it: the text that `csrc/gates.h` was compiled from.

A row's columns can be evaluated on tensors (`Row.evaluate`), which is the reference that the
kernels are tested against, or on SymPy's symbols, which is how the tests prove them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import Any

import torch

from .. import _C

__all__ = ["ROWS", "TORCH_WORDS", "Row", "cpu_level"]


def _load_cuda() -> bool:
    """Load the CUDA kernels where this torch can run them."""
    library = Path(__file__).parents[1] / "_cuda.so"
    if torch.version.cuda is None or not library.exists():
        return False
    torch.ops.load_library(library)
    return True


HAS_CUDA = _load_cuda()

#: What the words of csrc/math.h mean on tensors.
TORCH_WORDS: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        "where": torch.where,
        "abs": torch.abs,
        "exp": torch.exp,
        "expm1": torch.expm1,
        "tanh": torch.tanh,
        "isnan": torch.isnan,
    }
)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: name of the gate and of its operation in `torch.ops.torchbp`.
        inputs: names of the inputs as the columns spell them: `("x",)` or `("a", "b")`.
        parameter: name of the number that the columns read, or None.
        saves: what forward keeps for backward, by the columns' names: `()`, `("x",)`, `("y",)`
            or `("a", "b")`.
        columns: column name -> text. `forward` is y; `dx` (or `da`, `db`) the gradient times the
            upstream gradient `dy`; `dxx` (or `daa`, `dab`, `dbb`) the second order, the
            derivative of a gradient column with respect to a saved tensor.

    Example:
        >>> import torch, torchbp
        >>> row = torchbp.ROWS["relu"]
        >>> row.columns["forward"], row.columns["dx"], row.saves
        ('where(x < 0, 0, x)', 'where(y <= 0, 0, dy)', ('y',))
        >>> row.evaluate("forward", x=torch.tensor([1.0, -2.0, 3.0, -1.0]))
        tensor([1., 0., 3., 0.])
    """

    name: str
    inputs: tuple[str, ...]
    parameter: str | None
    saves: tuple[str, ...]
    columns: Mapping[str, str]
    code: Mapping[str, CodeType]

    @classmethod
    def parse(cls, text: Mapping[str, str]) -> Row:
        """A row from the strings that the binary holds."""
        inputs = tuple(text["inputs"].split(", "))
        saves = {"nothing": (), "inputs": inputs}.get(text["saves"], (text["saves"],))
        about = ("name", "inputs", "parameter", "saves")
        columns = {name: column for name, column in text.items() if name not in about}
        return cls(
            name=text["name"],
            inputs=inputs,
            parameter=None if text["parameter"] == "none" else text["parameter"],
            saves=saves,
            columns=MappingProxyType(columns),
            code=MappingProxyType(
                {
                    name: compile(column, f"{text['name']}.{name}", "eval")
                    for name, column in columns.items()
                }
            ),
        )

    def evaluate(
        self, column: str, *, words: Mapping[str, Callable[..., Any]] = TORCH_WORDS, **values: Any
    ) -> Any:
        """The value of a column, on tensors or on whatever `words` is made for.

        Args:
            column: a key of `columns`.
            words: what `where`, `abs`, `exp`, `expm1`, `tanh` and `isnan` mean.
            values: a value for each name that the column reads.
        """
        return eval(self.code[column], {**words, **values})


#: The table: name -> row, in the order of csrc/gates.h.
ROWS: Mapping[str, Row] = MappingProxyType(
    {row.name: row for row in (Row.parse(text) for text in _C.rows())}
)


def cpu_level() -> str:
    """The SIMD level of the CPU kernels in use: "baseline", "avx2" or "avx512".

    The best one that the machine has, unless the environment variable `TORCHBP_CPU` named another
    before the first operation ran.
    """
    return _C.cpu_level()
