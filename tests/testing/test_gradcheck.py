"""gradcheck: its arguments, what its report says, and how its hypotheses tell faults apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError

from tests.testing.zoo import ZOO, function, normal
from torchbp.testing import GradcheckError, Report, gradcheck


def failing(fn: Any, inputs: Any, **options: Any) -> Report:
    with pytest.raises(GradcheckError) as caught:
        gradcheck(fn, inputs, **options)
    return caught.value.report


def of(name: str) -> Report:
    animal = ZOO[name]
    return failing(animal.fn, animal.inputs(), **animal.options)


def test_a_right_gradient_passes() -> None:
    x, w = normal((3, 4), (4, 2))()
    assert gradcheck(lambda x, w: (x @ w).tanh(), (x, w), check_forward_ad=True)
    assert gradcheck(torch.sin, x, fast_mode=True, check_batched_grad=True)


def test_it_is_torch_s_error() -> None:
    fn, inputs = ZOO["cos"].fn, ZOO["cos"].inputs()
    with pytest.raises(TorchGradcheckError, match="wrong-sign"):
        gradcheck(fn, inputs)
    assert gradcheck(fn, inputs, raise_exception=False) is False


def test_bad_arguments() -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match="gradcheck: fn wants a function"):
        gradcheck(3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one tensor that requires grad, got Tensor"):
        gradcheck(torch.sin, x.detach())
    with pytest.raises(ValueError, match='"raise" or "skip", got \'no\''):
        gradcheck(torch.sin, x, kinks="no")  # type: ignore[arg-type]


def test_what_the_function_raises_is_passed_on() -> None:
    def refuses(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gradcheck(refuses, normal((2,))())
    with pytest.raises(RuntimeError, match="incorrect number of gradients"):
        gradcheck(function(lambda a, b: a * b, lambda g, a, b: g), normal((2,), (2,))())


def test_elements() -> None:
    """Index, both numbers and both errors of the worst elements, as on paper."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    report = failing(function(lambda x: x**3, lambda g, x: g * 3 * x), x)
    (checked,) = report.inputs
    assert (checked.name, checked.shape, checked.dtype) == ("x", (3,), "float64")
    assert checked.count == 2  # at 1 it is right
    first, second = checked.worst
    assert (first.output, first.input) == ("y[2]", "x[2]")
    assert (first.output_index, first.input_index) == ((2,), (2,))
    assert first.analytic == 9
    assert first.numeric == pytest.approx(27, abs=1e-6)
    assert first.absolute == pytest.approx(18, abs=1e-6)
    assert first.relative == pytest.approx(2 / 3, abs=1e-6)
    assert (second.analytic, second.input) == (6, "x[1]")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("square without its 2", "0.5 times what is right"),
        ("cos", "-1 times what is right"),
        ("bias from the first row", "rows 1, 2 of the output"),
        ("None for an operand", "zero where it should not be"),
        ("relu by another threshold", "not zero where it should be"),
    ],
)
def test_pattern(name: str, pattern: str) -> None:
    assert any(pattern in checked.pattern for checked in of(name).inputs)


def test_factors() -> None:
    assert of("square without its 2").factor == 0.5
    assert of("mean without 1/N").factor == 12
    assert of("cos").factor == -1
    assert of("scale without its factor").factor == pytest.approx(10 / 3, rel=1e-6)
    assert of("silu").factor is None
    assert "it doubles" in of("mean without 1/N").found[0].text


def test_one_element_has_no_constant_factor() -> None:
    """Any number is a multiple of any other: only other inputs tell."""
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert "wrong-factor" not in failing(function(torch.sin, lambda g, x: g * x), x).causes


def test_kinks() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert "x[1] = 0" in failing(torch.relu, x).found[0].text
    with pytest.warns(UserWarning, match=r"x\[1\] = 0"):
        assert gradcheck(torch.relu, x, kinks="skip")
    wrong = function(torch.relu, lambda g, x: -g * (x > 0))
    assert failing(wrong, x).causes == ["wrong-sign", "kink"]
    assert failing(wrong, x, kinks="skip").cause == "wrong-sign"
    # Great curvature is no kink, and a gradient that is none of the slopes is wrong.
    assert failing(lambda x: x.detach() ** 2 * 1e3 + 0 * x, x).cause == "cut"
    beyond = function(torch.relu, lambda g, x: g * torch.where(x == 0, 2.0, (x > 0).double()))
    assert "kink" not in failing(beyond, x).causes


