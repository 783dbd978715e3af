"""Python text of the calls that a ledger remembers: `h = torch.relu(z)`, `y = x @ w`."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from .operations import canonical

__all__ = ["Op", "Unwritable", "Var", "call_text", "closed", "literal", "renamed"]


class Unwritable(RuntimeError):
    """A gate that cannot be written as a line of code."""


@dataclass(eq=False)
class Var:
    """A tensor of the flat code, by the name that it has there.

    Attributes:
        hint: what to call it; `given` if that is what the traced code calls it.
        live: whether it receives a gradient.
        leaf: whether it is an argument.
    """

    hint: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    given: bool = False
    differentiable: bool = False
    leaf: bool = False
    live: bool = False
    name: str = ""
    node: str = ""
    low: float = math.nan  # its smallest element

    @property
    def grad(self) -> str:
        return f"grad_{self.name}"

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Op:
    """One operation of the flat code.

    Attributes:
        node: the name of the ledger's node that it belongs to.
        name: of the operation, as torchbp.graph.operations has it.
        func: the torch function, or the class of a custom Function.
        args, kwargs: its arguments, with Vars for tensors.
        result: Vars for what it returns, in tuples where it returns some; None where not needed.
        in_place: whether it was written as a change in place.
        random: whether it draws random numbers.
        place: of a "write", the text of the place in a text.
    """

    node: str
    name: str
    func: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    in_place: bool = False
    random: bool = False
    place: Callable[[str], str] | None = None

    @property
    def inputs(self) -> list[Var]:
        """The tensors that go in, each once."""
        found = [v for v in tree_leaves([self.args, self.kwargs]) if isinstance(v, Var)]
        return list(dict.fromkeys(found))

    @property
    def outputs(self) -> list[Var]:
        return [v for v in tree_leaves(self.result) if isinstance(v, Var)]


def literal(value: Any) -> str:
    """A value as an expression.

    Example:
        >>> literal([1.5, None, torch.float32]), literal(float("inf")), literal(torch.Size([2]))
        ('[1.5, None, torch.float32]', "float('inf')", '(2,)')
    """
    if isinstance(value, Var):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, (bool, int, float, complex, str, bytes)) or value in (None, ...):
        return "..." if value is ... else repr(value)
    if isinstance(value, Tensor) and not value.dim() and not value.is_floating_point():
        return repr(value.item())  # where a slice begins
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value)
    if isinstance(value, torch.device):
        return repr(str(value))
    if isinstance(value, tuple):
        inside = ", ".join(map(literal, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({literal(value.start)}, {literal(value.stop)}, {literal(value.step)})"
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not value.shape:
        return literal(value.item())
    raise Unwritable(f"an argument is no tensor, number or text, but {type(value).__name__}")


def index(key: Any) -> str:
    """What stands between the brackets of `x[key]`.

    Example:
        >>> index((slice(1, None), slice(None, None, 2), ..., 0))
        '1:, ::2, ..., 0'
    """
    if isinstance(key, tuple) and key:
        return ", ".join(map(index, key)) + ("," if len(key) == 1 else "")
    if isinstance(key, slice):
        parts = ["" if v is None else literal(v) for v in (key.start, key.stop)]
        return ":".join(parts) + ("" if key.step is None else f":{literal(key.step)}")
    return literal(key)


def closed(text: str) -> str:
    """The text in parentheses, if something may not be put behind it without them.

    Example:
        >>> closed("a + b"), closed("f(a)"), closed("-a")
        ('(a + b)', 'f(a)', '(-a)')
    """
    simple = (ast.Name, ast.Call, ast.Attribute, ast.Subscript)
    return text if isinstance(ast.parse(text, mode="eval").body, simple) else f"({text})"


def renamed(text: str, values: dict[str, Any]) -> str:
    """A formula in the words of csrc/gates.h, in the names of the flat code.

    Example:
        >>> renamed("dy * ((1 - y) * y)", {"dy": "grad_L", "y": "L"})
        'grad_L * (1 - L) * L'
        >>> renamed("where(x > 0, dy, slope * dy)", {"dy": "g", "x": "z", "slope": 0.1})
        'torch.where(z > 0, g, 0.1 * g)'
    """

    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if node.id not in values:
                return ast.parse(f"torch.{node.id}", mode="eval").body
            value = values[node.id]
            text = value if isinstance(value, str) else literal(value)
            return ast.parse(text, mode="eval").body

        def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
            return node  # math.log

        def visit_Call(self, node: ast.Call) -> ast.expr:
            node.args = [self.visit(argument) for argument in node.args]
            node.func = self.visit(node.func)
            return node

        def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
            left, right = self.visit(node.left), self.visit(node.right)
            if isinstance(node.op, ast.Mult):
                if _is_one(right):
                    return left
                if _is_one(left):
                    return right
                if isinstance(right, ast.BinOp) and isinstance(right.op, ast.Mult):  # a * (b * c)
                    left, right = ast.BinOp(left, ast.Mult(), right.left), right.right
            return ast.BinOp(left, node.op, right)

    return ast.unparse(Rename().visit(ast.parse(text, mode="eval").body))


def _is_one(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 1


# ---- calls

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "matmul": "@", "remainder": "%",
    "floor_divide": "//", "floordiv": "//", "mod": "%", "gt": ">", "ge": ">=", "lt": "<",
    "le": "<=", "eq": "==", "ne": "!=", "and": "&", "or": "|", "xor": "^", "bitwise_and": "&",
    "bitwise_or": "|", "bitwise_xor": "^", "greater": ">", "less": "<", "mm": "@", "mv": "@",
    "dot": "@", "bmm": "@",
}  # fmt: skip
PREFIX = {"neg": "-", "invert": "~", "bitwise_not": "~", "logical_not": "~"}

#: Methods in place whose twin without the underscore does something else, or is not there.
_NO_TWIN = frozenset({"bernoulli_", "random_", "normal_", "uniform_", "copy_", "set_", "resize_"})


def call_text(op: Op) -> str:
    """The call of an operation, not in place.

    Raises:
        Unwritable: there is no name to call it by, or an argument cannot be written down.
    """
    if op.func is None:
        raise Unwritable("the call that it belongs to was not seen")
    args, kwargs = op.args, op.kwargs
    if isinstance(op.func, type):
        name = op.func.__name__
        path = op.func.__module__
        if getattr(sys.modules.get(path), name, None) is not op.func:
            raise Unwritable(f"{path} has no {name} to import")
        if not all(part.isidentifier() for part in path.split(".")):
            raise Unwritable(f"{path} cannot be imported by name")
        return f"{name}.apply({_arguments(args, kwargs)})"
    promoted = op.in_place and any(v.dtype != op.outputs[0].dtype for v in op.inputs)
    if not kwargs and not promoted:
        if op.name in INFIX and len(args) == 2 and (op.name != "dot" or len(op.inputs) == 2):
            left, right = (literal(value) for value in args)
            left = f"({left})" if left.startswith("-") else left
            return f"{left} {INFIX[op.name]} {right}"
        if op.name in PREFIX and len(args) == 1:
            bool_only = op.name == "logical_not" and op.outputs[0].dtype == op.inputs[0].dtype
            if op.name != "logical_not" or bool_only:
                return f"{PREFIX[op.name]}{literal(args[0])}"
        if op.name == "reciprocal":
            return f"1 / {literal(args[0])}"
        if op.name == "getitem":
            return f"{literal(args[0])}[{index(args[1])}]"
    path = _path(op.func)
    owner, _, name = path.rpartition(".")
    if owner.endswith(".__get__") or name == "__get__":
        return f"{literal(args[0])}.{owner.rpartition('.')[2]}"
    ends = name.endswith("_") and not name.endswith("__")
    if owner == "torch.Tensor":
        receiver = literal(args[0])
        if ends or name.startswith("__i"):
            if name == "zero_":
                return f"torch.zeros_like({receiver})"
            if promoted or name in _NO_TWIN or not hasattr(Tensor, name[:-1]):
                receiver += ".clone()"
            else:
                name = name[:-1]
        return f"{receiver}.{name}({_arguments(args[1:], kwargs)})"
    if ends and _exists(path[:-1]):
        path = path[:-1]
    elif ends:
        args = (f"{literal(args[0])}.clone()", *args[1:])
        return f"{_short(path)}({args[0]}{', ' if args[1:] or kwargs else ''}" + (
            f"{_arguments(args[1:], kwargs)})"
        )
    return f"{_short(path)}({_arguments(args, kwargs)})"


def _arguments(args: Iterable[Any], kwargs: dict[str, Any]) -> str:
    return ", ".join([*map(literal, args), *(f"{k}={literal(v)}" for k, v in kwargs.items())])


def _short(path: str) -> str:
    return path.replace("torch.nn.functional.", "F.")


def _exists(path: str) -> bool:
    value: Any = sys.modules[path.partition(".")[0]]
    for part in path.split(".")[1:]:
        value = getattr(value, part, None)
    return value is not None


def _path(func: Any) -> str:
    """Where a torch function is found, as a dotted name."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{func!s}"
    own = getattr(func, "__name__", "")
    if isinstance(own, str) and getattr(torch, own, None) is func:
        return f"torch.{own}"
    name = resolve_name(func)
    if name is None or not name.startswith("torch."):
        raise Unwritable(f"{getattr(func, '__name__', func)} is not found in torch by a name")
    if name.endswith((".__get__", ".__set__")) or _exists(name):
        return name
    raise Unwritable(f"{name} is not found")


