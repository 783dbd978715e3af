"""The gradient of each operation as lines of code, for `flat`.

An elementwise operation is a formula in the words of csrc/gates.h, whose rows are taken as they
are: `dy` is the upstream gradient, `y` the result, other names the arguments. The others are
functions that write their lines. What has no rule here, or is called in a way that its rule does
not know, is left to `torch.func.vjp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ..functions.gate import GATES
from ..functions.table import ROWS
from .flat_text import Op, Var, call_text, closed, index, literal, renamed
from .operations import canonical

__all__ = ["Plan", "Rule", "Sent", "Unnamed", "plan"]


class _NoRule(Exception):
    """The rule does not know this kind of call."""


@dataclass
class Sent:
    """What a gate sends to an operand.

    Attributes:
        to: the operand.
        text: the gradient; or, if `into`, a statement that adds it to what it names.
        fresh: whether the gradient is a tensor of its own, which `+=` may change.
        then: a statement that changes the gradient in place, once it has a name: the operand's, or
            `spare` if that has a gradient already.
    """

    to: Var
    text: str
    fresh: bool = True
    into: bool = False
    then: str = ""
    spare: str = ""


@dataclass
class Plan:
    """The lines of an operation.

    Attributes:
        forward: statements that compute it, each with the tensors that it makes.
        before: statements for the backward, before its gradients.
        sent: its gradients.
    """

    forward: list[tuple[str, Sequence[Var]]] = field(default_factory=list)
    before: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)


class Rule:
    """One operation as its rule sees it; `new` makes a name for a value that it needs."""

    def __init__(self, op: Op, new: Callable[[str], str]) -> None:
        self.op, self.new = op, new
        self.plan = Plan()
        self.y = op.outputs[0]
        self.g = self.y.grad

    def bind(self, signature: str) -> SimpleNamespace:
        """The arguments by name: "x dim=None"; _NoRule if they do not fit."""
        names = [part.partition("=") for part in signature.split()]
        if len(self.op.args) > len(names):
            raise _NoRule
        values: dict[str, Any] = {name: eval(text) for name, equals, text in names if equals}
        values |= {name: value for (name, *_), value in zip(names, self.op.args, strict=False)}
        for name, value in self.op.kwargs.items():
            known = {"axis": "dim", "keepdims": "keepdim", "input": "x", "self": "x"}
            name = name if any(name == n for n, *_ in names) else known.get(name, name)
            if not any(name == n for n, *_ in names):
                raise _NoRule
            values[name] = value
        if len(values) < len(names):
            raise _NoRule
        return SimpleNamespace(**values)

    def send(
        self, to: Any, text: str, *, fresh: bool = True, shape: Sequence[int] | None = None
    ) -> None:
        """Send a gradient, of shape `shape` (the operand's if None), to an operand.

        It is summed over the dimensions along which the operand was broadcast.
        """
        if not isinstance(to, Var) or not to.live:
            return
        if shape is not None and tuple(shape) != to.shape:
            text, fresh = f"{closed(text)}{_summed(tuple(shape), to.shape)}", True
        if to.dtype != self.y.dtype:
            text, fresh = f"{closed(text)}.to({to.dtype})", True
        self.plan.sent.append(Sent(to, text, fresh))

    def into(self, to: Any, place: Callable[[str], str], text: str, function: str = "") -> None:
        """Add a gradient to a part of an operand's."""
        if not isinstance(to, Var) or not to.live:
            return
        if to.dtype != self.y.dtype:
            raise _NoRule
        statement = function or f"{place(to.grad)} += {text}"
        self.plan.sent.append(Sent(to, statement, into=True))

    def helper(self, hint: str, text: str, shape: Sequence[int] = ()) -> str:
        """A name for a value that several lines of the backward read."""
        name = self.new(hint)
        self.plan.before.append((f"{name} = {text}", tuple(shape)))
        return name


RULES: dict[str, Callable[[Rule], None]] = {}


def rule(*names: str) -> Callable[[Callable[[Rule], None]], Callable[[Rule], None]]:
    def keep(function: Callable[[Rule], None]) -> Callable[[Rule], None]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return keep


def plan(op: Op, new: Callable[[str], str]) -> Plan:
    """The lines of an operation: by its rule, or else by torch.func.vjp."""
    if not op.outputs:
        return Plan()
    live = any(v.live for v in op.inputs) and any(v.live for v in op.outputs)
    written = Rule(op, new)
    if op.name == "write":
        _write(written)
        return written.plan
    if live:
        values = [*op.inputs, *op.outputs]
        of_complex = any(v.dtype is not None and v.dtype.is_complex for v in values)
        try:
            if of_complex or op.name not in RULES:
                raise _NoRule
            RULES[op.name](written)
        except _NoRule:
            return _vjp(Rule(op, new))
    if not written.plan.forward:
        written.plan.forward.append(_assignment(op))
    return written.plan


def _assignment(op: Op) -> tuple[str, Sequence[Var]]:
    return f"{_pattern(op.result)} = {call_text(op)}", op.outputs


def _pattern(result: Any) -> str:
    """What an assignment has on its left."""
    if result is None:
        return "_"
    if isinstance(result, Var):
        return result.name
    nested = [f"({_pattern(v)})" if isinstance(v, (tuple, list)) else _pattern(v) for v in result]
    inside = ", ".join(nested)
    return f"{inside}," if len(nested) == 1 else inside


# ---- what PyTorch itself differentiates


def _vjp(rule: Rule) -> Plan:
    """The gradients of an operation that has no rule."""
    op, made = rule.op, rule.plan
    wanted = [v for v in op.inputs if v.live]
    call, given = call_text(op), ", ".join(v.name for v in wanted)
    function = f"lambda {given}: {call}"
    if isinstance(op.func, type) and op.func.setup_context is _Plain.setup_context:  # type: ignore[attr-defined]
        # torch.func takes no Function whose forward gets a ctx.
        made.forward.append(_assignment(op))
        upstream = ", ".join(v.grad if v.live else f"torch.zeros_like({v})" for v in op.outputs)
        if isinstance(op.result, tuple) and len(op.outputs) < len(op.result):
            raise Unnamed
        text = f"torch.autograd.functional.vjp({function}, ({given},), ({upstream},))[1]"
        if isinstance(op.result, Var):
            text = text.replace(f"({upstream},)", upstream)
        return _hand_out(rule, wanted, text)
    single = isinstance(op.result, Var)
    results = [op.result] if single else list(op.result)
    all_float = all(isinstance(v, Var) and v.differentiable for v in results)
    if single or all_float:
        back = rule.new("vjp")
        left = op.result.name if single else f"({_pattern(op.result)})"
        text = f"{left}, {back} = torch.func.vjp({function}, {given})"
        made.forward.append((text, op.outputs))
        upstream = ", ".join(v.grad if v.live else f"torch.zeros_like({v})" for v in results)
        if not single:
            upstream = f"({upstream}{',' * (len(results) == 1)})"
        return _hand_out(rule, wanted, f"{back}({upstream})")
    needed = [i for i, v in enumerate(results) if v is not None]
    if len(needed) == 1 and isinstance(results[needed[0]], Var):
        back, (number,) = rule.new("vjp"), needed
        text = f"{results[number]}, {back} = torch.func.vjp({function}[{number}], {given})"
        made.forward.append((text, op.outputs))
        return _hand_out(rule, wanted, f"{back}({results[number].grad})")
    if op.random:
        raise Unnamed
    # Some outputs have no gradient: each one that has is differentiated on its own.
    made.forward.append(_assignment(op))
    for i, output in enumerate(results):
        if isinstance(output, Var) and output.live:
            text = f"torch.func.vjp({function}[{i}], {given})[1]({output.grad})"
            _hand_out(rule, wanted, text)
        elif not (output is None or isinstance(output, Var)):
            raise Unnamed
    return made


class Unnamed(Exception):
    """No line of code can be written for the gate."""


class _Plain(torch.autograd.Function):
    pass


def _hand_out(rule: Rule, wanted: list[Var], text: str) -> Plan:
    made = rule.plan
    if len(wanted) == 1:
        made.sent.append(Sent(wanted[0], f"{text}[0]", fresh=False))
        return made
    grads = rule.helper("grads", text)
    made.sent += [Sent(v, f"{grads}[{i}]", fresh=False) for i, v in enumerate(wanted)]
    return made


# ---- broadcasting


def _summed(shape: tuple[int, ...], to: tuple[int, ...]) -> str:
    """What undoes that a tensor of shape `to` was broadcast to `shape`."""
    added = len(shape) - len(to)
    kept = [i for i in range(len(to)) if to[i] == 1 and shape[added + i] != 1]
    if not to:
        return ".sum()"
    if added and not kept:
        return f".sum({_dims(range(added))})"
    if kept and not added:
        return f".sum({_dims(kept)}, keepdim=True)"
    return f".sum_to_size({literal(to)})"


def _dims(dims: Iterable[int]) -> str:
    dims = list(dims)
    return str(dims[0]) if len(dims) == 1 else str(tuple(dims))


# ---- elementwise

#: signature: argument -> its gradient. Rows of the table come from csrc/gates.h, below.
FORMULAS: dict[str, tuple[str, dict[str, str]]] = {
    "sub": ("a b alpha=1", {"a": "dy", "b": "-dy * alpha"}),
    "rsub": ("a b alpha=1", {"a": "-dy * alpha", "b": "dy"}),
    "div": ("a b", {"a": "dy / b", "b": "-dy * y / b"}),
    "minimum": (
        "a b",
        {"a": "where(b < a, 0, where(a == b, dy / 2, dy))",
         "b": "where(a < b, 0, where(a == b, dy / 2, dy))"},
    ),
    "atan2": ("a b", {"a": "dy * b / (a ** 2 + b ** 2)", "b": "-dy * a / (a ** 2 + b ** 2)"}),
    "hypot": ("a b", {"a": "dy * a / y", "b": "dy * b / y"}),
    "logaddexp": ("a b", {"a": "dy * exp(a - y)", "b": "dy * exp(b - y)"}),
    "lerp": ("a b w", {"a": "dy * (1 - w)", "b": "dy * w", "w": "dy * (b - a)"}),
    "where": ("c a b", {"a": "where(c, dy, 0)", "b": "where(c, 0, dy)"}),
    "masked_fill": ("x mask value", {"x": "where(mask, 0, dy)", "value": "where(mask, dy, 0)"}),
    "addcmul": ("x a b value=1", {"x": "dy", "a": "dy * value * b", "b": "dy * value * a"}),
    "addcdiv": (
        "x a b value=1",
        {"x": "dy", "a": "dy * value / b", "b": "-dy * value * a / (b * b)"},
    ),
    "neg": ("x", {"x": "-dy"}),
    "abs": ("x", {"x": "dy * sign(x)"}),
    "sign": ("x", {"x": "0 * dy"}),
    "square": ("x", {"x": "dy * 2 * x"}),
    "sqrt": ("x", {"x": "dy / (2 * y)"}),
    "rsqrt": ("x", {"x": "-dy * y ** 3 / 2"}),
    "exp2": ("x", {"x": f"dy * y * {math.log(2)!r}"}),
    "expm1": ("x", {"x": "dy * (y + 1)"}),
    "log": ("x", {"x": "dy / x"}),
    "log2": ("x", {"x": f"dy / (x * {math.log(2)!r})"}),
    "log10": ("x", {"x": f"dy / (x * {math.log(10)!r})"}),
    "log1p": ("x", {"x": "dy / (x + 1)"}),
    "sin": ("x", {"x": "dy * cos(x)"}),
    "cos": ("x", {"x": "-dy * sin(x)"}),
    "tan": ("x", {"x": "dy * (1 + y ** 2)"}),
    "asin": ("x", {"x": "dy / sqrt(1 - x ** 2)"}),
    "acos": ("x", {"x": "-dy / sqrt(1 - x ** 2)"}),
    "atan": ("x", {"x": "dy / (1 + x ** 2)"}),
    "sinh": ("x", {"x": "dy * cosh(x)"}),
    "cosh": ("x", {"x": "dy * sinh(x)"}),
    "asinh": ("x", {"x": "dy / sqrt(x ** 2 + 1)"}),
    "erf": ("x", {"x": f"dy * {2 / math.sqrt(math.pi)!r} * exp(-x ** 2)"}),
    "silu": ("x", {"x": "dy * sigmoid(x) * (1 + x * (1 - sigmoid(x)))"}),
    "gelu": (
        "x approximate='none'",
        {"x": f"dy * ((1 + erf(x / {math.sqrt(2)!r})) / 2 + x * exp(-x ** 2 / 2) / "
              f"{math.sqrt(2 * math.pi)!r})"},
    ),
    "softplus": (
        "x beta=1.0 threshold=20.0",
        {"x": "where(x * beta > threshold, dy, dy * sigmoid(x * beta))"},
    ),
    "logsigmoid": ("x", {"x": "dy * sigmoid(-x)"}),
    "softsign": ("x", {"x": "dy / (1 + abs(x)) ** 2"}),
    "tanhshrink": ("x", {"x": "dy * tanh(x) ** 2"}),
    "relu6": ("x", {"x": "where((x > 0) & (x < 6), dy, 0)"}),
    "hardtanh": (
        "x min_val=-1.0 max_val=1.0", {"x": "where((x > min_val) & (x < max_val), dy, 0)"},
    ),
    "threshold": ("x threshold value", {"x": "where(x > threshold, dy, 0)"}),
}  # fmt: skip


def _from_table() -> None:
    """The rows of csrc/gates.h, with PyTorch's defaults."""
    for name, row in ROWS.items():
        defaults = GATES[name]._defaults
        extra = [] if row.parameter is None else [
            row.parameter + (f"={defaults[0]}" if defaults else "")
        ]  # fmt: skip
        columns = {argument: row.columns[f"d{argument}"] for argument in row.inputs}
        if name == "add":
            extra, columns["b"] = ["alpha=1"], f"{columns['b']} * alpha"
        FORMULAS[canonical(name)] = " ".join([*row.inputs, *extra]), columns


_from_table()


def _elementwise(rule: Rule) -> None:
    signature, gradients = FORMULAS[rule.op.name]
    given = rule.bind(signature)
    if rule.op.name == "gelu" and given.approximate != "none":
        raise _NoRule
    names = {"dy": rule.g, "y": rule.y.name, **vars(given)}
    for argument, formula in gradients.items():
        text = renamed(formula, names)
        rule.send(getattr(given, argument), text, fresh=text != rule.g, shape=rule.y.shape)


RULES.update(dict.fromkeys(FORMULAS, _elementwise))


@rule("pow")
def _pow(rule: Rule) -> None:
    given = rule.bind("a b")
    a, b, g, y = given.a, given.b, rule.g, rule.y
    if isinstance(b, Var):
        rule.send(a, f"torch.where({b} == 0, 0, {g} * {b} * {a} ** ({b} - 1))"
                  if isinstance(a, Var) else "", shape=y.shape)  # fmt: skip
        if isinstance(a, Var):
            log = f"torch.where({a} == 0, 0, {g} * {y} * torch.log({a}))"
        elif a > 0:
            log = f"{g} * {y} * {math.log(a)!r}"
        else:
            raise _NoRule
        rule.send(b, log, shape=y.shape)
    elif b == 0:
        rule.send(a, f"torch.zeros_like({a})")
    else:
        less = "" if b == 2 else f" ** {literal(b - 1)}"
        rule.send(a, f"{g} * {literal(b)} * {a}{less}" if b != 1 else g, fresh=b != 1)


@rule("clamp")
def _clamp(rule: Rule) -> None:
    given = rule.bind("x min=None max=None")
    low, high, x = given.min, given.max, given.x
    if isinstance(low, Var) or isinstance(high, Var):
        raise _NoRule
    tests = [f"{x} >= {literal(low)}"] * (low is not None)
    tests += [f"{x} <= {literal(high)}"] * (high is not None)
    test = tests[0] if len(tests) == 1 else " & ".join(f"({t})" for t in tests)
    rule.send(x, f"torch.where({test}, {rule.g}, 0)")


@rule("dropout")
def _dropout(rule: Rule) -> None:
    given = rule.bind("x p=0.5 training=True inplace=False")
    if not given.training or isinstance(given.p, Var):
        raise _NoRule
    mask = rule.new("mask")
    text = f"{mask} = F.dropout(torch.ones_like({given.x}), {literal(given.p)})"
    rule.plan.forward += [
        (text, [rule.y]),
        (f"{rule.y} = {given.x} * {mask}", [rule.y]),
    ]
    rule.send(given.x, f"{rule.g} * {mask}")


# ---- products


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(rule: Rule) -> None:
    given = rule.bind("a b")
    a, b, g = given.a, given.b, rule.g
    if not isinstance(a, Var) or not isinstance(b, Var):
        raise _NoRule
    if len(a.shape) == 1 and len(b.shape) == 1:
        rule.send(a, f"{g} * {b}")
        rule.send(b, f"{g} * {a}")
    elif len(b.shape) == 1:
        if len(a.shape) > 2:
            raise _NoRule
        rule.send(a, f"torch.outer({g}, {b})")
        rule.send(b, f"{a}.T @ {g}")
    elif len(a.shape) == 1:
        if len(b.shape) > 2:
            raise _NoRule
        rule.send(a, f"{b} @ {g}")
        rule.send(b, f"torch.outer({a}, {g})")
    else:
        batch = rule.y.shape[:-2]
        rule.send(a, f"{g} @ {_t(b)}", shape=(*batch, *a.shape[-2:]))
        if len(b.shape) == 2 and len(a.shape) > 2:
            rule.send(b, f"{a}.flatten(0, -2).T @ {g}.flatten(0, -2)")
        else:
            rule.send(b, f"{_t(a)} @ {g}", shape=(*batch, *b.shape[-2:]))


def _t(v: Var) -> str:
    return f"{v}.T" if len(v.shape) == 2 else f"{v}.mT"


@rule("outer")
def _outer(rule: Rule) -> None:
    given = rule.bind("a b")
    rule.send(given.a, f"{rule.g} @ {given.b}")
    rule.send(given.b, f"{rule.g}.T @ {given.a}")


@rule("addmm")
def _addmm(rule: Rule) -> None:
    given = rule.bind("x a b beta=1 alpha=1")
    a, b = given.a, given.b
    names = {"dy": rule.g, "beta": given.beta, "alpha": given.alpha}
    x = renamed("dy * beta", names)
    rule.send(given.x, x, fresh=x != rule.g, shape=rule.y.shape)
    scaled = renamed("dy * alpha", names)
    rule.send(a, f"{scaled} @ {b}.T")
    rule.send(b, f"{a}.T @ {closed(scaled)}")


@rule("l2_penalty")
def _l2_penalty(rule: Rule) -> None:
    text = " + ".join(f"({v} * {v}).sum()" for v in rule.op.args)
    rule.plan.forward.append((f"{rule.y} = {text}", [rule.y]))
    for v in rule.op.args:
        rule.send(v, f"{rule.g} * 2 * {v}")


@rule("linear")
def _linear(rule: Rule) -> None:
    given = rule.bind("x weight bias=None")
    x, weight, g = given.x, given.weight, rule.g
    if len(weight.shape) != 2 or not x.shape:
        raise _NoRule
    if len(x.shape) == 1:
        rule.send(weight, f"torch.outer({g}, {x})")
        rule.send(x, f"{g} @ {weight}")
    else:
        rows = "" if len(x.shape) == 2 else ".flatten(0, -2)"
        rule.send(x, f"{g} @ {weight}")
        rule.send(weight, f"{g}{rows}.T @ {x}{rows}")
    rule.send(given.bias, g, fresh=False, shape=rule.y.shape)


@rule("embedding")
def _embedding(rule: Rule) -> None:
    given = rule.bind("x weight padding_idx=None")
    if given.padding_idx is not None:
        raise _NoRule
    index, weight = given.x, given.weight
    rule.into(
        weight,
        str,
        "",
        f"{weight.grad}.index_add_(0, {index}.flatten(), {rule.g}.reshape(-1, {weight}.shape[1]))",
    )


@rule("conv2d")
def _conv2d(rule: Rule) -> None:
    given = rule.bind("x weight bias=None stride=1 padding=0 dilation=1 groups=1")
    x, weight = given.x, given.weight
    if isinstance(given.padding, str) or len(x.shape) != 4:
        raise _NoRule
    default = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    options = "".join(
        f", {name}={literal(getattr(given, name))}"
        for name, value in default.items()
        if getattr(given, name) not in (value, (value, value))
    )
    path = "torch.nn.grad.conv2d_"
    rule.send(x, f"{path}input({x}.shape, {weight}, {rule.g}{options})")
    rule.send(weight, f"{path}weight({x}, {weight}.shape, {rule.g}{options})")
    rule.send(given.bias, f"{rule.g}.sum((0, 2, 3))")


# ---- sums and the like


def _reduced(rule: Rule, x: Var, dim: Any, keepdim: Any) -> tuple[Callable[[str], str], list[int]]:
    """How a value of the reduced shape gets the shape of x back, and what was reduced."""
    if isinstance(dim, Var) or not isinstance(keepdim, bool):
        raise _NoRule
    count = len(x.shape)
    dims = list(range(count)) if dim is None or dim in ((), []) else dim
    given = [dims] if isinstance(dims, int) else list(dims)
    positive = sorted(d % count for d in given) if count else []
    if keepdim or len(positive) == count:
        return str, positive
    if len(given) == 1:
        return (lambda text: f"{text}.unsqueeze({given[0]})"), positive
    return (lambda text: text + "".join(f".unsqueeze({d})" for d in positive)), positive


def _bind_reduction(rule: Rule, extra: str = "") -> SimpleNamespace:
    args = rule.op.args
    if len(args) > 1 and all(type(value) is int for value in args[1:]):  # x.sum(0, 1)
        rule.op.args = args[0], args[1:] if len(args) > 2 else args[1]
    return rule.bind(f"x dim=None keepdim=False dtype=None {extra}")


@rule("sum", "mean")
def _sum(rule: Rule) -> None:
    given = _bind_reduction(rule)
    x, g = given.x, rule.g
    again, dims = _reduced(rule, x, given.dim, given.keepdim)
    over = ""
    if rule.op.name == "mean":
        whole = len(dims) == len(x.shape)
        over = f"{x}.numel()" if whole else " * ".join(f"{x}.shape[{d}]" for d in dims)
        over = f" / {over}" if whole or len(dims) == 1 else f" / ({over})"
    if rule.y.shape == ():
        rule.send(x, f"{g} * torch.ones_like({x}){over}")
    else:
        rule.send(x, f"{again(g)}.expand({x}.shape){over}", fresh=bool(over))


@rule("amax", "amin")
def _amax(rule: Rule) -> None:
    given = _bind_reduction(rule)
    _shared(rule, given.x, given.dim, given.keepdim)


def _shared(rule: Rule, x: Var, dim: Any, keepdim: Any) -> None:
    """The gradient of the largest or smallest, which those that are equal share."""
    again, dims = _reduced(rule, x, dim, keepdim)
    won = rule.helper("won", f"({x} == {again(rule.y.name)}).to({rule.y.dtype})", x.shape)
    count = f"{won}.sum({_dims(dims)}, keepdim=True)" if x.shape else won
    rule.send(x, f"{again(rule.g)} * {won} / {count}")


@rule("max", "min")
def _max(rule: Rule) -> None:
    if isinstance(rule.op.result, Var):
        if len(rule.op.args) > 1 or rule.op.kwargs:
            raise _NoRule
        return _shared(rule, rule.op.args[0], None, False)
    given = rule.bind("x dim keepdim=False")
    values, indices = rule.op.result
    if values is None or not given.x.shape or type(given.dim) is not int:
        raise _NoRule
    if indices is None:
        raise _NoRule
    again, _ = _reduced(rule, given.x, given.dim, given.keepdim)
    g = values.grad
    zeros = f"torch.zeros_like({given.x})"
    where = again(indices.name)
    rule.send(given.x, f"{zeros}.scatter({given.dim}, {where}, {again(g)})")


@rule("sort", "topk")
def _sort(rule: Rule) -> None:
    sort = rule.op.name == "sort"
    given = rule.bind(
        "x dim=-1 descending=False" if sort else "x k dim=-1 largest=True sorted=True"
    )
    values, indices = rule.op.result
    if values is None or indices is None or type(given.dim) is not int:
        raise _NoRule
    zeros = f"torch.zeros_like({given.x})"
    rule.send(given.x, f"{zeros}.scatter({given.dim}, {indices}, {values.grad})")


@rule("var", "std")
def _var(rule: Rule) -> None:
    given = _bind_reduction(rule)
    x = given.x
    again, dims = _reduced(rule, x, given.dim, given.keepdim)
    count = f"({x}.numel() - 1)"
    if len(dims) == 1:
        count = f"({x}.shape[{dims[0]}] - 1)"
    elif len(dims) < len(x.shape):
        raise _NoRule
    mean = f"{x}.mean({_dims(dims)}, keepdim=True)"
    over = "2 * " if rule.op.name == "var" else ""
    under = f" / {count}" if rule.op.name == "var" else f" / ({count} * {again(rule.y.name)})"
    rule.send(x, f"{again(rule.g)} * {over}({x} - {mean}){under}")


@rule("logsumexp")
def _logsumexp(rule: Rule) -> None:
    given = rule.bind("x dim keepdim=False")
    again, _ = _reduced(rule, given.x, given.dim, given.keepdim)
    rule.send(given.x, f"{again(rule.g)} * torch.exp({given.x} - {again(rule.y.name)})")


@rule("cumsum")
def _cumsum(rule: Rule) -> None:
    given = rule.bind("x dim")
    d = literal(given.dim)
    rule.send(given.x, f"{rule.g}.flip({d}).cumsum({d}).flip({d})")


@rule("softmax")
def _softmax(rule: Rule) -> None:
    given = rule.bind("x dim dtype=None")
    if type(given.dim) is not int:
        raise _NoRule
    y, g = rule.y, rule.g
    rule.send(given.x, f"{y} * ({g} - ({g} * {y}).sum({given.dim}, keepdim=True))")


@rule("log_softmax")
def _log_softmax(rule: Rule) -> None:
    given = rule.bind("x dim dtype=None")
    if type(given.dim) is not int:
        raise _NoRule
    total = f"{rule.g}.sum({given.dim}, keepdim=True)"
    rule.send(given.x, f"{rule.g} - torch.exp({rule.y}) * {total}")


# ---- losses

_LOSS = "weight=None size_average=None ignore_index=-100 reduce=None reduction='mean'"


def _classes(rule: Rule, signature: str) -> tuple[Var, Var, str, str]:
    """Scores, classes, the one-hot target and what follows it, of a loss on classes."""
    given = rule.bind(f"x target {signature}")
    x, target = given.x, given.target
    plain = (
        given.weight is None and given.size_average is None and given.reduce is None
        and given.reduction in ("mean", "sum") and len(x.shape) == 2
        and target.dtype == torch.int64 and not target.live and target.low >= 0
        and not 0 <= given.ignore_index < x.shape[1] and getattr(given, "smoothing", 0) == 0
    )  # fmt: skip
    if not plain:
        raise _NoRule
    over = f" / len({x})" if given.reduction == "mean" else ""
    return x, target, f"F.one_hot({target}, {x.shape[1]})", over


@rule("cross_entropy")
def _cross_entropy(rule: Rule) -> None:
    if "label_smoothing" in rule.op.kwargs:
        rule.op.kwargs = dict(rule.op.kwargs)
        if rule.op.kwargs["label_smoothing"]:
            raise _NoRule
        del rule.op.kwargs["label_smoothing"]
    x, _, one_hot, over = _classes(rule, _LOSS)
    rule.send(x, f"{rule.g} * (F.softmax({x}, 1) - {one_hot}){over}")


@rule("nll_loss")
def _nll_loss(rule: Rule) -> None:
    x, _, one_hot, over = _classes(rule, _LOSS)
    rule.send(x, f"-{rule.g} * {one_hot}.to({x.dtype}){over}")


#: Losses of x and target, averaged: the gradients of x and of the target.
PAIRS = {
    "mse_loss": ("dy * 2 * (x - target)", "dy * 2 * (target - x)"),
    "l1_loss": ("dy * sign(x - target)", "dy * sign(target - x)"),
    "binary_cross_entropy_with_logits": ("dy * (sigmoid(x) - target)", "-dy * x"),
}


def _pair(rule: Rule) -> None:
    given = rule.bind("x target size_average=None reduce=None reduction='mean'")
    x, target = given.x, given.target
    if given.size_average is not None or given.reduce is not None or x.shape != target.shape:
        raise _NoRule
    over = f" / {x}.numel()" if given.reduction == "mean" else ""
    for to, formula in zip((x, target), PAIRS[rule.op.name], strict=True):
        names = {"dy": rule.g, "x": x.name, "target": target.name}
        rule.send(to, renamed(formula, names) + over)


RULES.update(dict.fromkeys(PAIRS, _pair))

# ---- normalisation


def _normalised(
    rule: Rule, x: Var, weight: Any, bias: Any, eps: float, dims: Sequence[int], plain: str,
    channels: tuple[int, ...] | None,
) -> None:  # fmt: skip
    """The gradients of weight * (x - mean) / std + bias, over the dimensions of the mean."""
    g, over = rule.g, _dims(dims)
    others = [d for d in range(len(x.shape)) if d not in dims] if channels is None else [
        d for d in range(len(x.shape)) if d != 1
    ]  # fmt: skip
    sums = f".sum({_dims(others)})" if others else ""
    x_hat = rule.helper("x_hat", plain, x.shape)
    if isinstance(weight, Var):
        rule.send(weight, f"({g} * {x_hat}){sums}" if sums else f"{g} * {x_hat}")
    rule.send(bias, f"{g}{sums}", fresh=bool(sums))
    if not x.live:
        return
    scaled = g
    if isinstance(weight, Var):
        shaped = weight.name if channels is None else f"{weight}.view{literal(channels)}"
        scaled = f"grad_{x_hat}"  # which is free, as x_hat is
        rule.plan.before.append((f"{scaled} = {g} * {shaped}", x.shape))
    var = f"{x}.var({over}, correction=0, keepdim=True)"
    std = rule.helper("std", f"torch.sqrt({var} + {literal(eps)})", [
        1 if d in dims else n for d, n in enumerate(x.shape)
    ])  # fmt: skip
    mean = f"{scaled}.mean({over}, keepdim=True)"
    centred = rule.helper("centred", f"{scaled} - {mean}", x.shape)
    part = f"{x_hat} * ({scaled} * {x_hat}).mean({over}, keepdim=True)"
    rule.send(x, f"({centred} - {part}) / {std}")


@rule("layer_norm")
def _layer_norm(rule: Rule) -> None:
    given = rule.bind("x normalized_shape weight=None bias=None eps=1e-05")
    x = given.x
    shape = tuple(given.normalized_shape)
    dims = range(len(x.shape) - len(shape), len(x.shape))
    eps = f", eps={literal(given.eps)}" * (given.eps != 1e-5)
    plain = f"F.layer_norm({x}, {literal(shape)}{eps})"
    _normalised(rule, x, given.weight, given.bias, given.eps, dims, plain, None)


@rule("batch_norm")
def _batch_norm(rule: Rule) -> None:
    given = rule.bind(
        "x running_mean running_var weight=None bias=None training=False momentum=0.1 eps=1e-05"
    )
    x, weight, bias = given.x, given.weight, given.bias
    channels = (1, -1, *[1] * (len(x.shape) - 2))
    dims = [d for d in range(len(x.shape)) if d != 1]
    rest = "".join(f", {name}={v}" for name, v in (("weight", weight), ("bias", bias)) if v)
    eps = f", eps={literal(given.eps)}" * (given.eps != 1e-5)
    if given.training:
        text = f"F.batch_norm({x}, None, None{rest}, training=True{eps})"
        rule.plan.forward.append((f"{rule.y} = {text}", [rule.y]))
        plain = f"F.batch_norm({x}, None, None, training=True{eps})"
        _normalised(rule, x, weight, bias, given.eps, dims, plain, channels)
        return
    mean, var = given.running_mean, given.running_var
    sums = f".sum({_dims(dims)})"
    if isinstance(weight, Var) and weight.live:
        plain = f"F.batch_norm({x}, {mean}, {var}{eps})"
        rule.send(weight, f"({rule.g} * {plain}){sums}")
    rule.send(bias, f"{rule.g}{sums}")
    scale = f"{weight} / " if isinstance(weight, Var) else "1 / "
    std = f"torch.sqrt({var} + {literal(given.eps)})"
    rule.send(x, f"{rule.g} * ({scale}{std}).view{literal(channels)}")


# ---- views and moves


def _first(rule: Rule) -> Var:
    x = rule.op.args[0] if rule.op.args else rule.op.kwargs.get("input")
    if not isinstance(x, Var):
        raise _NoRule
    return x


@rule("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "view_as",
      "reshape_as", "atleast_1d", "atleast_2d", "atleast_3d")  # fmt: skip
def _view(rule: Rule) -> None:
    x = _first(rule)
    if x.dtype != rule.y.dtype:
        raise _NoRule  # a view as another dtype
    same = x.shape == rule.y.shape
    rule.send(x, rule.g if same else f"{rule.g}.reshape({x}.shape)", fresh=False)


@rule("clone", "contiguous", "positive", "to", "float", "double", "half", "bfloat16", "type",
      "type_as", "alias")  # fmt: skip
def _same(rule: Rule) -> None:
    x = _first(rule)
    if x.shape != rule.y.shape:
        raise _NoRule
    rule.send(x, rule.g, fresh=False)


@rule("expand", "expand_as", "broadcast_to")
def _expand(rule: Rule) -> None:
    rule.send(_first(rule), rule.g, fresh=False, shape=rule.y.shape)


@rule("transpose")
def _transpose(rule: Rule) -> None:
    x = _first(rule)
    dims = rule.op.args[1:]
    name = getattr(rule.op.func, "__name__", "")
    if len(dims) == 2 and all(type(d) is int for d in dims) and not rule.op.kwargs:
        rule.send(x, f"{rule.g}.transpose({dims[0]}, {dims[1]})", fresh=False)
    elif dims or rule.op.kwargs or len(x.shape) < 2:
        raise _NoRule
    elif len(x.shape) == 2:
        rule.send(x, f"{rule.g}.T", fresh=False)
    elif "mT" in call_text(rule.op) and name == "__get__":
        rule.send(x, f"{rule.g}.mT", fresh=False)
    else:
        raise _NoRule


@rule("permute")
def _permute(rule: Rule) -> None:
    x = _first(rule)
    dims = rule.op.args[1:] or tuple(rule.op.kwargs.values())
    if ".movedim(" in f".{call_text(rule.op)}" or "moveaxis" in call_text(rule.op):
        if len(dims) != 2:
            raise _NoRule
        rule.send(x, f"{rule.g}.movedim({literal(dims[1])}, {literal(dims[0])})", fresh=False)
        return
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if sorted(d % len(x.shape) for d in dims) != list(range(len(x.shape))):
        raise _NoRule
    places = [d % len(x.shape) for d in dims]
    back = ", ".join(str(places.index(d)) for d in range(len(places)))
    rule.send(x, f"{rule.g}.permute({back})", fresh=False)


@rule("flip")
def _flip(rule: Rule) -> None:
    rest = ", ".join(map(literal, rule.op.args[1:]))
    if rule.op.kwargs:
        raise _NoRule
    rule.send(_first(rule), f"{rule.g}.flip({rest})")


@rule("roll")
def _roll(rule: Rule) -> None:
    given = rule.bind("x shifts dims=()")
    shifts = given.shifts
    back = -shifts if isinstance(shifts, int) else tuple(-s for s in shifts)
    rest = "" if given.dims in ((), None) else f", {literal(given.dims)}"
    rule.send(given.x, f"{rule.g}.roll({literal(back)}{rest})")


@rule("tril", "triu")
def _tril(rule: Rule) -> None:
    given = rule.bind("x diagonal=0")
    diagonal = literal(given.diagonal) if given.diagonal else ""
    rule.send(given.x, f"{rule.g}.{rule.op.name}({diagonal})")


def _part(text: str, dim: int, key: str) -> str:
    """A part along a dimension: text[:, key]."""
    return f"{text}[{':, ' * dim}{key}]"


@rule("cat")
def _cat(rule: Rule) -> None:
    given = rule.bind("tensors dim=0")
    count = len(rule.y.shape)
    if any(len(v.shape) != count for v in given.tensors) or type(given.dim) is not int:
        raise _NoRule
    dim, start = given.dim % count, 0
    for v in given.tensors:
        end = start + v.shape[dim]
        first, last = str(start or ""), "" if v is given.tensors[-1] else str(end)
        last = "" if end == rule.y.shape[dim] else str(end)
        rule.send(v, _part(rule.g, dim, f"{first}:{last}"), fresh=False)
        start = end


@rule("stack")
def _stack(rule: Rule) -> None:
    given = rule.bind("tensors dim=0")
    dim = given.dim % len(rule.y.shape)
    for i, v in enumerate(given.tensors):
        rule.send(v, _part(rule.g, dim, str(i)), fresh=False)


@rule("split", "chunk", "unbind", "tensor_split", "split_with_sizes")
def _split(rule: Rule) -> None:
    x = _first(rule)
    rest = [*rule.op.args[1:], *rule.op.kwargs.values()]
    unbind = rule.op.name == "unbind"
    dim = rest[0] if unbind and rest else rest[1] if not unbind and len(rest) > 1 else 0
    parts = list(rule.op.result)
    if type(dim) is not int or any(isinstance(v, (tuple, list)) for v in parts):
        raise _NoRule
    live = [(i, v) for i, v in enumerate(parts) if v is not None and v.live]
    if unbind and len(live) == 1:
        dim %= len(x.shape)
        rule.into(x, lambda text: _part(text, dim, str(live[0][0])), live[0][1].grad)
        return
    if any(v is None for v in parts):
        raise _NoRule
    texts = [v.grad if v.live else f"torch.zeros_like({v})" for v in parts]
    rest_text = f", {dim}" if dim else ""
    function = "stack" if unbind else "cat"
    rule.send(x, f"torch.{function}([{', '.join(texts)}]{rest_text})")


@rule("getitem")
def _getitem(rule: Rule) -> None:
    x, key = rule.op.args
    keys = key if isinstance(key, tuple) else (key,)
    lists = [k for k in keys if isinstance(k, (Var, list))]
    if not lists or (len(keys) == 1 and isinstance(key, Var) and key.dtype == torch.bool):
        rule.into(x, lambda text: f"{text}[{index(key)}]", rule.g)
        return
    if len(lists) < len(keys) or not all(
        isinstance(k, Var) and k.dtype == torch.int64 for k in keys
    ):
        raise _NoRule
    inside = f"({', '.join(map(str, keys))}{',' * (len(keys) == 1)})"
    statement = f"{x.grad}.index_put_({inside}, {rule.g}, accumulate=True)"
    rule.into(x, str, "", statement)


@rule("select")
def _select(rule: Rule) -> None:
    given = rule.bind("x dim index")
    if not all(type(v) is int for v in (given.dim, given.index)):
        raise _NoRule
    dim = given.dim % len(given.x.shape)
    rule.into(given.x, lambda text: _part(text, dim, str(given.index)), rule.g)


@rule("narrow")
def _narrow(rule: Rule) -> None:
    given = rule.bind("x dim start length")
    if not all(type(v) is int and v >= 0 for v in (given.start, given.length)):
        raise _NoRule
    key = f"{given.start}:{given.start + given.length}"
    dim = given.dim % len(given.x.shape)
    rule.into(given.x, lambda text: _part(text, dim, key), rule.g)


@rule("index_select")
def _index_select(rule: Rule) -> None:
    given = rule.bind("x dim index")
    x = given.x
    rule.into(x, str, "", f"{x.grad}.index_add_({given.dim}, {given.index}, {rule.g})")


@rule("gather")
def _gather(rule: Rule) -> None:
    given = rule.bind("x dim index")
    x = given.x
    rule.into(x, str, "", f"{x.grad}.scatter_add_({given.dim}, {given.index}, {rule.g})")


def _write(rule: Rule) -> None:
    """`y = x.clone(); y[place] = value`."""
    x, value = rule.op.args
    place, y, g = rule.op.place, rule.y, rule.g
    assert place is not None
    here = place(y.name)
    subscript = here.endswith("]")
    put = f"{here} = {literal(value)}" if subscript else f"{here}.copy_({literal(value)})"
    rule.plan.forward += [(f"{y} = {x}.clone()", [y]), (put, [])]
    if not y.live:
        return
    part = place(g)
    if isinstance(value, Var) and value.live:
        shape = _shape_at(place, y.shape)
        if shape is None:
            part, shape = f"{part}.sum_to_size({value}.shape)", value.shape
        rule.send(value, part, fresh=False, shape=shape)
    if isinstance(x, Var) and x.live:
        zero = place(x.grad)
        then = f"{zero} = 0" if subscript else f"{zero}.zero_()"
        # First, for the value may be of the same tensor: only what is here so far is set to 0.
        rule.plan.sent.insert(0, Sent(x, f"{g}.clone()", then=then, spare=rule.new("kept")))


def _shape_at(place: Callable[[str], str], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a place in a tensor of a shape, if no other tensor says where it is."""
    try:
        found = eval(place("x"), {"torch": torch, "x": torch.empty(shape, device="meta")})
    except (NameError, RuntimeError, IndexError):
        return None
    return tuple(found.shape)
