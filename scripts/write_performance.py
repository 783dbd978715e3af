"""Writes docs/performance.md: every time in docs/benchmark.json, and for each goal that is not
reached the profile in docs/profile.json and what stands in the way; then the same of other
machines, in docs/benchmark-NAME.json and docs/profile-NAME.json.

    python scripts/benchmark.py --json docs/benchmark.json --chart docs/benchmark.png
    python scripts/benchmark.py --threads 2 --profile --case CASES --json docs/profile.json
    python scripts/benchmark.py --threads 2 --json docs/benchmark-avx2.json  # on a machine of AVX2
    python scripts/write_performance.py            # rewrite docs/performance.md
    python scripts/write_performance.py --check    # exit with 1 if that would change it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there

from scripts.benchmark_cases import BYTES, EMPTY, OURS
from scripts.benchmark_report import GOAL_THREADS, PEERS, condensed, duration, reached, times
from scripts.write_readme_tables import code, table, time_cells, write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"

Result = dict[str, Any]

#: Case -> what stands in the way of its goal. In braces, of the same run: `ours`, `torch`, `jax`,
#: `empty` (Functions that compute nothing), `bytes` (shuffled images copied as they are), `floor`,
#: how many times as long as the floor PyTorch takes, `at_floor`, as empty Functions, `possible`,
#: and as both, `reachable`; and JAX as empty Functions, `possible_jax`, and as twice the floor,
#: which one of two threads takes, `jax_alone`.
REASONS = {
    "ce_8192x10": """Functions that compute nothing take {empty} of our {ours}, so that about
        {possible} would be the most that kernels without cost could reach, and {reachable} kernels
        that take no longer than to copy their bytes ({floor}). The kernel itself is one pass over
        rows in SIMD lanes. Of its time on AVX-512 a quarter is exponentials and two fifths are the
        way to lanes and back: not so much the shuffles as that a row of ten numbers is written in
        three stores of 16 bytes, of which a cycle takes one. Fewer or more rows in a block, and
        fetching its lines ahead, gained nothing. Rows that stay as they lie, to whose numbers
        shuffles bring what belongs to a row, take as long on AVX2: what they save on the way back
        they spend on sums. Rows read and written in whole vectors, with blends in place of most
        shuffles, take a twentieth less on AVX-512, and a quarter more on AVX2. Nodes in C++ in
        place of Functions, of which `tiny_autograd` tells, would take a quarter off the call.""",
    "ce_4096x1000": """Logits and gradient are 33 MB, more than the last cache beside each other, so
        that a third of the traffic is lines fetched to be overwritten; the floor's copy fits. The
        ratio follows PyTorch's time, which varies more from run to run than ours.""",
    "loop_160": """A part of a step takes some microseconds, and to pass it on takes several times
        as long between cores that share no cache as between cores that do. The host of this virtual
        machine moves its cores from one state to the other and back within a minute: in the second
        a team takes twice as long as in the first, longer than one thread, and steps run alone
        (`on_team_in_rounds` tries which is faster).""",
    "tanh_64K": """Its bytes take {floor} of our {ours}. The rest is what two calls cost, as for 64
        numbers (`gates`), and arithmetic: some thirty operations and a division for each vector
        keep tanh within 2 ulp, and 1 - y^2 accurate where y is nearly 1. On AVX2 a single division,
        bounds found on bits and two loops in place of one, whose chain of operations was longer
        than what a core looks ahead, took a third off the kernel.""",
    "relu_16M": """Memory is kept from call to call and written past the caches, so that what is
        left is the machine's bandwidth and the engine; PyTorch's time, mostly that of fresh memory,
        varies by a third from run to run.""",
    "sigmoid_16M": """As `relu_16M`: the exponentials hide behind the memory.""",
    "linear_relu_f32": """The three products take the floor of {floor} at the rate of the fastest
        large product, PyTorch's or ours, of our {ours}: at that rate alone, with bias, activation
        and sums for nothing, the ratio would be {at_floor}. An eighth of the time was spent on
        copies of blocks to where the tiles find them. Fetching these ahead took off a third of
        that, a line at each step of a tile; all at once before a tile it made no difference, nor
        did wider blocks, huge pages, and on AVX2 panels that lie in other cache sets, smaller and
        larger blocks, or copies that are kept for all blocks of columns. On the machine with AVX2 a
        product in one thread reaches 80 % of what multiply-adds alone do while its core is its own,
        and 67 % while it is not (`loop_40`). Innermost loops that lie in as few cache lines as they
        can, two steps of them at a time, and copies by columns, whose addresses are short, took off
        a fiftieth in the first state, and a tenth in the second.""",
    "wide_autograd": """The three products of each layer take the floor of {floor}, of our {ours};
        at that rate alone the ratio would be {at_floor}. Activations happen in their tiles.""",
    "wide_step": """The three products of each layer take the floor of {floor}, of our {ours}; the
        update, activations and cross-entropy happen in their tiles.""",
    "cifar_epoch": """The floor, {floor} of our {ours}, is had from the best rate of a large
        product, which on a shared machine no epoch sees for seconds on end; as much arithmetic in
        large products, in the same rounds, is `the arithmetic alone`. The rest is memory: weights
        are read twice, momenta once, and both are written, 31 MB a step. What that takes depends
        on where the host of this virtual machine has its two cores, which it moves every few
        seconds: where they share no cache, a message from one to the other takes four times as
        long, and an epoch longer, as half of the activations and of their gradients is written by
        one thread and read by the other. So was each batch, which cost 3 to 6 % on AVX2, until each
        thread made it for itself; and so were the weights, and an epoch took half as long again,
        until a layer and its gradient were both divided by rows of the weights. Huge pages behind
        weights and momenta gained no more than 2 %. Fetched ahead a line at each step of a tile,
        and not all before it, they took a tenth off the first layer, and a sixth off its gradient
        and update; on AVX2, half as fast, by a tile whose strides are known, another fourteenth off
        an epoch.""",
    "linear_relu_bf16": """All but a few per cent of the time is in the three matrix products: the
        floor is {floor} of our {ours}, and PyTorch takes {at_floor} as long as it. On Zen 4
        PyTorch's reach 91 to 95 % of what the instruction for pairs of bfloat16 gives, and ours, in
        whose tiles the activation happens, about as much: a tenth less than PyTorch's time would
        leave nothing for copies of blocks. To fetch these ahead gained a fiftieth. Where a machine
        has no such instruction, products are those of float32, and cannot take half as long as
        these.""",
    "tiny_autograd": """Functions that compute nothing, six gradients handed to `.grad` and our
        optimizer take {empty} of our {ours}; with kernels without cost that would be {possible},
        and {possible_jax} over JAX. Of backward's instructions besides the products, a fifth sets a
        thread's state for each of the engine's eight nodes and back, another goes into the call of
        one operation with lists of tensors through PyTorch's dispatcher, and the rest into the
        engine's start and end, its six accumulations, and Python around two Functions. Nodes in C++
        in place of these, tried on AVX2, take a quarter off the step, and had they computed nothing
        the ratio would have been 3.6, and 1 over JAX. They were given up: a node's type belongs to
        PyTorch's unstable interface, which one binary for several versions cannot use, and the
        Function that a student reads would no longer be what runs. `compile_step` does the same
        step without any of them.""",
    "tiny_step": """The products alone take {floor} on all threads, but these are too short to be
        shared: on one thread about twice that. The rest of our {ours} are a call
        through PyTorch's dispatcher with a look at whether model and optimizer are unchanged, the
        update inside the products' tiles, cross-entropy and the transposition of operands of some
        thousand numbers. To share a single step between threads would cost what waking one takes.
        The ratio to JAX follows JAX's time, which varies by a third from run to run; and on the
        machine with AVX2 it follows the host, which for seconds on end runs something else on the
        other half of our core (`loop_40`). That slows down all that computes, by a third to a half,
        and not what threads of JAX wait for each other. On AVX2 activations and updates of all
        columns of a tile's rows in one run, tiles found without divisions and hyperparameters that
        are handed over when they change took a seventh off; on AVX-512, fewer arguments and cheaper
        questions whether all is unchanged, a twentieth.""",
    "loop_40": """The products alone take {floor} on all threads, but these are too short to be
        shared: on one of two threads they would take twice that, and JAX {jax_alone} as long. The
        rest is what a tile of a product that takes a microsecond costs besides: its ends,
        transposed operands, activations, updates. Operands read where they lie, tiles in the memory
        of the result, half a vector for the last 8 of 40 columns and an update in one run, as rows
        of 40 lie across cache lines, took a fifth off; tiles found without divisions, and functions
        and updates of a tile's rows in one run, an eighth, on AVX2. There the host runs something
        else on the other half of our core for most of the time: multiply-adds, two a cycle, are as
        fast as alone, but of all instructions a cycle takes three and no more, and a step has three
        for each multiply-add. Fewer of them around a tile, and loops that lie in as few cache lines
        as they can, took an eighth off in this state, and a twentieth in the other. Half of the
        examples on each of two threads through all layers, and then half of the weights, meets but
        twice a step and copies no operand, and still gained no more than 8 %: each fetches 31 KB of
        activations, gradients and weights that the other has written a microsecond ago. It was
        given up, as that is not worth a second way to train.""",
    "batches": """The peer mirrors; we mirror and move. Against the same work the ratio is that of
        `torch, shift too`. Images of 3 KiB lie anywhere in 150 MB: to copy their bytes as they are
        to one place (`index_select`), a quarter of what we write and no arithmetic, takes {bytes}
        of our {ours}. Rows in whole vectors that are written once, and fetching two or three images
        ahead or a row at a time, made no difference. Fetching the next image to L2 and not to L1
        gained a fifth, one call of two numbers for a batch and its targets another, and huge pages
        behind the images, which arrays of numpy have, a tenth.""",
}


