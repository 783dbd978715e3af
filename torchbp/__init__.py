"""torchbp: backpropagation you can read, prove and run at full speed, for PyTorch.

Every gradient is written by hand once, in the table of gates `csrc/gates.h`. `torchbp.functions`
holds the `torch.autograd.Function` classes, `torchbp.functional` and `torchbp.nn` are used as
`torch.nn.functional` and `torch.nn` are, `torchbp.optim` as `torch.optim` is.
"""

from __future__ import annotations

from . import functional, functions, graph, nn, optim, testing
from .convert import convert
from .functions.table import ROWS, cpu_level
from .memory import empty_cache
from .optim import compile_step
from .version import __version__

__all__ = [
    "ROWS",
    "__version__",
    "compile_step",
    "convert",
    "cpu_level",
    "empty_cache",
    "functional",
    "functions",
    "graph",
    "nn",
    "optim",
    "testing",
]
