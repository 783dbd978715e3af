"""check_function finds the planted faults, each in its own rows, and none in what is right."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import torchbp.nn
from scripts import write_check_function
from tests.ops import OPS, Case
from tests.testing.broken import BROKEN, FUNC, OldExp, Product, Sine
from tests.testing.wild import WILD, GradientReversal
from torchbp.testing import (
    CHECKS,
    CheckFunctionError,
    FunctionReport,
    check_function,
    parametrize_checks,
)
from torchbp.testing.__main__ import main

#: They take seconds.
COMPILED = ("compile", "compile-func", "export")


def report_of(fn: Any, *inputs: Any, **options: Any) -> FunctionReport:
    return check_function(fn, inputs, raise_exception=False, **options)


def names(report: FunctionReport, status: str) -> set[str]:
    return {row.name for row in report if row.status == status}


def inputs_of(name: str) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape) for shape in BROKEN[name].shapes]


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_fails_its_rows_and_no_others(name: str) -> None:
    broken = BROKEN[name]
    skip = () if broken.compiled else COMPILED
    report = report_of(broken.fn, *inputs_of(name), skip=skip, **broken.options)
    assert names(report, "failed") == broken.fails
    assert names(report, "not supported") == broken.unsupported
    if broken.fails:
        assert any(broken.says in row.text for row in report.failed)
        assert all(row.silent != broken.loud for row in report.failed)
    text = str(report)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(row.name in text for row in report)


def test_an_output_that_is_a_view_is_named() -> None:
    """Autograd lets nobody change it in place: `y += 1` raises, as for no operation of PyTorch."""
    fn = BROKEN["a view as output"].fn
    row = report_of(fn, torch.randn(3), checks=["later-changes"])["later-changes"]
    assert row.status == "not supported"
    assert "the output y is a view, which nobody may change in place" in row.text


def test_each_check_has_a_fault() -> None:
    assert set().union(*(broken.fails for broken in BROKEN.values())) == set(CHECKS)


_records: list[list[int]] = []


def recording(x: Tensor) -> Tensor:
    _records.append([len(_records)])
    return x.sin()


class Overwriting(Function):
    """y = exp(x), whose backward works in the memory of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors[0].mul_(grad_output)


