"""The cases of scripts/benchmark.py: what runs, against whom, what must agree, and the floor.

A case is a function that makes its data and gives a `Case`. Each of its contestants computes the
same from the same numbers, written as users of that library write it.
"""

from __future__ import annotations

import copy
import functools
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchbp
import torchbp.functional as F
from torchbp.data import BatchLoader
from torchbp.graph import Ledger, trace

Outputs = dict[str, npt.NDArray[Any]]
Mark = Callable[[str], None]

OURS, TORCH, COMPILE, JAX = "torchbp", "torch", "torch.compile", "jax"
EMPTY, BYTES, ARITHMETIC = "empty Functions", "the bytes alone", "the arithmetic alone"
#: Contestants that do only what no kernel could spare.
PARTIAL = (EMPTY, BYTES, ARITHMETIC)
#: Contestants of some cases only -> the library that they belong to.
EXTRAS = {
    "torch in float32": TORCH,
    "torch, shift too": TORCH,
    "torch, our loader": TORCH,
    EMPTY: TORCH,
    BYTES: TORCH,
    ARITHMETIC: TORCH,
    "torch, DataLoader": TORCH,
    "jax, not waiting": JAX,
}


def unmarked(stage: str) -> None:
    """The `mark` of a run that is not profiled."""


def nothing() -> None:
    """What there is to reset or to wait for where there is nothing."""


@dataclass
class Contestant:
    """One way to do what a case does.

    Attributes:
        run: what is timed; it calls its argument with the name of each stage at that stage's end.
        outputs: what a run from the start gives, by name: those that two contestants both have are
            compared.
        reset: back to the start, so that every turn does the same; not timed.
        finish: waits for what `run` has left to be done; timed, once a turn.
    """

    run: Callable[[Mark], object]
    outputs: Callable[[], Outputs]
    reset: Callable[[], None] = nothing
    finish: Callable[[], object] = nothing


@dataclass
class Floor:
    """What the hardware takes at least: the longer of its arithmetic and its memory traffic, since
    the two can overlap and a floor must not lie above what is possible.

    Attributes:
        flops: operations of the matrix products, in `dtype`.
        traffic: (bytes, size): bytes read and written, each input and each result once a pass, and
            the size in bytes of the buffers, which decides the cache that they come from.
    """

    flops: float = 0
    dtype: torch.dtype = torch.float32
    traffic: Sequence[tuple[float, int]] = ()


@dataclass
class Case:
    """
    Attributes:
        about: what is measured, in one line.
        contestants: name -> what makes it; it may raise, and is left out then.
        goals: at two threads: contestant -> how many times our time it is to take; "seconds", at
            most; "floor", the share of our time that the floor is to be, at least; "memory", how
            many times our memory torch is to take.
        tolerance: ||a - b|| / ||b||, at most, of outputs a and b that are to agree.
        memory: whether peak memory is measured.
    """

    name: str
    about: str
    contestants: dict[str, Callable[[], Contestant]]
    goals: dict[str, float] = field(default_factory=dict)
    floor: Floor | None = None
    tolerance: float = 1e-4  # float32 sums of up to some thousand terms, in any order
    memory: bool = False


def array(value: Any) -> npt.NDArray[Any]:
    """A tensor of PyTorch or JAX in float32, copied to NumPy's."""
    value = value.detach().float().cpu() if isinstance(value, Tensor) else value
    return np.asarray(value).astype(np.float32)


def in_jax(tensor: Tensor) -> Any:
    """A tensor as JAX's, copied; int64 becomes int32, which is what JAX counts in."""
    import jax.numpy as jnp

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return jnp.array(tensor.float().numpy(), jnp.bfloat16)
    return jnp.array(tensor.int().numpy() if tensor.dtype == torch.int64 else tensor.numpy())


# ---- What the machine can do


def fastest(call: Callable[[], object], seconds: float) -> float:
    """The shortest time of several calls: rates of the machine are to be its best."""
    clock, best, end = time.perf_counter, float("inf"), time.perf_counter() + seconds
    call()
    while clock() < end or best == float("inf"):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


SIDE = 2048


def large_product(
    dtype: torch.dtype, seconds: float, rows: int = SIDE
) -> tuple[float, Callable[[], object]]:
    """Operations per second of the fastest product of [rows, SIDE] and [SIDE, SIDE] numbers of a
    dtype, and that: PyTorch's or ours, or that of float32, which holds them too and is faster where
    no instruction multiplies them. `seconds` for each that is tried."""
    found: list[tuple[float, Callable[[], object]]] = []
    for used in dict.fromkeys((torch.float32, dtype)):
        a, b = torch.randn(rows, SIDE).to(used), torch.randn(SIDE, SIDE).to(used)
        c = torch.empty(rows, SIDE, dtype=used)
        theirs, ours = functools.partial(torch.mm, a, b, out=c), functools.partial(F.linear, a, b)
        found += [(fastest(product, seconds), product) for product in (theirs, ours)]
    best, product = min(found, key=operator.itemgetter(0))
    return 2.0 * rows * SIDE**2 / best, product


