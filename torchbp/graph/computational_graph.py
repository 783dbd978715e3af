"""`ComputationalGraph`: the lecture's graph of gates, each of which has a forward and a backward.

A gate is a row of the table `torchbp.ROWS`. Its value comes from the forward of the row's Function
and its gradients from that Function's backward, so that the numbers are those of training.
"""

from __future__ import annotations

import inspect
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from graphlib import CycleError, TopologicalSorter
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import resolve_name

from ..functions import check
from ..functions.gate import GATES
from ..functions.table import ROWS, Row
from .operations import canonical, pattern_of

if TYPE_CHECKING:
    from .html import Html
    from .ledger import Ledger
    from .svg import Svg

__all__ = ["ComputationalGraph", "Node"]

#: The largest exponent of `node ** exponent`, which is that many factors.
_MAX_EXPONENT = 8

_AS_INPUT = "a tensor is no node: make it an input of the graph"


class Node:
    """An input or a gate of a `ComputationalGraph`, which makes it: `input()`, `gate()`.

    Arithmetic on nodes makes gates: `+`, `-`, `*`, `/`, `**` with a whole exponent from 0 to 8,
    with nodes or numbers; the methods below; and the functions of torch, torch.nn.functional and
    torchbp.functional that are gates (`torch.exp(node)`).

    All tensors are the graph's own, of the inputs' dtype and without an autograd graph; not to be
    changed in place.

    Attributes:
        graph: the graph it belongs to.
        name: its name there.
        operation: the gate's row in `torchbp.ROWS`; None for an input.
        parameter: the number that the row reads (`a` of scale, `alpha` of elu, ...), or None.
        value: what forward computed here; None before a forward.
        grad: dL/dvalue, in the shape of value, as `x.grad` in torch; zeros where the output does
            not depend on it; None before a backward.
        downstream: what backward sent to each operand: upstream x local, in the shape of the
            operand (summed over the dimensions along which it was broadcast); None before a
            backward.
    """

    __hash__ = object.__hash__
    __array_ufunc__ = None  # numpy's numbers leave arithmetic to the node

    def __init__(
        self,
        graph: ComputationalGraph,
        name: str,
        operation: str | None = None,
        operands: tuple[str, ...] = (),
        parameter: float | None = None,
    ) -> None:
        self.graph = graph
        self.name = name
        self.operation = operation
        self.parameter = parameter
        self.value: Tensor | None = None
        self.grad: Tensor | None = None
        self.downstream: tuple[Tensor, ...] | None = None
        self._operands = operands
        self._local: tuple[Tensor, ...] | None = None
        self._version = 0

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The operands, each one of the graph's nodes; none for an input.

        Raises:
            ValueError: an operand's name is not in the graph.
        """
        return tuple(self.graph._operand(self, name) for name in self._operands)

    @property
    def upstream(self) -> Tensor | None:
        """The upstream gradient: the sum of what the uses of this node send, 1 for the output.

        It is dL/dvalue, another name of `grad`.
        """
        return self.grad

    @property
    def local(self) -> tuple[Tensor, ...] | None:
        """The local gradient, dvalue/doperand for each operand, in the shape of value.

        None before a forward. It is the gate's backward for an upstream gradient of 1.
        """
        if self.value is not None and self._local is None:
            with torch.inference_mode(False), torch.no_grad():
                operands = (
                    torch.broadcast_tensors(*self._operand_values()) if self._operands else ()
                )
                self._local = self._gradients(operands, torch.ones_like(self.value))
        return self._local

    @property
    def pattern(self) -> str | None:
        """The lecture's name for what the gradient does here, or None where it has none.

        "distributor" (add), "swap multiplier" (multiply), "router" (maximum); "adder" for a node
        with several uses, whose gradients add up; "distributor and adder" if it is both.
        """
        two = len(self._operands) == 2  # gates of one operand have names only in a ledger
        pattern = pattern_of(canonical(self.operation or ""), 2) if two else None
        names = [] if pattern is None else [pattern]
        if self.graph._uses[self.name] > 1:
            names.append("adder")
        return " and ".join(names) or None

    def _operand_values(self) -> tuple[Tensor, ...]:
        """The operands' values; RuntimeError if they, or this node's own, are not forward's."""
        for node in (*self.inputs, self):
            if node.value is None:
                raise RuntimeError(f"{self.name}: {node.name} has no value: run forward first")
            if node.value._version != node._version:
                raise RuntimeError(f"{node.name}: its value was changed in place after forward")
        return tuple(node.value for node in self.inputs if node.value is not None)

    def _numbers(self) -> tuple[float, ...]:
        return () if self.parameter is None else (self.parameter,)

    def _forward(self) -> Tensor:
        """The value of this gate, by its Function's forward."""
        assert self.operation is not None
        operands = [node.value for node in self.inputs]
        try:
            return GATES[self.operation].apply(*operands, *self._numbers())
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._definition()}: {error}") from None

    def _gradients(self, operands: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        """What this gate sends to each operand, by its Function's backward; () for an input."""
        if self.operation is None:
            return ()
        function = GATES[self.operation]
        context = _Context(len(operands))
        function.setup_context(context, (*operands, *self._numbers()), self.value)
        sent = function.backward(context, upstream)
        gradients = sent[: len(operands)] if isinstance(sent, tuple) else (sent,)
        # Where the gradient passes as it is, each operand gets a copy of its own.
        return tuple(grad.clone() if grad is upstream else grad for grad in gradients)

    def _forget(self) -> None:
        self.value = self.grad = self.downstream = self._local = None

    def _definition(self) -> str:
        """`x` for an input, `q = add(x, y)` for a gate."""
        if self.operation is None:
            return self.name
        parts = list(self._operands)
        if self.parameter is not None:
            parts.append(f"{ROWS[self.operation].parameter}={self.parameter:g}")
        return f"{self.name} = {self.operation}({', '.join(parts)})"

    def __repr__(self) -> str:
        known = [("value", self.value), ("grad", self.grad)]
        shown = [f"{name} {_short(tensor)}" for name, tensor in known if tensor is not None]
        return "  ".join([self._definition(), *shown])

    # ---- arithmetic makes gates

    def __add__(self, other: Any) -> Node:
        if isinstance(other, Node):
            return self.graph.gate("add", self, other)
        if _is_number(other):
            return self.graph.gate("shift", self, c=other)
        return NotImplemented

    __radd__ = __add__

    def __mul__(self, other: Any) -> Node:
        if isinstance(other, Node):
            return self.graph.gate("multiply", self, other)
        if _is_number(other):
            return self.graph.gate("scale", self, a=other)
        return NotImplemented

    __rmul__ = __mul__

    def __pos__(self) -> Node:
        return self

    def __neg__(self) -> Node:
        return self * -1.0

    def __sub__(self, other: Any) -> Node:
        return self + -other if isinstance(other, Node) or _is_number(other) else NotImplemented

    def __rsub__(self, other: Any) -> Node:
        return -self + other if _is_number(other) else NotImplemented

    def __truediv__(self, other: Any) -> Node:
        if isinstance(other, Node) or _is_number(other):
            return self * (1 / other)
        return NotImplemented

    def __rtruediv__(self, other: Any) -> Node:
        if not _is_number(other):
            return NotImplemented
        return self.reciprocal() if other == 1 else self.reciprocal() * other

    def __pow__(self, exponent: Any) -> Node:
        if not isinstance(exponent, int) or isinstance(exponent, bool):
            raise TypeError(
                f"{self.name} ** exponent: wants a whole number, got {type(exponent).__name__}"
            )
        if not 0 <= exponent <= _MAX_EXPONENT:
            raise ValueError(f"{self.name} ** exponent: wants 0 to {_MAX_EXPONENT}, got {exponent}")
        if exponent == 0:
            return self * 0 + 1
        power = self
        for _ in range(exponent - 1):
            power = power * self
        return power

    # Those of torch.Tensor that are gates.

    def exp(self) -> Node:
        """e^x."""
        return self.graph.gate("exp", self)

    def reciprocal(self) -> Node:
        """1 / x."""
        return self.graph.gate("reciprocal", self)

    def relu(self) -> Node:
        """max(0, x)."""
        return self.graph.gate("relu", self)

    def sigmoid(self) -> Node:
        """1 / (1 + e^-x)."""
        return self.graph.gate("sigmoid", self)

    def tanh(self) -> Node:
        """tanh(x)."""
        return self.graph.gate("tanh", self)

    def maximum(self, other: Node) -> Node:
        """The larger of both."""
        return self.graph.gate("maximum", self, other)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Node:
        """What a function of PyTorch (or an operation of torchbp) does with nodes: make a gate."""
        kwargs = kwargs or {}
        nodes = [value for value in (*args, *kwargs.values()) if isinstance(value, Node)]
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        name = name.removesuffix(".default").replace("torchbp_kernels", "torchbp")
        build = _OPERATORS.get(func)
        if build is None and nodes and func in _ROW_OF:
            build = partial(_gate_of_call, nodes[0].graph, _ROW_OF[func])
        if build is None:
            raise TypeError(
                f"{name}: no gate of a ComputationalGraph; those are + - * / ** and "
                f"{', '.join(ROWS)}"
            )
        try:
            return build(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None

    # ---- what only a value has

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self.name}: a node has no truth value: the graph is the same for every input"
        )

    def _compare(self, other: object) -> bool:
        raise TypeError(
            f"{self.name}: a node cannot be compared: the graph is the same for every input "
            "(whether two nodes are one is said by `is`)"
        )

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _compare