def operation_of(func: Any, name: str) -> str:
    """The canonical name of what a function computes."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func)
    return canonical(name)


_MAX_POOL = {
    "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
}  # fmt: skip


def bound(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without those at their defaults, without `inplace` and what only warns."""
    kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    modules = "torch.nn.functional", "torch._tensor", "torch.functional"
    if not isinstance(func, FunctionType) or func.__module__ not in modules:
        kwargs.pop("inplace", None)
        return args, kwargs
    try:
        parameters = inspect.signature(func).parameters
        given = inspect.signature(func).bind(*args, **kwargs).arguments
    except ValueError:  # it stands for a builtin function, which has none
        return args, kwargs
    kept: list[Any] = []
    named: dict[str, Any] = {}
    gap = False
    for parameter in parameters.values():
        name, default = parameter.name, parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if func.__name__.startswith("max_pool"):  # which hides its signature
                kwargs = {k: v for k, v in kwargs.items() if v != _MAX_POOL.get(k, v is None)}
            return args, kwargs
        value = given.get(name, default)
        left_out = name in ("inplace", "_stacklevel") or (
            not isinstance(value, Var) and type(value) is type(default) and value == default
        )
        if left_out:
            gap = True
        elif gap or parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = value
        else:
            kept.append(value)
    return tuple(kept), named
