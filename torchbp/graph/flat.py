"""`flat`: a function and its gradients as the lecture's flat code.

The forward lines compute the output; the same lines in reverse order, each as its gradient, compute
the gradients. What a ledger remembers of each call (`recording`) becomes an `Op`; the rules of
`flat_rules` say what each Op's lines are; here they are named, put in order and added up.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..functions.products import ACTIVATIONS
from .flat_rules import Plan, Sent, Unnamed, plan
from .flat_text import Op, Unwritable, Var, bound, call_text, index, operation_of
from .ledger import Ledger, Node
from .recording import Call, Slot
from .text import dims
from .trace import ones, record

__all__ = ["TWINS", "FlatCode", "flat", "flat_code"]

#: One line of the code: its text, the name of the ledger's node, and "forward" or "backward".
Line = tuple[str, str | None, str | None]

_WIDTH = 100


def flat(fn: Callable[..., Any], *inputs: Any, names: Sequence[str] | None = None) -> str:
    """The flat code of `fn(*inputs)`: a Python function of its output and gradients, as text.

    Forward one line a gate, then the gradients in reverse order, `grad_` before each name, the
    shape of what is no scalar behind it. It needs nothing but the imports that it begins with.
    Its arguments are the tensors among the inputs, then the parameters, buffers and tensors that
    `fn` reads; it changes none of them. It returns the output (all tensors of it) and a gradient
    for each argument that has one, in their order.

    Values are called as in the source, where a variable holds them; a name that is used twice is
    numbered. An output that is no scalar, or one of several, has its upstream gradient as another
    argument: ones if it is left out. Numbers, sizes, and which branch was taken are those of this
    call. Dropout draws its mask in a line of its own, with the same random numbers as PyTorch.

    What has no rule here is one line with `torch.func.vjp` in place of a formula.

    Args:
        fn: a function or module; neither it nor the inputs change.
        inputs: its arguments: tensors, or nested lists, tuples and dicts that hold some.
        names: of the tensors among the inputs; by default the names of `fn`'s parameters.

    Raises:
        TypeError: `fn` cannot be called, or `names` do not fit.
        ValueError: there is nothing to differentiate.
        RuntimeError: autograd cannot differentiate the function, or a gate cannot be written as
            code: a custom Function that no module holds, or what was computed outside of PyTorch.

    Example:
        >>> def f(w, x):
        ...     s = w * x
        ...     L = torch.sigmoid(s)
        ...     return L
        >>> print(flat(f, torch.tensor(2.0), torch.tensor(-1.0)))
        import torch
        <BLANKLINE>
        <BLANKLINE>
        def f(w, x):
            # Forward pass: compute output
            s = w * x
            L = torch.sigmoid(s)
        <BLANKLINE>
            # Backward pass: compute grads
            grad_L = 1.0
            grad_s = grad_L * (1 - L) * L
            grad_w = grad_s * x
            grad_x = grad_s * w
        <BLANKLINE>
            return L, grad_w, grad_x
        <BLANKLINE>
    """
    return flat_code(record("flat", fn, inputs, names, ones("flat"))).text


@dataclass(frozen=True)
class FlatCode:
    """The flat code of a ledger.

    Attributes:
        lines: (text, name of the ledger's node, "forward" or "backward") of each line of the text;
            None where a line belongs to no node.
    """

    lines: tuple[Line, ...]

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line, _, _ in self.lines)


def flat_code(ledger: Ledger) -> FlatCode:
    """The flat code of a ledger that `trace` made.

    Raises:
        RuntimeError: a gate cannot be written as code; the message names it.
    """
    return _Writer(ledger).write()


# ---- what is to be written

#: Functions of torchbp by the functions of PyTorch that compute the same.
TWINS: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Multiply": torch.mul, "Maximum": torch.maximum, "Exp": torch.exp,
    "Reciprocal": torch.reciprocal, "Scale": torch.mul, "Shift": torch.add, "ReLU": torch.relu,
    "LeakyReLU": torch.nn.functional.leaky_relu, "ELU": torch.nn.functional.elu,
    "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "MatMul": torch.matmul,
}  # fmt: skip

#: The operators whose method has its operands the other way round.
_SWAPPED = {
    "__rsub__": torch.sub, "__rdiv__": torch.div, "__rtruediv__": torch.div, "__rpow__": torch.pow,
    "__rmatmul__": torch.matmul, "__rmod__": torch.remainder, "__rfloordiv__": torch.floor_divide,
}  # fmt: skip


#: What returns the elements that it picks with their index, which the gradient needs.
_WITH_INDEX = frozenset({"max", "min", "sort", "topk"})
#: What returns all of its argument in parts, so that those without a gradient count as well.
_IN_PARTS = frozenset({"split", "chunk", "unbind", "tensor_split", "split_with_sizes"})


class _Program:
    """The operations of a ledger, in order."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.recording = ledger._recording
        if not self.recording.outputs:
            raise RuntimeError("flat: the ledger does not hold the calls of a function")
        self.vars: dict[Slot, Var] = {}
        self.bases: dict[Slot, Var] = {}  # of views that were written to
        self.ops: list[Op] = []
        self.arguments: list[Var] = []
        for node in ledger.nodes:
            if node.kind == "gate":
                call = self.recording.calls.get(node.id)
                if call is not None:
                    self.add(node, call)
            else:
                self.arguments.append(self.argument(node))
        self.outputs = [self.var(slot) for slot in self.recording.outputs]
        self.roots = list(
            dict.fromkeys(
                v
                for v, slot in zip(self.outputs, self.recording.outputs, strict=True)
                if slot in self.recording.roots
            )
        )
        self.prune()

    def argument(self, node: Node) -> Var:
        held = node.values[0]
        assert held is not None
        slot = Slot(node.id, 0)
        var = self.vars[slot] = Var(
            node.name,
            held.shape,
            held.dtype,
            given=True,
            leaf=True,
            differentiable=slot in self.recording.differentiable,
            node=node.name,
            low=held.min,
        )
        return var

    def make(self, slot: Slot) -> Var:
        """A Var for what a call returns."""
        node = self.ledger.nodes[slot.node]
        held = node.values[slot.output]
        named = self.recording.names.get(slot)
        several = len(node.values) > 1
        var = self.vars[slot] = Var(
            named or (f"{node.name}_{slot.output}" if several else node.name).lower(),
            () if held is None else held.shape,
            None if held is None else held.dtype,
            given=named is not None,
            differentiable=slot in self.recording.differentiable,
            node=node.name,
            low=math.nan if held is None else held.min,
        )
        return var

    def var(self, slot: Slot) -> Var:
        """The Var of a value, whose operation there is, or is made here."""
        if slot in self.vars:
            return self.vars[slot]
        alias = self.recording.aliases.get(slot)
        node = self.ledger.nodes[slot.node]
        if alias is None:
            raise RuntimeError(
                f"flat: the gate {node.name} cannot be written as code: the call that made it was "
                "not seen"
            )
        return self.rewritten(slot, alias.before, alias.written)

    # ---- calls

    def add(self, node: Node, call: Call) -> None:
        if call.autocast:
            raise RuntimeError(
                f"flat: the gate {node.name} cannot be written as code: autocast is on"
            )
        args, kwargs = tree_map_only(Slot, self.var, (call.args, call.kwargs), is_leaf=_is_slot)
        if call.written and getattr(call.func, "__name__", "") == "__setitem__":
            ((_, after),) = call.written
            base, key, value = args
            self.write(node.name, self.make(after), base, value, lambda t: f"{t}[{index(key)}]")
            return
        result = tree_map_only(Slot, self.result, call.result, is_leaf=_is_slot)
        if isinstance(call.func, type):
            self.add_function(node, call.func, args, result)
            return
        name = getattr(call.func, "__name__", "")
        func: Any = call.func
        if name in _SWAPPED and len(args) == 2:
            func, args = _SWAPPED[name], args[::-1]
        elif call.func is Tensor.where and len(args) > 1:
            func, args = torch.where, (args[1], args[0], *args[2:])
        args, kwargs = bound(func, args, kwargs)
        operation = operation_of(func, getattr(func, "__name__", node.operation))
        if name == "__get__" or operation in ("__get__", "", "get"):
            operation = node.operation
        self.ops.append(
            Op(node.name, operation, func, args, kwargs, _plain(result),
               in_place=bool(call.written), random=call.random)
        )  # fmt: skip

    def result(self, slot: Slot) -> Var:
        """Of a call: a new value, or an argument that it returned as it was."""
        return self.vars[slot] if slot in self.vars else self.make(slot)

    def write(self, node: str, y: Var, base: Var, value: Any, place: Callable[[str], str]) -> None:
        self.ops.append(Op(node, "write", None, (base, value), {}, y, place=place))

    def add_function(self, node: Node, function: type, args: tuple[Any, ...], result: Any) -> None:
        """A custom Function; one of torchbp as what it computes."""
        name = function.__name__
        if function.__module__.startswith("torchbp.functions."):
            y = result[0] if isinstance(result, tuple) else result
            if name in TWINS:
                self.simple(node.name, TWINS[name], args, y)
                return
            if name in ("Linear", "MLP", "Maxout", "L2Penalty", "SoftmaxCE"):
                getattr(self, f"add_{name.lower()}")(node.name, y, *args)
                return
        self.ops.append(Op(node.name, "apply", function, args, {}, result))

    def simple(self, node: str, func: Callable[..., Any], args: tuple[Any, ...], y: Var) -> None:
        args, kwargs = bound(func, args, {})
        self.ops.append(Op(node, operation_of(func, func.__name__), func, args, kwargs, y))

    def step(
        self, node: str, hint: str, shape: tuple[int, ...], func: Callable[..., Any], *args: Any
    ) -> Var:
        """An operation of our own, and its value."""
        inputs = [v for v in (a for arg in args for a in (arg if isinstance(arg, list) else [arg]))
                  if isinstance(v, Var)]  # fmt: skip
        var = Var(hint, shape, inputs[0].dtype, node=node)
        var.differentiable = any(v.differentiable for v in inputs)
        self.simple(node, func, args, var)
        return var

    def add_linear(
        self, node: str, y: Var, x: Var, weight: Var, bias: Any = None, activation: str = "none"
    ) -> None:
        given = (x, weight) if bias is None else (x, weight, bias)
        self.activated(node, y, given, activation)

    def activated(self, node: str, y: Var, given: tuple[Var, ...], activation: str) -> None:
        linear = torch.nn.functional.linear
        gate = ACTIVATIONS[activation].gate
        if gate is None:
            self.simple(node, linear, given, y)
            return
        z = self.step(node, "z", y.shape, linear, *given)
        self.simple(node, TWINS[gate.__name__], (z, *ACTIVATIONS[activation].parameter), y)

    def add_mlp(
        self, node: str, y: Var, x: Var, layers: int, activation: str, *parameters: Var
    ) -> None:
        weights, biases = parameters[:layers], parameters[layers:]
        h = x
        for i, weight in enumerate(weights):
            given = (h, weight, biases[i]) if biases else (h, weight)
            if i + 1 == layers:
                self.activated(node, y, given, "none")
                return
            shape = (*x.shape[:-1], weight.shape[0])
            differentiable = any(v.differentiable for v in given)
            h = Var("h", shape, x.dtype, node=node, differentiable=differentiable)
            self.activated(node, h, given, activation)

    def add_maxout(self, node: str, y: Var, x: Var, weight: Var, bias: Any = None) -> None:
        pieces, out, features = weight.shape
        rows = x.shape[:-1]
        flat = self.step(node, "w", (pieces * out, features), Tensor.flatten, weight, 0, 1)
        given = [x, flat]
        if bias is not None:
            given.append(self.step(node, "b", (pieces * out,), Tensor.flatten, bias, 0, 1))
        z = self.step(node, "z", (*rows, pieces * out), torch.nn.functional.linear, *given)
        parts = (pieces, out)
        z = self.step(node, "z", (*rows, *parts), Tensor.unflatten, z, -1, parts)
        won = Var("piece", y.shape, torch.int64, node=node)
        self.ops.append(Op(node, "max", Tensor.max, (z, -2), {}, (y, won)))

    def add_l2penalty(self, node: str, y: Var, *tensors: Var) -> None:
        self.ops.append(Op(node, "l2_penalty", None, tensors, {}, y))

    def add_softmaxce(self, node: str, y: Var, x: Var, target: Var, *options: Any) -> None:
        names = "weight", "ignore_index", "reduction", "label_smoothing"
        func = torch.nn.functional.cross_entropy
        args, kwargs = bound(func, (x, target), dict(zip(names, options, strict=False)))
        self.ops.append(Op(node, "cross_entropy", func, args, kwargs, y))

    # ---- changes through views

    def rewritten(self, slot: Slot, before: Slot, written: Sequence[tuple[Slot, Slot]]) -> Var:
        """A tensor after memory that it shares was written to through other tensors."""
        node = self.ledger.nodes[slot.node].name
        root, views = self.views_of(before)
        base = self.base_of(before)
        for target, after in written:
            other, chain = self.views_of(target)
            if other != root:
                raise RuntimeError(
                    f"flat: the gate {node} cannot be written as code: it changes memory that "
                    "several tensors share, in a way that cannot be followed"
                )
            base = self.written(node, base, chain, self.var(after))
        self.bases[slot] = made = base
        for call in views:
            made = self.viewed(node, call, made)
        held = self.ledger.nodes[slot.node].values[slot.output]
        known = self.vars.get(before)
        named = self.recording.names.get(slot) or (known.hint if known and known.given else None)
        if named is not None and not made.given:
            made.hint, made.given = named, True
        if held is not None:
            made.low = held.min
        self.vars[slot] = made
        return made

    def written(self, node: str, base: Var, chain: list[Call], value: Var) -> Var:
        """The base of a view after the view became `value`."""
        if not chain:  # the whole of it
            return value
        differentiable = base.differentiable or value.differentiable
        y = Var("written", base.shape, base.dtype, node=node, differentiable=differentiable)
        self.write(node, y, base, value, self.place(chain))
        return y

    def base_of(self, slot: Slot) -> Var:
        """What a tensor is a view of, as it was when the tensor had this value."""
        _, chain = self.views_of(slot)
        if not chain:
            return self.var(slot)
        if slot not in self.bases and slot in self.recording.aliases:
            self.var(slot)
        if slot not in self.bases:
            before = self.before(slot)
            if before is None:  # a view when it was new
                (given, *_) = (v for v in chain[-1].args if isinstance(v, Slot))
                return self.base_of(given)
            node = self.ledger.nodes[slot.node].name
            self.bases[slot] = self.written(node, self.base_of(before), chain, self.var(slot))
        return self.bases[slot]

    def before(self, slot: Slot) -> Slot | None:
        """What a tensor was before the change that gave it this value."""
        alias = self.recording.aliases.get(slot)
        if alias is not None:
            return alias.before
        call = self.recording.calls.get(slot.node)
        return next((b for b, a in call.written if a == slot), None) if call else None

    def views_of(self, slot: Slot) -> tuple[Slot, list[Call]]:
        """The tensor that a tensor is a view of, when it was new, and the calls that made the view,
        in order."""
        chain: list[Call] = []
        while True:
            before = self.before(slot)
            if before is not None:
                slot = before
                continue
            call = self.recording.calls.get(slot.node)
            if call is None or not call.view or not isinstance(call.result, Slot):
                return slot, chain[::-1]
            chain.append(call)
            slot = next(v for v in call.args if isinstance(v, Slot))

    def place(self, chain: list[Call]) -> Callable[[str], str]:
        """The text of a view of a text."""

        def text(base: str) -> str:
            for call in chain:
                base = call_text(self.view_op("", call, Var(base, (), None, name=base), None))
            return base

        return text

    def view_op(self, node: str, call: Call, base: Var, y: Var | None) -> Op:
        args = tuple(base if isinstance(v, Slot) and i == 0 else v for i, v in enumerate(call.args))
        args = tree_map_only(Slot, self.var, args, is_leaf=_is_slot)
        name = getattr(call.func, "__name__", "")
        operation = operation_of(call.func, name)
        return Op(node, operation, call.func, args, call.kwargs, y)

    def viewed(self, node: str, call: Call, base: Var) -> Var:
        held = self.ledger.nodes[call.result.node].values[call.result.output]
        assert held is not None
        y = Var("view", held.shape, held.dtype, node=node, differentiable=base.differentiable)
        self.ops.append(self.view_op(node, call, base, y))
        return y

    # ---- what is needed

    def prune(self) -> None:
        """Leave out what the output does not need; mark what receives a gradient."""
        for node in self.ledger.nodes:
            if node.id in self.recording.unseen and any(
                self.vars[Slot(node.id, 0)] in op.inputs for op in self.ops
            ):
                raise RuntimeError(
                    f"flat: {node.name} cannot be written as code: the call that computed it was "
                    "not seen"
                )
        needed = set(self.outputs)
        kept = []
        for op in reversed(self.ops):
            if any(v in needed for v in op.outputs):
                kept.append(op)
                needed.update(op.inputs)
        self.ops = kept[::-1]
        self.arguments = [v for v in self.arguments if v in needed or self.is_input(v)]
        live = set(self.roots)
        for op in reversed(self.ops):
            if any(v in live for v in op.outputs):
                live.update(v for v in op.inputs if v.differentiable)
            if not isinstance(op.result, Var) and op.name not in _IN_PARTS:
                op.result = tree_map_only(
                    Var, lambda v: v if v in needed else None, op.result, is_leaf=_is_none
                )
                if op.name in _WITH_INDEX and op.outputs and op.outputs[0] in live:
                    op.result = self.with_index(op)
        for v in live:
            v.live = not v.leaf or v in self.roots or self.ledger.grads[v.node] is not None

    def with_index(self, op: Op) -> Any:
        """What picks some of its elements: their index is what the gradient needs."""
        values, indices = op.result
        if values is not None and indices is None:
            indices = Var("index", values.shape, torch.int64, node=op.node)
        return values, indices

    def is_input(self, v: Var) -> bool:
        return self.ledger[v.node].kind == "input"


def _is_slot(value: Any) -> bool:
    return isinstance(value, Slot)


def _is_none(value: Any) -> bool:
    return value is None


def _plain(result: Any) -> Any:
    """Nested tuples in place of lists and named tuples; None for what is no tensor."""
    if isinstance(result, (tuple, list)):
        return tuple(_plain(value) for value in result)
    return result if isinstance(result, Var) else None


# ---- names

_LOSSES = frozenset(
    """
    cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div
    binary_cross_entropy binary_cross_entropy_with_logits
    """.split()  # noqa: SIM905
)
_SCORED = frozenset({"cross_entropy", "softmax", "log_softmax"})


class _Names:
    """Names that are Python's, each once, and so that `grad_` before one is no other."""

    def __init__(self) -> None:
        self.reserved = {*keyword.kwlist, "torch", "torchbp", "F", "float", "len", "slice"}
        self.taken = set(self.reserved)
        self.wanted: set[str] = set()

    def reserve(self, names: Iterable[str]) -> None:
        self.reserved.update(names)
        self.taken.update(names)

    def take(self, name: str) -> str:
        self.taken |= {name, f"grad_{name}"}
        return name

    def free(self, name: str) -> bool:
        return not {name, f"grad_{name}"} & self.taken

    def exact(self, name: str) -> str:
        """This name, or the first number behind it that makes it a free one."""
        if self.free(name):
            return self.take(name)
        between = "_" if name[-1].isdigit() else ""
        number = 2
        while not self.free(made := f"{name}{between}{number}") or made in self.wanted:
            number += 1
        return self.take(made)

    def numbered(self, name: str) -> str:
        """The name with the first number that makes it a free one."""
        number = 1
        while not self.free(made := f"{name}{number}") or made in self.wanted:
            number += 1
        return self.take(made)


def _identifier(name: str) -> str:
    """A name as Python's: fc1.weight is fc1_weight, 0.weight is layer0_weight.

    Example:
        >>> _identifier("fc1.weight"), _identifier("0.weight"), _identifier("pair[0]['a']")
        ('fc1_weight', 'layer0_weight', 'pair_0_a')
    """
    name = re.sub(r"\W+", "_", name).strip("_") or "value"
    return f"layer{name}" if name[0].isdigit() else name


def _name_all(program: _Program, names: _Names) -> None:
    made = [v for op in program.ops for v in op.outputs]
    for op in program.ops:
        for v in op.outputs:
            if not v.given:
                v.hint = "loss" if op.name in _LOSSES else v.hint
        first = next(iter(op.inputs), None)
        if op.name in _SCORED and first is not None and not first.given:
            first.hint = "scores"
    for v in program.outputs:
        if not v.given and v.hint != "loss":
            v.hint = "y" if v.shape else "L"
    everything = list(dict.fromkeys([*program.arguments, *made]))
    for v in everything:
        v.hint = _identifier(v.hint)
    names.wanted = {v.hint for v in everything if v.given}
    hints = Counter(v.hint for v in everything if not v.given)
    own = {node.name for node in program.ledger.nodes}
    for v in sorted(everything, key=lambda v: not v.given):
        if v.given or v.hint in own or (hints[v.hint] == 1 and names.free(v.hint)):
            v.name = names.exact(v.hint)
        else:
            v.name = names.numbered(v.hint)


# ---- the text


class _Writer:
    def __init__(self, ledger: Ledger) -> None:
        self.program = _Program(ledger)
        self.names = _Names()
        self.functions: dict[str, Any] = {}  # that are imported
        for op in self.program.ops:
            if op.name == "apply" and op.func is not None:
                known = self.functions.setdefault(op.func.__name__, op.func)
                if known is not op.func:
                    raise RuntimeError(
                        f"flat: the gate {op.node} cannot be written as code: there is another "
                        f"custom Function {op.func.__name__}"
                    )
        self.names.reserve(self.functions)
        _name_all(self.program, self.names)
        self.lines: list[Line] = []
        self.grads: dict[Var, bool] = {}  # those with a gradient so far: whether += may change it

    def write(self) -> FlatCode:
        program = self.program
        plans = [self.plan(op) for op in program.ops]
        roots = program.roots
        upstream = [] if len(roots) == 1 and not roots[0].shape else roots
        self.add("# Forward pass: compute output")
        for op, made in zip(program.ops, plans, strict=True):
            for text, outputs in made.forward:
                self.add(text, op.node, "forward", [v.shape for v in outputs])
        self.add("")
        self.add("# Backward pass: compute grads")
        for root in roots:
            self.seed(root, plans, bool(upstream))
        for op, made in zip(program.ops[::-1], plans[::-1], strict=True):
            self.backward(op, made)
        self.add("")
        returned = [v.name for v in program.outputs]
        returned += [v.grad for v in program.arguments if v in self.grads]
        body = [*self.lines, *((line, None, None) for line in _wrapped("return ", returned, ""))]
        head = self.head(upstream)
        code = [("" if not text else f"    {text}", *rest) for text, *rest in body]
        return FlatCode((*self.imports(code), *head, *code))  # type: ignore[arg-type]

    def plan(self, op: Op) -> Plan:
        try:
            return plan(op, self.names.numbered)
        except (Unwritable, Unnamed) as error:
            reason = str(error) or "its outputs cannot be differentiated one by one"
            raise RuntimeError(
                f"flat: the gate {op.node} cannot be written as code: {reason}"
            ) from error

    def add(
        self,
        text: str,
        node: str | None = None,
        direction: str | None = None,
        shapes: Iterable[tuple[int, ...]] = (),
    ) -> None:
        shapes = [shape for shape in shapes if shape]
        comment = f"  # {', '.join(map(dims, shapes))}" if shapes else ""
        self.lines.append((text + comment, node, direction))

    def seed(self, root: Var, plans: list[Plan], argument: bool) -> None:
        """The gradient of an output, where the backward begins."""
        ones = f"torch.ones_like({root})"
        if argument:
            text = f"{ones} if {root.grad} is None else {root.grad}"
        else:
            text = "1.0" if not root.leaf and _may_be_number(root, plans) else ones
        self.add(f"{root.grad} = {text}", root.node, "backward", [root.shape])
        self.grads[root] = False

    def backward(self, op: Op, made: Plan) -> None:
        if not made.sent:
            return
        for text, shape in made.before:
            self.add(text, op.node, "backward", [shape])
        for sent in sorted(made.sent, key=lambda sent: not sent.to.leaf):
            v = sent.to
            first = v not in self.grads
            if sent.into:
                if first:
                    self.add(f"{v.grad} = torch.zeros_like({v})", op.node, "backward", [v.shape])
                elif not self.grads[v]:
                    self.add(f"{v.grad} = {v.grad}.clone()", op.node, "backward", [v.shape])
                self.add(sent.text, op.node, "backward")
                self.grads[v] = True
                continue
            if sent.then and not first:
                self.add(f"{sent.spare} = {sent.text}", op.node, "backward", [v.shape])
                self.add(sent.then.replace(v.grad, sent.spare, 1), op.node, "backward")
                sent.text = sent.spare
            if first:
                text = f"{v.grad} = {sent.text}"
            elif self.grads[v]:
                text = f"{v.grad} += {sent.text}"
            else:
                text = f"{v.grad} = {v.grad} + {sent.text}"
            self.add(text, op.node, "backward", [v.shape])
            self.grads[v] = sent.fresh if first else True
            if sent.then and first:
                self.add(sent.then, op.node, "backward")

    def head(self, upstream: list[Var]) -> list[Line]:
        name = self.program.recording.name
        name = _identifier(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
        if self.program.recording.name == "<lambda>" or name in self.names.reserved:
            name = "f"
        arguments = [v.name for v in self.program.arguments]
        arguments += [f"{v.grad}=None" for v in upstream]
        lines = _wrapped(f"def {name}(", arguments, "):")
        sizes = [f"{v}: {dims(v.shape)}{_kind(v)}" for v in self.program.arguments if v.shape]
        lines += [f"    # {line}" for line in _filled(sizes)]
        return [(line, None, None) for line in lines]

    def imports(self, code: Sequence[Line]) -> list[Line]:
        text = "\n".join(line.partition("  #")[0] for line, _, _ in code)
        lines = [
            statement
            for statement, pattern in (
                ("import torch", r"\btorch\."),
                ("import torch.nn.functional as F", r"\bF\."),
                ("import torchbp", r"\btorch\.ops\.torchbp"),
            )
            if re.search(pattern, text)
        ]
        lines += sorted(f"from {f.__module__} import {f.__name__}" for f in self.functions.values())
        lines += ["", ""] if lines else []
        return [(line, None, None) for line in lines]


def _kind(v: Var) -> str:
    if v.dtype is None or v.dtype.is_floating_point:
        return ""
    return f" {str(v.dtype).removeprefix('torch.')}"


def _filled(parts: Sequence[str]) -> list[str]:
    """The parts with commas between them, in lines that are not too long."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 10 <= _WIDTH:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return [line + "," * (i + 1 < len(lines)) for i, line in enumerate(lines)]


def _wrapped(begin: str, parts: Sequence[str], end: str) -> list[str]:
    """`begin`, the parts with commas between them, `end`: on one line if there is room."""
    line = f"{begin}{', '.join(parts)}{end}"
    if len(line) + 4 <= _WIDTH:
        return [line]
    opened = begin if begin.endswith("(") else f"{begin}("
    lines = _filled(parts)
    return [opened, *(f"    {line}" for line in lines[:-1]), f"    {lines[-1]},", end or ")"]


def _may_be_number(root: Var, plans: list[Plan]) -> bool:
    """Whether the gradient of a scalar may be a number: nothing but factors of tensors read it,
    and what hands it on unchanged, or times a number, to another such scalar."""
    readers: dict[str, list[Sent | None]] = {}
    for made in plans:
        for text, sent in [*((t, None) for t, _ in made.before), *((s.text, s) for s in made.sent)]:
            for name in set(re.findall(r"\bgrad_\w+", text)):
                readers.setdefault(name, []).append(sent)
    stack = [root]
    while stack:
        v = stack.pop()
        for sent in readers.get(v.grad, ()):
            if sent is None or sent.into:
                return False
            if _scales(sent.text, v.grad):
                continue
            if sent.to.leaf or sent.to.shape or not _is_numeric(sent.text, v.grad):
                return False
            stack.append(sent.to)
    return True


def _is_numeric(text: str, upstream: str) -> bool:
    """Whether an expression is a number if the upstream gradient is one."""
    factors = _factors(ast.parse(text, mode="eval").body)
    return all(
        isinstance(f, ast.Constant) or (isinstance(f, ast.Name) and f.id == upstream)
        for f in factors
    )


def _scales(text: str, upstream: str) -> bool:
    """Whether a gradient is the upstream times a tensor, so that the number 1 will do for it."""
    factors = _factors(ast.parse(text, mode="eval").body)
    of_upstream = [f for f in factors if upstream in ast.unparse(f)]
    if len(of_upstream) != 1 or not isinstance(of_upstream[0], ast.Name):
        return False
    return any(
        isinstance(node, (ast.Name, ast.BinOp, ast.Call)) and _is_tensor(node)
        for node in factors
        if node is not of_upstream[0]
    )


def _factors(node: ast.expr) -> list[ast.expr]:
    """The factors of a product, and what it is divided by."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        return [*_factors(node.left), *_factors(node.right)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _factors(node.operand)
    return [node]


def _is_tensor(node: ast.expr) -> bool:
    """Whether an expression is a tensor: not a size, nor a number."""
    if any(isinstance(part, ast.Compare) for part in ast.walk(node)):
        return False
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        return not called.endswith((".numel", ".size", "len"))
    return any(
        isinstance(part, ast.Name) and part.id not in ("torch", "F") for part in ast.walk(node)
    )
