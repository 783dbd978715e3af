"""Functions that are right in all but one thing, each labelled with the checks that have to fail.

`Sine` does everything; the others change one of its methods, or the least that shows the fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["BROKEN", "Broken", "Product", "Sine"]


class Sine(Function):
    """y = sin(x), with all that a Function can have."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return grad_output * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:  # type: ignore[override]
        return tangent * ctx.saved_tensors[0].cos()


class Product(Function):
    """y = x w, w a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return grad_output * w, (grad_output * x).sum()

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return dx * w + x * dw


class Exp(Sine):
    """y = exp(x), from y alone."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return grad_output * ctx.saved_tensors[0]

    jvp = backward  # type: ignore[assignment]


@dataclass(frozen=True)
class Broken:
    """A function with a fault.

    Attributes:
        fails: the checks that fail, and no others.
        says: what is said of the first of them.
        loud: whether the failures are errors.
        unsupported: the checks that are refused by an error.
        compiled: whether the checks that compile run too.
    """

    name: str
    fn: Any
    fails: frozenset[str]
    says: str
    shapes: tuple[tuple[int, ...], ...] = ((3, 4),)
    loud: bool = False
    unsupported: frozenset[str] = frozenset()
    compiled: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


BROKEN: dict[str, Broken] = {}

FUNC = frozenset({"func.grad", "func.vjp", "func.jvp", "func.jacrev", "func.hessian"})


def change(base: type[Function], **methods: Callable[..., Any]) -> type[Function]:
    members = {name: staticmethod(method) for name, method in methods.items()}
    return type("Broken", (base,), members)


def add(name: str, fn: Any, fails: set[str], says: str, **others: Any) -> None:
    assert name not in BROKEN
    BROKEN[name] = Broken(name, fn, frozenset(fails), says, **others)


def cos(ctx: Any, grad: Tensor) -> Any:
    return grad * ctx.saved_tensors[0].cos()


# ---- gradients
add(
    "a factor",
    change(Sine, backward=lambda ctx, g: 1.01 * cos(ctx, g)),
    {"gradient"},
    "wrong-factor",
)
add(
    "detach in backward",
    change(Sine, backward=lambda ctx, g: g * ctx.saved_tensors[0].detach().cos()),
    {"double-backward", "func.hessian"},
    "double-backward-wrong",
)
add(
    "numpy in backward",
    change(
        Sine,
        backward=lambda ctx, g: torch.from_numpy((g * ctx.saved_tensors[0].cos()).detach().numpy()),
    ),
    {"double-backward"},
    "a constant for autograd",
    unsupported=frozenset({"bfloat16", "vmap", *FUNC} - {"func.vjp", "func.jvp"}),
)
add(
    "once_differentiable",
    change(Sine, backward=once_differentiable(cos)),
    set(),
    "",
    unsupported=frozenset({"double-backward"}),
)
add(
    "a dropped tangent",
    change(Sine, jvp=lambda ctx, t: torch.zeros_like(t)),
    {"forward-mode", "func.jvp"},
    "tangent-wrong",
)
add(
    "a jvp that crashes",
    change(Sine, jvp=lambda ctx, t: t * ctx.cosine),
    {"forward-mode", "func.jvp", "func.hessian"},
    "AttributeError",
    loud=True,
)

# ---- transforms


class WrongDimension(Sine):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return WrongDimension.apply(x), 0