class Summed(Function):
    """y = sum(x) w, and for empty x the gradient of w is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x.sum() * w

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        total = x.sum() if x.numel() else torch.ones_like(w)
        return (grad_output * w).expand_as(x), grad_output * total


FURTHER: dict[str, tuple[str, Any, tuple[tuple[int, ...], ...], str, dict[str, Any]]] = {
    "memory that was not written": (
        "determinism", lambda x: x.sin() + torch.empty_like(x).clamp(0, 0), ((3,),), "y ", {},
    ),
    "Python objects": ("leak", recording, ((3,),), "Python objects behind", {}),
    "a backward in the memory of the output": (
        "mutation", Overwriting, ((3,),), "backward changes the output in place", {},
    ),
    "a sum over nothing": (
        "empty", Summed, ((3,), ()), "the gradient of w along a direction", {},
    ),
    "empty, unlike the reference": (
        "empty", lambda x: x.sum(), ((3,),), "against the reference: y",
        {"reference": lambda x: x.sum() + (0 if x.numel() else 1)},
    ),
    "another value under no_grad": (
        "frozen", lambda x: x.sin() if torch.is_grad_enabled() else x.cos(), ((3,),),
        "under no_grad: y is wrong", {},
    ),
    "float32 for all": ("float64", lambda x: x.float(), ((3,),), "y is float32 for float64", {}),
    "another dtype than the reference": (
        "reference", lambda x: x.float(), ((3,),), "float32, and float64 is right",
        {"reference": lambda x: x},
    ),
    "another shape than the reference": (
        "reference", torch.sin, ((3,),), "has shape [3], and [1, 3] is right",
        {"reference": lambda x: x.sin()[None]},
    ),
    "a reference that raises": (
        "reference", torch.sin, ((3,),), "the reference, called plainly, it raises",
        {"reference": lambda x: x @ torch.ones(4, 4, dtype=x.dtype)},
    ),
    "a backward that raises": (
        "func.grad",
        type("Raising", (Sine,), {"backward": staticmethod(lambda ctx, g: ctx.nothing)}),
        ((3,),), "called plainly it raises AttributeError", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_further_faults(name: str) -> None:
    check, fn, shapes, says, options = FURTHER[name]
    report = report_of(fn, *map(torch.randn, shapes), checks=[check], **options)
    assert report[check].status == "failed"
    assert says in report[check].text


# ---- no false alarm


def test_all_is_found_where_all_is_there() -> None:
    report = report_of(Sine, torch.randn(3, 4))
    assert names(report, "failed") == set()
    # torch.compile's fullgraph takes no Function with a jvp.
    assert names(report, "not supported") <= {"compile", "compile-func"}
    assert names(report, "not applicable") == {"opcheck", "reference", "speed", "memory"}
    two = report_of(Product, torch.randn(3, 4), torch.randn(()), skip=COMPILED)
    assert names(two, "failed") | names(two, "not supported") == set()


NO_FAULT: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "a step, whose gradient is zero": (torch.sgn, (3, 4)),
    "a gradient too large for float16": (lambda x: x.abs().mul(300).square(), (3, 4)),
    "an exponential too large for it": (lambda x: (x.abs() + 12).exp(), (3, 4)),
    "cancellation": (lambda x: (x.square() - 2 * x + 1).sum(-1), (3, 4)),
    "a view": (lambda x: x.t(), (3, 4)),
    "the input itself": (lambda x: x, (3, 4)),
    "an output that needs no gradient": (lambda x: (x.sin(), x.detach()), (3, 4)),
    "in place on a copy": (lambda x: x.clone().mul_(2).sigmoid_(), (3, 4)),
    "a scalar": (torch.exp, ()),
    "one element": (torch.tanh, (1,)),
    "a batch of nothing": (torch.tanh, (0, 3)),
}


@pytest.mark.parametrize("name", NO_FAULT)
def test_no_false_alarm(name: str) -> None:
    fn, shape = NO_FAULT[name]
    report = report_of(fn, torch.randn(shape), skip=COMPILED)
    assert names(report, "failed") == set(), report


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_ours(op: Any) -> None:
    """Every operation does all there is, and agrees with torch's."""
    case: Case = op.main_case
    ours, reference, inputs = case.split(torch.float32)
    report = report_of(ours, *inputs, reference=reference, skip=[*COMPILED, "speed"])
    assert names(report, "failed") == set(), report
    assert names(report, "not supported") <= {"empty"}, report
    assert names(report, "not applicable") == {"opcheck"}


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "Linear": (lambda: nn.Linear(4, 2), lambda: (torch.randn(3, 4),)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), lambda: (torch.randn(2, 2, 5, 5),)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), lambda: (torch.randn(3, 4, 2),)),
    "Embedding": (lambda: nn.Embedding(5, 3), lambda: (torch.randint(5, (4,)),)),
    "Dropout": (lambda: nn.Dropout(), lambda: (torch.randn(3, 4),)),
    "CrossEntropyLoss": (
        lambda: nn.CrossEntropyLoss(),
        lambda: (torch.randn(3, 4), torch.tensor([0, 1, 3])),
    ),
    "Sequential": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: (torch.randn(3, 4),),
    ),
    "torchbp.nn.MLP": (lambda: torchbp.nn.MLP([4, 3, 2], "tanh"), lambda: (torch.randn(3, 4),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    make, inputs = MODULES[name]
    module = make()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    report = report_of(module, *inputs(), skip=COMPILED)
    assert names(report, "failed") == set(), report
    assert names(report, "not supported") == set(), report
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    for parameter in dict(module.named_parameters()):
        assert f"{parameter} [" in report.inputs


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.LayerNorm], ids=lambda make: make.__name__)
def test_torchs_own_faults(make: Any) -> None:
    """torch 2.13 reads a weight with gaps as if it had none, and loses the input's part of the
    weight's gradient in a second derivative under torch.func. The formula says so too."""
    torch.manual_seed(0)
    report = report_of(make(4), torch.randn(3, 4), checks=["func.hessian", "double-backward"])
    assert "double-backward" not in names(report, "failed")
    if names(report, "failed"):
        x, w, v = (torch.randn(s, dtype=torch.float64) for s in ((3, 4), (4,), (3, 4)))
        dim = 0 if make is nn.BatchNorm1d else 1

        def builtin(x: Tensor, w: Tensor) -> Tensor:
            if dim:
                return (nn.functional.layer_norm(x, [4], w) * v).sum()
            return (nn.functional.batch_norm(x, None, None, w, training=True) * v).sum()

        def formula(x: Tensor, w: Tensor) -> Tensor:
            away = x - x.mean(dim, keepdim=True)
            deviation = (away.square().mean(dim, keepdim=True) + 1e-5).sqrt()
            return (away / deviation * w * v).sum()

        torch.testing.assert_close(builtin(x, w), formula(x, w))
        wrong, right = (torch.func.hessian(f, (0, 1))(x, w)[1][0] for f in (builtin, formula))
        assert not torch.allclose(wrong, right, atol=1e-3)