def arithmetic_alone(flops: float) -> Contestant:
    """As many operations, in large products: what a floor stands on, in the same rounds. Where a
    call takes seconds, a machine that is shared sees its best rate in none of them."""
    calls = max(1, round(flops / (2.0 * SIDE**3)))
    _, product = large_product(torch.float32, 0.2, round(flops / (2.0 * SIDE**2 * calls)))

    def run(mark: Mark) -> None:
        for _ in range(calls):
            product()

    return Contestant(run, outputs=dict)


# ---- Functions: forward and backward


def differentiated(
    function: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    upstream: Tensor | None = None,
) -> Contestant:
    """y = function(*leaves, *constants) and y.backward(upstream), as autograd does it."""
    own = [leaf.detach().requires_grad_() for leaf in leaves]

    def run(mark: Mark) -> Tensor:
        reset()
        y = function(*own, *constants)
        mark("forward")
        y.backward(upstream)
        mark("backward")
        return y

    def outputs() -> Outputs:
        y = array(run(unmarked))
        return {"y": y} | {f"gradient {i}": array(leaf.grad) for i, leaf in enumerate(own)}

    def reset() -> None:
        for leaf in own:
            leaf.grad = None

    return Contestant(run, outputs, reset)


def differentiated_jax(
    function: Callable[..., Any],
    leaves: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    upstream: Tensor | None = None,
) -> Contestant:
    """The same, jitted in one piece."""
    import jax

    @jax.jit
    def both(upstream: Any, leaves: Sequence[Any], constants: Sequence[Any]) -> Any:
        y, pull = jax.vjp(lambda *leaves: function(*leaves, *constants), *leaves)
        return y, pull(upstream)

    arguments = (
        in_jax(torch.tensor(1.0) if upstream is None else upstream),
        [in_jax(leaf) for leaf in leaves],
        [in_jax(constant) for constant in constants],
    )

    def run(mark: Mark) -> Any:
        return jax.block_until_ready(both(*arguments))

    def outputs() -> Outputs:
        y, gradients = run(unmarked)
        return {"y": array(y)} | {f"gradient {i}": array(g) for i, g in enumerate(gradients)}

    return Contestant(run, outputs)