class ComputationalGraph:
    """A graph of gates with a forward in topological order and a backward in reverse.

    Inputs and gates are added by name (`input`, `gate`), or read off a Python expression
    (`from_function`). Then `forward` gives each node its `value`, `backward` its `grad`; at each
    gate the upstream gradient times the local one is what goes downstream. A node that is used
    several times adds up what its uses send. `graph[name]` is a node, `len(graph)` their number,
    `print(graph)` lists them.

    Example:
        >>> graph = ComputationalGraph()
        >>> x, y, z = graph.input("x"), graph.input("y"), graph.input("z")
        >>> q = graph.gate("add", x, y, name="q")
        >>> f = graph.gate("multiply", q, z, name="f")
        >>> graph.forward(x=-2, y=5, z=-4)
        tensor(-12.)
        >>> graph.backward()
        >>> graph
        node                value  grad
        x                      -2    -4
        y                       5    -4
        z                      -4     3
        q = add(x, y)           3    -4
        f = multiply(q, z)    -12     1
        >>> f.upstream, f.local, f.downstream
        (tensor(1.), (tensor(-4.), tensor(3.)), (tensor(-4.), tensor(3.)))
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._uses: Counter[str] = Counter()  # name -> how many operands it is
        self._output: Node | None = None

    @classmethod
    def from_function(cls, fn: Callable[..., Any]) -> ComputationalGraph:
        """The graph of what `fn` computes: fn is called once, with nodes in place of tensors.

        Args:
            fn: a function (or module) of the inputs, which get its parameters' names (those with a
                default keep it). It may use what makes gates of nodes, see `Node`: arithmetic, and
                functions such as torch.exp. What it returns is the output.

        Raises:
            TypeError: fn does something else with a node, has parameters without names (`*args`),
                or returns anything but one node.

        Example:
            >>> graph = ComputationalGraph.from_function(lambda x: 1 / (1 + torch.exp(-x)))
            >>> graph.forward(x=1.0)
            tensor(0.7311)
            >>> graph.backward()
            >>> graph
            node                               value     grad
            x                                      1   0.1966
            scale1 = scale(x, a=-1)               -1  -0.1966
            exp1 = exp(scale1)                0.3679  -0.5344
            shift1 = shift(exp1, c=1)          1.368  -0.5344
            reciprocal1 = reciprocal(shift1)  0.7311        1
        """
        try:
            called = fn.forward if isinstance(fn, torch.nn.Module) else fn
            parameters = inspect.signature(called).parameters.values()
        except (TypeError, ValueError):
            raise TypeError(
                "from_function: fn wants a Python function whose parameters name the inputs, "
                f"got {fn!r}"
            ) from None
        graph = cls()
        args, kwargs = [], {}
        for parameter in parameters:
            if parameter.default is not parameter.empty:
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(f"from_function: fn wants a name for each input, has {parameter}")
            node = graph.input(parameter.name)
            if parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = node
            else:
                args.append(node)
        result = fn(*args, **kwargs)
        if not isinstance(result, Node):
            many = f" of {len(result)}" if isinstance(result, list | tuple) else ""
            raise TypeError(
                f"from_function: fn wants to return one node, got {type(result).__name__}{many}"
            )
        graph.output = result
        return graph

    def input(self, name: str) -> Node:
        """Add an input, to which `forward` gives a value.

        Raises:
            ValueError: the name is taken.
        """
        return self._add(Node(self, _checked_name("input", name)))

    def gate(
        self, operation: str, /, *operands: Node | str, name: str | None = None, **parameter: float
    ) -> Node:
        """Add a gate.

        Args:
            operation: a row of `torchbp.ROWS`: add, multiply, maximum, exp, reciprocal, scale,
                shift, relu, leaky_relu, elu, sigmoid or tanh.
            operands: as many as the row has inputs: nodes of this graph, or names of nodes, which
                may be added later.
            name: of the gate; else the operation and a number, such as "add1".
            parameter: the number that the row reads, by its name: `a` of scale, `c` of shift,
                `negative_slope` of leaky_relu (0.01 if not given), `alpha` of elu (1).

        Raises:
            TypeError: the number of operands is wrong, or their type, or a parameter is missing,
                superfluous or no number.
            ValueError: no such row, a name that is taken, a node of another graph.

        Example:
            >>> graph = ComputationalGraph()
            >>> graph.gate("leaky_relu", graph.input("x"), negative_slope=0.1)
            leaky_relu1 = leaky_relu(x, negative_slope=0.1)
            >>> graph.forward(x=torch.tensor([1.0, -2.0]))
            tensor([ 1.0000, -0.2000])
            >>> graph["leaky_relu1"].local
            (tensor([1.0000, 0.1000]),)
        """
        check.choice("gate", "operation", operation, tuple(ROWS))
        row = ROWS[operation]
        if len(operands) != len(row.inputs):
            raise TypeError(
                f"{operation}: wants {len(row.inputs)} operands ({', '.join(row.inputs)}), "
                f"got {len(operands)}"
            )
        names = tuple(map(partial(self._name_of, operation), row.inputs, operands))
        number = _parameter_of(row, parameter)
        name = self._new_name(operation) if name is None else _checked_name(operation, name)
        node = self._add(Node(self, name, operation, names, number))
        self._uses.update(names)
        return node

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in topological order: each after its operands.

        Raises:
            ValueError: the graph has a cycle, or an operand's name is not in the graph.
        """
        operands = {
            node.name: [operand.name for operand in node.inputs] for node in self._nodes.values()
        }
        try:
            return tuple(self._nodes[name] for name in TopologicalSorter(operands).static_order())
        except CycleError as error:
            raise ValueError(f"the graph has a cycle: {' -> '.join(error.args[1])}") from None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The inputs, in the order in which they were added."""
        return tuple(node for node in self._nodes.values() if node.operation is None)

    @property
    def output(self) -> Node:
        """The node that `forward` returns and `backward` starts from.

        It is the one gate that no other uses (in a graph without gates, the one input); set it to
        a node, or its name, to choose another.

        Raises:
            ValueError: several nodes are unused, or there is no node at all.
        """
        if self._output is not None:
            return self._output
        unused = [node for node in self._nodes.values() if not self._uses[node.name]]
        candidates = [node for node in unused if node.operation is not None] or unused
        if len(candidates) == 1:
            return candidates[0]
        self.nodes  # noqa: B018 (where all are used there is a cycle, which it tells)
        if not candidates:
            raise ValueError("the graph has no nodes")
        names = ", ".join(node.name for node in candidates)
        raise ValueError(
            f"the graph has {len(candidates)} nodes that nobody uses ({names}): "
            "choose one, graph.output = node"
        )

    @output.setter
    def output(self, node: Node | str) -> None:
        self._output = self[self._name_of("output", "node", node)]

    def forward(self, /, **inputs: Tensor | float) -> Tensor:
        """Run the gates in topological order, so that each node has its `value`.

        Args:
            inputs: the value of each input by its name: tensors of one dtype, whose shapes
                broadcast at each gate that has two of them; or numbers, which become tensors of
                the dtype of the first tensor (torch's default where there is none). Copied: no
                autograd graph is recorded, no input is changed.

        Returns:
            the value of the output.

        Raises:
            TypeError: an input is missing or unknown, or not of a floating dtype.
            TypeError, ValueError: those of the gates (shapes that do not broadcast, mixed dtypes),
                which name the gate.
            ValueError: a cycle, an operand that is not in the graph, several outputs.
        """
        nodes, output = self.nodes, self.output
        values = self._input_values(inputs)
        for node in nodes:
            node._forget()
        with torch.inference_mode(False), torch.no_grad():
            for node in nodes:
                if node.operation is None:
                    node.value = values[node.name].detach().clone()
                else:
                    node.value = node._forward()
                node._version = node.value._version
        assert output.value is not None
        return output.value

    def backward(self, grad_output: Tensor | float | None = None) -> None:
        """Run the gates' backward in reverse order, so that each node has its `grad`.

        It starts afresh: gradients of an earlier backward are dropped, not added to.

        Args:
            grad_output: the upstream gradient of the output, in its shape and dtype. It may be
                left out, or be a number, if the output has one element; left out it is 1, the base
                case df/df = 1.

        Raises:
            RuntimeError: no forward ran before, or a value was changed in place since.
            TypeError, ValueError: grad_output is missing, or of another shape or dtype.
        """
        nodes, output = self.nodes, self.output
        for node in nodes:
            if node.value is None:
                raise RuntimeError(f"backward: {node.name} has no value: run forward first")
        with torch.inference_mode(False), torch.no_grad():
            arrived = {output.name: _upstream_of(output, grad_output)}
            for node in reversed(nodes):
                operands = node._operand_values()
                upstream = arrived.get(node.name)
                if upstream is None:  # the output does not depend on it
                    node.grad = torch.zeros_like(node.value)  # type: ignore[arg-type]
                    node.downstream = tuple(map(torch.zeros_like, operands))
                    continue
                node.grad = upstream
                node.downstream = node._gradients(operands, upstream)
                for operand, sent in zip(node.inputs, node.downstream, strict=True):
                    other = arrived.get(operand.name)
                    arrived[operand.name] = sent if other is None else other + sent

    def ledger(self) -> Ledger:
        """What the nodes hold now, as `trace` returns it: to be drawn, or written as JSON.

        Example:
            >>> graph = ComputationalGraph.from_function(lambda x, y: x * y)
            >>> graph.forward(x=2.0, y=3.0)
            tensor(6.)
            >>> graph.backward()
            >>> graph.ledger()["multiply1"].pattern
            'swap multiplier'
        """
        from .computational_ledger import ledger

        return ledger(self)

    def to_svg(self, path: str | os.PathLike[str] | None = None) -> Svg:
        """The picture of the graph, as `Ledger.to_svg`: with values after a forward, with
        gradients after a backward."""
        return self.ledger().to_svg(path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> Html:
        """The stepper of the graph, as `Ledger.to_html`."""
        return self.ledger().to_html(path)

    def _repr_svg_(self) -> str | None:
        """What a notebook shows; the text of a graph that cannot be drawn yet."""
        try:
            return self.ledger()._repr_svg_()
        except ValueError:
            return None

    def __getitem__(self, name: str) -> Node:
        try:
            return self._nodes[name]
        except KeyError:
            raise KeyError(f"no node {name!r} in the graph of {self._names()}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        try:
            nodes = self.nodes
        except ValueError:  # a graph that is not finished can be looked at too
            nodes = tuple(self._nodes.values())
        rows = [("node", "value", "grad")]
        rows += [(node._definition(), _short(node.value), _short(node.grad)) for node in nodes]
        first, second, third = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            f"{node:{first}}  {value:>{second}}  {grad:>{third}}".rstrip()
            for node, value, grad in rows
        )

    def _add(self, node: Node) -> Node:
        if node.name in self._nodes:
            raise ValueError(f"the graph has a node {node.name!r} already")
        self._nodes[node.name] = node
        return node

    def _new_name(self, operation: str) -> str:
        """The operation and the first number that neither a node nor an operand has."""
        number = 1
        while (name := f"{operation}{number}") in self._nodes or name in self._uses:
            number += 1
        return name

    def _name_of(self, op: str, argument: str, node: Any) -> str:
        """The name of an operand, which is a node of this graph or any name."""
        if isinstance(node, str):
            return node
        if isinstance(node, Node):
            if node.graph is not self:
                raise ValueError(f"{op}: {argument} is {node.name!r} of another graph")
            return node.name
        hint = ": for a number use scale or shift" if isinstance(node, Real) else ""
        hint = f": {_AS_INPUT}" if isinstance(node, Tensor) else hint
        raise TypeError(f"{op}: {argument} wants a node or a name, got {type(node).__name__}{hint}")

    def _operand(self, node: Node, name: str) -> Node:
        if name not in self._nodes:
            raise ValueError(
                f"{node._definition()}: no node {name!r} in the graph of {self._names()}"
            )
        return self._nodes[name]

    def _names(self) -> str:
        return ", ".join(self._nodes) or "no nodes"

    def _input_values(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """A tensor for each input; TypeError if they are not those that were given."""
        names = [node.name for node in self.inputs]
        missing = [name for name in names if name not in given]
        unknown = [name for name in given if name not in names]
        for kind, wrong in (("missing", missing), ("unknown", unknown)):
            if wrong:
                raise TypeError(
                    f"forward: {kind} {', '.join(wrong)}; "
                    f"the inputs of the graph are {', '.join(names) or 'none'}"
                )
        first = next((value for value in given.values() if isinstance(value, Tensor)), None)
        dtype, device = (None, None) if first is None else (first.dtype, first.device)
        values = {}
        for name, value in given.items():
            if isinstance(value, Tensor):
                check.floating("forward", name, value)
                values[name] = value
            elif isinstance(value, Real):
                number = check.number("forward", name, value)
                values[name] = torch.tensor(number, dtype=dtype, device=device)
            else:
                raise TypeError(
                    f"forward: {name} wants a torch.Tensor or a number, got {type(value).__name__}"
                )
        return values


class _Context:
    """What a Function's setup_context and backward find in place of autograd's ctx."""

    next_functions = ()  # no engine runs it

    def __init__(self, operands: int) -> None:
        self.needs_input_grad = (True,) * operands
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Tensor) -> None:
        """Nothing: a graph has no forward mode."""


def _upstream_of(output: Node, grad: Any) -> Tensor:
    """Where backward starts: the gradient that was given, or the base case df/df = 1."""
    value = output.value
    assert value is not None
    if isinstance(grad, Tensor):
        check.like("backward", "grad_output", grad, output.name, value)
        check.shape("backward", "grad_output", grad, tuple(value.shape))
        return grad.detach().clone()
    number = 1.0 if grad is None else check.number("backward", "grad_output", grad)
    if value.numel() != 1:
        got = "nothing" if grad is None else "a number"
        raise ValueError(
            f"backward: grad_output wants shape {tuple(value.shape)}, that of {output.name}, "
            f"got {got}, which is for one element"
        )
    return torch.full_like(value, number)


def _parameter_of(row: Row, given: Mapping[str, Any]) -> float | None:
    """The number that a row reads, the Function's default if it was not given; None if none."""
    wanted = row.parameter
    for name in given:
        if name != wanted:
            has = "no parameter" if wanted is None else f"the parameter {wanted} alone"
            raise TypeError(f"{row.name}: has {has}, got {name}")
    if wanted is None:
        return None
    default = inspect.signature(GATES[row.name].forward).parameters[wanted].default
    if wanted not in given and default is inspect.Parameter.empty:
        raise TypeError(f"{row.name}: wants the number {wanted}, got nothing")
    return check.number(row.name, wanted, given.get(wanted, default))


def _checked_name(op: str, name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{op}: name wants a string, got {type(name).__name__}")
    if not name:
        raise ValueError(f"{op}: name wants at least one letter, got ''")
    return name


def _is_number(value: Any) -> bool:
    """Whether arithmetic takes it for a number; TypeError for a tensor, which has a way in."""
    if isinstance(value, Tensor):
        raise TypeError(_AS_INPUT)
    return isinstance(value, Real)


def _short(tensor: Tensor | None) -> str:
    """A tensor in a few letters: up to four numbers, or dtype and shape."""
    if tensor is None:
        return ""
    if tensor.is_meta or tensor.dim() > 1 or tensor.numel() > 4:
        return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    numbers = ", ".join(f"{number:.4g}" for number in tensor.flatten().tolist())
    return f"[{numbers}]" if tensor.dim() else numbers


# ---- what functions become when they are called with nodes

#: Functions that are operators, which take numbers too.
_OPERATORS: Mapping[Any, Callable[..., Node]] = {
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.subtract: operator.sub,
    torch.mul: operator.mul,
    torch.multiply: operator.mul,
    torch.div: operator.truediv,
    torch.divide: operator.truediv,
    torch.true_divide: operator.truediv,
    torch.neg: operator.neg,
    torch.negative: operator.neg,
    torch.pow: operator.pow,
    torch.square: lambda x: x * x,
}

#: Functions that are the gate of a row; and the rows' operations, which torchbp.functional calls.
_ROW_OF: Mapping[Any, str] = {
    torch.exp: "exp",
    torch.reciprocal: "reciprocal",
    torch.maximum: "maximum",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    TF.relu: "relu",
    TF.leaky_relu: "leaky_relu",
    TF.elu: "elu",
    **{
        called: name
        for name in ROWS
        for space in (torch.ops.torchbp, torch.ops.torchbp_kernels)
        for called in (getattr(space, name), getattr(space, name).default)
    },
}


def _gate_of_call(
    graph: ComputationalGraph, operation: str, *args: Any, inplace: bool = False, **kwargs: Any
) -> Node:
    """The gate for the call of a function: operands first, then the row's parameter."""
    if inplace:
        raise TypeError("a node's value cannot be changed in place")
    row = ROWS[operation]
    if row.parameter is not None and len(args) == len(row.inputs) + 1:
        *args, kwargs[row.parameter] = args  # type: ignore[assignment]
    return graph.gate(operation, *args, **kwargs)