class Machine(NamedTuple):
    """What was measured on one."""

    data: dict[str, Any]
    profiles: dict[str, Any]


def page(machine: Machine, *others: Machine) -> str:
    """The text of docs/performance.md."""
    parts = [
        "# Performance",
        "<!-- generated by scripts/write_performance.py from docs/benchmark*.json and "
        "docs/profile*.json -->",
        f"{where(machine.data)}. `make bench` measures it anew; how is told by "
        "`python scripts/benchmark.py --help`. In bold: how many times as long as torchbp it "
        "takes, the median over rounds in which all took turns. The floor is the bytes over the "
        "rate of PyTorch's copy, which large results of ours outrun past the caches, or the "
        "arithmetic over that of a large matrix product.",
        *sections(machine, "##"),
    ]
    for other in others:
        of = other.data["machine"]["simd"]
        parts += [f"## Another machine: {of}", f"{where(other.data)}.", *sections(other, "###", of)]
    return "\n\n".join(parts) + "\n"


def sections(machine: Machine, heading: str, of: str = "") -> Iterator[str]:
    """Times, and the goals that they miss, under headings of a level. of: behind each heading, so
    that no two of a page are alike."""
    behind = f", {of}" if of else ""
    for title, times_of in tables(machine.data):
        yield f"{heading} {title}{behind}"
        yield times_of
    yield f"{heading} Goals that are not reached{behind}"
    yield f"Stages and operations as profiled on {machine.profiles['date']}."
    yield from missed(machine, f"{heading}#", behind)