class Empty(torch.autograd.Function):
    """What Python and autograd take for a Function whose kernels take no time: its outputs and
    gradients are memory that nobody writes."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*inputs)
        return torch.empty(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(x) if need else None for x, need in needed)


def function_case(
    name: str,
    about: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    jaxed: Callable[[], Callable[..., Any]] | None,
    *data: Any,
    extras: dict[str, Callable[[], Contestant]] | None = None,
    **rest: Any,
) -> Case:
    """A case of a function: `data` is what `differentiated` takes, `jaxed` gives the function in
    JAX; without it, torch alone is the peer."""
    contestants = {
        OURS: lambda: differentiated(ours, *data),
        TORCH: lambda: differentiated(theirs, *data),
    }
    if jaxed is not None:
        contestants |= {
            COMPILE: lambda: differentiated(torch.compile(theirs), *data),
            JAX: lambda: differentiated_jax(jaxed(), *data),
        }
    return Case(name, about, contestants | (extras or {}), **rest)


def cross_entropy(name: str, rows: int, classes: int, **rest: Any) -> Case:
    logits = torch.randn(rows, classes)
    targets = torch.randint(classes, (rows,))
    size = logits.nbytes

    def nothing_computed() -> Contestant:
        empty = functools.partial(Empty.apply, ())
        return replace(differentiated(empty, [logits], [targets]), outputs=dict)

    return function_case(
        name,
        f"mean cross-entropy of {rows} x {classes} logits, forward and backward",
        F.cross_entropy,
        nn.functional.cross_entropy,
        lambda: mean_cross_entropy,
        [logits],
        [targets],
        extras={EMPTY: nothing_computed},
        floor=Floor(traffic=[(3 * size, size)]),  # read; read again and write the gradient
        **rest,
    )


def mean_cross_entropy(logits: Any, targets: Any) -> Any:
    """In JAX, as optax has it."""
    import jax
    import jax.numpy as jnp

    label = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - label).mean()


def elementwise(
    name: str, gate: str, elements: int, dtype: torch.dtype = torch.float32, **goals: float
) -> Case:
    """A gate of one input, whose backward reads y and dy, or multiply, which reads a, b and dy."""

    def jaxed() -> Callable[..., Any]:
        import jax

        return getattr(jax.numpy if gate == "multiply" else jax.nn, gate)  # type: ignore[no-any-return]

    inputs = [torch.randn(elements).to(dtype) for _ in range(2 if gate == "multiply" else 1)]
    passes = 8 if gate == "multiply" else 5
    size = inputs[0].nbytes
    return function_case(
        name,
        f"{gate} of {elements:,} {str(dtype)[6:]}, forward and backward",
        getattr(F, gate),
        getattr(torch, gate),
        jaxed,
        inputs,
        [],
        torch.randn(elements).to(dtype),
        goals=goals,
        floor=Floor(traffic=[(passes * size, size)]),
    )


def linear(
    name: str, n: int, d: int, m: int, dtype: torch.dtype, activation: str | None, **goals: float
) -> Case:
    """A layer inside a network: its input wants a gradient as well."""

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = nn.functional.linear(x, weight, bias)
        return z if activation is None else getattr(torch, activation)(z)  # type: ignore[no-any-return]

    def jaxed() -> Callable[..., Any]:
        import jax

        f = (lambda z: z) if activation is None else getattr(jax.nn, activation)
        return lambda x, weight, bias: f(x @ weight.T + bias)

    leaves = [torch.randn(n, d), torch.randn(m, d) / d**0.5, torch.randn(m)]
    leaves = [leaf.to(dtype) for leaf in leaves]
    upstream = torch.randn(n, m).to(dtype)
    extras: dict[str, Callable[[], Contestant]] = {}
    if dtype != torch.float32:
        extras["torch in float32"] = lambda: differentiated(
            theirs, [leaf.float() for leaf in leaves], [], upstream.float()
        )
    about = "x W^T + b" if activation is None else f"{activation}(x W^T + b)"
    # Forward reads x, W, b and writes y; backward reads all that and dy, and writes the gradients.
    moved = 3 * sum(leaf.nbytes for leaf in leaves) + 3 * n * m * leaves[0].itemsize
    return function_case(
        name,
        f"{about}, x [{n}, {d}], W [{m}, {d}], {dtype}, all gradients".replace("torch.", ""),
        functools.partial(F.linear, activation=activation),
        theirs,
        jaxed,
        leaves,
        [],
        upstream,
        extras=extras,
        goals=goals,
        floor=Floor(3 * 2.0 * n * d * m, dtype, [(moved, max(leaf.nbytes for leaf in leaves))]),
        # bfloat16 has 8 bits; where x W^T is rounded before the bias is added, signs change.
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
    )


def gate(name: str, row: str) -> Case:
    """One row of the table of gates on 64 elements: what a call costs."""
    spelled: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "scale": (lambda x: F.scale(x, 2.0), lambda x: 2.0 * x),
        "shift": (lambda x: F.shift(x, 2.0), lambda x: x + 2.0),
    }
    here = torch if hasattr(torch, row) else nn.functional
    ours, theirs = spelled.get(row) or (getattr(F, row), getattr(here, row))
    return function_case(
        name,
        f"{row} of 64 float32, forward and backward: the cost of a call",
        ours,
        theirs,
        None,
        [torch.randn(64) for _ in torchbp.ROWS[row].inputs],
        [],
        torch.randn(64),
        goals={TORCH: 1 / 1.7},
    )


def layered(f: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """Linear layers with f between them, by PyTorch; parameters: weight and bias of each."""
    *hidden, last = zip(parameters[::2], parameters[1::2], strict=True)
    for weight, bias in hidden:
        x = f(nn.functional.linear(x, weight, bias))
    return nn.functional.linear(x, *last)


def tracing(name: str, quick: bool) -> Case:
    """What it costs to see every gate of a network, against its forward and backward alone."""
    leaves = [torch.randn(128, SIZES[0]), *(p.detach() for p in network(SIZES).parameters())]
    target = torch.randint(SIZES[-1], (128,))

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return nn.functional.cross_entropy(layered(torch.relu, x, *parameters), target)

    def run(mark: Mark) -> Ledger:
        return trace(loss, *leaves)

    def outputs() -> Outputs:
        ledger = run(unmarked)
        held = ledger.nodes[ledger.outputs[0]].value
        assert held is not None
        assert held.tensor is not None
        return {"y": array(held.tensor)} | {
            f"gradient {i}": array(g) for i, g in enumerate(ledger.grads.values())
        }

    about = f"graph.trace of {SIZES} at batch 128, against forward and backward alone"
    contestants = {
        OURS: lambda: Contestant(run, outputs),
        TORCH: lambda: differentiated(loss, leaves),
    }
    return Case(name, about, contestants, {TORCH: 1 / 20})


PHYSICS, POINTS, VISCOSITY = [2, 64, 64, 64, 1], 256, 0.01


def burgers(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """How well u = network(x, t) solves Burgers' equation: the mean of (u_t + u u_x - v u_xx)^2."""

    def loss(points: Tensor, *parameters: Tensor) -> Tensor:
        u = network(points, *parameters)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)
        residual = slope[:, 1] + u.squeeze(1) * slope[:, 0] - VISCOSITY * bend[:, 0]
        return residual.square().mean()

    return loss