class Old(Function):
    """As in old tutorials, ctx in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.sin()

    backward = staticmethod(cos)  # type: ignore[assignment]


def in_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


def batched(g: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(g)


add(
    "a vmap that takes any dimension for the first",
    WrongDimension,
    {"vmap"},
    "over dimension -1",
)
add(
    "ctx in forward",
    Old,
    set(),
    "",
    unsupported=frozenset({"forward-mode", "vmap", *FUNC}),
)
add(
    "another value under torch.func",
    lambda x: Sine.apply(x) * (1.5 if torch._C._functorch.is_functorch_wrapped_tensor(x) else 1),
    {"vmap", *FUNC},
    "is wrong in",
)
add(
    "another gradient under torch.func",
    change(Sine, backward=lambda ctx, g: cos(ctx, g) * (1.5 if in_transform() else 1)),
    {"func.grad", "func.jacrev", "func.hessian", "vmap"},
    "is wrong in",
)
add(
    "another gradient of a batch of upstreams",
    change(Sine, backward=lambda ctx, g: cos(ctx, g) * (1.5 if batched(g) else 1)),
    {"func.jacrev", "func.hessian", "vmap"},
    "is wrong in",
)

# ---- compilers
add(
    "a constant when compiled",
    change(Sine, forward=lambda x: x.sin() + (0.5 if torch.compiler.is_dynamo_compiling() else 0)),
    {"compile", "compile-func"},
    "at inputs number 1",
    compiled=True,
)
add(
    "a constant when exported",
    change(Sine, forward=lambda x: x.sin() + (0.5 if torch.compiler.is_exporting() else 0)),
    {"export"},
    "at inputs number 1",
    unsupported=frozenset({"compile"}),  # torch.compile wants no jvp with fullgraph
    compiled=True,
)


@torch.library.custom_op("torchbp_tests::sine", mutates_args=())
def registered(x: Tensor) -> Tensor:
    return x.sin()


registered.register_fake(lambda x: x.new_empty(x.shape[::-1]))
registered.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
add(
    "a fake kernel of another shape",
    registered,
    {"opcheck", "forward-mode", "func.jvp"},  # torch drops the tangent itself
    "the tangent is dropped",
    unsupported=FUNC - {"func.jvp"},
)

# ---- number types
add(
    "float32 inside",
    change(Sine, forward=lambda x: x.float().sin().to(x.dtype)),
    {"gradient", "forward-mode", "func.jvp", "float64"},
    "low-precision",
)


def wrong_in(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.sin() * (1.2 if x.dtype is kind else 1)


for kind in (torch.float32, torch.float16, torch.bfloat16):
    add(
        f"wrong in {kind}",
        change(Sine, forward=wrong_in(kind)),
        {str(kind).removeprefix("torch.")} | ({"autocast"} if kind is torch.float32 else set()),
        "against float64",
    )
add(
    "float32 for half inputs",
    change(Sine, forward=lambda x: x.sin() if x.dtype is torch.float64 else x.float().sin()),
    {"float16", "bfloat16"},
    "y is float32 for float16 inputs",
)
add(
    "float64 for all",
    change(Sine, forward=lambda x: x.double().sin()),
    {"float32", "float16", "bfloat16"},
    "y is float64 for float32 inputs",
)
add(
    "wrong under autocast",
    change(
        Sine,
        forward=lambda x: x.sin() * (1.5 if torch.is_autocast_enabled("cpu") else 1),
    ),
    {"autocast"},
    "against float64",
)

# ---- memory


def as_if_contiguous(x: Tensor) -> Tensor:
    """What a kernel does that takes the pointer and forgets the strides."""
    if in_transform():
        return x
    strides = torch.empty(x.shape, device="meta").stride()
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided(x.shape, strides) if x.numel() <= room else x


def halved_where_expanded(ctx: Any, g: Tensor) -> Any:
    return cos(ctx, g) * (0.5 if 0 in g.stride() and g.numel() > 1 else 1)


def garbage_if_empty(ctx: Any, g: Tensor) -> Any:
    x, w = ctx.saved_tensors
    return g * w, (g * x).sum() if x.numel() else torch.ones_like(w)


def lazy(ctx: Any, g: Tensor) -> Any:
    x, w = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, (g * x.abs()).sum()
    return g * w, (g * x).sum()


def crashing(ctx: Any, g: Tensor) -> Any:
    x, w = ctx.saved_tensors
    missing: Any = w if ctx.needs_input_grad[1] else None
    return g * missing, (g * x).sum()


add(
    "strides forgotten",
    change(Sine, forward=lambda x: as_if_contiguous(x).sin()),
    {"strided", "expanded"},
    "x transposed in memory",
)
add(
    "strides of the upstream forgotten",
    change(Sine, backward=lambda ctx, g: cos(ctx, as_if_contiguous(g))),
    {"strided"},
    "the upstream gradient transposed",
)
add(
    "an upstream of stride 0",
    change(Sine, backward=halved_where_expanded),
    {"expanded"},
    "the upstream gradient expanded",
)
add(
    "garbage for nothing",
    change(Product, backward=garbage_if_empty),
    {"empty"},
    "of an empty output",
    shapes=((3, 4), ()),
)
add(
    "frozen inputs",
    change(Product, backward=lazy),
    {"frozen"},
    "x frozen",
    shapes=((3, 4), ()),
)
add(
    "a crash for frozen inputs",
    change(Product, backward=crashing),
    {"frozen"},
    "with w frozen it raises TypeError",
    shapes=((3, 4), ()),
    loud=True,
)

# ---- state
_calls = [0]
_kept: list[Tensor] = []


def drifting(x: Tensor) -> Tensor:
    _calls[0] += 1
    return x.sin() + 1e-13 * _calls[0]


def keeping(x: Tensor) -> Tensor:
    _kept.append(x.detach() * 2)
    return x.sin()


class OldSine(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return grad_output * ctx.x.cos()


class OldExp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.y = x.exp()
        return ctx.y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return grad_output * ctx.y


add("a drift", change(Sine, forward=drifting), {"determinism"}, "in another run y differs")
add(
    "the upstream gradient changed",
    change(Sine, backward=lambda ctx, g: g.mul_(ctx.saved_tensors[0].cos())),
    {"gradient", "mutation"},
    "gradient-modified",
    unsupported=frozenset({"expanded", "vmap"}),
)
add(
    "an input written to",
    change(Sine, forward=lambda x: x.add_(0).sin()),
    {"gradient", "mutation"},
    "modified by an inplace operation",
    unsupported=frozenset({"expanded"}),
)
add(
    "an input on ctx",
    OldSine,
    {"later-changes"},
    "backward uses the input x",
    unsupported=frozenset({"forward-mode", "vmap", *FUNC}),
)
add(
    "an output on ctx",
    OldExp,
    {"later-changes", "leak"},
    "backward uses the output y",
    unsupported=frozenset({"forward-mode", "vmap", *FUNC}),
)
add(
    "a view as output",
    change(Sine, forward=lambda x: x.sin().view_as(x)),
    set(),
    "",
    unsupported=frozenset({"later-changes"}),
)
add("a global list", change(Sine, forward=keeping), {"leak"}, "nothing gives back")
add(
    "another function than the reference",
    Sine,
    {"reference"},
    "against the reference: y",
    options={"reference": torch.cos},
)
add(
    "a gradient unlike the reference's",
    change(Sine, backward=lambda ctx, g: 1.01 * cos(ctx, g)),
    {"gradient", "reference"},
    "wrong-factor",
    options={"reference": torch.sin},
)
add(
    "ten times the memory",
    change(Sine, forward=lambda x: x.expand(20, *x.shape).sin()[0].clone()),
    {"memory"},
    "more than 3 times as much memory",
    options={"reference": torch.sin, "max_memory": 3.0},
)
add(
    "too slow",  # for a limit that nothing keeps
    Sine,
    {"speed"},
    "times as much time",
    options={"reference": torch.sin, "max_time": 1e-6},
)
