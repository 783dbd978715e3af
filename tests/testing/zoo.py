"""A zoo of broken gradients, each labelled with its fault, and the tests' own right ones.

`ZOO` holds them by name. Of most of them forward and backward stand side by side, the backward with
the fault that its name tells; inputs are float64, away from kinks unless the kink is the fault.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

__all__ = ["ZOO", "Animal", "function"]

Maker = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Animal:
    """A broken function.

    Attributes:
        fault: the cause that is to be found.
        fn, inputs: the function, and what makes its inputs.
        options: of gradcheck, where the fault shows only with them.
    """

    name: str
    fault: str
    fn: Callable[..., Any]
    inputs: Maker
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


ZOO: dict[str, Animal] = {}


def function(
    forward: Callable[..., Tensor], backward: Callable[..., Any], name: str = "Broken"
) -> Callable[..., Any]:
    """A custom Function of y = forward(*inputs) with the gradients backward(upstream, *inputs)."""

    def run(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    def back(ctx: Any, grad_output: Tensor) -> Any:
        return backward(grad_output, *ctx.saved_tensors)

    # The arguments have the names that they have in `backward`, behind the upstream.
    names = list(inspect.signature(backward).parameters.values())[1:]
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([context, *names])  # type: ignore[attr-defined]
    members = {"forward": staticmethod(run), "backward": staticmethod(back)}
    return type(name, (Function,), members).apply  # type: ignore[attr-defined, no-any-return]


def normal(*shapes: tuple[int, ...], away: float = 0.0) -> Maker:
    """Makes normal numbers, at least `away` from zero."""

    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        made = []
        for shape in shapes:
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            made.append((x + away * x.sign()).requires_grad_())
        return tuple(made)

    return make


def positive(*shapes: tuple[int, ...]) -> Maker:
    def make() -> tuple[Tensor, ...]:
        return tuple((x.detach().abs() + 0.5).requires_grad_() for x in normal(*shapes)())

    return make


def numbers(*values: Any, dtype: torch.dtype = torch.float64) -> Maker:
    return lambda: tuple(torch.tensor(v, dtype=dtype, requires_grad=True) for v in values)


def add(name: str, fault: str, fn: Callable[..., Any], inputs: Maker, **options: Any) -> None:
    assert name not in ZOO
    ZOO[name] = Animal(name, fault, fn, inputs, options)


V, M, S = (5,), (3, 4), (4, 4)

# ---- swapped-operands
add(
    "multiply keeps its own operand",
    "swapped-operands",
    function(lambda a, b: a * b, lambda g, a, b: (g * a, g * b)),
    normal(V, V),
)
add(
    "multiply of scalars",
    "swapped-operands",
    function(lambda a, b: a * b, lambda g, a, b: (g * a, g * b)),
    normal((), ()),
)
add(
    "divide, the other order",
    "swapped-operands",
    function(lambda a, b: a / b, lambda g, a, b: (-g * a / b**2, g / b)),
    positive(M, M),
)
add(
    "matmul of squares, the other order",
    "swapped-operands",
    function(lambda x, w: x @ w, lambda g, x, w: (x.T @ g, g @ w.T)),
    normal(S, S),
)
add(
    "matmul, the other order, of other shapes",
    "swapped-operands",
    function(lambda x, w: x @ w, lambda g, x, w: (x.T @ g, g @ w.T)),
    normal((3, 4), (4, 2)),
)

# ---- wrong-sign
add("subtract", "wrong-sign", function(lambda a, b: a - b, lambda g, a, b: (g, g)), normal(V, V))
add("cos", "wrong-sign", function(torch.cos, lambda g, x: g * x.sin()), normal(M))
add(
    "reciprocal of a scalar",
    "wrong-sign",
    function(lambda x: 1 / x, lambda g, x: g / x**2),
    positive(()),
)
add(
    "divide, by the divisor",
    "wrong-sign",
    function(lambda a, b: a / b, lambda g, a, b: (g / b, g * a / b**2)),
    positive(V, V),
)

# ---- wrong-factor
add("square without its 2", "wrong-factor", function(lambda x: x**2, lambda g, x: g * x), normal(V))
add(
    "mean without 1/N",
    "wrong-factor",
    function(lambda x: x.mean(), lambda g, x: g.expand_as(x)),
    normal(M),
)
add(
    "mean squared error with 1/N too many",
    "wrong-factor",
    function(lambda x: (x**2).mean(), lambda g, x: 2 * g * x / x.numel() / len(x)),
    normal(M),
)
add(
    "scale without its factor",
    "wrong-factor",
    function(lambda x: 0.3 * x, lambda g, x: g),
    normal(()),
)
add(
    "bias with mean for sum",
    "wrong-factor",
    function(lambda x, b: x + b, lambda g, x, b: (g, g.mean(0))),
    normal(M, (4,)),
)
add(
    "tanh of 2x without the 2",
    "wrong-factor",
    function(lambda x: (2 * x).tanh(), lambda g, x: g * (1 - (2 * x).tanh() ** 2)),
    normal(V),
)

# ---- upstream-ignored
add(
    "sigmoid's local gradient alone",
    "upstream-ignored",
    function(torch.sigmoid, lambda g, x: x.sigmoid() * (1 - x.sigmoid())),
    normal(M),
)
add(
    "a loss that takes itself for the last",
    "upstream-ignored",
    function(lambda x: (x**2).sum(), lambda g, x: 2 * x),
    normal(V),
)
add("exp of a scalar", "upstream-ignored", function(torch.exp, lambda g, x: x.exp()), normal(()))
add(
    "one operand of multiply",
    "upstream-ignored",
    function(lambda a, b: a * b, lambda g, a, b: (g * b, a.clone())),
    normal(V, V),
)

# ---- transposed
add(
    "weights of a square layer",
    "transposed",
    function(lambda x, w: x @ w.T, lambda g, x, w: (g @ w, x.T @ g)),
    normal(S, S),
)
add(
    "weights not transposed",
    "transposed",
    function(lambda x, w: x @ w, lambda g, x, w: (g @ w, x.T @ g)),
    normal((3, 4), S),
)
add(
    "weights of other shapes",
    "transposed",
    function(lambda x, w: x @ w.T, lambda g, x, w: (g @ w, x.T @ g)),
    normal((3, 4), (2, 4)),
)
add(
    "transpose not put back",
    "transposed",
    function(lambda x: x.T * 3, lambda g, x: g * 3),
    normal(S),
)

# ---- batch-sum-missing
add(
    "bias from the first row",
    "batch-sum-missing",
    function(lambda x, b: x + b, lambda g, x, b: (g, g[0])),
    normal(M, (4,)),
)
add(
    "bias from the last row",
    "batch-sum-missing",
    function(lambda x, w, b: x @ w + b, lambda g, x, w, b: (g @ w.T, x.T @ g, g[-1])),
    normal((3, 4), (4, 2), (2,)),
)
add(
    "weights from the first row",
    "batch-sum-missing",
    function(lambda x, w: x @ w, lambda g, x, w: (g @ w.T, x[:1].T @ g[:1])),
    normal((3, 4), (4, 2)),
)
add(
    "bias summed over the wrong dimension",
    "batch-sum-missing",
    function(lambda x, b: x + b, lambda g, x, b: (g, g.sum(1))),
    normal(S, (4,)),
)


# ---- overwritten
def assigned(g: Tensor, x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[torch.tensor([2, 0, 0, 2])] = g
    return made


add(
    "index with repeats",
    "overwritten",
    function(lambda x: x[torch.tensor([2, 0, 0, 2])], assigned),
    normal(V),
)
add(
    "the second use alone",
    "overwritten",
    function(lambda x: x.exp() + x.sin(), lambda g, x: g * x.cos()),
    normal(V),
)
add(
    "the first use alone",
    "overwritten",
    function(lambda x: x.exp() + x.sin(), lambda g, x: g * x.exp()),
    normal(M),
)
add(
    "a residual without its shortcut",
    "overwritten",
    function(lambda x: x + x.tanh(), lambda g, x: g * (1 - x.tanh() ** 2)),
    normal(M),
)
add(
    "shared weights",
    "overwritten",
    function(
        lambda x, w: (x @ w).tanh() @ w,
        lambda g, x, w: ((g @ w.T * (1 - (x @ w).tanh() ** 2)) @ w.T, (x @ w).tanh().T @ g),
    ),
    normal((3, 4), S),
)

# ---- wrong-input
add(
    "multiply, the same for both",
    "wrong-input",
    function(lambda a, b: a * b, lambda g, a, b: (g * b, g * b)),
    normal(V, V),
)
add(
    "in the place of another",
    "wrong-input",
    function(lambda a, b: a * 2 + b * b, lambda g, a, b: (None, g * 2)),
    normal(V, V),
)
add(
    "three in turn",
    "wrong-input",
    function(lambda a, b, c: a * b * c, lambda g, a, b, c: (g * a * c, g * a * b, g * b * c)),
    normal(V, V, V),
)

# ---- wrong-mask
add(
    "relu the other way",
    "wrong-mask",
    function(torch.relu, lambda g, x: g * (x < 0)),
    normal(M, away=0.2),
)
add(
    "clamp without its mask",
    "wrong-mask",
    function(lambda x: x.clamp(-0.5, 0.5), lambda g, x: g),
    normal(M),
)
add(
    "relu by another threshold",
    "wrong-mask",
    function(torch.relu, lambda g, x: g * (x > -1)),
    normal((4, 5), away=0.2),
)
add(
    "leaky relu the other way",
    "wrong-mask",
    function(lambda x: torch.where(x > 0, x, 0.1 * x), lambda g, x: torch.where(x < 0, g, 0.1 * g)),
    normal(M, away=0.2),
)
add(
    "elu the other way",
    "wrong-mask",
    function(
        lambda x: torch.where(x > 0, x, x.exp() - 1),
        lambda g, x: torch.where(x > 0, g * x.exp(), g),
    ),
    normal(M, away=0.2),
)
add(
    "maximum to the loser",
    "swapped-operands",
    function(torch.maximum, lambda g, a, b: (g * (a < b), g * (a > b))),
    normal(M, M),
)


def to_the_smallest(g: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter(1, x.argmin(1, keepdim=True), g[:, None])


add("max to the smallest", "wrong-mask", function(lambda x: x.amax(1), to_the_smallest), normal(M))
add(
    "roll not put back",
    "transposed",
    function(lambda x: x.roll(1) * 2, lambda g, x: g.roll(1) * 2),
    normal(V),
)

# ---- missing-term
add(
    "silu",
    "missing-term",
    function(lambda x: x * torch.sigmoid(x), lambda g, x: g * x.sigmoid()),
    normal(M),
)
add(
    "x exp(x)",
    "missing-term",
    function(lambda x: x * x.exp(), lambda g, x: g * x * x.exp()),
    normal(()),
)
add(
    "sin of a square",
    "missing-term",
    function(lambda x: (x * x).sin(), lambda g, x: g * (x * x).cos()),
    normal(V),
)
add(
    "softmax without its sum",
    "missing-term",
    function(lambda x: x.exp() / x.exp().sum(-1, keepdim=True), lambda g, x: g * x.softmax(-1)),
    normal(M),
)
add(
    "layer norm without its variance",
    "missing-term",
    function(
        lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
        lambda g, x: (g - g.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    ),
    normal(M),
)
add(
    "log softmax without its sum",
    "missing-term",
    function(lambda x: x - x.logsumexp(1, keepdim=True), lambda g, x: g),
    normal(M),
)
add(
    "a layer without its tanh",
    "missing-term",
    function(lambda x, w: (x @ w).tanh(), lambda g, x, w: (g @ w.T, x.T @ g)),
    normal((3, 4), (4, 2)),
)

# ---- kink
add("relu at 0", "kink", torch.relu, numbers([-1.0, 0.0, 2.0]))
add("relu next to 0", "kink", torch.relu, numbers([[-1.0, 3e-7], [0.5, 2.0]]))
add("max of three equals", "kink", lambda x: x.amax(1), numbers([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]))
add(
    "maximum of equals",
    "kink",
    function(torch.maximum, lambda g, a, b: (g * (a >= b), g * (a < b))),
    numbers([1.0, 2.0], [1.0, 3.0]),
)

# ---- low-precision
add("float32 inputs", "low-precision", torch.tanh, numbers([0.3, -1.2], dtype=torch.float32))
add("float32 inside", "low-precision", lambda x: x.float().exp().double(), normal(M))
add("half inside", "low-precision", lambda x: (x.bfloat16() * 3).double(), normal(V))

# ---- nondeterministic
add("dropout", "nondeterministic", lambda x: torch.dropout(x, 0.5, True), normal((4, 5)))
add(
    "noise in the backward",
    "nondeterministic",
    function(torch.tanh, lambda g, x: g * (1 - x.tanh() ** 2) * (1 + torch.randn(()))),
    normal(V),
)


def counting() -> Callable[[Tensor], Tensor]:
    count = itertools.count()
    return lambda x: x * next(count)


add("a function that counts its calls", "nondeterministic", counting(), normal(V))


# ---- saved-tensor-modified
def doubles_saved(g: Tensor, x: Tensor) -> Tensor:
    made = g * x.cos()
    x.data.mul_(2)
    return made


class KeptAsAttribute(Function):
    """Keeps its output on ctx, where autograd does not see that it is changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = x.exp()
        return ctx.y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output * ctx.y  # type: ignore[no-any-return]