def physics(name: str, quick: bool) -> Case:
    """Derivatives of derivatives: the loss of a physics-informed network, and its gradients."""
    points = torch.randn(POINTS, PHYSICS[0])
    leaves = [points, *(p.detach() for p in network(PHYSICS).parameters())]

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        return F.mlp(x, parameters[::2], parameters[1::2], "tanh")

    def in_jax_too() -> Contestant:
        import jax
        import jax.numpy as jnp

        def u(point: Any, parameters: Sequence[Any]) -> Any:
            *hidden, (weight, bias) = zip(parameters[::2], parameters[1::2], strict=True)
            for w, b in hidden:
                point = jnp.tanh(w @ point + b)
            return (weight @ point + bias)[0]

        def residual(point: Any, parameters: Sequence[Any]) -> Any:
            slope = jax.grad(u)
            x, t = slope(point, parameters)
            bend = jax.grad(lambda p: slope(p, parameters)[0])(point)[0]
            return t + u(point, parameters) * x - VISCOSITY * bend

        def loss(points: Any, *parameters: Any) -> Any:
            return (jax.vmap(residual, (0, None))(points, parameters) ** 2).mean()

        return differentiated_jax(loss, leaves)

    about = f"loss of Burgers' equation, with u_xx, and its gradients, {PHYSICS} at {POINTS} points"
    contestants = {
        OURS: lambda: differentiated(burgers(ours), leaves),
        TORCH: lambda: differentiated(burgers(functools.partial(layered, torch.tanh)), leaves),
        JAX: in_jax_too,
    }
    return Case(name, about, contestants)


# ---- Training steps

RATE, MOMENTUM = 0.002, 0.9  # so small a rate that rounding does not grow in a thousand steps
COMPARED = 20  # steps, where a run is a single one
Batches = list[tuple[Tensor, Tensor]]


def network(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1])


class Training:
    """A model with its optimizer, trained by steps through autograd.

    Args:
        mode: torch.compile's, where it is the library.

    Attributes:
        step: one step (x, target, mark) -> loss.
    """

    def __init__(self, sizes: Sequence[int], library: str, mode: str | None = None) -> None:
        sequential = network(sizes)
        self.model: nn.Module = sequential
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        optimizer: Any = torch.optim.SGD
        if library == OURS:
            self.model = torchbp.nn.MLP.from_sequential(sequential)
            self.criterion = torchbp.nn.CrossEntropyLoss()
            optimizer = torchbp.optim.SGD
        self.optimizer = optimizer(self.model.parameters(), lr=RATE, momentum=MOMENTUM)
        self.start = copy.deepcopy(list(self.model.parameters()))
        self.step = self._step
        if library == COMPILE:
            self.loss = torch.compile(
                lambda x, target: self.criterion(self.model(x), target), mode=mode
            )
            self.update = torch.compile(self.optimizer.step)
            self.step = self._compiled_step

    def _step(self, x: Tensor, target: Tensor, mark: Mark = unmarked) -> Tensor:
        self.optimizer.zero_grad()
        mark("zero_grad")
        logits = self.model(x)
        mark("forward")
        loss = self.criterion(logits, target)
        mark("loss")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("optimizer")
        return loss  # type: ignore[no-any-return]

    def _compiled_step(self, x: Tensor, target: Tensor, mark: Mark = unmarked) -> Tensor:
        self.optimizer.zero_grad()
        mark("zero_grad")
        loss = self.loss(x, target)
        mark("forward, loss")
        loss.backward()
        mark("backward")
        self.update()
        mark("optimizer")
        return loss

    @torch.no_grad()
    def reset(self) -> None:
        """Weights as they were, no momentum. Else units that died would leave momenta that decay to
        denormal numbers, which no training on new data has."""
        for parameter, start in zip(self.model.parameters(), self.start, strict=True):
            parameter.copy_(start)
        for state in self.optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].zero_()

    def outputs(self, losses: Iterable[Any]) -> Outputs:
        """Losses of the steps from the start, and what has been added to the parameters."""
        self.reset()
        found = np.concatenate([array(loss).reshape(-1) for loss in losses])
        pairs = zip(self.model.parameters(), self.start, strict=True)
        return {
            "losses": found,
            "updates": np.concatenate([array(p - s).ravel() for p, s in pairs]),
        }


def autograd_steps(
    sizes: Sequence[int], batches: Batches, library: str, mode: str | None = None
) -> Contestant:
    training = Training(sizes, library, mode)
    compared = batches * COMPARED if len(batches) == 1 else batches

    def run(mark: Mark) -> None:
        for x, target in batches:
            training.step(x, target, mark)

    def outputs() -> Outputs:
        return training.outputs(training.step(x, target) for x, target in compared)

    return Contestant(run, outputs, training.reset)


def empty_steps(sizes: Sequence[int], batches: Batches) -> Contestant:
    """The step of torchbp with Functions that compute nothing, and its optimizer, which does."""
    training = Training(sizes, OURS)
    parameters, shape = list(training.model.parameters()), (len(batches[0][0]), sizes[-1])

    def run(mark: Mark) -> None:
        for x, target in batches:
            training.optimizer.zero_grad()
            mark("zero_grad")
            logits = Empty.apply(shape, x, *parameters)  # type: ignore[no-untyped-call]
            mark("forward")
            loss = Empty.apply((), logits, target)  # type: ignore[no-untyped-call]
            mark("loss")
            loss.backward()
            mark("backward")
            training.optimizer.step()
            mark("optimizer")

    return Contestant(run, dict, training.reset)


