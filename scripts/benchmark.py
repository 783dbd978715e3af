#!/usr/bin/env python3
"""Time torchbp on the CPU against torch eager, torch.compile and JAX jit.

    python scripts/benchmark.py                             # every case, on 1 and on 2 threads
    python scripts/benchmark.py --case tiny_step loop       # some of them
    python scripts/benchmark.py --case tiny_autograd --profile   # where the time goes
    python scripts/benchmark.py --json docs/benchmark.json --chart docs/benchmark.png

Each case runs in a process of its own, bound to as many cores as it has threads (JAX takes its
number of threads from that). There every contestant first shows that it computes what torchbp
does. Then they take turns, in an order drawn anew for every round: some calls that do not count,
until caches and threads are theirs, and some that do. A time is the median of the rounds. A ratio,
how many times our time another takes, is the median of the ratios within each round, so that
whatever slows a whole round down counts for nothing.

The floor is what the machine takes at least for the same: bytes over the rate of a copy of that
size, or floating-point operations over the rate of a large matrix product, the longer of the two,
both measured in the same process. Behind it stands the share of our time that it is.

The JSON file holds `machine`, `versions`, `date`, whether it was a `quick` run, and `results`, one
for each case and number of threads: median, quartiles (in seconds) and ratio of each contestant,
reasons of those `skipped`, `floor` (seconds), `rates` (per second), `goals`, `others` (the share of
the machine that other processes took meanwhile), the number of `rounds` and, where measured,
`memory`: bytes that a call adds to the resident set at its peak.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there

import torchbp
from scripts.benchmark_cases import (
    CASES,
    EXTRAS,
    GROUPS,
    JAX,
    OURS,
    Case,
    Contestant,
    Floor,
    Outputs,
    fastest,
    large_product,
    unmarked,
)
from scripts.benchmark_report import PEERS, Result, chart, notes, profile_tables, table
from torchbp.train import figures, write_file

# ---- Measuring one case, in a process of its own


class Disagreement(Exception):
    """Two contestants do not compute the same."""


def measure(
    case: Case, peers: Sequence[str], seconds: float, profiled: bool, tell: Callable[[str], None]
) -> Result:
    """Check and time the contestants of a case.

    Raises:
        Disagreement: one computes something else than we do.
        Exception: whatever ours raises; another that does is skipped.
    """
    taking_part = [name for name in case.contestants if EXTRAS.get(name, name) in (OURS, *peers)]
    contestants, skipped = checked(case, taking_part, tell)

    result: Result = {
        "case": case.name,
        "about": case.about,
        "threads": torch.get_num_threads(),
        "contestants": {},
        "skipped": skipped,
        "goals": case.goals,
        "floor": None,
        "rates": {},
    }
    if case.memory:
        result["memory"] = {name: peak(contestant) for name, contestant in contestants.items()}
    if profiled:
        result["profile"] = {
            name: profile(contestant, min(1.0, seconds))
            for name, contestant in contestants.items()
            if EXTRAS.get(name, name) != JAX
        }
    if case.floor:
        tell(f"{case.name}: measuring the floor")
        result["floor"], result["rates"] = lower_bound(case.floor, min(0.5, seconds))
    before = busy()
    rounds = list(race(contestants, seconds, lambda text: tell(f"{case.name}: {text}")))
    result["rounds"] = len(rounds)
    taken, mine, passed = (now - then for now, then in zip(busy(), before, strict=True))
    result["others"] = round(max(0.0, taken - mine) / (passed * (os.cpu_count() or 1)), 3)
    result["contestants"] = medians(contestants, rounds)
    return result


def checked(
    case: Case, names: Sequence[str], tell: Callable[[str], None]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those of the contestants that compute what we do, and why others are skipped.

    Raises: as `measure`.
    """
    contestants: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}
    expected: Outputs = {}
    for name in names:
        tell(f"{case.name}: checking {name}")
        try:
            contestant = case.contestants[name]()
            outputs = contestant.outputs()
        except Exception as error:  # whatever a library that is missing or broken raises
            if name == OURS:
                raise
            skipped[name] = reason(error)
            continue
        if name == OURS:
            expected = outputs
        compare(case, name, outputs, expected)
        contestants[name] = contestant
    return contestants, skipped


