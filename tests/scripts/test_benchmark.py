"""scripts/benchmark.py: its contestants compute the same, and a run gives figures and a chart."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torchbp
from scripts import benchmark, benchmark_cases, benchmark_report
from scripts.benchmark_cases import CASES, GROUPS, JAX, OURS, TORCH, Case, Contestant

TWO_GATES = ["gate_add", "gate_relu"]
LIBRARIES = [TORCH, *([JAX] if importlib.util.find_spec("jax") else [])]
# A case of each kind; what is left out computes the same at a larger size, or needs a compiler.
KINDS = [
    "ce_8192x10",
    "tanh_64K",
    "linear_relu_f32",
    "linear_relu_bf16",
    "tiny_autograd",
    "tiny_step",
    "physics",
    "loop_40",
    "batches",
    "cifar_epoch",
    "trace",
    *GROUPS["gates"],
]


def printed(*flags: str) -> str:
    """What a run prints that ends without an error."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = benchmark.main(["--quick", "--threads", "1", "--peers", "torch", *flags])
    assert (code, complained.getvalue()) == (0, "")
    return said.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """Standard output, figures and chart of a quick run."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--json", str(folder / "times.json"), "--chart", str(folder / "times.png")]
    said = printed("--case", "ce_8192x10", *TWO_GATES, *files)
    return said, json.loads((folder / "times.json").read_text()), folder / "times.png"


def result(name: str, threads: int = 2, goals: Any = None, **ratios: float) -> dict[str, Any]:
    """A result in which we take 1 ms, and the floor is half of that."""
    rows = {peer: {"seconds": 1e-3 * ratio, "ratio": ratio} for peer, ratio in ratios.items()}
    return {
        "case": name,
        "about": f"what {name} is",
        "threads": threads,
        "contestants": {OURS: {"seconds": 1e-3, "ratio": 1.0}, **rows},
        "skipped": {},
        "goals": goals or {},
        "floor": 5e-4,
    }


def constant(value: float) -> Contestant:
    return Contestant(lambda mark: None, lambda: {"y": np.full(3, value)})


@pytest.mark.parametrize("name", KINDS)
def test_contestants_compute_the_same(name: str) -> None:
    case = CASES[name](name, True)
    outputs = {
        contestant: make().outputs()
        for contestant, make in case.contestants.items()
        if contestant == OURS or benchmark_cases.EXTRAS.get(contestant, contestant) in LIBRARIES
    }
    assert len(outputs) > 1
    for contestant, found in outputs.items():
        assert found.keys() <= outputs[OURS].keys()
        assert all(np.isfinite(values).all() and values.any() for values in found.values())
        benchmark.compare(case, contestant, found, outputs[OURS])


@pytest.mark.parametrize("flops", [1.4e9, 6e10])
def test_as_much_arithmetic(monkeypatch: pytest.MonkeyPatch, flops: float) -> None:
    # PyTorch's product, whose operations can be counted, is the faster one.
    ranks = iter((1.0, 2.0))
    monkeypatch.setattr(benchmark_cases, "fastest", lambda call, seconds: next(ranks))
    contestant = benchmark_cases.arithmetic_alone(flops)
    with FlopCounterMode(display=False) as counter:
        contestant.run(benchmark_cases.unmarked)
    assert counter.get_total_flops() == pytest.approx(flops, rel=2e-3)  # whole rows
    assert contestant.outputs() == {}


def test_groups_stand_for_their_cases() -> None:
    assert GROUPS["gates"] == [f"gate_{row}" for row in torchbp.ROWS]
    assert GROUPS["loop"] == ["loop_40", "loop_160"]


def test_a_contestant_that_computes_something_else_is_refused() -> None:
    case = Case("case", "", {OURS: lambda: constant(1.0), TORCH: lambda: constant(1.001)})
    with pytest.raises(benchmark.Disagreement, match=r"^y of torch is not that of torchbp"):
        benchmark.measure(case, [TORCH], 0.01, False, lambda text: None)
    case.contestants[TORCH] = lambda: constant(float("nan"))
    with pytest.raises(benchmark.Disagreement, match="relative error nan"):
        benchmark.measure(case, [TORCH], 0.01, False, lambda text: None)


def test_who_is_missing_is_skipped_with_the_reason() -> None:
    def missing() -> Contestant:
        raise ImportError("No module named 'jax'")

    case = Case("case", "", {OURS: lambda: constant(1.0), JAX: missing})
    found = benchmark.measure(case, [TORCH, JAX], 0.01, False, lambda text: None)
    assert found["skipped"] == {JAX: "No module named 'jax'"}
    assert found["contestants"].keys() == {OURS}
    case.contestants[OURS] = missing  # ours has no excuse
    with pytest.raises(ImportError, match="jax"):
        benchmark.measure(case, [TORCH], 0.01, False, lambda text: None)


def test_a_run(run: tuple[str, dict[str, Any], Path]) -> None:
    said, data, chart = run
    assert data["quick"] is True
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["simd"] == torchbp.cpu_level()
    assert [found["case"] for found in data["results"]] == ["ce_8192x10", *TWO_GATES]
    for found in data["results"]:
        assert found["threads"] == 1
        assert found["skipped"] == {}
        extras = {"empty Functions"} if found["case"] == "ce_8192x10" else set()
        assert found["contestants"].keys() == {OURS, TORCH, *extras}
        for row in found["contestants"].values():
            assert 0 < row["low"] <= row["seconds"] <= row["high"]
            assert row["ratio"] > 0
        assert found["contestants"][OURS]["ratio"] == 1
    first = data["results"][0]
    assert first["goals"] == {TORCH: 30}
    assert first["floor"] > 0
    assert list(first["rates"]) == ["bytes at 327,680"]
    assert "\x1b" not in said  # no bar, no colour
    assert said.count("ce_8192x10") == 1
    assert said.count("gates (") == 1
    assert re.search(r"gate by gate \(1\): add \d.*x, relu \d.*x\n", said)
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_load_tells_what_a_file_holds(
    run: tuple[str, dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "times.json").write_text(json.dumps(run[1]))
    assert benchmark.main(["--load", str(tmp_path / "times.json")]) == 0
    assert capsys.readouterr().out == run[0]


def test_profile_tells_stages_and_operations() -> None:
    said = printed("--profile", "--case", "tanh_64K")
    assert all(f"│ {stage} " in said for stage in ("forward", "backward", "all"))
    assert "aten::tanh_backward" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--case", "relu"], r"argument --case: 'relu' is not a case; there are ce_8192x10, "),
        (["--threads", "0"], r"argument --threads: '0' is not a number of threads from 1 to \d+"),
        (["--threads", "4096"], "argument --threads: '4096' is not a number of threads"),
        (["--seconds", "nan"], "argument --seconds: 'nan' is not a number above 0"),
        (["--peers", "numpy"], "argument --peers: invalid choice: 'numpy'"),
        (["--load", "nowhere.json"], "--load: .*No such file or directory"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(flags)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(f"benchmark.py: error: {message}", said)


def test_goals_hold_for_what_the_table_shows() -> None:
    goals = {TORCH: 2.0, JAX: 5.0, "seconds": 2e-3, "floor": 0.8}
    found = benchmark_report.reached(result("case", goals=goals, torch=1.996))
    assert found == {
        TORCH: ("torch 2.00x", True),  # 1.996 is shown as 2.00
        "seconds": ("<= 2.00 ms", True),
        "floor": ("floor >= 80%", False),
    }
    assert benchmark_report.reached(result("case", goals=goals, torch=1.994))[TORCH][1] is False


def test_the_slowest_gate_stands_for_all() -> None:
    results = [
        result("ce_8192x10", torch=30.0),
        result("gate_relu", torch=0.7),
        result("gate_tanh", torch=0.6),
        result("gate_tanh", threads=1, torch=0.9),
    ]
    rows = benchmark_report.condensed(results)
    assert [(row["case"], row["threads"]) for row in rows] == [
        ("ce_8192x10", 2),
        ("gates (tanh)", 2),
        ("gates (tanh)", 1),
    ]


def test_chart_shows_the_ratios_at_the_most_threads() -> None:
    data = {
        "machine": {"processor": "a processor"},
        "results": [
            result("ce_8192x10", torch=30.0, jax=4.0),
            result("ce_8192x10", threads=1, torch=17.0),
            result("tanh_64K", torch=0.5),
        ],
    }
    (axes,) = benchmark_report.chart(data).axes
    assert {"30.0x", "4.00x", "0.50x"} == {text.get_text() for text in axes.texts}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ce_8192x10", "tanh_64K"]
    assert axes.get_xscale() == "log"
    with pytest.raises(ValueError, match="chart: there are no ratios"):
        benchmark_report.chart({**data, "results": [result("tanh_64K")]})