def test_a_registered_operation() -> None:
    report = report_of(torch.ops.torchbp.sigmoid, torch.randn(3), skip=COMPILED)
    assert names(report, "failed") == set()
    assert report["opcheck"].status == "passed"


def test_structural_zeros_are_no_failures_in_half_types() -> None:
    """The gradient of a bias before a norm is zero but for rounding."""
    model = nn.Sequential(nn.Linear(4, 5), nn.GroupNorm(1, 5), nn.Tanh())
    kinds = ["float32", "float16", "bfloat16", "autocast"]
    assert report_of(model, torch.randn(3, 4), checks=kinds).passed


def test_constants_of_float64_make_the_output_wide() -> None:
    """As torch promotes types: it is none of the function's doing."""
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    report = report_of(lambda x: x * scale, torch.randn(2), checks=["float32", "float16"])
    assert report.passed, report


# ---- functions found in the wild


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In what it says of every fourth function; the script's --check looks at all."""
    written = write_check_function.PAGE.read_text(encoding="utf-8")
    if torch.__version__ not in written:
        pytest.skip("the page was written with another torch, whose errors read otherwise")
    made = write_check_function.page(WILD[::4])
    for part in made.split("\n\n"):
        assert set(part.splitlines()) <= set(written.splitlines())
    assert all(f"### {wild.name}\n" in written for wild in WILD)
    monkeypatch.setattr(write_check_function, "page", lambda: made)
    assert write_check_function.main(["--check"]) == 1
    monkeypatch.setattr(write_check_function, "PAGE", tmp_path / "check_function.md")
    assert write_check_function.main([]) == 0
    assert write_check_function.main(["--check"]) == 0


@pytest.mark.parametrize("derive", ["eager", "compiled"])
def test_what_the_page_says_of_torch_compile(derive: str) -> None:
    """Under compile(vjp) the backward of a Function with ctx in forward is left out, where plain
    torch.func refuses it."""

    def pulled(x: Tensor) -> Any:
        return torch.func.vjp(lambda x: GradientReversal.apply(x, 1.0), x)[1](torch.ones(3))

    if derive == "eager":
        with pytest.raises(RuntimeError, match="must override the setup_context"):
            pulled(torch.randn(3))
    elif torch.__version__ in write_check_function.PAGE.read_text(encoding="utf-8"):
        torch._dynamo.reset()
        (grad,) = torch.compile(pulled, backend="aot_eager")(torch.randn(3))
        assert torch.equal(grad, torch.ones(3))  # and -1 is what backward says


# ---- the table


