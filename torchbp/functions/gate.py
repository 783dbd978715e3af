"""The plumbing of every hand-written Function, once, so that each reads like the lecture's.

A Function of torchbp has `forward`, `setup_context`, `backward` and `jvp`; this module gives it

* `Gate`, its base class: a cheap `apply`, clear errors, a `jvp` that torch.compile does not see;
* `raw`, which calls an operation of `torch.ops.torchbp` from inside a Function;
* `backward_of`, the Function that a unary row's gradient column is, differentiable again;
* `TwoInputs`, the gradients of a two-input row, each in the shape of its input;
* `call`, through which torchbp.functional applies a Function under eager PyTorch, torch.func and
  torch.compile alike;
* `plain` and `eager`, for a Function that takes a Gate's place where none of these is at work, and
  `idle`, where there is no need for any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import check
from .table import ROWS, Row

__all__ = [
    "BACKWARD", "GATES", "REFUSALS", "Gate", "TwoInputs", "any_autocast", "auxiliary",
    "backward_of", "below", "call", "eager", "factors", "fast_backward", "idle", "is_traced",
    "needs_grad", "past_autocast", "plain", "raw", "requires_grad", "save", "sum_to", "unused",
    "wanted",
]  # fmt: skip

_functorch_active = torch._C._are_functorch_transforms_active
is_traced = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
#: Whether autocast is on for any device.
any_autocast = torch._C._is_any_autocast_enabled
dispatch_modes = torch._C._len_torch_dispatch_stack
_JVP = torch._C._functorch.TransformType.Jvp
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_Exclude = torch._C._ExcludeDispatchKeyGuard
_will_execute = torch._C._will_engine_execute_node

#: What bad input raises somewhere below, of which `check` says better what is wrong.
REFUSALS = RuntimeError, TypeError, LookupError, AttributeError, OverflowError


def _keys(*names: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys


# Inside a Function an operation is plain arithmetic: autograd and autocast have had their turn.
_AUTOCAST = _keys("AutocastCPU", "AutocastCUDA")
_SETTLED = _keys("AutogradFunctionality", "AutogradOther") | _AUTOCAST


def below(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` as a Function calls it: past autograd and autocast, straight to the kernel."""

    def run(*args: Any) -> Any:
        if is_traced():  # the tracer has no use for the guard
            return op(*args)
        with _Exclude(_SETTLED):
            return op(*args)

    return run


def past_autocast() -> AbstractContextManager[Any]:
    """A context for what a backward leaves to PyTorch's operations, autograd included."""
    return _Exclude(_AUTOCAST) if any_autocast() else nullcontext()


def raw(name: str) -> Callable[..., Any]:
    """The operation `torch.ops.torchbp.NAME` as a Function calls it.

    Where nothing traces, transforms or casts, that is its twin in `torch.ops.torchbp_kernels`,
    which has no autograd to get past: the guard of `below` costs as much as a small kernel.

    ONNX has none of these operations, so that its exporter is refused: `_by_formula`.
    """
    op = below(getattr(torch.ops.torchbp, name).default)
    kernel = getattr(torch.ops.torchbp_kernels, name).default._op

    def run(*args: Any) -> Any:
        if is_traced() or _functorch_active() or dispatch_modes() or any_autocast():
            if not is_traced() and torch.onnx.is_in_onnx_export():
                raise RuntimeError(f"torchbp::{name}: ONNX has no such operation")
            return op(*args)
        return kernel(*args)

    return run


def fast_backward(grad: Tensor) -> bool:
    """Whether a backward may use its fused kernel, as nobody will differentiate or batch it.

    Batching shows as a functorch transform, or (`is_grads_batched=True`) as a batched gradient.
    What torch.compile traces is never differentiated twice.
    """
    return is_traced() or not (
        _grad_enabled()
        or _functorch_active()
        or forward_ad._current_level >= 0
        or _is_batched(grad)
    )


#: Of a product with fewer results a gradient takes less time than to ask whether it is wanted.
MANY = 1 << 13