def fused_steps(sizes: Sequence[int], batches: Batches) -> Contestant:
    """compile_step; where there are many steps, all of them in one call."""
    training = Training(sizes, OURS)
    step = torchbp.compile_step(training.model, training.optimizer)
    one = len(batches) == 1
    xs, targets = (torch.stack(column) for column in zip(*batches, strict=True))
    x, target = batches[0]

    def run(mark: Mark) -> Tensor:
        return step(x, target) if one else step.scan(xs, targets)

    def outputs() -> Outputs:
        return training.outputs(run(unmarked) for _ in range(COMPARED if one else 1))

    return Contestant(run, outputs, training.reset)


class JaxTraining:
    """The same in JAX: weights [in, out], a step that gives the new state, buffers donated."""

    def __init__(self, sizes: Sequence[int]) -> None:
        import jax

        self.tree = jax.tree
        layers = [layer for layer in network(sizes) if isinstance(layer, nn.Linear)]
        self.start = [(in_jax(layer.weight.T), in_jax(layer.bias)) for layer in layers]
        self.reset()

        def loss(parameters: Any, x: Any, target: Any) -> Any:
            *hidden, (weight, bias) = parameters
            for w, b in hidden:
                x = jax.nn.relu(x @ w + b)
            return mean_cross_entropy(x @ weight + bias, target)

        def step(state: Any, batch: Any) -> Any:
            parameters, velocity = state
            value, gradient = jax.value_and_grad(loss)(parameters, *batch)
            velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient)
            parameters = jax.tree.map(lambda p, v: p - RATE * v, parameters, velocity)
            return (parameters, velocity), value

        self.raw_step = step

    def reset(self) -> None:
        zeros = self.tree.map(lambda a: 0 * a, self.start)
        self.state = self.tree.map(lambda a: a.copy(), self.start), zeros
        self.finish()

    def finish(self) -> None:
        import jax

        jax.block_until_ready(self.state)

    def outputs(self, losses: Iterable[Any]) -> Outputs:
        self.reset()
        found = np.concatenate([array(loss).reshape(-1) for loss in losses])
        updates = self.tree.map(lambda p, s: p - s, self.state[0], self.start)
        parts = [array(part).T.ravel() for layer in updates for part in layer]  # as [out, in]
        return {"losses": found, "updates": np.concatenate(parts)}


def jax_steps(sizes: Sequence[int], batches: Batches, wait: bool = True) -> Contestant:
    """Many steps are one lax.scan. One is waited for, as torch's is done when it returns, and as a
    script does that reads the loss; without `wait` Python runs ahead of the device."""
    import jax

    training = JaxTraining(sizes)
    if len(batches) == 1:
        step = jax.jit(training.raw_step, donate_argnums=0)
        data = tuple(map(in_jax, batches[0]))
    else:
        many = functools.partial(jax.lax.scan, training.raw_step)
        step = jax.jit(many, donate_argnums=0)
        data = tuple(in_jax(torch.stack(column)) for column in zip(*batches, strict=True))

    def run(mark: Mark) -> Any:
        training.state, loss = step(training.state, data)
        return jax.block_until_ready((training.state, loss))[1] if wait else loss

    def outputs() -> Outputs:
        times = COMPARED if len(batches) == 1 else 1
        return training.outputs(run(unmarked) for _ in range(times))

    return Contestant(run, outputs, training.reset, training.finish)


def training_flops(sizes: Sequence[int], rows: int) -> float:
    """Of the products forward, for the weights' gradients, and for the inputs' but the first's."""
    products = [a * b for a, b in pairwise(sizes)]
    return 2.0 * rows * (3 * sum(products) - products[0])


def steps(
    name: str, about: str, sizes: Sequence[int], batch: int, count: int, fused: bool, **goals: float
) -> Case:
    """`count` steps on as many batches; `fused`: ours is compile_step, else ordinary autograd."""
    batches = [
        (torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))) for _ in range(count)
    ]
    contestants: dict[str, Callable[[], Contestant]] = {
        library: functools.partial(autograd_steps, sizes, batches, library)
        for library in (OURS, TORCH, COMPILE)
    }
    contestants[JAX] = lambda: jax_steps(sizes, batches)
    if fused:
        contestants[OURS] = lambda: fused_steps(sizes, batches)
    else:
        contestants[EMPTY] = lambda: empty_steps(sizes, batches)
    if count == 1:
        contestants["jax, not waiting"] = lambda: jax_steps(sizes, batches, wait=False)
    size = 4 * sum(a * b + b for a, b in pairwise(sizes))
    # Weights are read forward and backward, their gradients written; the update reads weight,
    # gradient and momentum, and writes weight and momentum.
    floor = Floor(count * training_flops(sizes, batch), traffic=[(8 * count * size, size)])
    about = f"{about}, {list(sizes)} at batch {batch}"
    # An update is a small difference of parameters. In many steps a ReLU comes up whose input is 0
    # to rounding: from there two runs differ.
    return Case(name, about, contestants, goals, floor, 1e-3 if count == 1 else 3e-2)