def test_the_table_as_data() -> None:
    report = report_of(OldExp, torch.randn(3), checks=["leak", "gradient", "vmap"])
    assert [row.name for row in report] == ["gradient", "vmap", "leak"]  # in their order
    assert len(report) == 3
    assert not report.passed
    assert [row.name for row in report.failed] == ["leak"]
    assert report["leak"].result == "silently wrong"
    assert report["vmap"].result == "not supported"
    assert report.inputs == "x [3] float32"
    assert report.summary() == "1 passed, 1 not supported, 1 silently wrong"
    assert all(row.seconds > 0 for row in report)
    with pytest.raises(KeyError):
        report["speed"]


def test_a_gradient_carries_its_report() -> None:
    report = report_of(BROKEN["a factor"].fn, torch.randn(3), checks=["gradient"])
    cause = report["gradient"].report
    assert cause is not None
    assert cause.cause == "wrong-factor"
    assert cause.factor == pytest.approx(1.01)
    assert str(cause) in str(report)


def test_raising() -> None:
    x = torch.randn(3)
    with pytest.raises(CheckFunctionError, match="1 of 2 checks failed") as caught:
        check_function(OldExp, x, checks=["leak", "vmap"])
    assert caught.value.report["leak"].status == "failed"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(
        CheckFunctionError, match="required, and not supported: raises RuntimeError"
    ):
        check_function(OldExp, x, checks=["vmap"], require=True)
    with pytest.raises(CheckFunctionError):
        check_function(OldExp, x, checks=["vmap"], require=["vmap"])
    check_function(OldExp, x, checks=["vmap"], require=["export"]).raise_for_failures()


