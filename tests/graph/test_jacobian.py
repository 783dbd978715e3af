"""torchbp.graph.jacobian: sizes by arithmetic, matrices against torch.autograd.functional.jacobian,
structures of functions whose structure is known.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchbp import functional as F
from torchbp import functions
from torchbp.graph import jacobian


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def both(x: Tensor, w: Tensor) -> dict[str, Any]:
    return {"product": x @ w, "rest": [x.sum(), w.tanh()]}


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "relu": (F.relu, (randn(4, 3),)),
    "sigmoid": (F.sigmoid, (randn(7),)),
    "softmax": (lambda x: x.softmax(-1), (randn(4, 3),)),
    "matmul": (F.matmul, (randn(2, 3), randn(3, 4))),
    "linear": (lambda x, w, b: F.linear(x, w, b, "elu"), (randn(2, 3), randn(4, 3), randn(4))),
    "maxout": (F.maxout, (randn(2, 3), randn(2, 4, 3))),
    "multiply, broadcast": (F.multiply, (randn(2, 1), randn(3))),
    "mlp": (lambda x, a, b: F.mlp(x, [a, b]), (randn(2, 3), randn(4, 3), randn(2, 4))),
    "loss": (lambda x: F.cross_entropy(x, torch.tensor([0, 2])), (randn(2, 3),)),
    "Function": (functions.Multiply.apply, (randn(3), randn(3))),
    "conv": (torch.nn.functional.conv2d, (randn(1, 2, 4, 4), randn(3, 2, 3, 3))),
    "layer norm": (nn.LayerNorm(5, dtype=torch.float64), (randn(3, 5),)),
    "view": (lambda x: x.t().reshape(-1)[1:], (randn(3, 2),)),
    "expanded input": (lambda x: x * x, (randn(1).expand(3),)),
    "several outputs": (lambda x, w: tuple(both(x, w)["rest"]), (randn(2, 3), randn(3, 2))),
    "scalar": (torch.exp, (torch.tensor(0.5, dtype=torch.float64),)),
}


@pytest.mark.parametrize(("fn", "inputs"), CASES.values(), ids=CASES)
def test_explicit_is_torchs_jacobian(fn: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    expected: Any = torch.autograd.functional.jacobian(fn, inputs)
    expected = (
        [row for rows in expected for row in rows] if type(expected[0]) is tuple else expected
    )
    found = list(jacobian(fn, *inputs))
    assert len(found) == len(expected)
    for entry, matrix in zip(found, expected, strict=True):
        explicit = entry.explicit()
        # The same products, batched otherwise: a few roundings apart.
        torch.testing.assert_close(explicit, matrix, rtol=1e-13, atol=1e-14)
        assert entry.shape == matrix.shape
        assert entry.bytes == matrix.numel() * 8

        # The lecture's layout is the transpose: input x output.
        n, m = entry.output_shape.numel(), entry.input_shape.numel()
        transposed = entry.explicit("lecture")
        assert transposed.shape == entry.lecture_shape == entry.input_shape + entry.output_shape
        torch.testing.assert_close(transposed.reshape(m, n), explicit.reshape(n, m).t())
        upstream = torch.randn(entry.output_shape, dtype=torch.float64)
        downstream = (transposed.reshape(m, n) @ upstream.reshape(n)).view(entry.input_shape)
        torch.testing.assert_close(entry.vjp(upstream), downstream, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, w = torch.ones(2, 3, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    for entry in jacobian(F.matmul, x, w):
        assert entry.explicit().dtype == entry.dtype == dtype
        assert entry.bytes == entry.explicit().numel() * dtype.itemsize
    (entry,) = jacobian(lambda x: x.double().exp(), x)  # a gradient has the dtype of the input
    assert entry.explicit().dtype == entry.dtype == dtype
    assert entry.structure == "diagonal"


def test_nothing_has_no_entries() -> None:
    (entry,) = jacobian(F.relu, randn(0, 3))
    assert entry.explicit().shape == entry.explicit("lecture").shape == (0, 3, 0, 3)
    assert (entry.bytes, entry.structure) == (0, "zero")
    assert entry.vjp(randn(0, 3)).shape == (0, 3)


def test_item_access_and_names() -> None:
    found = jacobian(both, randn(2, 3), randn(3, 2))
    assert [(entry.output, entry.input) for entry in found] == [
        (output, name)
        for output in ("y['product']", "y['rest'][0]", "y['rest'][1]")
        for name in ("x", "w")
    ]
    assert found["y['rest'][0]", "w"] is found[3]
    assert found["y['rest'][0]", "w"].structure == "zero"
    assert found[3].name == "dy['rest'][0]/dw"
    single = jacobian(F.relu, torch.tensor([1.0, -1.0]))
    assert single["x"][0].tolist() == [1, 0]
    with pytest.raises(KeyError, match=r"no 'w'; there are \('y', 'x'\)"):
        single["w"]
    with pytest.raises(KeyError, match=r"no .*x.*; there are"):  # of which output?
        found["x"]


def test_inputs_in_lists_and_others() -> None:
    x, weights = randn(2, 3), [randn(4, 3), randn(2, 4)]
    found = jacobian(F.mlp, x, weights, None, "tanh")
    assert [entry.input for entry in found] == ["x", "weights[0]", "weights[1]"]
    model = nn.Embedding(5, 3)  # no floating input at all, but parameters
    (entry,) = jacobian(model, torch.tensor([4, 1]), parameters=True)
    assert entry.explicit().sum((0, 1)).tolist() == [[float(i in (4, 1))] * 3 for i in range(5)]
    labels = torch.tensor([0, 2])  # no floating input: passed on
    (entry,) = jacobian(F.cross_entropy, x, labels)
    assert entry.input == "input"


# ---- sizes ---------------------------------------------------------------------------------------


def test_lecture_sizes_before_anything_is_allocated() -> None:
    """N = 64, D = M = 4096: dy/dx takes 256 GiB, dy/dw 16 TiB (row 23 says 256 GB each)."""
    x, w = torch.ones(64, 4096, device="meta"), torch.ones(4096, 4096, device="meta")
    for product in (torch.matmul, F.matmul):
        of_x, of_w = jacobian(product, x, w)
        assert of_x.bytes == (64 * 4096) * (64 * 4096) * 4 == 256 * 2**30
        assert of_w.bytes == (64 * 4096) * (4096 * 4096) * 4 == 16 * 2**40
        assert of_x.shape == (64, 4096, 64, 4096)
        assert of_x.structure == "unknown"
        with pytest.raises(MemoryError, match=r"takes 256 GiB, above the budget of 1 GiB"):
            of_x.explicit()
        with pytest.raises(MemoryError, match=r"dy/d\w+ of shape .* takes 16 TiB"):
            of_w[0, 0]


def test_budget_is_the_most_bytes() -> None:
    x = randn(10)
    (entry,) = jacobian(F.relu, x, budget=800)
    assert entry.explicit().shape == (10, 10)
    (entry,) = jacobian(F.relu, x, budget=799)
    with pytest.raises(MemoryError, match="takes 800 B, above the budget of 799 B"):
        entry.explicit()
    assert entry.vjp(torch.ones(10)).shape == (10,)
    (entry,) = jacobian(F.relu, x, budget=float("inf"))
    assert entry.explicit().shape == (10, 10)


# ---- structure -----------------------------------------------------------------------------------

STRUCTURES: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "elementwise": (torch.exp, (5, 3), "diagonal"),
    "elementwise, three dimensions": (lambda x: x * x, (2, 5, 3), "diagonal"),
    "reshaped": (lambda x: x.view(-1).exp(), (5, 3), "diagonal"),
    "one number": (lambda x: 3 * x, (), "diagonal"),
    "one row": (torch.exp, (1, 6), "diagonal"),
    "softmax": (lambda x: x.softmax(-1), (5, 3), "block diagonal by row"),
    "row sums": (lambda x: x.sum(1), (5, 3), "block diagonal by row"),
    "row product": (lambda x: x @ torch.ones(3, 7).double(), (5, 3), "block diagonal by row"),
    "softmax of one row": (lambda x: x.softmax(-1), (1, 6), "dense"),
    "over the rows": (lambda x: x.softmax(0), (5, 3), "dense"),
    "sum": (torch.sum, (5, 3), "dense"),
    "rows exchanged": (lambda x: x.flip(0), (4, 3), "dense"),
    "constant": (lambda x: 0 * x, (5, 3), "zero"),
    "dead ReLU": (lambda x: F.relu(-x.abs()), (5, 3), "zero"),
    "sqrt at 0": (lambda x: (0 * x).sqrt(), (5,), "unknown"),
}


@pytest.mark.parametrize(("fn", "shape", "structure"), STRUCTURES.values(), ids=STRUCTURES)
def test_structure(fn: Callable[..., Any], shape: tuple[int, ...], structure: str) -> None:
    (entry,) = jacobian(fn, randn(*shape))
    assert entry.structure == structure
    if structure == "diagonal":
        matrix = entry.explicit().reshape(entry.output_shape.numel(), -1)
        assert torch.equal(matrix, matrix.diagonal().diag())


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_one_entry_off_the_diagonal_is_found(count: int) -> None:
    """However small: what is probed are exact zeros."""
    for i in range(count):
        for j in range(count):
            matrix = torch.eye(count, dtype=torch.float64)
            if i != j:
                matrix[i, j] = 1e-200
            (entry,) = jacobian(lambda x, matrix=matrix: matrix @ x, randn(count))
            assert entry.structure == ("diagonal" if i == j else "dense"), (i, j)


def test_probes_are_bounded_and_stated() -> None:
    calls = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return grad.clone()

    (entry,) = jacobian(Counted.apply, randn(100, 30))
    assert entry.structure == "diagonal"
    assert calls == 1 + 2 * 7 + 2 * 12  # ceil(log2) of 100 rows and of 3000 elements
    assert entry.probed == f"{calls} random upstream gradients"
    (entry,) = jacobian(lambda x, w: x, randn(2), randn(2)).entries[1:]
    assert (entry.structure, entry.probed) == ("zero", "no path in the graph leads to w")


# ---- the lecture ---------------------------------------------------------------------------------


def test_lecture_relu_is_diagonal() -> None:
    """[1, -2, 3, -1] with upstream [4, -1, 5, 9] gives [4, 0, 5, 0] (row 21)."""
    (entry,) = jacobian(F.relu, torch.tensor([1.0, -2.0, 3.0, -1.0]))
    upstream = torch.tensor([4.0, -1.0, 5.0, 9.0])
    assert entry.structure == "diagonal"
    assert entry.explicit("lecture").tolist() == torch.diag(torch.tensor([1.0, 0, 1, 0])).tolist()
    assert (entry.explicit("lecture") @ upstream).tolist() == [4, 0, 5, 0]
    assert entry.vjp(upstream).tolist() == [4, 0, 5, 0]


def test_lecture_matrix_product() -> None:
    """Row 22; the gradients of its upstream gradient, explicit and implicit."""
    x = torch.tensor([[2.0, 1, -3], [-3, 4, 2]])
    w = torch.tensor([[3.0, 2, 1, -1], [2, 1, 3, 2], [3, 2, 1, -2]])
    upstream = torch.tensor([[2.0, 3, -3, 9], [-8, 1, 4, 6]])
    expected = {
        "x": [[0, 16, -9], [-24, 9, -30]],
        "w": [[28, 3, -18, 0], [-30, 7, 13, 33], [-22, -7, 17, -15]],
    }
    found = jacobian(F.matmul, x, w)
    for name, gradient in expected.items():
        entry = found[name]
        assert entry.vjp(upstream).tolist() == gradient
        assert torch.tensordot(entry.explicit("lecture"), upstream, dims=2).tolist() == gradient
    # x[n, d] affects row y[n, :] alone, by w[d, m] (row 24).
    assert found["x"].structure == "block diagonal by row"
    assert found["w"].structure == "dense"
    for n in range(2):
        for d in range(3):
            affected = torch.zeros(2, 4)
            affected[n] = w[d]
            assert torch.equal(found["x"].explicit("lecture")[n, d], affected)


# ---- modules, and functions that batching cannot run ---------------------------------------------


def test_parameters_of_a_module() -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    x = randn(4, 3)
    assert [entry.input for entry in jacobian(layer, x)] == ["input"]
    of_x, of_weight = jacobian(layer, x, parameters=True)
    assert (of_x.input, of_weight.input) == ("input", "weight")
    expected = torch.autograd.functional.jacobian(
        lambda w: nn.functional.linear(x, w, layer.bias), layer.weight.detach()
    )
    torch.testing.assert_close(of_weight.explicit(), expected)


class ByNumpy(torch.autograd.Function):
    """x^2, with a backward that nothing can batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * grad.numpy())


