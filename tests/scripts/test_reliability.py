"""scripts/reliability.py: every claim holds in a sample; what is done is kept, and done again only
if what it depends on has changed; what is wrong is reported.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import mmap
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import torchbp
import torchbp.functional as F
from scripts import (
    reliability,
    reliability_accuracy,
    reliability_determinism,
    reliability_frame,
    reliability_fuzz,
    reliability_large,
    reliability_leaks,
    reliability_malformed,
    reliability_proofs,
    reliability_specials,
)
from scripts.reliability_accuracy import Accuracy
from scripts.reliability_bounds import Bounded, exact, where
from scripts.reliability_determinism import Determinism
from scripts.reliability_frame import ROOT, Figure, Piece, Result, State, key_of, run
from scripts.reliability_fuzz import Fuzz
from scripts.reliability_large import Large
from scripts.reliability_leaks import Leaks
from scripts.reliability_malformed import Malformed
from scripts.reliability_proofs import Proofs
from scripts.reliability_specials import Specials
from tests import ops, proofs
from tests.compare import ulps_off
from tests.ops import DTYPES, OPS, RAW_OPS, Case, Input
from tests.scripts.reliability_fixture import Dying, Hindered, Squares, Wrong
from torchbp.functions.table import Row

#: What does not hold yet: figure -> how its lines begin.
KNOWN: dict[str, tuple[str, ...]] = {}

# ---- every figure --------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", reliability.FIGURES, ids=lambda figure: figure.name)
def test_a_sample_of_the_figure_holds(figure: Figure, tmp_path: Path) -> None:
    if figure.obstacle():
        pytest.skip(str(figure.obstacle()))
    state = State(tmp_path)
    pieces = figure.pieces(figure.sample)
    assert run([(figure, piece) for piece in pieces], state) == []
    found, measured, _ = reliability.chosen(figure, state, 0.0)
    assert found == pieces
    assert len(measured) == len(pieces)
    known = KNOWN.get(figure.name, ())
    wrong = [line for line in figure.failures(measured) if not line.startswith(known)]
    assert wrong == []
    assert figure.title in reliability.section(figure, state, 0.0)


def test_the_page_has_every_figure() -> None:
    text = reliability.PAGE.read_text(encoding="utf-8")
    for figure in reliability.FIGURES:
        assert f"## {figure.title}\n\n{figure.claim}\n" in text, "run scripts/reliability.py"
        assert f"`python scripts/reliability.py --only {figure.name}`: " in text


# ---- the frame -----------------------------------------------------------------------------------


def squares(state: State, figure: Figure) -> list[int]:
    return sorted(entry["result"]["square"] for entry in state.lines(figure).values())


def main(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, figure: Figure) -> int:
    monkeypatch.setattr(reliability, "FIGURES", (figure,))
    where = ["--state", str(folder), "--page", str(folder / "page.md")]
    return reliability.main([*where, *arguments])


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    calls: list[Piece] = []
    real = reliability_frame.Worker.measure

    def measure(self: Any, figure: Figure, piece: Piece) -> dict[str, Any]:
        calls.append(piece)
        return real(self, figure, piece)

    monkeypatch.setattr(reliability_frame.Worker, "measure", measure)
    return calls


def test_what_is_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = count_calls(monkeypatch)
    figure = Squares()
    state = State(tmp_path)
    assert main(monkeypatch, tmp_path, "--sample", "0.5", figure=figure) == 0
    assert squares(state, figure) == [0, 1, 4, 9]
    assert main(monkeypatch, tmp_path, "--jobs", "2", figure=figure) == 0
    assert squares(state, figure) == [0, 1, 4, 9, 16, 25, 36]
    assert sorted(piece["number"] for piece in calls) == [0, 1, 2, 3, 4, 5, 6]
    text = (tmp_path / "page.md").read_text()
    assert "complete, 14 numbers" in text
    assert "0, 1, 4, 9, 16, 25, 36" in text

    # The last line cut off, as by a loss of power: done again, and readable after it.
    path = state.path(figure)
    path.write_bytes(path.read_bytes()[:-20])
    assert main(monkeypatch, tmp_path, figure=figure) == 0
    assert len(calls) == 8
    assert len(state.lines(figure)) == 7


def test_levels(tmp_path: Path) -> None:
    """Each piece runs at the level that it names."""
    figure, state = Squares(), State(tmp_path)
    assert run([(figure, piece) for piece in figure.pieces()], state) == []
    for line in state.lines(figure).values():
        level = line["piece"]["level"]
        assert line["result"]["level"] == level or level is None


def test_a_new_build_starts_afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure, state = Squares(), State(tmp_path)
    piece = figure.pieces()[0]
    state.add(figure, piece, {"square": 0}, 0.1)
    assert list(state.lines(figure)) == [key_of(piece)]
    binary = tmp_path / "another.so"
    binary.write_bytes(b"another build")
    reliability_frame._checksum_of_extension.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torchbp._C, "__file__", str(binary))
        assert state.lines(figure) == {}
    reliability_frame._checksum_of_extension.cache_clear()
    assert len(state.lines(figure)) == 1
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert state.lines(figure) == {}
    monkeypatch.undo()
    monkeypatch.setattr(Squares, "sources", ("tests/machine.py",))
    assert state.lines(figure) == {}


def test_the_page_says_what_was_sampled_and_what_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, tmp_path, "--sample", figure=Wrong()) == 0
    text = (tmp_path / "page.md").read_text()
    assert "sampled, 4 of 20 numbers" in text
    assert "Holds in all of them." in text
    assert "`python scripts/reliability.py --only wrong`" in text
    assert main(monkeypatch, tmp_path, figure=Wrong()) == 1
    assert "wrong: a square is 49" in capsys.readouterr().err
    text = (tmp_path / "page.md").read_text()
    assert "complete, 20 numbers" in text
    assert "**Does not hold in 1 points:**\n\n- a square is 49" in text


def test_only_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, tmp_path, "--only", "squares:3", figure=Squares()) == 0
    assert capsys.readouterr().out == "## Squares of numbers\n\n9\n\n"
    assert not (tmp_path / "page.md").exists()
    with pytest.raises(SystemExit):
        main(monkeypatch, tmp_path, "--only", "squares:11", figure=Squares())
    assert "squares has no piece with 11" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(monkeypatch, tmp_path, "--only", "cubes", figure=Squares())
    assert "wants one of squares, got 'cubes'" in capsys.readouterr().err


def test_a_figure_that_cannot_be_measured_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(monkeypatch, tmp_path, figure=Hindered()) == 0
    assert "not run: it needs a larger machine." in (tmp_path / "page.md").read_text()


def test_a_process_that_dies_is_reported_and_its_piece_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Dying, "cured", tmp_path / "cured")
    figure, state = Dying(), State(tmp_path)
    assert main(monkeypatch, tmp_path, figure=figure) == 1
    errors = capsys.readouterr().err
    assert "number=4" in errors
    assert "ValueError: four" in errors
    assert "the process died (signal 11)" in errors
    assert squares(state, figure) == [0, 1, 4, 9, 36]
    assert "sampled, 10 of 14 numbers" in (tmp_path / "page.md").read_text()
    figure.cured.touch()
    assert main(monkeypatch, tmp_path, figure=figure) == 0
    assert squares(state, figure) == [0, 1, 4, 9, 16, 25, 36]


def test_ctrl_c_leaves_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/reliability.py", "--only", "accuracy:exp:avx2:float32"]
    command += ["accuracy:exp:baseline:bfloat16", "--state", str(tmp_path), "--jobs", "1"]
    command[3], command[4] = command[4], command[3]  # the short one first
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has what it runs in the background ignore Ctrl-C, these tests for example.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state, figure = State(tmp_path), Accuracy()

    def interrupt() -> None:
        while not state.lines(figure) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)

    waiting = threading.Thread(target=interrupt)
    waiting.start()
    _, errors = process.communicate(timeout=120)
    waiting.join()
    assert process.returncode == 130, errors
    assert "run again to go on" in errors
    (line,) = list(state.lines(figure).values())[:1]
    assert line["piece"]["dtype"] == "bfloat16"


# ---- accuracy ------------------------------------------------------------------------------------


def a_piece(gate: str, dtype: str = "float32") -> Piece:
    about: Piece = {"gate": gate, "dtype": dtype, "of": "torchbp", "level": None}
    if dtype == "float32":
        return {**about, "sample": 1e-6}
    return {**about, "begin": 0, "end": 2**16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "gradient"])
def test_an_error_of_a_few_ulps_is_reported(
    monkeypatch: pytest.MonkeyPatch, direction: str, dtype: str
) -> None:
    """One result of many, 3 ulps (5 for a gradient) off."""
    figure, piece = Accuracy(), a_piece("exp", dtype)
    assert figure.failures([(piece, figure.measure(piece))]) == []
    real = reliability_accuracy.ours

    def off(row: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, dx = real(row, x, dy)
        which, ulps = (y, 3) if direction == "forward" else (dx, 5)
        of_one = (x > 1) & (x < 1.02)
        integers = which.view(torch.int32 if dtype == "float32" else torch.int16)
        integers[of_one.nonzero()[:1]] += ulps
        return y, dx

    monkeypatch.setattr(reliability_accuracy, "ours", off)
    result = figure.measure(piece)
    assert 1 < result[direction]["x"] < 1.02
    lines = figure.failures([(piece, result)])
    assert any(f"exp in {dtype}, None, {direction}: " in line for line in lines)
    assert "**" in "".join(figure.tables([({**piece, "level": "avx2"}, result)]))


def test_a_half_result_rounded_the_wrong_way_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off instead of rounded: less than an ulp off, and wrong."""
    real = reliability_accuracy.ours

    def cut(row: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float32:
            return real(row, x, dy)
        y, _ = real(row, x.float(), dy.float())
        _, dx = real(row, x, dy)
        return (y.view(torch.int32) & -(2**16)).view(torch.float32).to(x.dtype), dx

    monkeypatch.setattr(reliability_accuracy, "ours", cut)
    figure, piece = Accuracy(), a_piece("exp", "bfloat16")
    lines = figure.failures([(piece, figure.measure(piece))])
    assert any("results are not the float32 result rounded to nearest" in line for line in lines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errors_in_ulps_are_those_of_the_slower_way(dtype: torch.dtype) -> None:
    exact = torch.cat(
        [torch.randn(10_000, dtype=torch.float64) * 10.0**e for e in (-46, -38, -7, -4, 0, 4, 38)]
        + [torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0])]
    )
    got = (exact * (1 + torch.randn_like(exact) * 1e-3)).to(dtype)
    (fast, place), slow = reliability_accuracy.error(got, exact), ulps_off(got, exact)
    assert fast[place] == fast.max()
    nearest = slow == 0  # where the slower way says 0 for up to half an ulp
    assert torch.equal(fast[~nearest], slow[~nearest])
    # float64 is rounded to half types through float32
    assert bool((fast[nearest] <= 0.501).all())