# ---- Epochs of images

BATCH, SHIFT = 128, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10
SIZES = [3072, 512, 256, 10]


def images(count: int) -> SimpleNamespace:
    """Noise in CIFAR-10's shape: speed does not depend on what is seen. It does on where it lies:
    in an array of numpy, as `CIFAR10` has it, which asks for huge pages."""
    pixels = np.random.default_rng(0).integers(256, size=(count, 3, 32, 32), dtype=np.uint8)
    return SimpleNamespace(images=torch.from_numpy(pixels), targets=torch.randint(10, (count,)))


def prepare(pixels: Tensor, rows: Tensor, mirrored: Tensor | None, corner: Tensor | None) -> Tensor:
    """A batch the usual way: index, float, normalise, flip, and crop from a padded image.

    Args:
        mirrored: bool [B].
        corner: where the crop begins, int64 [B, 2] in [0, 2 SHIFT].
    """
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    x = pixels[rows].float() / 255
    x = (x - mean) / std
    if mirrored is not None:
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if corner is not None:
        windows = nn.functional.pad(x, [SHIFT] * 4).unfold(2, 32, 1).unfold(3, 32, 1)
        x = windows[torch.arange(len(rows)), :, corner[:, 0], corner[:, 1]]
    return x.flatten(1)


class Transformed(Dataset[tuple[Tensor, int]]):
    """An image at a time, by the operations of torchvision's RandomHorizontalFlip, ToTensor and
    Normalize on what its CIFAR10 gives. (Its wheels load with some builds of torch alone.)
    """

    def __init__(self, data: SimpleNamespace, augment: bool) -> None:
        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = data.targets.tolist()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.pixels[index])
        if self.augment and torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        x = x.to(torch.get_default_dtype()).div(255).clone()
        mean, std = torch.as_tensor(MEAN).view(-1, 1, 1), torch.as_tensor(STD).view(-1, 1, 1)
        return x.sub_(mean).div_(std), self.targets[index]


def prepare_jax(pixels: Any, rows: Any, mirrored: Any, corner: Any) -> Any:
    """The same in JAX, to be jitted."""
    import jax
    import jax.numpy as jnp

    mean, std = jnp.array(MEAN)[:, None, None], jnp.array(STD)[:, None, None]
    x = (pixels[rows].astype(jnp.float32) / 255 - mean) / std
    if mirrored is not None:
        x = jnp.where(mirrored[:, None, None, None], x[..., ::-1], x)
    if corner is not None:
        padded = jnp.pad(x, [(0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)])
        x = jax.vmap(lambda i, c: jax.lax.dynamic_slice(i, (0, c[0], c[1]), (3, 32, 32)))(
            padded, corner
        )
    return x.reshape(len(rows), -1)