def test_html(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report = report_of(BROKEN["a factor"].fn, torch.randn(3), checks=["gradient", "vmap"])
    text = report.to_html(path)
    assert path.read_text(encoding="utf-8") == text
    assert text.count("data:image/png;base64,") == 3
    assert "wrong-factor" in text
    for foreign in ("http:", "https:", "<script", "<link", "@import"):
        assert foreign not in text

    def angled(x: Tensor) -> Tensor:
        return x.exp()

    angled.__name__ = "<b>&"
    assert "<b>&" not in report_of(angled, torch.randn(2), checks=["vmap"]).to_html()
    with pytest.raises(TypeError, match="to_html: path wants"):
        report.to_html(3)  # type: ignore[arg-type]


# ---- what is left alone, and what is asked for


def test_inputs_random_state_and_settings_are_left_alone() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    held, settings = x.detach().clone(), (gc.isenabled(), gc.get_freeze_count())
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    report_of(Sine, x, skip=COMPILED)
    assert torch.equal(torch.rand(1), wanted)
    assert torch.equal(x.detach(), held)
    assert x._version == 0
    assert x.grad is None
    assert settings == (gc.isenabled(), gc.get_freeze_count())
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_requires_grad_is_checked() -> None:
    """If anything does; else all that floats."""
    x, w = torch.randn(3), torch.randn((), requires_grad=True)
    bad = BROKEN["garbage for nothing"].fn
    wrong_x = type(
        "WrongX",
        (Product,),
        {"backward": staticmethod(lambda ctx, g: (g, (g * ctx.saved_tensors[0]).sum()))},
    )
    assert report_of(wrong_x, x, w, checks=["gradient"]).passed
    assert not report_of(wrong_x, x, w.detach(), checks=["gradient"]).passed
    assert report_of(bad, x, w, checks=["gradient"]).passed


def test_random_functions_are_checked_at_one_draw() -> None:
    report = report_of(nn.Dropout(), torch.randn(3, 4), checks=["gradient", "determinism", "vmap"])
    assert report.passed
    assert report["determinism"].text == "it draws random numbers"
    assert report["vmap"].status == "not applicable"


def test_float32_alone() -> None:
    """What refuses float64 is checked in what it takes."""

    def single(x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise TypeError(f"single: x wants float32, got {x.dtype}")
        return x.sin()

    report = report_of(single, torch.randn(3, 4), skip=COMPILED)
    assert names(report, "failed") == set()
    assert {"gradient", "float64"} <= names(report, "not supported")
    assert {"vmap", "strided", "func.grad", "mutation"} <= names(report, "passed")
    assert "single: x wants float32" in report["float64"].text


def test_crashes_are_failures_and_stop_nothing() -> None:
    def odd(x: Tensor) -> Tensor:
        if not x.numel():
            return 1 // x.numel()  # type: ignore[return-value]
        return x * 2

    report = report_of(odd, torch.randn(3), checks=["empty", "frozen"])
    assert report["empty"].result == "failed"
    assert "ZeroDivisionError" in report["empty"].text
    assert report["frozen"].status == "passed"


def test_outputs_and_inputs_of_many_kinds() -> None:
    def several(x: Tensor, n: int, which: Tensor) -> dict[str, Any]:
        return {"a": x.sin() * n, "b": [x[which]], "c": which, "d": None}

    report = report_of(several, torch.randn(4), 3, torch.tensor([0, 2]), skip=COMPILED)
    assert names(report, "failed") == set(), report
    assert report.inputs == "x [4] float32, 3, which [2] int64"


def test_complex() -> None:
    def power(z: Tensor) -> Tensor:
        return (z * z.conj()).real

    z = torch.randn(3, dtype=torch.complex64)
    report = report_of(power, z, skip=COMPILED)
    assert names(report, "failed") == set(), report
    assert {"gradient", "double-backward", "vmap", "strided", "leak"} <= names(report, "passed")


def test_complex_double_backward_fails() -> None:
    class Squared(Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
            (z,) = ctx.saved_tensors
            return grad_output * 2 * z.detach().conj()

    z = torch.randn(3, dtype=torch.complex64)
    report = report_of(Squared, z, checks=["gradient", "double-backward"])
    assert names(report, "failed") == {"double-backward"}


def test_another_number_of_outputs_is_no_refusal() -> None:
    def changing(x: Tensor) -> list[Tensor]:
        return [x] * (2 if torch._C._functorch.is_functorch_wrapped_tensor(x) else 1)

    report = report_of(changing, torch.randn(3), checks=["vmap", "func.vjp", "func.jacrev"])
    assert names(report, "failed") >= {"vmap", "func.vjp"}
    assert names(report, "not supported") == set()


def test_bad_input() -> None:
    x = torch.randn(3)
    with pytest.raises(TypeError, match="check_function: fn wants a function or module, got int"):
        check_function(3, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="check_function: argmax wants to return a floating tensor"):
        check_function(torch.argmax, x)
    with pytest.raises(ValueError, match=r"checks wants names out of gradient, .* got 'grad'"):
        check_function(torch.sin, x, checks=["grad"])
    with pytest.raises(ValueError, match="skip wants names"):
        check_function(torch.sin, x, skip="nothing")
    with pytest.raises(ValueError, match="require wants names"):
        parametrize_checks(torch.sin, x, require=["all"])
    with pytest.raises(ValueError, match='kinks wants "raise" or "skip", got'):
        check_function(torch.sin, x, kinks="leave")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="atol wants a number that is not negative, got -1"):
        check_function(torch.sin, x, atol=-1)
    with pytest.raises(ValueError, match="max_time wants a reference to compare with, got none"):
        check_function(torch.sin, x, max_time=2)
    with pytest.raises(TypeError, match="reference wants a function or module, got str"):
        check_function(torch.sin, x, reference="sin")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # the function's own
        check_function(torch.mm, (torch.randn(2, 3), torch.randn(2, 3)))


# ---- pytest


@parametrize_checks(
    Sine, lambda: torch.randn(3), skip=COMPILED, require=["vmap", "double-backward"]
)
def test_one_test_a_row(check: Callable[[], FunctionReport]) -> None:
    assert check().passed


def test_what_is_not_supported_is_skipped() -> None:
    wanted = ["gradient", "vmap", "forward-mode", "opcheck", "leak"]
    mark = parametrize_checks(
        OldExp, torch.randn(3), checks=wanted, require=["forward-mode"], argument="row"
    )
    assert mark.name == "parametrize"
    argument, parameters = mark.args
    assert argument == "row"
    checks = {parameter.id: parameter.values[0] for parameter in parameters}
    assert list(checks) == sorted(wanted, key=list(CHECKS).index)
    assert checks["gradient"]()["gradient"].status == "passed"
    with pytest.raises(pytest.skip.Exception, match="not supported: raises RuntimeError: In order"):
        checks["vmap"]()
    with pytest.raises(pytest.skip.Exception, match="not applicable: no registered operation"):
        checks["opcheck"]()
    with pytest.raises(CheckFunctionError, match="required, and not supported"):
        checks["forward-mode"]()
    with pytest.raises(CheckFunctionError, match="reference cycle"):
        checks["leak"]()


# ---- the command


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


OWN = """
import os
import signal

import torch

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.mul_(2)

def scaled(x, w):
    return x * w

def nothing(x):
    return None

def dying(x):
    if not x.is_contiguous():
        os.kill(os.getpid(), signal.SIGSEGV)
    return x * 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_ops.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_ops", raising=False)
    return tmp_path


def test_runs_as_a_command(folder: Path) -> None:
    checks = ("--checks", "gradient,mutation,vmap")
    done = command("torchbp.testing", "own_ops.py:Twice", "3x4:float64", *checks, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert "backward changes the upstream gradient in place" in done.stdout
    assert "Twice(x [3, 4] float64)" in done.stdout
    assert "2 silently wrong, 1 not supported" in done.stdout


def test_exit_status_and_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = "--checks", "gradient,reference,vmap"
    scaled = "own_ops:scaled", "3", "-2.0"
    assert main([*scaled, *quick, "--require", "all", "--html", "table.html"]) == 0
    assert "gradient" in (folder / "table.html").read_text()
    capsys.readouterr()
    assert main([*scaled, *quick, "--reference", "torch:mul", "--seed", "3"]) == 0
    assert "3 passed" in capsys.readouterr().out
    assert main([*scaled, *quick, "--reference", "torch:add"]) == 1
    assert main(["own_ops:Twice", "3", *quick, "--skip", "gradient", "--require", "vmap"]) == 1
    torch.save({"w": torch.randn(()), "x": torch.randn(2)}, "inputs.pt")
    assert main(["own_ops:scaled", "--inputs", "inputs.pt", *quick]) == 0


def test_a_crash_of_compiled_code_is_a_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    assert main(["own_ops.py:dying", "2x3", "--checks", "strided", "--isolate"]) == 1
    said = capsys.readouterr().out
    assert "the process is killed by SIGSEGV" in said
    assert "1 failed" in said
    # Short, as argparse takes it: the processes are no parents of others.
    assert main(["own_ops.py:scaled", "3", "-2.0", "--checks", "vmap", "--isol"]) == 0
    assert "1 passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_ops"], "MODULE:NAME: wants a colon"),
        (["own_ops:Thrice", "3"], "MODULE:NAME: own_ops has no Thrice"),
        (["own_ops:scaled", "3"], "INPUT: scaled wants other arguments than 1"),
        (["own_ops:scaled", "3", "3y"], "INPUT 3y: wants a shape"),
        (["own_ops:nothing", "3"], "nothing wants to return a floating tensor"),
        (["own_ops:scaled", "3", "3", "--checks", "grad"], "checks wants names out of"),
        (["own_ops:scaled", "3", "3", "--reference", "torch"], "--reference: wants a colon"),
        (["own_ops:scaled", "3", "3", "--max-time", "2"], "max_time wants a reference"),
        (["own_ops:scaled", "3", "3", "--atol", "-1"], "atol wants a number"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m torchbp.testing: error: ")
    assert message in said
    assert said.count("\n") == 1


def test_help_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in CHECKS)


def test_funcs_are_all_of_torch_func() -> None:
    assert {name for name in CHECKS if name.startswith("func.")} == FUNC