@pytest.mark.parametrize("gate", reliability_accuracy.UNARY)
def test_the_reference_is_good_to_a_thousandth_of_an_ulp(gate: str) -> None:
    """float64 against forty digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 40
    row = reliability_accuracy.UNARY[gate]
    x = torch.cat([reliability_accuracy.sampled(1).view(torch.float32)[::7], torch.randn(200) * 9])
    x = x[x.isfinite() & (x != 0)]
    y, _ = reliability_accuracy.exact(row, x, x, x)
    number = [mpmath.mpf(value) for value in reliability_accuracy.parameters(row)]

    def true(value: float) -> Any:
        v = mpmath.mpf(value)
        return {
            "exp": lambda: mpmath.exp(v),
            "reciprocal": lambda: 1 / v,
            "scale": lambda: number[0] * v,
            "shift": lambda: v + number[0],
            "relu": lambda: max(v, 0),
            "leaky_relu": lambda: v if v > 0 else number[0] * v,
            "elu": lambda: v if v > 0 else number[0] * mpmath.expm1(v),
            "sigmoid": lambda: 1 / (1 + mpmath.exp(-v)),
            "tanh": lambda: mpmath.tanh(v),
        }[gate]()

    for value, got in zip(x.tolist(), y.tolist(), strict=True):
        wanted = true(value)
        if abs(wanted) > 3.5e38:
            assert abs(got) > 3.4e38
            continue
        ulp = max(abs(wanted) * mpmath.mpf(2) ** -23, mpmath.mpf(2) ** -149)
        assert abs(mpmath.mpf(got) - wanted) <= ulp / 1000, value


def test_samples_have_every_exponent_and_the_edges() -> None:
    x = reliability_accuracy.sampled(2).view(torch.float32)
    _, counts = (x.view(torch.int32) >> 23).unique(return_counts=True)
    assert len(counts) == 512
    assert int(counts.min()) >= 2
    values = set(x.tolist())
    for edge in (0.0, 2.0**-149, 20.0, -104.0, torch.inf, -torch.inf):
        assert edge in values
    assert bool(x.isnan().any())
    piece = a_piece("exp")
    parts = list(reliability_accuracy.chunks(piece))
    assert sum(map(len, parts)) == Accuracy().size(piece)


def test_the_pieces_cover_every_number_once() -> None:
    pieces = [
        piece
        for piece in Accuracy().pieces()
        if (piece["gate"], piece["of"], piece["dtype"]) == ("exp", "torch", "float32")
    ]
    assert [piece["begin"] for piece in pieces] == list(range(0, 2**32, 2**24))
    assert sum(map(Accuracy().size, pieces)) == 2**32
    last = list(reliability_accuracy.chunks({**pieces[-1], "begin": 2**32 - 3}))
    assert last[0].view(torch.int32).tolist() == [-3, -2, -1]
    whole = torch.cat(list(reliability_accuracy.chunks(a_piece("exp", "float16"))))
    assert sorted(whole.view(torch.int16).tolist()) == list(range(-(2**15), 2**15))


# ---- proofs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column", "said"),
    [
        (proofs.changed("exp", dx="dy"), "dx", "exp, column dx, where {x: p}: dy != dy*exp(x)"),
        (proofs.changed("tanh", dxx="2 * dy * y"), "dxx", "tanh, column dxx, where"),
        (proofs.changed("multiply", dab="0"), "dab", "multiply, column dab, where"),
        (proofs.changed("relu", forward="where(x < 1, 0, x)"), "dx", "relu: is x < 1 true where"),
        (proofs.changed("tanh", dx="dy * x"), "dx", "tanh: name 'x' is not defined"),
    ],
)
def test_a_wrong_row_is_not_proved(
    row: Row, column: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reliability_proofs, "ROWS", {row.name: row})
    figure, piece = Proofs(), {"row": row.name, "level": None}
    result = figure.measure(piece)
    assert figure.failures([(piece, result)])[0].startswith(said)
    shown = figure.tables([(piece, result)])
    assert shown[0].startswith("0 of 1 rows proved: ")
    assert f"**not `{column}`**" in shown[1]


class Cube(torch.autograd.Function):
    """x^3, with faults of the gradient's factor, of double backward and of forward mode."""

    @staticmethod
    def forward(x: Tensor, fault: str) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        x, ctx.fault = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        factor = 3.00001 if ctx.fault == "factor" else 3
        return factor * dy * (x.detach() if ctx.fault == "detached" else x) ** 2, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 if ctx.fault == "tangent" else 3) * x_t * x**2


