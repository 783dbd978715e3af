#!/usr/bin/env python3
"""Time torchbp on a GPU against PyTorch eager, in a CUDA graph and compiled, and against JAX.

    python scripts/benchmark_gpu.py                          # every case
    python scripts/benchmark_gpu.py --case ce_65536x10 step  # those whose names begin so
    python scripts/benchmark_gpu.py --json build/gpu.json
    python scripts/benchmark_gpu.py --device cpu --quick     # whether it runs, on any machine

Every contestant first shows that it computes what torchbp does. Then they take turns, in an order
drawn anew for every round, each between two CUDA events; a time is the median of the rounds, a
ratio the median of the ratios within each round. Inputs take turns as well, as many sets of them as
are larger than the GPU's L2 together. `copy` moves the bytes that a case has to move at least, from
one place of the GPU's memory to another. All compute in the same dtype with the same TF32 setting.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there

import torchbp
import torchbp.functional as F
from scripts.benchmark import add_measuring, checked, jax_version, medians, reason
from scripts.benchmark_cases import (
    COMPILE,
    JAX,
    OURS,
    TORCH,
    Batches,
    Case,
    Contestant,
    Training,
    autograd_steps,
    differentiated,
    fused_steps,
    jax_steps,
    network,
    unmarked,
)
from scripts.benchmark_report import Result, duration, times
from torchbp.train import write_file

GRAPH, COPY = "torch, graph", "copy"
PEERS = (COPY, TORCH, GRAPH, COMPILE, JAX)
MODE = "reduce-overhead"  # of torch.compile: CUDA graphs
L2 = 64 << 20  # more bytes than the L2 cache of any GPU of today holds


# ---- Contestants


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as one CUDA graph, which is to be replayed; it has to have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def graphed(make: Callable[[], Contestant]) -> Contestant:
    """A contestant whose run is a CUDA graph. Its outputs are those of the run itself, which the
    same kernels compute."""
    contestant = make()
    replay = captured(lambda: contestant.run(unmarked))
    return Contestant(lambda mark: replay(), contestant.outputs, contestant.reset)


def graphed_steps(sizes: Sequence[int], batches: Batches) -> Contestant:
    """Training steps of PyTorch, a step a CUDA graph."""
    training = Training(sizes, TORCH)
    x, target = (tensor.clone() for tensor in batches[0])
    loss = torch.zeros(())
    replay = captured(lambda: loss.copy_(training.step(x, target).detach()))

    def run(mark: Any) -> list[Tensor]:
        losses = []
        for batch in batches:
            x.copy_(batch[0])
            target.copy_(batch[1])
            replay()
            losses.append(loss.clone())
        return losses

    return Contestant(run, lambda: training.outputs(steps_of(run, batches)), training.reset)


def steps_of(run: Callable[[Any], list[Tensor]], batches: Batches) -> Iterator[Tensor]:
    """The losses of as many steps as the other contestants compare."""
    for _ in range(20 if len(batches) == 1 else 1):
        yield from run(unmarked)


def copies(size: int) -> Contestant:
    """`size` bytes read and as many written."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return Contestant(lambda mark: target.copy_(source), dict)


def in_turn(make: Callable[[int], Contestant], sets: int) -> Contestant:
    """Contestants of several sets of inputs, one after the other; the first is compared."""
    all_of_them = [make(i) for i in range(sets)]
    calls = iter(range(sys.maxsize))

    def reset() -> None:
        for contestant in all_of_them:
            contestant.reset()

    return Contestant(
        lambda mark: all_of_them[next(calls) % sets].run(mark), all_of_them[0].outputs, reset
    )


# ---- Cases