def where(data: dict[str, Any]) -> str:
    """The machine, the versions and the day of some times."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return (
        f"{machine['processor']}, {machine['simd']}, {machine['cores']} cores; {versions}; "
        f"{data['date']}"
    )


def tables(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """For each number of threads a title and the times."""
    for threads in sorted({result["threads"] for result in data["results"]}, reverse=True):
        results = [result for result in data["results"] if result["threads"] == threads]
        head = ["case", OURS, *PEERS, "floor of our time"]
        rows = [time_cells(result) for result in condensed(results)]
        yield f"{threads} thread{'s' if threads > 1 else ''}", table(head, rows)


def missed(machine: Machine, heading: str, behind: str) -> Iterator[str]:
    found = {result["case"]: result for result in machine.profiles["results"]}
    for result in condensed(machine.data["results"]):
        if result["threads"] != GOAL_THREADS:
            continue
        fails = [said for said, fine in reached(result).values() if not fine]
        if not fails:
            continue
        ran = result["contestants"]
        name = result["case"]
        yield f"{heading} {code(name)}{behind}"
        wanted = ", ".join(fails)
        had = ", ".join(
            f"{peer} {times(ran[peer]['ratio'])}" for peer in result["goals"] if peer in ran
        )
        had = had or duration(ran[OURS]["seconds"])
        yield f"{result['about']}. Wanted: {wanted}; measured: {had}."
        profiled = found.get(name)
        if name in REASONS and profiled:
            yield " ".join(REASONS[name].split()).format(**numbers(profiled))
        if profiled:
            yield from profile(profiled)


def numbers(result: Result) -> dict[str, str]:
    """What the reasons speak of."""
    ran = result["contestants"]
    said = {name: duration(found["seconds"]) for name, found in ran.items()}
    said["ours"] = said[OURS]
    if result["floor"]:
        said["floor"] = duration(result["floor"])
        if "torch" in ran:
            said["at_floor"] = times(ran["torch"]["seconds"] / result["floor"])
        if "jax" in ran:
            said["jax_alone"] = times(ran["jax"]["seconds"] / (2 * result["floor"]))
    if BYTES in ran:
        said["bytes"] = said[BYTES]
    if EMPTY in ran:
        said["empty"] = said[EMPTY]
        said["possible"] = times(ran["torch"]["seconds"] / ran[EMPTY]["seconds"])
        if "jax" in ran:
            said["possible_jax"] = times(ran["jax"]["seconds"] / ran[EMPTY]["seconds"])
        if result["floor"]:
            least = ran[EMPTY]["seconds"] + result["floor"]
            said["reachable"] = times(ran["torch"]["seconds"] / least)
    return said


def profile(result: Result) -> Iterator[str]:
    """Stages of a call side by side, and our operations by their own time."""
    profiles = result["profile"]
    staged = [one["stages"] for one in profiles.values()]
    stages = dict.fromkeys(stage for one in staged for stage in one)
    rows = [
        [
            stage,
            *(
                duration(p["stages"][stage]) if stage in p["stages"] else ""
                for p in profiles.values()
            ),
        ]
        for stage in stages
    ]
    yield table(["stage", *profiles], rows)
    operations = [
        [code(name), f"{calls:g}", duration(seconds)]
        for name, calls, seconds in profiles[OURS]["operations"]
    ]
    yield table(["our operation, as profiled", "calls", "own time"], operations)


def read() -> list[Machine]:
    """What `page` takes, from docs."""
    docs = ROOT / "docs"
    names = [
        "",
        *sorted(path.stem.removeprefix("benchmark") for path in docs.glob("benchmark-*.json")),
    ]

    def content(kind: str, name: str) -> dict[str, Any]:
        return json.loads((docs / f"{kind}{name}.json").read_bytes())  # type: ignore[no-any-return]

    return [Machine(content("benchmark", name), content("profile", name)) for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 on drift")
    options = parser.parse_args(arguments)
    wanted = page(*read())
    return write_or_check(PAGE, wanted, Path(__file__).name, options.check)


if __name__ == "__main__":
    raise SystemExit(main())