EVERY_MODE = tuple(proofs.MODES)


@pytest.mark.parametrize(
    ("fault", "shape", "failing"),
    [
        ("", (2, 3), ()),
        ("factor", (2, 3), ("gradcheck",)),
        ("detached", (2, 3), ("gradgradcheck", "forward over backward")),
        ("tangent", (2, 3), ("forward mode",)),
        ("raises", (2, 3), EVERY_MODE),
        ("", (0,), EVERY_MODE),  # nothing was compared
    ],
)
def test_a_wrong_derivative_is_reported(
    fault: str, shape: tuple[int, ...], failing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cube(x: Tensor) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no cubes today")
        return Cube.apply(x, fault)  # type: ignore[no-any-return,no-untyped-call]

    case = Case("exp", "cube", cube, cube, (Input(shape),))
    monkeypatch.setattr(reliability_proofs, "CALLS", {str(case): case})
    figure, piece = Proofs(), {"op": "exp", "level": None}
    result = figure.measure(piece)
    lines = figure.failures([(piece, result)])
    modes = [mode for mode in EVERY_MODE if any(f", {mode}: " in line for line in lines)]
    assert modes == list(failing), lines
    assert figure.size(piece) == len(EVERY_MODE)


def test_a_check_that_is_not_watched_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were torch to compare Jacobians in another way, the figure would say so."""
    monkeypatch.setattr(proofs, "watched", lambda: nullcontext(proofs.Compared()))
    with pytest.raises(AssertionError, match="compared 0 of 225 elements"):
        proofs.compare_case(reliability_proofs.CALLS["exp-matrix"], "gradcheck")


def test_an_operation_that_should_refuse_and_does_not_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reliability_proofs, "REFUSING", {"exp"})
    figure, piece = Proofs(), {"raw": "exp", "level": None}
    lines = figure.failures([(piece, figure.measure(piece))])
    assert lines == ["torch.ops.torchbp.exp, None: takes inputs that require grad"]


def test_the_pieces_prove_every_row_and_check_every_operation_at_every_level() -> None:
    pieces = Proofs().pieces()
    assert {piece["row"] for piece in pieces if "row" in piece} == set(torchbp.ROWS)
    for kind, names in (("op", set(OPS)), ("raw", set(RAW_OPS))):
        own = {(piece[kind], piece["level"]) for piece in pieces if kind in piece}
        assert own == set(itertools.product(names, reliability_accuracy.levels()))
    small = {str(case) for case in proofs.SMALL}
    assert small - set(reliability_proofs.CALLS) == set(proofs.NOT_COMPARABLE)


# ---- fuzz ----------------------------------------------------------------------------------------


Fault = Callable[[Tensor, list[Tensor], Tensor], Any]


def of_transposed(y: Tensor, grads: list[Tensor], x: Tensor) -> None:
    """A gradient off by a millionth where the input is transposed."""
    if grads and not x.is_contiguous() and x.dtype == torch.float32:
        grads[0] *= 1 + 1e-6


def of_threads(y: Tensor, grads: list[Tensor], x: Tensor) -> None:
    """One number missing, where several threads share the work."""
    if torch.get_num_threads() > 1 and y.numel() > 32768:
        y.view(-1)[-1] = 0


def of_halves(y: Tensor, grads: list[Tensor], x: Tensor) -> None:
    """The next number."""
    if x.dtype == torch.bfloat16:
        y.view(torch.int16).sub_(1)


def of_one_row(y: Tensor, grads: list[Tensor], x: Tensor) -> None:
    """Nothing, where there is one row."""
    if x.dim() > 1 and x.shape[0] == 1:
        y.zero_()


@pytest.mark.parametrize(
    ("op", "fault", "said"),
    [
        ("tanh", of_transposed, "tanh in float32: gradient 0"),
        ("exp", of_threads, "exp in "),
        ("leaky_relu", of_halves, "leaky_relu in bfloat16: the output"),
        ("matmul", of_one_row, "matmul in "),
        ("cross_entropy", of_transposed, "cross_entropy in float32: gradient 0"),
    ],
)
def test_a_call_that_is_wrong_is_found_and_one_line_repeats_it(
    op: str,
    fault: Fault,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    piece: Piece = {"op": op, "level": None, "seed": 0, "cases": 300}
    real = ops.run

    def run_that_is_wrong(
        function: Any, inputs: list[Tensor], upstream: Any, free: list[int]
    ) -> list[Tensor]:
        y, *grads = real(function, inputs, upstream, free)
        if inputs[0].dtype != torch.float64:  # as the reference is
            fault(y, grads, inputs[0])
        return [y, *grads]

    with monkeypatch.context() as patch:
        patch.setattr(reliability_fuzz, "run", run_that_is_wrong)
        (line,) = Fuzz().measure(piece)["failures"]
        assert line.startswith(said)
        assert "\n" not in line
        command = shlex.split(line[line.index("TORCHBP_CPU=") :])
        assert command[1:4] == ["python", "-m", "scripts.reliability_fuzz"]
        assert reliability_fuzz.main(command[4:]) == 1
        assert capsys.readouterr().out.strip() in line
    assert reliability_fuzz.main(command[4:]) == 0
    assert capsys.readouterr().out == "right\n"


def test_the_command_of_a_piece_prints_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    """So that the one that ends the process is known."""
    piece = '{"op": "relu", "level": null, "seed": 0, "cases": 3}'
    assert reliability_fuzz.main([piece]) == 0
    *cases, last = capsys.readouterr().out.splitlines()
    assert last == "right"
    assert len(cases) == 3
    assert all(" python -m scripts.reliability_fuzz '{" in line for line in cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_within_their_bounds_and_bounds_near_the_errors(dtype: torch.dtype) -> None:
    """The same formulas in PyTorch's float32 and rounded, and with their bounds."""
    a, b = (torch.randn(40, 70).to(dtype), torch.randn(70, 40).to(dtype))

    def formula(a: Any, b: Any) -> list[Any]:
        products = a.matmul(b)
        return [a * a + a, products, 1 / (1 + (-abs(a)).exp()), a.tanh(), a.sum((1,)), a - a / 3]

    for got, bound in zip(formula(a.float(), b.float()), formula(exact(a), exact(b)), strict=True):
        kept = bound.stored()
        off = (got.to(dtype).double() - kept.value).abs()
        assert bool((off <= kept.error).all())
        # Sums rarely come near their worst case, which grows as their length does.
        assert float((off / kept.error).nan_to_num().max()) > 0.004  # 0 / 0: exact


def test_a_comparison_that_errors_leave_open_takes_both_branches() -> None:
    x = Bounded(
        torch.tensor([1e-9, 1.0]).double(), torch.tensor([1e-8, 1e-8]).double(), torch.float32
    )
    y = where(x > 0, x * 0.0 + 5.0, x * 0.0 - 2.0)
    assert y.value.tolist() == [5.0, 5.0]
    assert y.error[0] >= 7
    assert y.error[1] < 1e-5


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case_name", ["relu-matrix", "relu-large"])
def test_a_result_that_changes_is_reported(monkeypatch: pytest.MonkeyPatch, case_name: str) -> None:
    """One call of many gives -0 instead of 0: equal, but not the same bits."""
    figure = Determinism()
    piece = {"op": "relu", "dtype": "float32", "level": None, "calls": 12}
    assert figure.measure(piece)["failures"] == []
    real, large = ops.run, case_name == "relu-large"
    calls = 0

    def changing(
        function: Any, inputs: list[Tensor], upstream: Any, free: list[int]
    ) -> list[Tensor]:
        nonlocal calls
        y, *grads = real(function, inputs, upstream, free)
        calls += (inputs[0].numel() == reliability_determinism.BIG) == large
        if calls == 4:
            y[y == 0] = -0.0
        return [y, *grads]

    monkeypatch.setattr(reliability_determinism, "run", changing)
    result = figure.measure(piece)
    assert len(result["failures"]) == 1
    assert result["failures"][0].startswith(f"{case_name} in float32, None, ")
    assert result["failures"][0].endswith("the output differs")
    assert (
        "**differs in 1 of 1 dtypes**" in figure.tables([({**piece, "level": "avx2"}, result)])[0]
    )


# ---- special values ------------------------------------------------------------------------------


def test_a_nan_that_is_lost_is_reported_and_a_sign_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Specials()
    piece = {"call": "relu-matrix", "dtype": "float32", "level": "avx2"}
    case = reliability_specials.CALLS["relu-matrix"]

    def measured(function: Any) -> Result:
        monkeypatch.setitem(reliability_specials.CALLS, "relu-matrix", replace(case, ours=function))
        return figure.measure(piece)

    assert measured(case.reference) == {"differences": [], "failures": []}
    result = measured(lambda x: torch.where(x > 0, x, 0))
    assert len(result["failures"]) >= 2 * len(reliability_specials.UPSTREAM)
    assert result["failures"][0].startswith("relu-matrix in float32, avx2, forward: inputs [nan]")
    result = measured(lambda x: torch.where(torch.relu(x) == 0, x * -0.0, torch.relu(x)))
    assert result["differences"][0]["ours"] == 0
    assert "| forward | float32 | avx2 |" in figure.tables([(piece, result)])[1]


@pytest.mark.parametrize("fault", [torch.nan, 1.0])
def test_a_product_that_loses_or_makes_nan_is_reported(
    monkeypatch: pytest.MonkeyPatch, fault: float
) -> None:
    figure = Specials()
    piece = {"call": "matmul-matrices", "dtype": "float32", "level": "avx2"}
    case = reliability_specials.PRODUCTS["matmul-matrices"]

    def wrong(x: Tensor, w: Tensor) -> Tensor:
        y = torch.matmul(x, w)
        at = y.isnan() if fault == 1 else y.isinf() | (y.abs() > 1e30)
        of_rows = at.any(1, keepdim=True).expand_as(y)
        return torch.where(of_rows & (x.dtype == torch.float32), fault, y)

    assert figure.measure(piece) == {"differences": [], "failures": []}
    monkeypatch.setitem(reliability_specials.PRODUCTS, "matmul-matrices", replace(case, ours=wrong))
    result = figure.measure(piece)
    start = "matmul-matrices in float32, avx2, forward(0, 0): "
    assert any(line.startswith(start) for line in result["failures"])
    said = figure.tables([(piece, result)])[1]
    assert "| forward, input 0 | float32 | avx2 |" in said


def test_sums_that_cancel_excuse_no_more_than_their_inputs_last_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figure = Specials()
    piece = {"call": "mlp-tanh", "dtype": "float32", "level": "avx2"}
    case = reliability_specials.PRODUCTS["mlp-tanh"]
    assert figure.measure(piece)["failures"] == []
    monkeypatch.setattr(reliability_specials, "spread", lambda *given: [0.0] * 9)
    start = "mlp-tanh in float32, avx2, gradient 0(3, 0): 3.4028234663852886e+38 in input 3"
    assert any(line.startswith(start) for line in figure.measure(piece)["failures"])
    monkeypatch.undo()

    def off(*inputs: Tensor) -> Tensor:
        return case.ours(*inputs) * (1 + 1e-4)

    monkeypatch.setitem(reliability_specials.PRODUCTS, "mlp-tanh", replace(case, ours=off))
    assert any("gradient 0" in line for line in figure.measure(piece)["failures"])


# ---- malformed calls -----------------------------------------------------------------------------


def relu_that(fault: str) -> Any:
    """relu, with its answer to what is no tensor replaced."""
    spoilt = False

    def relu(x: Any) -> Tensor:
        nonlocal spoilt
        dense = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested
        if dense and x.dtype in DTYPES:
            return torch.relu(x) + spoilt
        if fault == "is taken":
            return torch.zeros(())
        spoilt = fault == "the next call gives something else"
        raise {"ValueError: no": ValueError("no"), "KeyError": KeyError("relu: x")}.get(
            fault, TypeError("relu: x wants a torch.Tensor")
        )

    return relu


@pytest.mark.parametrize(
    "fault", ["", "is taken", "ValueError: no", "KeyError", "the next call gives something else"]
)
def test_a_bad_answer_to_a_malformed_call_is_reported(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    call = reliability_malformed.one("relu")
    call.function = relu_that(fault)
    monkeypatch.setattr(reliability_malformed, "MALFORMED", {"relu": call})
    result = Malformed().measure({"seed": 3})
    assert bool(result["failures"]) == bool(fault)
    assert all(fault in line and ", seed 3: " in line for line in result["failures"])


@pytest.mark.parametrize("structure", reliability_malformed.STRUCTURES)
def test_a_call_of_another_structure_that_is_taken_is_reported(
    monkeypatch: pytest.MonkeyPatch, structure: Any
) -> None:
    """By an operation that takes whatever it is given."""
    call = reliability_malformed.MALFORMED["linear"]
    monkeypatch.setattr(reliability_malformed, "STRUCTURES", [structure])
    monkeypatch.setattr(reliability_malformed, "MALFORMED", {"linear": call})
    assert Malformed().measure({"seed": 0})["failures"] == []
    real = call.function

    def linear(x: Any = None, *rest: Any, **given: Any) -> Tensor:
        right = {name: make(Random(), torch.float32) for name, make in call.right.items()}
        if rest or given.keys() != right.keys() - {"x"} or x is None:
            return torch.zeros(1)
        return real(x, **given)

    linear.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(call, "function", linear)
    lines = Malformed().measure({"seed": 0})["failures"]
    if structure is reliability_malformed.twice:  # what Python itself sees to
        assert lines == []
    else:
        assert lines
        assert all(line.endswith(": is taken") for line in lines)


# ---- large index ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", reliability_large.KINDS)
def test_numbers_that_are_taken_from_elsewhere_are_reported(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As an index that overflows would: the last numbers are those from the beginning."""
    figure = Large()
    piece = {"kind": kind, "elements": 2**19}
    assert figure.measure(piece)["failures"] == []
    real = torch.autograd.grad

    def wrapped(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        grads = real(*arguments, **options)
        for flat in (grad.view(-1) for grad in grads):
            half = len(flat) // 2
            flat[-half:] = flat[:half].clone()
        return grads

    def last(*arguments: Any, **options: Any) -> Tensor:
        y = linear(*arguments, **options)
        y.data[-1] = y.data[0]
        return y

    linear = F.linear
    if kind == "linear, large output":  # it has no gradient
        monkeypatch.setattr(F, "linear", last)
    monkeypatch.setattr(torch.autograd, "grad", wrapped)
    (line,) = figure.measure(piece)["failures"]
    assert line.startswith(f"{kind}: the ")


def test_what_is_compared_reaches_the_end() -> None:
    for n, size in ((2**31 + 2**24, 1), (2**21 + 2**14, 1024), (214_000_000, 10), (100, 1)):
        parts = reliability_large.places(n, size)
        assert parts[0].start == 0
        assert parts[-1].stop == n
        behind = [part for part in parts if part.stop * size > n * size - 2**24]
        assert behind[0].start * size <= max(0, n * size - 2**24)
        assert all(a.stop == b.start for a, b in pairwise(behind))


# ---- leaks ---------------------------------------------------------------------------------------

kept: list[Any] = []


def keep_an_object(number: int) -> None:
    kept.append([])


def keep_a_tensor(number: int) -> None:
    kept.append(torch.empty(1))


def allocate(number: int) -> None:
    """16 bytes, in one of five calls."""
    if number % 5 == 0:
        ctypes.CDLL(None).malloc(16)


def keep_an_error(number: int) -> None:
    try:
        raise ValueError
    except ValueError as error:
        kept.append(error)


def map_pages(number: int) -> None:
    """Memory that comes neither from malloc nor from Python."""
    if number % 5 == 0:
        pages = mmap.mmap(-1, 4096 * 8)
        pages.write(b"x" * 4096 * 8)
        kept.append(pages)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda number: None, ""),
        (keep_an_object, "objects a call"),
        (keep_a_tensor, "bytes of malloc a call"),
        (allocate, "bytes of malloc a call"),
        (keep_an_error, "objects a call"),
        (map_pages, "resident bytes a call"),
    ],
)
def test_a_leak_is_reported(fault: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process of the same size as one that leaks nothing."""
    numbers = itertools.count()
    monkeypatch.setitem(
        reliability_leaks.KINDS, "forward", lambda op: [lambda: fault(next(numbers))]
    )
    piece = {"op": "relu", "kind": "forward", "calls": 1000}
    lines = Leaks().measure(piece)["failures"]
    kept.clear()
    assert bool(lines) == bool(said)
    assert said in " ".join(lines)
    assert all(line.startswith("relu, forward: ") for line in lines)