@dataclass
class Data:
    """The leaves, constants and upstream gradients of a function, in several sets."""

    sets: list[tuple[list[Tensor], list[Tensor], Tensor | None]] = field(default_factory=list)

    @classmethod
    def of(cls, make: Callable[[], tuple[list[Tensor], list[Tensor], Tensor | None]]) -> Data:
        first = make()
        size = sum(t.nbytes for t in [*first[0], *first[1]])
        more = max(1, -(-L2 // size)) if first[0][0].is_cuda else 1
        return cls([first, *(make() for _ in range(more - 1))])

    def contestant(
        self, function: Callable[..., Tensor], wrap: Callable[..., Contestant] | None = None
    ) -> Contestant:
        def make(i: int) -> Contestant:
            made = functools.partial(differentiated, function, *self.sets[i])
            return wrap(made) if wrap else made()

        return in_turn(make, len(self.sets))


def function_case(
    name: str,
    about: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    data: Data,
    goals: dict[str, float],
    copied: int = 0,
    tolerance: float = 1e-4,
) -> Case:
    contestants: dict[str, Callable[[], Contestant]] = {
        OURS: lambda: data.contestant(ours),
        TORCH: lambda: data.contestant(theirs),
        GRAPH: lambda: data.contestant(theirs, graphed),
    }
    if COMPILE in goals:
        contestants[COMPILE] = lambda: data.contestant(torch.compile(theirs, mode=MODE))
    if copied:
        contestants[COPY] = lambda: copies(copied)
    return Case(name, about, contestants, goals, tolerance=tolerance)


def elementwise(name: str, gate: str, n: int) -> Case:
    inputs = 2 if gate == "multiply" else 1
    data = Data.of(lambda: ([torch.randn(n) for _ in range(inputs)], [], torch.randn(n)))
    # Forward reads the inputs and writes y; backward reads dy and what is saved, writes gradients.
    passes = 8 if gate == "multiply" else 5
    return function_case(
        name,
        f"{gate} of {n:,} float32, forward and backward, against a copy of its bytes",
        getattr(F, gate),
        getattr(torch, gate),
        data,
        {COPY: 0.9},
        copied=passes * 4 * n // 2,
    )


def cross_entropy(name: str, rows: int, classes: int, goal: float) -> Case:
    data = Data.of(lambda: ([torch.randn(rows, classes)], [torch.randint(classes, (rows,))], None))
    return function_case(
        name,
        f"mean cross-entropy of {rows} x {classes} float32 logits, forward and backward",
        F.cross_entropy,
        nn.functional.cross_entropy,
        data,
        {TORCH: goal},
    )


def linear_relu(name: str, rows: int, width: int, dtype: torch.dtype) -> Case:
    def make() -> tuple[list[Tensor], list[Tensor], Tensor]:
        leaves = [torch.randn(rows, width), torch.randn(width, width) / width**0.5]
        leaves = [leaf.to(dtype) for leaf in [*leaves, torch.randn(width)]]
        return leaves, [], torch.randn(rows, width).to(dtype)

    kind = "bf16" if dtype == torch.bfloat16 else "tf32"
    return function_case(
        name,
        f"relu(x W^T + b), x [{rows}, {width}], W [{width}, {width}], {kind}, all gradients",
        functools.partial(F.linear, activation="relu"),
        lambda x, weight, bias: torch.relu(nn.functional.linear(x, weight, bias)),
        Data.of(make),
        {GRAPH: 1.3, COMPILE: 1.3},
        tolerance=3e-2,  # bfloat16 has 8 bits, TF32 10
    )


def mlp(name: str, rows: int, width: int) -> Case:
    """Narrow layers in float16: five of them, forward and backward."""
    sizes = [width] * 5
    start = [parameter.detach().half() for parameter in network(sizes).parameters()]

    def make() -> tuple[list[Tensor], list[Tensor], Tensor]:
        x, dy = torch.randn(rows, width).half(), torch.randn(rows, width).half()
        return [x, *start], [], dy

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        return F.mlp(x, list(parameters[::2]), list(parameters[1::2]))

    def theirs(x: Tensor, *parameters: Tensor) -> Tensor:
        *hidden, last = zip(parameters[::2], parameters[1::2], strict=True)
        for weight, bias in hidden:
            x = torch.relu(nn.functional.linear(x, weight, bias))
        return nn.functional.linear(x, *last)

    return function_case(
        name,
        f"mlp of {len(sizes) - 1} layers {width} wide, batch {rows}, float16, all gradients",
        ours,
        theirs,
        Data.of(make),
        {GRAPH: 3.0},
        tolerance=3e-2,
    )


def steps(name: str, sizes: list[int], batch: int, count: int, goals: dict[str, float]) -> Case:
    batches = [
        (torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))) for _ in range(count)
    ]
    contestants: dict[str, Callable[[], Contestant]] = {
        OURS: lambda: fused_steps(sizes, batches),
        TORCH: lambda: autograd_steps(sizes, batches, TORCH),
        GRAPH: lambda: graphed_steps(sizes, batches),
        JAX: lambda: jax_steps(sizes, batches),
    }
    if count == 1:
        contestants[COMPILE] = lambda: autograd_steps(sizes, batches, COMPILE, MODE)
    about = f"{count} SGD steps by compile_step, {sizes} at batch {batch}, float32"
    # As on the CPU: an update is a small difference of parameters, and rectifiers change sides.
    return Case(name, about, contestants, goals, tolerance=1e-3 if count == 1 else 3e-2)


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    """By name; quick: small enough for any machine."""
    few = 64 if quick else 1  # what numbers of rows are divided by
    rows = 65536
    found: dict[str, Callable[..., Case]] = {}
    for gate in ("relu", "sigmoid", "multiply"):
        found[f"{gate}_64M"] = functools.partial(elementwise, gate=gate, n=(1 << 26) // few**2)
    for n, classes, goal in ((rows, 10, 5.0), (8192, 1000, 2.0), (8192, 50257, 2.0)):
        found[f"ce_{n}x{classes}"] = functools.partial(
            cross_entropy, rows=n // few, classes=classes, goal=goal
        )
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "tf32")):
        for width in (512, 1024):
            found[f"linear_relu_{width}_{kind}"] = functools.partial(
                linear_relu, rows=rows // few, width=width // min(few, 8), dtype=dtype
            )
    found["step_wide"] = functools.partial(
        steps, sizes=[3072, 512, 512, 10], batch=128, count=1,
        goals={TORCH: 8.0, GRAPH: 1.5, COMPILE: 1.5},
    )  # fmt: skip
    found["step_small"] = functools.partial(
        steps, sizes=[64, 100, 100, 100, 100, 10], batch=32, count=20 if quick else 1000,
        goals={GRAPH: 2.0, JAX: 2.0},
    )  # fmt: skip
    for width in (64, 128):
        for power in (14, 16, 18):
            found[f"mlp_{width}_2^{power}"] = functools.partial(
                mlp, rows=(1 << power) // few, width=width
            )
    return {name: functools.partial(make, name) for name, make in found.items()}