def wanted(ctx: Any, size: int = MANY) -> tuple[bool, ...]:
    """Of which inputs the backward that is running wants the gradient.

    Of those that require grad, as `ctx.needs_input_grad` has them, the ones on the way to what it
    was asked for: `torch.autograd.grad(y, x)` wants no gradient of a weight. This is looked up
    where the first input, x, requires grad (parameters alone are asked for together), and where the
    `size` of the upstream gradient, if given, is worth it.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if not needs[0] or is_traced() or size < MANY or _functorch_active():
        return needs
    nodes = [node for node, _ in ctx.next_functions if node is not None]  # one for each True
    if len(nodes) < 2:
        return needs
    first, *others = nodes
    try:
        found = [*map(_will_execute, others)]
        # Without others it is what this backward is for, and need not be asked.
        found.insert(0, not any(found) or _will_execute(first))
    except RuntimeError:  # a leaf that autograd.grad was asked for; or no engine is running
        found = [*map(_may_execute, nodes)]
    if all(found):
        return needs
    flags = iter(found)
    return tuple(need and next(flags) for need in needs)


def _may_execute(node: Any) -> bool:
    """Whether the running backward goes through a node, or might."""
    try:
        return _will_execute(node)  # type: ignore[no-any-return]
    except RuntimeError:
        return True


def auxiliary(ctx: Any, *outputs: Tensor, constant: tuple[Tensor, ...] = ()) -> None:
    """Say which outputs are there for backward; only a second derivative goes through them.

    torch.compile has none, and would fill in zeros for the gradients of those that nobody used.

    Args:
        ctx: the context of a Function.
        outputs: those that a second derivative goes through.
        constant: those that have no gradient at all.
    """
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constant, *(outputs if is_traced() else ()))


def unused(*grads: Tensor | None) -> bool:
    """Whether the gradients of auxiliary outputs are missing, as they are without a second one."""
    if not is_traced():
        for grad in grads:
            if grad is not None:
                return False
    return True


def _forward_over_forward() -> bool:
    """Whether forward mode is nested, as in jacfwd of jacfwd.

    There PyTorch loses what plain operations in a custom `jvp` do (seen in torch 2.13).
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == _JVP for level in stack) > 1


def needs_grad(ctx: Any, count: int) -> tuple[bool, ...]:
    """Which of the first inputs get a gradient, as `setup_context` asks.

    What only the others' gradients read is not saved, as in PyTorch: it takes no memory, and may be
    changed in place before backward. All of them do where the tracer, a transform or forward mode
    is at work, each of which knows better what it needs.
    """
    if is_traced() or forward_ad._current_level >= 0 or _functorch_active():
        return (True,) * count
    return ctx.needs_input_grad[:count]  # type: ignore[no-any-return]