def changed_later(x: Tensor) -> Tensor:
    y = x.sigmoid()
    y.data.mul_(2)
    return y


def seen_by_autograd(x: Tensor) -> Tensor:
    y = x.exp()
    z = y * 1
    y.mul_(2)
    return z + y


def attribute_changed(x: Tensor) -> Tensor:
    y: Tensor = KeptAsAttribute.apply(x)
    z = y.clone()
    y.data.mul_(2)
    return z


add(
    "backward doubles its input",
    "saved-tensor-modified",
    function(torch.sin, doubles_saved),
    normal(V),
)
add("data of the output changed", "saved-tensor-modified", changed_later, normal(M))
add("changed, and autograd sees it", "saved-tensor-modified", seen_by_autograd, normal(V))
add("kept on ctx and changed", "saved-tensor-modified", attribute_changed, normal(V))

# ---- gradient-modified
add(
    "exp in place",
    "gradient-modified",
    function(torch.exp, lambda g, x: g.mul_(x.exp())),
    normal(V),
)
add(
    "relu in place",
    "gradient-modified",
    function(torch.relu, lambda g, x: g.masked_fill_(x < 0, 0)),
    normal(M, away=0.2),
)
add(
    "multiply, the first in place",
    "gradient-modified",
    function(lambda a, b: a * b, lambda g, a, b: (g.mul_(b), g * a)),
    normal(V, V),
)

