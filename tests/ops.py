"""The table of operations that the tests run over: a new operation is tested by adding a row.

A row (`Op`) names the operation of torchbp.functional, an independent reference out of PyTorch and
the ways of calling both (`Case`): shapes, broadcasting, options. `pytest -k "elu"` runs whatever
concerns one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

import torchbp.functional as F

__all__ = ["CASES", "DTYPES", "IN_PLACE_OPS", "OPS", "RAW_OPS", "Case", "Input", "Op"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """How to draw one tensor.

    kind: "normal"; "nonzero" (at least 0.2 from 0, so that finite differences stay on one side of
    a kink); "probabilities" over dimension 1 (0 for vectors); "classes" (int64 from 0 to `high`);
    "positive" (a constant that no gradient is asked for).
    """

    shape: Shape
    kind: str = "normal"
    high: int = 0
    #: every third class index is this one
    ignored: int | None = None

    @property
    def differentiable(self) -> bool:
        return self.kind not in ("classes", "positive")

    def make(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """A tensor from torch's default generator: the same values in every dtype, but rounded."""
        if self.kind == "classes":
            classes = torch.randint(self.high, self.shape)
            if self.ignored is not None:
                classes.view(-1)[::3] = self.ignored
            return classes.to(device)
        x = torch.randn(self.shape, dtype=torch.float64)
        if self.kind == "nonzero":
            x = x + 0.2 * torch.where(x < 0, -1, 1)
        elif self.kind == "probabilities":
            x = x.softmax(min(1, x.dim() - 1))
        elif self.kind == "positive":
            x = 0.5 + x.abs()
        return x.to(device, dtype)