# ---- Measuring


class Clock:
    """Seconds between two places of the GPU's work, or, on a CPU, of the program."""

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"

    def __call__(self, work: Callable[[], object]) -> float:
        if not self.gpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def measure(case: Case, peers: Sequence[str], seconds: float, clock: Clock) -> Result:
    """Check and time the contestants of a case.

    Raises:
        Disagreement: one computes something else than we do.
        Exception: whatever ours raises; another that does is skipped.
    """
    taking_part = [name for name in case.contestants if name in (OURS, *peers)]
    ready, skipped = checked(case, taking_part, lambda text: None)

    def turn(contestant: Contestant, calls: int) -> float:
        contestant.reset()
        contestant.run(unmarked)

        def work() -> None:
            for _ in range(calls):
                contestant.run(unmarked)
            contestant.finish()

        return clock(work) / calls

    each = seconds / (10 * len(ready))  # of a turn
    calls = {name: max(1, round(each / turn(c, 1))) for name, c in ready.items()}
    order, shuffle = list(ready), random.Random(0).shuffle
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        shuffle(order)
        rounds.append({name: turn(ready[name], calls[name]) for name in order})
    return {
        "case": case.name,
        "about": case.about,
        "contestants": medians(ready, rounds),
        "skipped": skipped,
        "goals": case.goals,
        "rounds": len(rounds),
    }


def report(results: list[Result], device: str, quick: bool) -> dict[str, Any]:
    """What --json writes."""
    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda or "none", "torchbp": torchbp.__version__}
    return {
        "device": name,
        "versions": versions | jax_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "quick": quick,
        "results": results,
    }


def table(results: Sequence[Result]) -> Table:
    """Times, behind them ratios, and goals reached or not."""
    made = Table(pad_edge=False, header_style="bold")
    for head in ("case", OURS, *PEERS, "goal"):
        made.add_column(head, justify="left" if head in ("case", "goal") else "right")
    for result in results:
        ran = result["contestants"]

        def cell(name: str, result: Result = result) -> str:
            if name not in result["contestants"]:
                return "skipped" if name in result["skipped"] else ""
            held = result["contestants"][name]
            return f"{duration(held['seconds'])} {times(held['ratio'])}"

        goals = [
            f"{'✓' if ran[goal]['ratio'] >= value else '✗'} {goal} {times(value)}"
            for goal, value in result["goals"].items()
            if goal in ran
        ]
        made.add_row(
            result["case"], duration(ran[OURS]["seconds"]), *map(cell, PEERS), "\n".join(goals)
        )
    return made


# ---- The command line


def parser() -> argparse.ArgumentParser:
    about, text = (__doc__ or "").split("\n", 1)
    top = argparse.ArgumentParser(
        "benchmark_gpu.py",
        description=about,
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(cases(False))
    top.add_argument(
        "--case", nargs="+", metavar="NAME", help=f"how names begin, of {names} (default: all)"
    )
    top.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    add_measuring(top, PEERS, seconds=2.0, rounds=5)
    top.add_argument("--quick", action="store_true", help="small sizes, to see whether it runs")
    top.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    wanted = {
        name: make
        for name, make in cases(options.quick).items()
        if options.case is None or name.startswith(tuple(options.case))
    }
    if not wanted:
        top.error(f"--case: no case begins with {', '.join(options.case)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        top.error(f"--device: torch {torch.__version__} finds no CUDA device")
    torch.set_default_device(options.device)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch some memory
    results: list[Result] = []
    errors: list[str] = []
    console = Console(highlight=False, width=160)
    for name, make in wanted.items():
        print(name, end=" ", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name.endswith("tf32") else "highest")
        try:
            results.append(measure(make(), options.peers, options.seconds, Clock(options.device)))
        except Exception as error:
            errors.append(f"{name}: {reason(error)}")
        finally:
            torch.set_float32_matmul_precision(before)
    print(file=sys.stderr)
    data = report(results, options.device, options.quick)
    if results:
        console.print(table(results))
        said = ", ".join(f"{key} {value}" for key, value in data["versions"].items())
        console.print(f"{data['device']}; {said}; {data['date']}")
        for result in results:
            for name, why in result["skipped"].items():
                console.print(f"{result['case']}: {name} skipped: {why}", markup=False)
    if options.json:
        write_file(options.json, json.dumps(data, indent=1) + "\n")
    for message in errors:
        print(f"{top.prog}: error: {message}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