def draws(
    count: int, augment: bool, shift: bool
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(rows, mirrored, corner) of each batch of an epoch; not `augment`: in order, as they are."""
    order = torch.randperm(count) if augment else torch.arange(count)
    for rows in order.split(BATCH):
        mirrored = torch.rand(len(rows)) < 0.5 if augment else None
        corner = torch.randint(2 * SHIFT + 1, (len(rows), 2)) if augment and shift else None
        yield rows, mirrored, corner


def loader(data: SimpleNamespace, augment: bool, shift: bool) -> BatchLoader:
    return BatchLoader(
        data,
        BATCH,
        shuffle=augment,
        flip=augment,
        shift=SHIFT if augment and shift else 0,
        mean=MEAN,
        std=STD,
    )


def batches(name: str, quick: bool) -> Case:
    """Input alone."""
    data = images(2_000 if quick else 50_000)
    count = len(data.images)
    seen = slice(3 * BATCH)  # whose batches are compared
    few = SimpleNamespace(images=data.images[seen], targets=data.targets[seen])

    @functools.cache
    def augmented() -> tuple[Tensor, Tensor, Tensor]:
        """Some images as our loader augments them, and the mirrored and corner that it drew."""
        some = SimpleNamespace(images=few.images[:64], targets=few.targets[:64])
        batch, _ = next(
            iter(
                BatchLoader(some, shuffle=False, flip=True, shift=SHIFT, mean=MEAN, std=STD, seed=1)
            )
        )
        mirrored, corner = torch.zeros(64, dtype=torch.bool), torch.zeros(64, 2, dtype=torch.int64)
        matched = torch.zeros(64, dtype=torch.int64)
        for flip in (False, True):
            for place in np.ndindex(2 * SHIFT + 1, 2 * SHIFT + 1):
                flips, places = torch.full((64,), flip), torch.tensor(place).expand(64, 2)
                x = prepare(some.images, torch.arange(64), flips, places)
                same = torch.isclose(x, batch, atol=1e-5).all(1)
                mirrored[same], corner[same] = flip, torch.tensor(place)
                matched += same
        if not (matched == 1).all():
            raise ValueError(f"{name}: a batch of BatchLoader is no flip and shift of its images")
        return batch, mirrored, corner

    def ours() -> Contestant:
        batches = loader(data, True, True)

        def run(mark: Mark) -> None:
            for _ in batches:
                pass

        def outputs() -> Outputs:
            plain = torch.cat([x for x, _ in loader(few, False, False)])
            return {"batches": array(plain), "augmented": array(augmented()[0])}

        return Contestant(run, outputs)

    def theirs(prepare: Callable[..., Tensor], shift: bool) -> Contestant:
        def run(mark: Mark) -> None:
            for rows, mirrored, corner in draws(count, True, shift):
                prepare(data.images, rows, mirrored, corner)
                data.targets[rows]

        def outputs() -> Outputs:
            plain = [prepare(few.images, *drawn) for drawn in draws(len(few.images), False, shift)]
            found = {"batches": array(torch.cat(plain))}
            if shift:
                _, *drawn = augmented()
                found["augmented"] = array(prepare(few.images, torch.arange(64), *drawn))
            return found

        return Contestant(run, outputs)

    def the_bytes_alone() -> Contestant:
        """Shuffled images as they are, copied to one place."""
        rows, out = data.images.flatten(1), torch.empty(BATCH, 3072, dtype=torch.uint8)

        def run(mark: Mark) -> None:
            for order, _, _ in draws(count, True, False):
                torch.index_select(rows, 0, order, out=out[: len(order)])

        return Contestant(run, dict)

    def in_jax_too() -> Contestant:
        import jax

        batch = jax.jit(prepare_jax)
        pixels, targets = in_jax(data.images), in_jax(data.targets)

        def get(pixels: Any, *drawn: Tensor | None) -> Any:
            return batch(pixels, *(None if d is None else d.numpy() for d in drawn))

        def run(mark: Mark) -> None:
            for rows, mirrored, corner in draws(count, True, True):
                jax.block_until_ready((get(pixels, rows, mirrored, corner), targets[rows.numpy()]))

        def outputs() -> Outputs:
            plain = [get(pixels, *drawn) for drawn in draws(len(few.images), False, True)]
            _, *drawn = augmented()
            return {
                "batches": np.concatenate([array(x) for x in plain]),
                "augmented": array(get(pixels, torch.arange(64), *drawn)),
            }

        return Contestant(run, outputs)

    size = data.images.nbytes
    return Case(
        name,
        f"an epoch of input alone, {count:,} images with flip and shift; torch flips only",
        {
            OURS: ours,
            TORCH: lambda: theirs(prepare, False),
            "torch, shift too": lambda: theirs(prepare, True),
            BYTES: the_bytes_alone,
            COMPILE: lambda: theirs(torch.compile(prepare), True),
            JAX: in_jax_too,
        },
        {TORCH: 10, "seconds": 0.35},
        # Bytes are read once; floats are written to a batch that stays in the cache.
        Floor(traffic=[(size, size), (4 * size, 4 * BATCH * 3072)]),
    )


def cifar_epoch(name: str, quick: bool) -> Case:
    """Training, input and all."""
    data = images(2_000 if quick else 50_000)
    flops = training_flops(SIZES, len(data.images))
    few = SimpleNamespace(images=data.images[: 4 * BATCH], targets=data.targets[: 4 * BATCH])

    def usual(library: str, batch: Callable[..., Tensor] = prepare) -> Contestant:
        training = Training(SIZES, library)

        def epoch(data: SimpleNamespace, augment: bool, mark: Mark) -> Iterator[Tensor]:
            for rows, mirrored, _ in draws(len(data.images), augment, False):
                x, target = batch(data.images, rows, mirrored, None), data.targets[rows]
                mark("input")
                yield training.step(x, target, mark)

        return contestant(training, epoch)

    def transforms() -> Contestant:
        """As PyTorch's tutorials write it: a DataLoader of transformed images."""
        training = Training(SIZES, TORCH)

        def epoch(data: SimpleNamespace, augment: bool, mark: Mark) -> Iterator[Tensor]:
            for x, target in DataLoader(Transformed(data, augment), BATCH, shuffle=augment):
                mark("input")
                yield training.step(x.flatten(1), target, mark)

        return contestant(training, epoch)

    def our_loader() -> Contestant:
        training = Training(SIZES, TORCH)

        def epoch(data: SimpleNamespace, augment: bool, mark: Mark) -> Iterator[Tensor]:
            for x, target in loader(data, augment, False):
                mark("input")
                yield training.step(x, target, mark)

        return contestant(training, epoch)

    def ours() -> Contestant:
        training = Training(SIZES, OURS)
        step = torchbp.compile_step(training.model, training.optimizer)

        def epoch(data: SimpleNamespace, augment: bool, mark: Mark) -> Iterator[Tensor]:
            yield step.epoch(loader(data, augment, False))

        return contestant(training, epoch)

    def in_jax_too() -> Contestant:
        import jax

        training = JaxTraining(SIZES)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, pixels: Any, targets: Any, rows: Any, mirrored: Any) -> Any:
            x = prepare_jax(pixels, rows, mirrored, None)
            return training.raw_step(state, (x, targets[rows]))

        arrays = {len(d.images): (in_jax(d.images), in_jax(d.targets)) for d in (data, few)}

        def epoch(data: SimpleNamespace, augment: bool, mark: Mark) -> Iterator[Any]:
            held = arrays[len(data.images)]
            for rows, mirrored, _ in draws(len(data.images), augment, False):
                flips = None if mirrored is None else mirrored.numpy()
                training.state, loss = step(training.state, *held, rows.numpy(), flips)
                yield loss

        return contestant(training, epoch)

    def contestant(
        training: Training | JaxTraining,
        epoch: Callable[[SimpleNamespace, bool, Mark], Iterable[Any]],
    ) -> Contestant:
        return Contestant(
            run=lambda mark: list(epoch(data, True, mark)),
            outputs=lambda: training.outputs(epoch(few, False, unmarked)),
            reset=training.reset,
            finish=getattr(training, "finish", nothing),
        )

    return Case(
        name,
        f"an epoch of training on {len(data.images):,} images with flips, {SIZES} at batch {BATCH}",
        {
            OURS: ours,
            TORCH: lambda: usual(TORCH),
            "torch, our loader": our_loader,
            "torch, DataLoader": transforms,
            COMPILE: lambda: usual(COMPILE, torch.compile(prepare)),
            JAX: in_jax_too,
            ARITHMETIC: lambda: arithmetic_alone(flops),
        },
        {"torch, DataLoader": 3, "floor": 1 / 1.25},
        Floor(flops),
        # Of 400,000 rectifiers in four steps, one may lie so near to 0 that rounding decides on
        # which side: it moves the updates by 2e-3. A wrong rate or image moves them by 1e-1.
        tolerance=5e-3,
    )