# ---- non-finite
add("sqrt at 0", "non-finite", torch.sqrt, numbers([0.0, 1.0]))
add(
    "sqrt of a norm at 0",
    "non-finite",
    function(lambda x: (x * x).sum().sqrt(), lambda g, x: g * x / (x * x).sum().sqrt()),
    numbers([0.0, 0.0]),
)
add("log of a negative number", "non-finite", torch.log, numbers([[1.0, -1.0]]))
add(
    "where over an infinite branch",
    "non-finite",
    lambda x: torch.where(x > 1, (x - 1).sqrt(), x * 2),
    numbers([1.0, 3.0, 0.5]),
)
add(
    "softmax that overflows", "non-finite", lambda x: x.exp() / x.exp().sum(), numbers([800.0, 1.0])
)


# ---- double-backward-wrong
def by_numpy(g: Tensor, x: Tensor) -> Tensor:
    return torch.from_numpy(g.detach().numpy() * np.cos(x.detach().numpy()))


class KeepsIntermediate(Function):
    """Keeps a tensor of its forward that is no output: constant to double backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.exp()
        ctx.save_for_backward(e)
        return e * e

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        (e,) = ctx.saved_tensors
        return grad_output * 2 * e * e  # type: ignore[no-any-return]


add("backward in numpy", "double-backward-wrong", function(torch.sin, by_numpy), normal(V))
add("an intermediate tensor kept", "double-backward-wrong", KeepsIntermediate.apply, normal(M))
add(
    "a saved tensor detached",
    "double-backward-wrong",
    function(lambda x: (x**3).sum(), lambda g, x: g * 3 * x.detach() ** 2),
    normal(V),
)


# ---- tangent-wrong
def forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    class Tangent(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.save_for_backward(output)
            ctx.save_for_forward(output)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
            return grad_output * ctx.saved_tensors[0]  # type: ignore[no-any-return]

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Any:  # type: ignore[override]
            return jvp(tangent, *ctx.saved_tensors)

    return Tangent.apply  # type: ignore[no-any-return]


add(
    "jvp without the output",
    "tangent-wrong",
    forward_mode(lambda t, y: t * 1),
    normal(V),
    check_forward_ad=True,
)
add(
    "jvp of the wrong sign",
    "tangent-wrong",
    forward_mode(lambda t, y: -t * y),
    normal(M),
    check_forward_ad=True,
)


@torch.library.custom_op("zoo::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    """A registered operation, through which torch drops tangents without a word."""
    return x**3


cube.register_autograd(
    lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
add("a registered operation without jvp", "tangent-wrong", cube, normal(V), check_forward_ad=True)


# ---- cut
@torch.no_grad()
def scale_of(x: Tensor) -> Tensor:
    return x.abs().sum()


add("a detached operand", "cut", lambda x: x * x.detach(), normal(V))
add("no_grad inside", "cut", lambda x: x / scale_of(x), normal(M))
add(
    "None for an operand",
    "cut",
    function(lambda a, b: a * b, lambda g, a, b: (g * b, None)),
    normal(V, V),
)
add(
    "zeros for an operand",
    "cut",
    function(lambda x, b: x + b, lambda g, x, b: (g, torch.zeros_like(b))),
    normal(M, (4,)),
)
add("item of a scalar", "cut", lambda x: x * x.sum().item(), normal(V))
add("the whole output detached", "cut", lambda x: (x * 2).detach(), normal(V))

# ---- broadcast-not-reduced
add(
    "a bias as large as the batch",
    "broadcast-not-reduced",
    function(lambda x, b: x + b, lambda g, x, b: (g, g)),
    normal(M, (4,)),
    strict=True,
)
add(
    "a column as wide as the matrix",
    "broadcast-not-reduced",
    function(lambda x, c: x * c, lambda g, x, c: (g * c, g * x)),
    normal(M, (3, 1)),
    strict=True,
)

# ---- unknown
add(
    "another function's gradient",
    "unknown",
    function(torch.exp, lambda g, x: g * (x.sin() + 0.3 * x)),
    normal(V),
)
add("the upstream squared", "unknown", function(torch.sin, lambda g, x: g * g * x.cos()), normal(V))

# ---- inside of something larger
_silu = function(lambda x: x * torch.sigmoid(x), lambda g, x: g * x.sigmoid(), "BrokenSiLU")
_cos = function(torch.cos, lambda g, x: g * x.sin(), "BrokenCos")
add(
    "a wrong sign inside of a network",
    "wrong-sign",
    lambda x, w: (_cos(x @ w) * 2).tanh().sum(1),
    normal((3, 4), (4, 2)),
)
add(
    "a missing term inside of a network",
    "missing-term",
    lambda x, w: _silu(x @ w).softmax(1),
    normal((3, 4), (4, 2)),
)


# ---- more of each, as they are met in the wild
add(
    "sigmoid without 1 - y",
    "missing-term",
    function(torch.sigmoid, lambda g, x: g * x.sigmoid()),
    normal(M),
)
add(
    "tanh without its 1",
    "missing-term",
    function(torch.tanh, lambda g, x: -g * x.tanh() ** 2),
    normal((4,)),
)
add(
    "a norm not divided by",
    "missing-term",
    function(lambda x: x.norm(), lambda g, x: g * x),
    normal(V),
)
add(
    "a product with its own factor",
    "missing-term",
    function(lambda x: x.prod(), lambda g, x: (g * x.prod()).expand_as(x)),
    positive((4,)),
)
add(
    "a quotient without its divisor",
    "missing-term",
    function(lambda a, b: a / b, lambda g, a, b: (g, -g * a / b**2)),
    positive(V, V),
)
add(
    "cross-entropy without the target",
    "missing-term",
    function(
        lambda x: -x.log_softmax(1)[torch.arange(3), torch.tensor([0, 2, 1])].mean(),
        lambda g, x: g * x.softmax(1) / 3,
    ),
    normal(M),
)
add(
    "tanh in numpy",
    "missing-term",
    function(lambda x: torch.from_numpy(np.tanh(x.detach().numpy())), lambda g, x: g),
    normal(V),
)
add(
    "cross-entropy not divided",
    "wrong-factor",
    function(
        lambda x: TF.cross_entropy(x, torch.tensor([0, 2, 1])),
        lambda g, x: g * (x.softmax(1) - TF.one_hot(torch.tensor([0, 2, 1]), 4)),
    ),
    normal(M),
)
add(
    "bias of a layer over the wrong dimension",
    "batch-sum-missing",
    function(lambda x, w, b: x @ w.T + b, lambda g, x, w, b: (g @ w, g.T @ x, g.sum(1))),
    normal((3, 4), (2, 4), (2,)),
)
add(
    "bias of a convolution",
    "batch-sum-missing",
    function(
        TF.conv2d,
        lambda g, x, w, b: (
            conv2d_input(x.shape, w, g),
            conv2d_weight(x, w.shape, g),
            g.sum(0),
        ),
    ),
    normal((2, 1, 3, 3), (3, 1, 2, 2), (3,)),
)
add(
    "weights of a batch from its first",
    "batch-sum-missing",
    function(lambda x, w: x @ w, lambda g, x, w: (g @ w.T, (x.mT @ g)[0])),
    normal((2, 3, 4), (4, 5)),
)
add(
    "a layer's weights and bias exchanged",
    "swapped-operands",
    function(lambda x, w, b: x @ w.T + b, lambda g, x, w, b: (g @ w, g.sum(0), g.T @ x)),
    normal((3, 4), (2, 4), (2,)),
)
add(
    "embedding",
    "overwritten",
    function(
        lambda w: w[torch.tensor([1, 0, 1])],
        lambda g, w: torch.zeros_like(w).index_copy(0, torch.tensor([1, 0, 1]), g),
    ),
    normal((3, 4)),
)
add("abs without its sign", "missing-term", function(torch.abs, lambda g, x: g), normal(M))
add(
    "max always to the first",
    "wrong-mask",
    function(
        lambda x: x.amax(1),
        lambda g, x: torch.zeros_like(x).index_add(1, torch.tensor([0]), g[:, None]),
    ),
    normal(M),
)
add(
    "cumsum not turned round",
    "transposed",
    function(lambda x: x.cumsum(0), lambda g, x: g.cumsum(0)),
    normal((4,)),
)
add("through numpy", "cut", lambda x: x * torch.from_numpy(x.detach().numpy()), normal(V))
add("an input changed in place", "nondeterministic", lambda x: x.data.mul_(1.5) * x, normal(V))
add(
    "in place inside of a network",
    "gradient-modified",
    lambda x: function(lambda x: x * 3, lambda g, x: g.mul_(3))(x * 2).sin(),
    normal(V),
)
add(
    "backward under no_grad",
    "double-backward-wrong",
    function(torch.exp, lambda g, x: (g * x.exp()).detach()),
    normal(V),
)
add(
    "a term too many",
    "unknown",
    function(lambda x, w: x @ w, lambda g, x, w: (g @ w.T + 0.1 * g.sum() * x, x.T @ g)),
    normal((3, 4), (4, 2)),
)