def medians(
    names: Iterable[str], rounds: Sequence[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Of each contestant: quartiles of its time, and the median of its ratio to ours."""
    found = {}
    for name in names:
        low, median, high = np.quantile([times[name] for times in rounds], [0.25, 0.5, 0.75])
        ratio = statistics.median(times[name] / times[OURS] for times in rounds)
        row = {"seconds": median, "low": low, "high": high, "ratio": ratio}
        found[name] = {key: float(f"{value:.4g}") for key, value in row.items()}
    return found


def compare(case: Case, name: str, outputs: Outputs, expected: Outputs) -> None:
    for key in expected.keys() & outputs.keys():
        ours, theirs = expected[key].astype(np.float64), outputs[key].astype(np.float64)
        if ours.shape != theirs.shape:
            raise Disagreement(
                f"{key} has shape {list(theirs.shape)} in {name} and {list(ours.shape)} in {OURS}"
            )
        error = float(np.linalg.norm(theirs - ours)) / (float(np.linalg.norm(ours)) or 1.0)
        if not error <= case.tolerance:
            raise Disagreement(
                f"{key} of {name} is not that of {OURS}: relative error {error:.2g},"
                f" at most {case.tolerance:g} is allowed"
            )


def race(
    contestants: dict[str, Contestant], seconds: float, tell: Callable[[str], None]
) -> Iterator[dict[str, float]]:
    """Seconds a call of each contestant, a dict for every round, of about `seconds` in all."""
    # Long enough for the threads of the contestant before to stop waiting for more work.
    settle = min(0.006, seconds / 100)
    plans, needed = {}, 0.0
    for name, contestant in contestants.items():
        once = turn(contestant, 1, settle)
        calls = max(1, round(settle / once))
        # What lasts that long does not show what was before it.
        warm, before = (settle, max(settle, once)) if once < 0.5 else (0.0, 0.0)
        plans[name] = contestant, calls, warm
        needed += before + once * calls
    rounds = min(60, max(3, round(seconds / needed)))
    order, shuffle = list(contestants), random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # what there is now need not be looked through again
    try:
        for done in range(rounds):
            tell(f"round {done + 1} of {rounds}")
            gc.collect()
            shuffle(order)
            yield {name: turn(*plans[name]) for name in order}
    finally:
        gc.unfreeze()


def turn(contestant: Contestant, calls: int, warm: float) -> float:
    """Seconds a call, after calls that do not count, of `warm` seconds and one at least if any."""
    clock, run = time.perf_counter, contestant.run
    gc.disable()
    try:
        contestant.reset()
        end = clock() + warm
        while warm:
            run(unmarked)
            if clock() >= end:
                break
        contestant.finish()
        contestant.reset()
        start = clock()
        for _ in range(calls):
            run(unmarked)
        contestant.finish()
        return (clock() - start) / calls
    finally:
        gc.enable()


def lower_bound(floor: Floor, seconds: float) -> tuple[float, dict[str, float]]:
    """Seconds, and the rates per second that they were had from."""
    rates: dict[str, float] = {}
    if floor.flops:
        rate, _ = large_product(floor.dtype, seconds)
        rates[f"{str(floor.dtype).removeprefix('torch.')} operations"] = rate
    arithmetic = floor.flops / rate if floor.flops else 0.0
    traffic = 0.0
    for moved, size in floor.traffic:
        source, target = torch.ones(size // 4), torch.ones(size // 4)
        copied = functools.partial(target.copy_, source)
        rate = 2.0 * size / fastest(copied, seconds)
        rates[f"bytes at {size:,}"] = rate
        traffic += moved / rate
    return float(f"{max(arithmetic, traffic):.4g}"), rates


def busy() -> tuple[float, float, float]:
    """Seconds that all processes have used so far, that this one has, and that have passed."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return 0.0, 0.0, time.perf_counter()
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter()


def peak(contestant: Contestant) -> int | None:
    """Bytes that a call adds to the resident set at its peak; None where Linux does not tell."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        contestant.reset()
        gc.collect()
        torchbp.empty_cache()  # what a call needs counts, wherever it finds it
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = status("VmRSS")
        contestant.run(unmarked)
        contestant.finish()
        return status("VmHWM") - before
    except OSError:
        return None
    finally:
        contestant.reset()


def profile(contestant: Contestant, seconds: float) -> dict[str, Any]:
    """Where the time of a call goes: seconds of each stage, and operations by their own time."""
    clock = time.perf_counter
    samples: list[Counter[str]] = []
    end = clock() + seconds
    while not samples or (clock() < end and len(samples) < 500):
        stages: Counter[str] = Counter()
        last = clock()

        def mark(stage: str, stages: Counter[str] = stages) -> None:
            nonlocal last
            now = clock()
            stages[stage] += now - last  # type: ignore[assignment]
            last = clock()

        contestant.run(mark)
        if not stages:
            mark("in one")
        samples.append(stages)
    calls = min(5, len(samples))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities):
        torch.empty(1)  # the first of all takes the time of the profiler's start
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(calls):
            contestant.run(unmarked)
    operations = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    contestant.reset()
    return {
        "stages": {
            stage: statistics.median(sample[stage] for sample in samples) for stage in samples[0]
        },
        "operations": [
            [event.key, event.count / calls, 1e-6 * event.self_cpu_time_total / calls]
            for event in operations[:12]
        ],
    }


def reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def child(settings: str) -> int:
    """What runs in the process of its own: a line of JSON for each thing to tell."""
    options = json.loads(settings)
    # Before any thread is there: XLA makes as many as it may use cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options["threads"]])
    torch.set_num_threads(options["threads"])

    def say(kind: str, value: object) -> None:
        print(json.dumps({kind: value}), flush=True)

    for name in options["cases"]:
        torch.manual_seed(0)
        say("state", f"{name}: making its data")
        try:
            case = CASES[name](name, options["quick"])
            result = measure(
                case,
                options["peers"],
                options["seconds"],
                options["profile"],
                lambda text: say("state", text),
            )
        except Exception as error:
            where = f"{name} ({options['threads']})"
            say("error", f"{where}: {reason(error)}")
            continue
        say("result", result)
    return 0


# ---- Running all of them


class Failure(Exception):
    """A case's process that ended before its time."""


def run_cases(options: argparse.Namespace, names: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Results and errors of all cases, at every number of threads."""
    # Cases of a group share a process, which saves the start.
    group = {case: name for name, members in GROUPS.items() for case in members}
    together: dict[str, list[str]] = defaultdict(list)
    for name in names:
        together[group.get(name, name)].append(name)
    jobs = [(cases, threads) for cases in together.values() for threads in options.threads]
    results: list[Result] = []
    errors: list[str] = []
    terminal = sys.stderr.isatty()
    bar = Progress(
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        disable=not terminal,
    )
    task = bar.add_task("", total=sum(len(cases) for cases, _ in jobs))
    with bar:
        try:
            for cases, threads in jobs:
                count = f"{threads} thread" + "s" * (threads > 1)
                left = len(cases)
                try:
                    for kind, value in events(options, cases, threads):
                        if kind == "state":
                            bar.update(task, description=f"{value} ({count})")
                            continue
                        (results if kind == "result" else errors).append(value)
                        bar.advance(task)
                        left -= 1
                except Failure as failure:
                    errors.append(f"{', '.join(cases)} ({count}): {failure}")
                    bar.advance(task, left)
        except KeyboardInterrupt:
            errors.append("interrupted: this is what there was")
    return results, errors


def events(
    options: argparse.Namespace, cases: Sequence[str], threads: int
) -> Iterator[tuple[str, Any]]:
    """What the process of some cases tells, as it does."""
    settings = {
        "cases": cases,
        "threads": threads,
        "quick": options.quick,
        "peers": options.peers,
        "seconds": 0.01 if options.quick else options.seconds,
        "profile": options.profile,
    }
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):  # libraries may print something too
                    yield from json.loads(line).items()
            if process.wait():
                log.seek(0)
                last = log.read().strip().splitlines()[-1:]
                raise Failure(f"ended with {process.returncode} {' '.join(last)}".strip())
        finally:
            process.kill()
            process.wait()


def report(results: Sequence[Result], quick: bool) -> dict[str, Any]:
    """What --json writes."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"torchbp": torchbp.__version__} | jax_version()
    return {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "simd": torchbp.cpu_level(),
        },
        "versions": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "quick": quick,
        "results": list(results),
    }


def jax_version() -> dict[str, str]:
    try:
        import jax
    except ImportError:
        return {}
    return {"jax": jax.__version__}


def processor() -> str:
    """The processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, no usage


def case_names(text: str) -> list[str]:
    """A type for argparse: the cases that a name stands for."""
    if text not in CASES and text not in GROUPS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a case; there are {', '.join([*CASES, *GROUPS])}"
        )
    return GROUPS.get(text, [text])


def thread_count(text: str) -> int:
    """A type for argparse: a number of threads that this machine has cores for."""
    cores = len(os.sched_getaffinity(0))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= cores:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads from 1 to {cores}")
    return int(text)


def positive(text: str) -> float:
    """A type for argparse: a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_measuring(
    top: argparse.ArgumentParser, peers: Sequence[str], seconds: float, rounds: int
) -> None:
    """The options --peers and --seconds."""
    top.add_argument(
        "--peers",
        choices=peers,
        nargs="*",
        default=list(peers),
        help="against whom (default: all; one that is not installed is skipped)",
    )
    top.add_argument(
        "--seconds",
        type=positive,
        default=seconds,
        metavar="S",
        help=f"time to spend on a case, {rounds} rounds at least (default: %(default)s)",
    )


def parser() -> Parser:
    about, text = (__doc__ or "").split("\n", 1)
    top = Parser(
        "benchmark.py",
        description=about,
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument(
        "--case",
        type=case_names,
        nargs="+",
        metavar="NAME",
        help=f"cases to run: {', '.join([*CASES, *GROUPS])} (default: all)".replace("%", "%%"),
    )
    cores = len(os.sched_getaffinity(0))
    top.add_argument(
        "--threads",
        type=thread_count,
        nargs="+",
        default=[n for n in (1, 2) if n <= cores],
        metavar="N",
        help="numbers of threads (default: 1 2)",
    )
    add_measuring(top, PEERS, seconds=6.0, rounds=3)
    top.add_argument(
        "--quick",
        action="store_true",
        help="try everything in little time: few rounds, short loops and epochs",
    )
    top.add_argument(
        "--profile",
        action="store_true",
        help="also print where the time of each case goes: its stages and its operations",
    )
    top.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    top.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios as a PNG")
    top.add_argument(
        "--load", type=Path, metavar="FILE", help="measure nothing: tell what a --json file holds"
    )
    top.add_argument("--child", help=argparse.SUPPRESS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if options.child:
        return child(options.child)
    errors: list[str] = []
    if options.load:
        try:
            data = json.loads(options.load.read_bytes())
        except (OSError, ValueError) as error:
            top.error(f"--load: {error}")
    else:
        names = list(dict.fromkeys(name for given in options.case or [CASES] for name in given))
        results, errors = run_cases(options, names)
        data = report(results, options.quick)
    console = Console(highlight=False)
    console.width = max(
        console.width, 140
    )  # rather than leave out what a narrow one has no room for
    if data["results"]:
        console.print(table(data["results"]))
        machine, versions = data["machine"], data["versions"]
        said = ", ".join(f"{name} {version}" for name, version in versions.items())
        console.print(f"{machine['processor']}, {machine['simd']}; {said}; {data['date']}")
        for note in notes(data["results"]):
            console.print(note, markup=False, soft_wrap=True)
    for result in data["results"]:
        if "profile" in result:
            for title, made in profile_tables(result):
                console.print(f"\n{title}", made)
    try:
        if options.json:
            write_file(options.json, json.dumps(data, indent=1) + "\n")
        if options.chart:
            figures.save_figure(options.chart, chart(data))
    except (OSError, ValueError) as error:
        errors.append(str(error))
    for message in errors:
        print(f"{top.prog}: error: {message}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