# ---- All of them

TINY, WIDE = [64, 64, 64, 10], SIZES
AUTOGRAD, FUSED = "an SGD step, backward() and step()", "an SGD step by compile_step"


def loop(name: str, units: int, quick: bool, goal: float) -> Case:
    count = 50 if quick else 1000
    about = f"{count} SGD steps in one call, in JAX one lax.scan"
    return steps(name, about, [64, *[units] * 4, 10], 32, count, True, jax=goal)


#: Name -> what makes the case from its name and whether it is to be quick.
CASES: dict[str, Callable[[str, bool], Case]] = {
    "ce_8192x10": lambda name, quick: cross_entropy(name, 8192, 10, goals={TORCH: 30}),
    "ce_4096x1000": lambda name, quick: cross_entropy(name, 4096, 1000, goals={TORCH: 3}),
    "ce_1024x50257": lambda name, quick: cross_entropy(
        name, 1024, 50257, goals={TORCH: 2, "memory": 2}, memory=True
    ),
    "relu_16M": lambda name, quick: elementwise(name, "relu", 1 << 24, torch=2.5),
    "sigmoid_16M": lambda name, quick: elementwise(name, "sigmoid", 1 << 24, torch=2.5),
    "multiply_16M": lambda name, quick: elementwise(name, "multiply", 1 << 24, torch=1.5),
    "tanh_64K": lambda name, quick: elementwise(name, "tanh", 1 << 16, torch=1.5),
    "multiply_f16": lambda name, quick: elementwise(name, "multiply", 1 << 22, torch.float16),
    "multiply_bf16": lambda name, quick: elementwise(name, "multiply", 1 << 22, torch.bfloat16),
    "linear_relu_f32": lambda name, quick: linear(
        name, 256, 3072, 512, torch.float32, "relu", torch=1.1
    ),
    "linear_relu_bf16": lambda name, quick: linear(
        name, 256, 3072, 512, torch.bfloat16, "relu", **{TORCH: 1.1, "torch in float32": 2}
    ),
    "one_output": lambda name, quick: linear(name, 1024, 768, 1, torch.float32, None),
    "few_examples": lambda name, quick: linear(name, 4, 1024, 1024, torch.float32, None),
    "tiny_autograd": lambda name, quick: steps(
        name, AUTOGRAD, TINY, 32, 1, False, torch=5, jax=2.5
    ),
    "tiny_step": lambda name, quick: steps(name, FUSED, TINY, 32, 1, True, torch=12, jax=5),
    "wide_autograd": lambda name, quick: steps(name, AUTOGRAD, WIDE, 128, 1, False, torch=1.1),
    "wide_step": lambda name, quick: steps(name, FUSED, WIDE, 128, 1, True, torch=1.2),
    "physics": physics,
    "loop_40": lambda name, quick: loop(name, 40, quick, 3),
    "loop_160": lambda name, quick: loop(name, 160, quick, 1.3),
    "batches": batches,
    "cifar_epoch": cifar_epoch,
    "trace": tracing,
}
CASES |= {
    f"gate_{row}": lambda name, quick: gate(name, name.removeprefix("gate_"))
    for row in torchbp.ROWS
}

#: Names that stand for several cases.
GROUPS = {
    "loop": [name for name in CASES if name.startswith("loop_")],
    "gates": [name for name in CASES if name.startswith("gate_")],
}