def test_backward_that_vmap_cannot_run() -> None:
    x = randn(5)
    (entry,) = jacobian(ByNumpy.apply, x)
    torch.testing.assert_close(entry.explicit(), torch.diag(2 * x))


def test_many_batches_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("torchbp.graph.jacobian"), "_BATCH", 40)
    x, w = randn(3, 4), randn(4, 5)
    expected = torch.autograd.functional.jacobian(torch.matmul, (x, w))
    for entry, matrix in zip(jacobian(torch.matmul, x, w), expected, strict=True):
        torch.testing.assert_close(entry.explicit(), matrix)


def test_nothing_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.ReLU(inplace=True)).train()
    x = torch.randn(4, 3, requires_grad=True)
    copy, state = x.detach().clone(), {k: v.clone() for k, v in model.state_dict().items()}
    buffers, random = dict(model[0]._buffers), torch.get_rng_state()
    for fn in (model, lambda x: model(x), model.forward):
        found = jacobian(fn, x)
        found[0].explicit()
        str(found)
        found.costs(min_run_time=0)
        found.plot()
    assert torch.equal(x, copy)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(model[0]._buffers[name] is held for name, held in buffers.items())
    assert torch.equal(torch.get_rng_state(), random)
    y = nn.functional.relu_(x.detach().clone())
    assert torch.equal(
        jacobian(nn.ReLU(inplace=True), x)[0].explicit().sum((2, 3)), (y > 0).float()
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad(mode: Callable[[], Any]) -> None:
    with mode():
        (entry,) = jacobian(F.relu, torch.tensor([1.0, -1.0]))
        assert entry.explicit().tolist() == [[1, 0], [0, 0]]


# ---- what it shows -------------------------------------------------------------------------------


def test_table_and_repr() -> None:
    found = jacobian(F.matmul, torch.ones(2, 3), torch.ones(3, 4))
    text = str(found)
    for words in ("Jacobians of matmul", "y [2, 4]", "[2, 4, 3, 4]", "384 B", "block diagonal by"):
        assert words in text
    assert repr(found[1]) == "<Jacobian dy/dw [2, 4, 3, 4]: 384 B, dense>"
    assert repr(found[1]) in repr(found)
    assert len(found) == 2
    assert found.bytes == 384 + 8 * 6 * 4


def test_costs() -> None:
    (cost,) = jacobian(F.relu, torch.ones(50)).costs(min_run_time=0)
    assert (cost.explicit_bytes, cost.implicit_bytes) == (50 * 50 * 4, 2 * 50 * 4)
    assert cost.forming is not None
    assert cost.product is not None
    assert cost.implicit is not None
    assert min(cost.forming, cost.product, cost.implicit) > 0
    assert "explicit 9.766 KiB, forming" in str(cost)
    (cost,) = jacobian(F.relu, torch.ones(50), budget=100).costs(min_run_time=0)
    assert cost.forming is cost.product is None
    assert cost.implicit is not None
    (cost,) = jacobian(F.relu, torch.ones(50, device="meta")).costs()
    assert cost.implicit is None
    assert "not measured" in str(cost)


def test_plot(tmp_path: Path) -> None:
    found = jacobian(F.matmul, torch.ones(2, 3), torch.ones(3, 4))
    figure = found.plot(tmp_path / "product.png")
    assert (tmp_path / "product.png").stat().st_size > 1000
    pictures = [axes for axes in figure.axes if axes.images]
    assert [axes.get_ylabel() for axes in pictures[:2]] == ["x [2, 3]", "w [3, 4]"]
    drawn = pictures[0].images[0].get_array()
    assert drawn is not None
    expected = found[0].explicit().reshape(8, 6).t()
    assert torch.equal(torch.tensor(np.ma.filled(drawn, 0)), expected)
    assert torch.equal(torch.tensor(np.ma.getmaskarray(drawn)), expected == 0)  # white
    transposed = found[0].plot(layout="torch").axes[0].images[0].get_array()
    assert transposed is not None
    assert torch.equal(torch.tensor(np.ma.filled(transposed, 0)), expected.t())


def test_plot_of_what_is_large() -> None:
    (axes, *_) = jacobian(F.relu, torch.ones(2048)).plot().axes
    drawn = axes.images[0].get_array()
    assert drawn is not None
    assert drawn.shape == (256, 256)
    assert np.ma.getmaskarray(drawn).sum() == 256 * 255  # white elsewhere
    assert drawn.diagonal().min() == 1  # no entry is lost
    (axes,) = jacobian(torch.relu, torch.ones(64, 4096, device="meta")).plot().axes
    assert "256 GiB\nabove the budget" in axes.texts[0].get_text()
    (axes,) = jacobian(torch.relu, torch.ones(2, device="meta")).plot().axes
    assert "on meta" in axes.texts[0].get_text()
    (axes,) = jacobian(torch.relu, torch.ones(0)).plot().axes
    assert "empty" in axes.texts[0].get_text()


def test_plot_of_what_is_not_finite() -> None:
    (axes, *_) = jacobian(torch.sqrt, torch.tensor([0.0, 0.25])).plot().axes
    drawn = axes.images[0].get_array()
    assert drawn is not None
    assert np.ma.filled(drawn, 0).tolist() == [[1, 1], [0, 1]]
    assert [text.get_text() for text in axes.texts] == ["inf", "nan", "1"]


# ---- errors --------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    x = torch.ones(2)
    with pytest.raises(TypeError, match="fn wants a function or module, got int"):
        jacobian(3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one floating tensor, got none"):
        jacobian(F.relu)
    with pytest.raises(ValueError, match=r"floating tensor, got a tensor of torch\.int64, int"):
        jacobian(F.relu, torch.tensor([1]), 2)
    with pytest.raises(TypeError, match="budget wants a number of bytes, got str"):
        jacobian(F.relu, x, budget="1 GiB")  # type: ignore[arg-type]
    for budget in (-1, float("nan")):
        with pytest.raises(ValueError, match="budget wants a number of bytes >= 0"):
            jacobian(F.relu, x, budget=budget)
    with pytest.raises(TypeError, match="parameters=True wants fn to be a module, got relu"):
        jacobian(F.relu, x, parameters=True)
    with pytest.raises(TypeError, match=r"argmax wants to return .*, got a tensor of torch\.int64"):
        jacobian(torch.argmax, x)
    with pytest.raises(TypeError, match="got float"):
        jacobian(lambda x: x.sum().item(), x)
    with pytest.raises(ValueError, match="LazyLinear has parameters that its first call"):
        jacobian(nn.LazyLinear(2), x)
    (entry,) = jacobian(F.relu, x)
    with pytest.raises(ValueError, match='layout wants "torch" or "lecture", got \'numpy\''):
        entry.explicit("numpy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout wants"):
        entry.plot(layout="numpy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"upstream wants a torch\.Tensor, got int"):
        entry.vjp(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"upstream wants the shape of y, \[2\], got \[3\]"):
        entry.vjp(torch.ones(3))
    (entry,) = jacobian(F.relu, torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="meta have sizes and no values"):
        entry.explicit()


def test_what_autograd_cannot_differentiate() -> None:
    x = torch.ones(2)
    for fn in (lambda x: x.detach(), lambda x: torch.tensor(x.tolist()), lambda x: torch.ones(2)):
        with pytest.raises(ValueError, match="autograd cannot differentiate <lambda>: its output"):
            jacobian(fn, x)

    class Without(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    with pytest.raises(ValueError, match=r"cannot differentiate Without: .*backward"):
        jacobian(Without.apply, x)

    def own_error(x: Tensor) -> Tensor:
        raise KeyError("of the function")

    with pytest.raises(KeyError, match="of the function"):
        jacobian(own_error, x)