def factors(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Two inputs of which each one's gradient reads the other: what is to be saved of them."""
    need_a, need_b = needs_grad(ctx, 2)
    return a if need_b else None, b if need_a else None


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for backward, and for forward mode where that is on."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0 or _functorch_active():
        ctx.save_for_forward(*tensors)


#: The gates of the table: row's name -> Function.
GATES: dict[str, type[Gate]] = {}

#: Of those with one input that save it or their output, the Function of the gradient column.
BACKWARD: dict[str, type[Gate]] = {}


def _check_of(row: Row) -> Callable[..., None]:
    names = [*row.inputs, *([row.parameter] if row.parameter else [])]

    def check_row(*inputs: Any) -> None:
        """Raise TypeError or ValueError for bad input to the gate of a row."""
        if len(inputs) > len(names):
            raise TypeError(f"{row.name}: wants {', '.join(names)}, got {len(inputs)} arguments")
        for i, (name, value) in enumerate(zip(names, inputs, strict=False)):
            if name == row.parameter:
                check.number(row.name, name, value)
            elif i == 0:
                check.floating(row.name, name, value)
            else:
                check.like(row.name, name, value, names[0], inputs[0])
                check.broadcastable(row.name, names[0], inputs[0], name, value)

    return check_row


def _jvp_of(backward: Callable[..., Any]) -> Callable[..., Tensor]:
    def jvp(ctx: Any, x_t: Tensor, *_: None) -> Tensor:
        y_t = backward(ctx, x_t)
        y_t = y_t[0] if isinstance(y_t, tuple) else y_t
        return y_t.clone() if y_t is x_t else y_t  # a tangent of its own

    return jvp


class Gate(Function):
    """Base class of every Function of torchbp.

    A subclass defines, as static methods and with every input positional,

    * `forward(*inputs)`, `setup_context(ctx, inputs, output)`, `backward(ctx, *upstream)` and
      `jvp(ctx, *tangents)`, as torch.autograd.Function has them;
    * `check(*inputs)`, which raises TypeError, ValueError or IndexError for bad input;
    * `formula(*inputs)`, the same result from PyTorch's own operations, which torch.compile uses
      under a torch.func transform, and which is for tensors and programs that know no others.

    The gate of a row of the table names it, `row = "relu"`, and is found in `GATES` by that name.
    It needs no `check`, nor a `jvp` if it has one input: its Jacobian is diagonal, so that
    forward mode multiplies the tangent as backward does the upstream gradient.
    """

    generate_vmap_rule = True
    row: ClassVar[str]
    check: ClassVar[Callable[..., None]]
    formula: ClassVar[Callable[..., Any]]
    _defaults: tuple[Any, ...] = ()
    _inputs = 0
    _twin: type[Gate]
    _record: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        row = cls.__dict__.get("row")
        if row is not None:
            GATES[row] = cls
            cls.check = staticmethod(_check_of(ROWS[row]))
            if len(ROWS[row].inputs) == 1:
                cls.jvp = staticmethod(_jvp_of(cls.backward))  # type: ignore[method-assign]
        if "forward" in cls.__dict__:
            parameters = [
                parameter
                for parameter in inspect.signature(cls.forward).parameters.values()
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ]
            cls._inputs = len(parameters)
            cls._defaults = tuple(p.default for p in parameters if p.default is not p.empty)
        # torch.compile traces the class itself, whatever its apply does, and refuses one that has a
        # jvp. So jvp moves to a twin, which apply uses.
        cls._twin = cls
        if "jvp" in cls.__dict__:
            jvp = cls.jvp
            del cls.jvp
            cls._twin = type(cls.__name__, (cls,), {"__doc__": cls.__doc__})
            cls._twin.jvp = staticmethod(jvp)  # type: ignore[method-assign]
        cls._record = _recorder(cls._twin)

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Run forward, and record the Function for backward if an input requires grad.

        The work of `torch.autograd.Function.apply` without its `inspect.signature` on every call,
        which is most of its time.
        """
        try:
            if kwargs or _functorch_active():
                if not kwargs and _forward_over_forward():
                    return cls.formula(*args)
                return super(Gate, cls._twin).apply(*args, **kwargs)
            missing = cls._inputs - len(args)
            if missing > 0:
                args += cls._defaults[len(cls._defaults) - missing :]
            if forward_ad._current_level >= 0 or (_grad_enabled() and requires_grad(args)):
                return cls._record(*args)
            return cls.forward(*args)
        except REFUSALS:
            if not kwargs:
                if _by_formula(args):
                    return cls.formula(*args)
                cls._explain(args)
            raise

    @classmethod
    def _explain(cls, args: tuple[Any, ...]) -> None:
        """Raise what `check` finds wrong with arguments that something below refused."""
        if not any(map(_stands_in, args)):
            cls.check(*args)


def _recorder(function: type[Function]) -> Callable[..., Any]:
    """What runs a Function's forward and records it, which is all that PyTorch's `apply` has to do
    where no transform is active."""
    # A node of the graph calls backward itself, not what looks for a vjp at every call.
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return super(Function, function).apply  # type: ignore[misc, no-any-return]


def plain() -> bool:
    """Whether a Function is recorded for backward and for nothing else, if an input requires grad:
    nothing traces, transforms or differentiates in forward mode."""
    return (
        not (is_traced() or _functorch_active() or forward_ad._current_level >= 0)
        and _grad_enabled()
    )


def idle(inputs: tuple[Any, ...]) -> bool:
    """Whether a Function's forward is all that there is to do, as nothing records, traces or
    transforms what is done to the inputs."""
    return not (
        is_traced()
        or (_grad_enabled() and requires_grad(inputs))
        or _functorch_active()
        or forward_ad._current_level >= 0
    )


def eager(function: type[Function], gate: type[Gate]) -> Callable[..., Any]:
    """`apply` of a Function that takes a Gate's place where the mode is `plain`.

    There it may do what saves time and a transform would not see: its `forward` has a ctx and
    returns the first output alone, so that what else backward needs is no output (each costs a
    microsecond or two). Whatever differentiates its gradient goes through the Gate, or through
    PyTorch's operations.
    """
    # What error messages, profiles and computational graphs show.
    function.__name__ = function.__qualname__ = gate.__name__
    function._backward_cls.__name__ = f"{gate.__name__}Backward"  # type: ignore[attr-defined]
    record = _recorder(function)

    def apply(*inputs: Any) -> Any:
        try:
            return record(*inputs)
        except REFUSALS:
            if _by_formula(inputs):
                y = gate.formula(*inputs)
                return y[0] if isinstance(y, tuple) else y
            gate._explain(inputs)
            raise

    return apply


def call(function: type[Gate], *inputs: Any) -> Any:
    """`function.apply(*inputs)`, right under torch.compile too.

    torch.compile drops a custom Function's rules inside a torch.func transform that it compiles
    (vmap of grad and jvp are silently wrong, torch 2.13), so there PyTorch's own formula runs.
    """
    if is_traced():
        if any(map(_has_operations, inputs)):
            return function.formula(*inputs)
        function.check(*inputs)
        if _functorch_active():
            return function.formula(*inputs)
        if not (torch.is_grad_enabled() and requires_grad(inputs)):
            return function.forward(*inputs)
        inputs = _each_once(inputs)
    return function.apply(*inputs)


def _each_once(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, with a view for a tensor that is there already, as in x * x: torch.compile
    refuses a Function of one tensor twice (torch 2.13)."""
    once: list[Any] = []
    for value in inputs:
        again = isinstance(value, Tensor) and any(value is other for other in once)
        once.append(value.view_as(value) if again else value)
    return tuple(once)


def _stands_in(value: Any) -> bool:
    """Whether it is no tensor and yet called in place of one, which it can refuse itself."""
    return hasattr(value, "__torch_function__") and not isinstance(value, Tensor)


def _has_operations(value: Any) -> bool:
    """Whether it is a tensor of a class that knows PyTorch's operations and no others: a DTensor,
    a jagged one, a weight that torchao has quantized."""
    return isinstance(value, Tensor) and hasattr(type(value), "__tensor_flatten__")


def _by_formula(inputs: tuple[Any, ...]) -> bool:
    """Whether PyTorch's operations are to do what an operation of torchbp has refused."""
    return any(map(_has_operations, inputs)) or torch.onnx.is_in_onnx_export()


def requires_grad(inputs: tuple[Any, ...]) -> bool:
    """Whether one of them does."""
    for value in inputs:  # noqa: SIM110 (a generator costs a microsecond)
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def second_order(
    row: Row, dy: Tensor, saved: Tensor, parameter: tuple[float, ...]
) -> Tensor | None:
    """The second-order column, d(dx)/d(saved), from PyTorch's operations: differentiable further.

    Half types compute in float32. None where the column is 0.
    """
    if row.columns["dxx"] == "0":
        return None
    half = saved.dtype in (torch.bfloat16, torch.float16)
    wide_dy, wide_saved = (dy.float(), saved.float()) if half else (dy, saved)
    values: dict[str, Any] = {"dy": wide_dy, row.saves[0]: wide_saved}
    if row.parameter is not None:
        values[row.parameter] = parameter[0]
    second: Tensor = row.evaluate("dxx", **values)
    return second.to(saved.dtype)


def backward_of(name: str, class_name: str) -> type[Gate]:
    """The Function of a unary row's gradient column: (dy, saved, *parameter) -> dx.

    It is linear in dy, so that its own backward is itself once more for dy, and the second-order
    column for the saved tensor.
    """
    row = ROWS[name]
    kernel = raw(f"{name}_backward")

    # With its exact arguments: torch.compile counts them.
    def gradient(dy: Tensor, saved: Tensor) -> Tensor:
        return kernel(dy, saved)

    def gradient_with(dy: Tensor, saved: Tensor, parameter: float) -> Tensor:
        return kernel(dy, saved, parameter)

    class Backward(Gate):
        __doc__ = f"The gradient column of the row `{name}`: `{row.columns['dx']}`."

        forward = staticmethod(gradient if row.parameter is None else gradient_with)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            dy, saved, *parameter = inputs
            save(ctx, dy, saved)
            ctx.parameter = tuple(parameter)

        @staticmethod
        def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
            dy, saved = ctx.saved_tensors
            grad_dy = grad_saved = None
            if ctx.needs_input_grad[0]:
                grad_dy = Backward.apply(ddx, saved, *ctx.parameter)
            if ctx.needs_input_grad[1]:
                second = second_order(row, dy, saved, ctx.parameter)
                grad_saved = None if second is None else ddx * second
            return grad_dy, grad_saved, *(None for _ in ctx.parameter)

        @staticmethod
        def jvp(ctx: Any, dy_t: Tensor | None, saved_t: Tensor | None, *_: None) -> Tensor:
            dy, saved = ctx.saved_tensors
            tangent = torch.zeros_like(saved)
            if dy_t is not None:
                tangent = tangent + Backward.apply(dy_t, saved, *ctx.parameter)
            second = second_order(row, dy, saved, ctx.parameter)
            if saved_t is not None and second is not None:
                tangent = tangent + saved_t * second
            return tangent

    Backward.__name__ = Backward.__qualname__ = class_name
    BACKWARD[name] = Backward
    return Backward


def sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a broadcast input: summed over the dimensions along which it was copied."""
    return grad if grad.shape == shape else grad.sum_to_size(shape)


class TwoInputs:
    """The gradients of a row with two inputs."""

    def __init__(self, name: str) -> None:
        self.row = ROWS[name]
        self.both = raw(f"{name}_backward")
        self.one = raw(f"{name}_backward_a"), raw(f"{name}_backward_b")

    def backward(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(da, db), None where not needed: by kernel, or from the row's text if differentiated.

        ctx has saved a and b. In the place of one that no needed column reads it may have saved
        None, and then keeps `shapes`.
        """
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        fast = fast_backward(dy)
        if fast and need_a and need_b:
            return self.both(dy, a, b)
        shape_a, shape_b = ctx.shapes if a is None or b is None else (a.shape, b.shape)
        if fast:
            # For what it does not read the kernel takes anything of the gradient's shape.
            one_a, one_b = self.one
            a, b = dy if a is None else a, dy if b is None else b
            da, db = one_a(dy, a, b) if need_a else None, one_b(dy, a, b) if need_b else None
        else:
            da = self.row.evaluate("da", dy=dy, a=a, b=b) if need_a else None
            db = self.row.evaluate("db", dy=dy, a=a, b=b) if need_b else None
        return (
            None if da is None else sum_to(da, shape_a),
            None if db is None else sum_to(db, shape_b),
        )

    def jvp(self, inputs: tuple[Tensor, Tensor], a_t: Tensor | None, b_t: Tensor | None) -> Tensor:
        """The tangent of y: the same columns, with the inputs' tangents for dy."""
        a, b = inputs
        of_a = None if a_t is None else self.row.evaluate("da", dy=a_t, a=a, b=b)
        of_b = None if b_t is None else self.row.evaluate("db", dy=b_t, a=a, b=b)
        if of_a is None or of_b is None:
            return of_b if of_a is None else of_a  # type: ignore[return-value]
        return of_a + of_b
