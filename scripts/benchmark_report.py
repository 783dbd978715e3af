"""What scripts/benchmark.py measured, told: the table, its notes, the profiles, the chart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from scripts.benchmark_cases import COMPILE, EXTRAS, GROUPS, JAX, OURS, TORCH

PEERS = (TORCH, COMPILE, JAX)
GOAL_THREADS = 2
Result = dict[str, Any]


def duration(seconds: float) -> str:
    """A time with three digits.

    Example:
        >>> duration(2.2e-05), duration(0.3301), duration(10.44)
        ('22.0 us', '330 ms', '10.4 s')
    """
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{three_digits(seconds * scale)} {unit}"
    return f"{three_digits(seconds)} s"


def three_digits(value: float) -> str:
    """
    Example:
        >>> [three_digits(x) for x in (0.0123, 1.0, 15.26, 99.96, 1234.5)]
        ['0.01', '1.00', '15.3', '100', '1234']
    """
    places = next((n for n, limit in ((2, 9.995), (1, 99.95)) if abs(value) < limit), 0)
    return f"{value:.{places}f}"


def times(value: float) -> str:
    return f"{three_digits(value)}x"


def reached(result: Result) -> dict[str, tuple[str, bool]]:
    """Goal -> how it is said, and whether it is reached; those of peers that ran."""
    found: dict[str, tuple[str, bool]] = {}
    ran = result["contestants"]
    ours = ran[OURS]["seconds"]
    for goal, value in result["goals"].items():
        if goal == "seconds":
            found[goal] = f"<= {duration(value)}", ours <= value
        elif goal == "floor":
            found[goal] = f"floor >= {value:.0%}", result["floor"] / ours >= value
        elif goal == "memory":
            if TORCH in ran and result["memory"][TORCH]:
                had = result["memory"][TORCH] / max(result["memory"][OURS], 1)
                found[goal] = f"memory {times(value)} ({times(had)})", had >= value
        elif goal in ran:
            # As exact as the table shows it: nobody could see more.
            shown = float(three_digits(ran[goal]["ratio"]))
            found[goal] = f"{goal} {times(value)}", shown >= float(three_digits(value))
    return found


def condensed(results: Sequence[Result]) -> list[Result]:
    """The results with the gates as one, the gate with the lowest ratio to torch, named."""
    rows: list[Result] = []
    worst: dict[int, Result] = {}
    for result in results:
        if result["case"] not in GROUPS["gates"]:
            rows.append(result)
            continue
        if TORCH not in result["contestants"]:
            continue
        found = worst.get(result["threads"])
        ratio = result["contestants"][TORCH]["ratio"]
        if found is None or ratio < found["contestants"][TORCH]["ratio"]:
            worst[result["threads"]] = result
    for result in worst.values():
        name = result["case"].removeprefix("gate_")
        rows.append(
            result
            | {"case": f"gates ({name})", "about": f"the slowest of the gates: {result['about']}"}
        )
    return rows


def table(results: Sequence[Result]) -> Table:
    """Times, behind them ratios, and goals reached or not."""
    made = Table(pad_edge=False, header_style="bold")
    for head in ("case", "threads", OURS, *PEERS, f"goal at {GOAL_THREADS}", "floor", "share"):
        made.add_column(head, justify="left" if head == "case" or "goal" in head else "right")
    for result in condensed(results):
        ran, skipped = result["contestants"], result["skipped"]
        goals = reached(result) if result["threads"] == GOAL_THREADS else {}

        def cell(name: str, ran: Any = ran, skipped: Any = skipped, goals: Any = goals) -> Text:
            if name not in ran:
                return Text("skipped" if name in skipped else "", style="dim")
            style = "" if name not in goals else "green" if goals[name][1] else "red"
            time = duration(ran[name]["seconds"])
            return Text.assemble(f"{time} ", (times(ran[name]["ratio"]).rjust(6), style))

        goal = Text("\n").join(
            Text(f"✓ {text}", "green") if fine else Text(f"✗ {text}", "red")
            for text, fine in goals.values()
        )
        ours, floor = ran[OURS]["seconds"], result["floor"]
        made.add_row(
            result["case"],
            str(result["threads"]),
            Text(duration(ours), style="bold"),
            *map(cell, PEERS),
            goal,
            duration(floor) if floor else "",
            f"{floor / ours:.0%}" if floor else "",
        )
        for name, library in EXTRAS.items():
            if name in ran:
                made.add_row(
                    f"  {name}", "", "", *(cell(name) if p == library else "" for p in PEERS)
                )
    return made


def notes(results: Sequence[Result]) -> Iterator[str]:
    """What the table has no room for: each gate, memory, what was skipped and why."""
    gates: dict[int, list[str]] = defaultdict(list)
    reasons: dict[str, list[str]] = defaultdict(list)
    for result in results:
        where = f"{result['case']} ({result['threads']})"
        if result["case"] in GROUPS["gates"] and TORCH in result["contestants"]:
            name, ran = result["case"].removeprefix("gate_"), result["contestants"][TORCH]
            gates[result["threads"]].append(f"{name} {times(ran['ratio'])}")
        for name, why in result["skipped"].items():
            reasons[f"{name} skipped: {why}"].append(where)
        if result.get("memory"):
            said = [
                f"{name} {'unknown' if value is None else f'{value / 2**20:,.0f} MiB'}"
                for name, value in result["memory"].items()
            ]
            yield f"{where}, memory that a call adds at its peak: {', '.join(said)}"
    for threads, said in gates.items():
        yield f"torch's time over ours, gate by gate ({threads}): {', '.join(said)}"
    if sentence := disturbance(results):
        yield sentence
    for why, where_all in reasons.items():
        yield f"{why} [{', '.join(where_all)}]"


def disturbance(results: Sequence[Result]) -> str:
    """A sentence where other processes were in the way, which hurts some more than others."""
    most = max((result.get("others", 0) for result in results), default=0)
    return f"Other processes took up to {most:.0%} of the machine meanwhile." if most > 0.05 else ""


def profile_tables(result: Result) -> Iterator[tuple[str, Table]]:
    """Where the time goes: the stages side by side, then the operations of torchbp and torch; each
    with its title."""
    profiles = result["profile"]
    where = f"{result['case']} ({result['threads']})"
    stages = Table()
    stages.add_column("stage")
    for name in profiles:
        stages.add_column(name, justify="right")
    for stage in dict.fromkeys(stage for found in profiles.values() for stage in found["stages"]):
        held = [found["stages"].get(stage) for found in profiles.values()]
        stages.add_row(stage, *("" if s is None else duration(s) for s in held))
    sums = [sum(found["stages"].values()) for found in profiles.values()]
    stages.add_section()
    stages.add_row("all", *map(duration, sums))
    yield f"{where}: stages of a call", stages
    for name in [name for name in (OURS, TORCH) if name in profiles]:
        operations = Table()
        for head in ("operation", "calls", "own time"):
            operations.add_column(head, justify="left" if head == "operation" else "right")
        for operation, calls, seconds in profiles[name]["operations"]:
            operations.add_row(operation, f"{calls:g}", duration(seconds))
        yield f"{where}: operations of {name}, with what profiling itself costs", operations


COLOURS = {TORCH: "#c2410c", COMPILE: "#d9a441", JAX: "#2f6f9f"}


def chart(data: dict[str, Any]) -> Figure:
    """How many times our time the others take, at the most threads measured: bars on a log axis,
    from 1, as fast as we are.

    Raises:
        ValueError: there is nothing to draw.
    """
    # A trace does more than forward and backward alone, and runs no race with them.
    races = (r for r in condensed(data["results"]) if r["case"] != "trace")
    results = [r for r in races if len(r["contestants"]) > 1]
    if not results:
        raise ValueError("chart: there are no ratios in the results")
    threads = max(result["threads"] for result in results)
    results = [result for result in results if result["threads"] == threads]
    bars = [
        [(peer, r["contestants"][peer]["ratio"]) for peer in PEERS if peer in r["contestants"]]
        for r in results
    ]
    lines = sum(len(group) for group in bars) + 0.9 * len(bars)
    figure = Figure(figsize=(8, 1 + 0.125 * lines), layout="constrained", facecolor="white")
    axes = figure.subplots()
    ratios = [ratio for group in bars for _, ratio in group]
    low, high = min(0.8, 0.8 * min(ratios)), 1.6 * max(ratios)
    height, labelled, y = 0.92, [], 0.0
    for group in bars:
        labelled.append(y + (len(group) - 1) / 2)
        for peer, ratio in group:
            axes.barh(y, ratio - 1, height, left=1, color=COLOURS[peer], linewidth=0)
            axes.text(
                1.03 * max(ratio, 1),
                y + 0.04,
                times(ratio),
                va="center",
                fontsize=7,
                color="#1f2328",
            )
            y += 1
        y += 0.9
    axes.set_yticks(labelled, [result["case"] for result in results], fontsize=9)
    axes.set(xscale="log", xlim=(low, high), ylim=(y - 0.9, -1))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=8.5)
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="#1f2328", linewidth=1)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, colors="#1f2328")
    here = [peer for peer in PEERS if any(peer == name for group in bars for name, _ in group)]
    for peer in here:
        axes.barh([0], [0], color=COLOURS[peer], label=peer)
    axes.legend(loc="lower right", fontsize=9, frameon=True, edgecolor="white", framealpha=1)
    machine = data["machine"]
    axes.set_title(
        f"Time over that of torchbp: {threads} threads, {machine['processor']}, log scale",
        fontsize=10,
        color="#1f2328",
    )
    return figure