@dataclass(frozen=True)
class Case:
    """One way of calling an operation; `ours` and `reference` take the tensors of `inputs`."""

    op: str
    name: str
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[Input, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def make(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        return [given.make(dtype, device) for given in self.inputs]

    @property
    def differentiable(self) -> list[int]:
        """Positions of the inputs that have gradients."""
        return [i for i, given in enumerate(self.inputs) if given.differentiable]

    def split(
        self, dtype: torch.dtype = torch.float64
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
        """(ours, reference, inputs) of the differentiable inputs alone, the others held fixed."""
        inputs = self.make(dtype)
        free = self.differentiable

        def bind(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def bound(*values: Tensor) -> Tensor:
                full = list(inputs)
                for i, value in zip(free, values, strict=True):
                    full[i] = value
                return function(*full)

            return bound

        return bind(self.ours), bind(self.reference), [inputs[i] for i in free]


def run(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor | None,
    free: Sequence[int],
) -> list[Tensor]:
    """Output and gradients of the inputs at `free`; without an upstream gradient, for ones."""
    given = [tensor.detach() for tensor in inputs]
    leaves = [given[i].requires_grad_() for i in free]
    y = function(*given)
    dy = torch.ones_like(y) if upstream is None else upstream
    return [y.detach(), *(torch.autograd.grad(y, leaves, dy) if leaves else ())]


@dataclass(frozen=True)
class Op:
    """One row of the table.

    raw: the operations of torch.ops.torchbp that forward and a first backward run.
    elementwise: one output element for each (broadcast) input element, to be right to the ulp.
    smooth: infinitely often differentiable, so that third derivatives are compared too.
    cancels: the gradient subtracts y from 1, so that an ulp of y is up to one of dy in it.
    main: the names of the cases that slow tests (torch.compile, torch.export) run.
    """

    name: str
    cases: tuple[Case, ...]
    raw: frozenset[str]
    elementwise: bool = False
    smooth: bool = False
    cancels: bool = False
    main: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def main_cases(self) -> list[Case]:
        main = self.main or (self.cases[0].name,)
        return [case for case in self.cases if case.name in main]

    @property
    def main_case(self) -> Case:
        return self.main_cases[0]


def unary(
    name: str,
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *,
    kind: str = "normal",
    smooth: bool = False,
    cancels: bool = False,
    parameters: Sequence[tuple[float, ...]] = ((),),
    raw: Sequence[str] = (),
) -> Op:
    """The row of a gate with one input, called with each of the `parameters`."""
    # Parameters are numbers that every dtype holds: PyTorch rounds them to it first.
    shapes: Mapping[str, Shape] = {
        "matrix": (3, 5),
        "number": (),
        "empty": (0, 4),
        "cube": (2, 1, 4),
        "odd length": (1037,),  # whole vectors of every SIMD level, and a rest
    }
    calls = [(shape, parameters[0]) for shape in shapes] + [("matrix", p) for p in parameters[1:]]
    cases = []
    for i, (shape, parameter) in enumerate(calls):
        bound = (ours, reference)
        if parameter:
            bound = tuple(partial(_then, f, parameter) for f in bound)  # type: ignore[assignment]
        label = shape if i < len(shapes) else f"{shape} {parameter[0]:g}"
        cases.append(Case(name, label, *bound, (Input(shapes[shape], kind),)))
    backward = raw or (name, f"{name}_backward")
    return Op(
        name,
        tuple(cases),
        frozenset(backward),
        elementwise=True,
        smooth=smooth,
        cancels=cancels,
    )


def _then(function: Callable[..., Tensor], parameter: tuple[float, ...], x: Tensor) -> Tensor:
    return function(x, *parameter)


def binary(
    name: str,
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *,
    smooth: bool = False,
    raw: Sequence[str] = (),
) -> Op:
    """The row of a gate with two inputs."""
    shapes: Mapping[str, tuple[Shape, Shape]] = {
        "matrices": ((3, 4), (3, 4)),
        "row to matrix": ((3, 4), (4,)),
        "column to cube": ((3, 1), (2, 3, 4)),
        "each to the other": ((3, 1), (1, 4)),
        "number to matrix": ((), (3, 4)),
        "numbers": ((), ()),
        "one and empty": ((1,), (0, 3)),
        "odd length": ((1037,), (1037,)),
    }
    cases = tuple(
        Case(name, label, ours, reference, (Input(a), Input(b))) for label, (a, b) in shapes.items()
    )
    main = ("matrices", "column to cube")
    return Op(name, cases, frozenset(raw), elementwise=True, smooth=smooth, main=main)


def product(name: str, raw: Sequence[str], cases: Sequence[Case], main: Sequence[str] = ()) -> Op:
    return Op(name, tuple(cases), frozenset(raw), main=tuple(main))


ACTIVATIONS: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.relu,
    "leaky_relu": TF.leaky_relu,
    "elu": TF.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def matmul_case(name: str, x: Shape, w: Shape) -> Case:
    return Case("matmul", name, F.matmul, torch.matmul, (Input(x), Input(w)))


def linear_case(
    name: str, x: Shape, out: int, bias: bool = True, activation: str | None = None
) -> Case:
    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias, activation)

    def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ACTIVATIONS[activation](TF.linear(x, weight, bias))

    shapes = [x, (out, x[-1])] + [(out,)] * bias
    return Case("linear", name, ours, reference, tuple(map(Input, shapes)))


def maxout_case(name: str, x: Shape, pieces: int, out: int, bias: bool = True) -> Case:
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = TF.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return z.unflatten(-1, weight.shape[:2]).max(-2).values

    shapes = [x, (pieces, out, x[-1])] + [(pieces, out)] * bias
    return Case("maxout", name, F.maxout, reference, tuple(map(Input, shapes)))


def mlp_case(
    name: str, x: Shape, sizes: Sequence[int], activation: str = "relu", bias: bool = True
) -> Case:
    layers = len(sizes)

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        return F.mlp(x, parameters[:layers], parameters[layers:] or None, activation)

    def reference(x: Tensor, *parameters: Tensor) -> Tensor:
        biases = parameters[layers:] or (None,) * layers
        for i, (weight, bias) in enumerate(zip(parameters[:layers], biases, strict=True)):
            x = TF.linear(ACTIVATIONS[activation](x) if i else x, weight, bias)
        return x

    widths = [x[-1], *sizes]
    weights = [(out, width) for width, out in zip(widths[:-1], sizes, strict=True)]
    shapes: list[Shape] = [x, *weights] + [(out,) for out in sizes if bias]
    return Case("mlp", name, ours, reference, tuple(map(Input, shapes)))


def ce_case(name: str, input: Shape, target: Input, weighted: bool = False, **options: Any) -> Case:
    def bind(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def bound(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
            return function(input, target, weight, **options)

        return bound

    classes = input[0] if len(input) == 1 else input[1]
    inputs = [Input(input), target] + [Input((classes,), "positive")] * weighted
    ours, reference = bind(F.cross_entropy), bind(TF.cross_entropy)
    return Case("cross_entropy", name, ours, reference, tuple(inputs))


def l2_penalty_case(name: str, *shapes: Shape) -> Case:
    def ours(*tensors: Tensor) -> Tensor:
        return F.l2_penalty(tensors)

    def reference(*tensors: Tensor) -> Tensor:
        return torch.stack([tensor.square().sum() for tensor in tensors]).sum()

    return Case("l2_penalty", name, ours, reference, tuple(map(Input, shapes)))


def classes(*shape: int, high: int = 4, ignored: int | None = None) -> Input:
    return Input(shape, "classes", high=high, ignored=ignored)


def probabilities(*shape: int) -> Input:
    return Input(shape, "probabilities")


#: The table.
OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        unary("exp", F.exp, torch.exp, smooth=True),
        unary("reciprocal", F.reciprocal, torch.reciprocal, kind="nonzero", smooth=True),
        unary(
            "scale",
            F.scale,
            lambda x, a: a * x,
            smooth=True,
            parameters=[(-1.75,), (0.0,)],
            raw=["scale"],
        ),
        unary(
            "shift",
            F.shift,
            lambda x, c: x + c,
            smooth=True,
            parameters=[(0.25,), (-1e3,)],
            raw=["shift"],
        ),
        unary("relu", F.relu, torch.relu, kind="nonzero"),
        unary(
            "leaky_relu",
            F.leaky_relu,
            TF.leaky_relu,
            kind="nonzero",
            parameters=[(), (0.1,), (-0.5,), (1.5,)],
        ),
        unary("elu", F.elu, TF.elu, kind="nonzero", parameters=[(), (1.7,), (0.2,)]),
        unary("sigmoid", F.sigmoid, torch.sigmoid, smooth=True, cancels=True),
        unary("tanh", F.tanh, torch.tanh, smooth=True, cancels=True),
        binary("add", F.add, torch.add, smooth=True, raw=["add"]),
        binary(
            "multiply", F.multiply, torch.mul, smooth=True, raw=["multiply", "multiply_backward"]
        ),
        binary("maximum", F.maximum, torch.maximum, raw=["maximum", "maximum_backward"]),
        product(
            "matmul",
            [],
            [
                matmul_case("matrices", (3, 4), (4, 5)),
                matmul_case("vectors", (4,), (4,)),
                matmul_case("vector and matrix", (4,), (4, 5)),
                matmul_case("matrix and vector", (3, 4), (4,)),
                matmul_case("batches", (2, 3, 4), (2, 4, 5)),
                matmul_case("batch and matrix", (2, 3, 4), (4, 5)),
                matmul_case("batch and vector", (2, 3, 4), (4,)),
                matmul_case("batches that broadcast", (2, 1, 3, 4), (5, 4, 2)),
                matmul_case("no rows", (0, 4), (4, 5)),
                matmul_case("no columns", (3, 0), (0, 5)),
            ],
            main=["matrices", "batches that broadcast", "vector and matrix"],
        ),
        product(
            "linear",
            ["linear", "linear_backward"],
            [
                linear_case("plain", (5, 3), 4),
                linear_case("no bias", (5, 3), 4, bias=False),
                linear_case("vector", (3,), 4),
                linear_case("cube", (2, 3, 4), 2),
                linear_case("no rows", (0, 3), 4),
                linear_case("no rows relu", (2, 0, 3), 4, activation="relu"),
                linear_case("no features", (3, 0), 2),
                linear_case("one of all", (1, 1), 1),
                linear_case("relu", (5, 3), 4, activation="relu"),
                linear_case("leaky_relu", (5, 3), 4, activation="leaky_relu"),
                linear_case("elu", (5, 3), 4, activation="elu"),
                linear_case("sigmoid", (5, 3), 4, activation="sigmoid"),
                linear_case("tanh", (5, 3), 4, activation="tanh"),
                linear_case("elu cube no bias", (2, 3, 4), 2, bias=False, activation="elu"),
                linear_case("tanh vector", (3,), 2, activation="tanh"),
                linear_case("relu wide", (33, 70), 65, activation="relu"),
            ],
            main=["plain", "relu", "elu", "tanh vector"],
        ),
        product(
            "maxout",
            ["linear", "max_pieces", "max_pieces_backward"],
            [
                maxout_case("two pieces", (5, 3), 2, 4),
                maxout_case("three pieces no bias", (5, 3), 3, 4, bias=False),
                maxout_case("one piece", (5, 3), 1, 2),
                maxout_case("vector", (3,), 2, 4),
                maxout_case("cube", (2, 3, 4), 3, 2),
                maxout_case("no rows", (0, 3), 2, 4),
                maxout_case("256 pieces", (2, 2), 256, 3, bias=False),
                maxout_case("wide", (33, 40), 3, 65),
            ],
        ),
        product(
            "cross_entropy",
            ["softmax_ce_with_gradient"],
            [
                ce_case("classes", (5, 4), classes(5)),
                ce_case("sum", (5, 4), classes(5), reduction="sum"),
                ce_case("none", (5, 4), classes(5), reduction="none"),
                ce_case("weight", (5, 4), classes(5), weighted=True),
                ce_case("weight sum", (5, 4), classes(5), weighted=True, reduction="sum"),
                ce_case("weight none", (5, 4), classes(5), weighted=True, reduction="none"),
                ce_case("ignore -100", (5, 4), classes(5, ignored=-100)),
                ce_case("ignore 1", (5, 4), classes(5, ignored=1), weighted=True, ignore_index=1),
                ce_case(
                    "ignore none", (5, 4), classes(5, ignored=-1), ignore_index=-1, reduction="none"
                ),
                ce_case("smoothing", (5, 4), classes(5), label_smoothing=0.1),
                ce_case("smoothing 1", (5, 4), classes(5), label_smoothing=1.0),
                ce_case(
                    "smoothing weight ignore",
                    (5, 4),
                    classes(5, ignored=-100),
                    weighted=True,
                    label_smoothing=0.3,
                ),
                ce_case(
                    "smoothing weight sum",
                    (5, 4),
                    classes(5),
                    weighted=True,
                    label_smoothing=0.3,
                    reduction="sum",
                ),
                ce_case(
                    "smoothing weight none",
                    (5, 4),
                    classes(5, ignored=2),
                    weighted=True,
                    label_smoothing=0.3,
                    reduction="none",
                    ignore_index=2,
                ),
                ce_case("probabilities", (5, 4), probabilities(5, 4)),
                ce_case("probabilities sum", (5, 4), probabilities(5, 4), reduction="sum"),
                ce_case("probabilities none", (5, 4), probabilities(5, 4), reduction="none"),
                ce_case("probabilities weight", (5, 4), probabilities(5, 4), weighted=True),
                ce_case(
                    "probabilities weight smoothing",
                    (5, 4),
                    probabilities(5, 4),
                    weighted=True,
                    label_smoothing=0.2,
                    reduction="none",
                ),
                ce_case("not normalised", (5, 4), Input((5, 4))),
                ce_case("vector", (4,), classes()),
                ce_case("vector none", (4,), classes(), reduction="none"),
                ce_case("vector of probabilities", (4,), probabilities(4)),
                ce_case("image", (2, 4, 3, 2), classes(2, 3, 2)),
                ce_case(
                    "image weight none",
                    (2, 4, 3),
                    classes(2, 3, ignored=-100),
                    weighted=True,
                    reduction="none",
                ),
                ce_case("image of probabilities", (2, 4, 3), probabilities(2, 4, 3)),
                ce_case(
                    "image of probabilities none",
                    (2, 4, 3),
                    probabilities(2, 4, 3),
                    reduction="none",
                ),
                ce_case("one class", (3, 1), classes(3, high=1)),
                ce_case("no rows sum", (0, 4), classes(0), reduction="sum"),
                ce_case("no rows none", (0, 4), classes(0), reduction="none"),
                ce_case("no rows mean", (0, 4), classes(0)),
                ce_case("many classes", (7, 1037), classes(7, high=1037)),
                ce_case(
                    "many classes smoothing",
                    (7, 1037),
                    classes(7, high=1037),
                    weighted=True,
                    label_smoothing=0.1,
                ),
                ce_case("many classes of probabilities", (7, 1037), probabilities(7, 1037)),
            ],
            main=["classes", "smoothing weight ignore", "probabilities", "image weight none"],
        ),
        product(
            "mlp",
            ["mlp", "mlp_backward"],
            [
                mlp_case("relu", (5, 3), [4, 3, 2]),
                mlp_case("leaky_relu", (5, 3), [4, 3, 2], "leaky_relu"),
                mlp_case("elu", (5, 3), [4, 3, 2], "elu"),
                mlp_case("sigmoid", (5, 3), [4, 3, 2], "sigmoid"),
                mlp_case("tanh", (5, 3), [4, 3, 2], "tanh"),
                mlp_case("no bias", (5, 3), [4, 2], bias=False),
                mlp_case("elu no bias", (5, 3), [4, 2], "elu", bias=False),
                mlp_case("one layer", (5, 3), [2]),
                mlp_case("four layers", (5, 3), [4, 2, 3, 2], "tanh"),
                mlp_case("vector", (3,), [4, 2]),
                mlp_case("cube elu", (2, 3, 4), [3, 2], "elu"),
                mlp_case("no rows", (0, 3), [4, 2]),
                mlp_case("wide", (33, 70), [65, 34, 10]),
            ],
            main=["relu", "elu", "tanh"],
        ),
        product(
            "l2_penalty",
            ["l2_penalty", "scale", "multiply"],
            [
                l2_penalty_case("one", (3, 4)),
                l2_penalty_case("three shapes", (3, 4), (5,), (2, 1, 2)),
                l2_penalty_case("number", ()),
                l2_penalty_case("with empty", (3, 4), (0,)),
                l2_penalty_case("odd length", (1037,), (3,)),
            ],
            main=["three shapes"],
        ),
    )
}

CASES: tuple[Case, ...] = tuple(case for op in OPS.values() for case in op.cases)

#: Every operation of torch.ops.torchbp, from the registry itself; those of torchbp.optim change
#: their arguments, and tests/optim tests them.
_REGISTERED = sorted(
    name.removeprefix("torchbp::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchbp::")
)
IN_PLACE_OPS: tuple[str, ...] = tuple(
    name for name in _REGISTERED if getattr(torch.ops.torchbp, name).default._schema.is_mutable
)
RAW_OPS: tuple[str, ...] = tuple(name for name in _REGISTERED if name not in IN_PLACE_OPS)