def test_strict_alone_minds_what_autograd_sums() -> None:
    animal = ZOO["a bias as large as the batch"]
    assert gradcheck(animal.fn, animal.inputs())
    assert failing(animal.fn, animal.inputs(), strict=True).cause == "broadcast-not-reduced"


def test_torch_passes_what_changes_the_gradient() -> None:
    for name in ("exp in place", "relu in place"):
        animal = ZOO[name]
        assert torch.autograd.gradcheck(animal.fn, animal.inputs())
        assert of(name).cause == "gradient-modified"


def test_double_backward_is_optional_and_loud_errors_are_fine() -> None:
    animal = ZOO["backward in numpy"]
    assert gradcheck(animal.fn, animal.inputs(), check_double_backward=False)

    class Once(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
            return grad_output * ctx.saved_tensors[0].cos()  # type: ignore[no-any-return]

    assert gradcheck(Once.apply, normal((3,))())


def test_float32_is_checked_in_float64() -> None:
    x = torch.tensor([0.3, -1.2], requires_grad=True)
    with pytest.warns(UserWarning, match="double precision"):
        assert failing(torch.tanh, x).cause == "low-precision"
    with pytest.warns(UserWarning, match="double precision"):
        report = failing(function(torch.cos, lambda g, x: g * x.sin()), x)
    assert report.cause == "wrong-sign"
    assert "float64" in report.notes[0]


def test_float32_that_cannot_be_float64() -> None:
    w = torch.ones(2, 2)
    with pytest.warns(UserWarning, match="double precision"):
        report = failing(lambda x: (x @ w).exp(), torch.ones(1, 2, requires_grad=True))
    assert report.cause == "low-precision"
    assert "In float64 the function raises" in report.found[0].text


def test_where_it_starts() -> None:
    assert "forward of log" in of("log of a negative number").found[0].text
    assert "backward of Sqrt" in of("sqrt at 0").found[0].text
    assert "forward of exp" in of("softmax that overflows").found[0].text


def test_the_guilty_function_is_named() -> None:
    report = of("a missing term inside of a network")
    assert report.cause == "missing-term"
    assert any("BrokenSiLU" in note for note in report.notes)


def test_parameters_reached_by_other_ways() -> None:
    """Inputs are changed in place, so that a module sees it; and have their values again."""
    layer = nn.Linear(3, 2).double()
    x = torch.ones(1, 3, dtype=torch.float64)
    before = layer.weight.detach().clone()
    assert gradcheck(lambda *_: layer(x), tuple(layer.parameters()))
    report = failing(lambda *_: layer(x).detach(), tuple(layer.parameters()))
    assert report.cause == "cut"
    assert torch.equal(layer.weight, before)


def test_random_state_is_left_alone() -> None:
    x = normal((3,))()
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    gradcheck(torch.sin, x)
    assert torch.equal(torch.rand(1), wanted)


def test_complex() -> None:
    z = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128, requires_grad=True)
    assert gradcheck(lambda z: (z * z).abs(), z)
    report = failing(function(lambda z: z * 2j, lambda g, z: g * 2j), z)
    assert report.cause == "wrong-sign"  # the gradient wants the conjugate, -2j
    assert report.inputs[0].worst[0].input.startswith("z[")


def test_several_outputs() -> None:
    class Two(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x, 3 * x

        @staticmethod
        def backward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return 3 * b

    report = failing(Two.apply, normal((3,))())
    assert report.cause == "overwritten"
    assert "upstream of output 0" in report.found[0].text
    assert report.inputs[0].worst[0].output.startswith("y0[")


def test_html(tmp_path: Path) -> None:
    """One file with three heat maps for each wrong input, and nothing from elsewhere."""
    path = tmp_path / "report.html"
    text = of("softmax without its sum").to_html(path)
    assert path.read_text(encoding="utf-8") == text
    assert text.count("data:image/png;base64,") == 3
    assert "missing-term" in text
    assert "prefers-color-scheme: dark" in text
    for foreign in ("http:", "https:", "<script", "<link", "@import"):
        assert foreign not in text
    names = function(torch.sin, lambda g, x: g * x, "<b>&")
    assert "<b>&" not in failing(names, normal((2,))()).to_html()
    with pytest.raises(TypeError, match="to_html: path wants"):
        of("cos").to_html(3)  # type: ignore[arg-type]
