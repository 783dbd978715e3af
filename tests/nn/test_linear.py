"""Linear and Maxout: initialisation, state_dict, dtypes, copies, and bad arguments."""

# ruff: noqa: E501  (tables: one row a line)
from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import torchbp
from tests.compare import assert_same
from torchbp.nn import Linear, Maxout

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.relu,
    "leaky_relu": TF.leaky_relu,
    "elu": TF.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(7, 5), (1, 1), (0, 3), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_same_initialisation_as_torch(sizes: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Linear(*sizes, bias)
    after = torch.rand(())
    torch.manual_seed(0)
    ours = Linear(*sizes, bias, activation="relu")
    assert torch.equal(torch.rand(()), after), "another number of draws"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x = torch.randn(2, sizes[0])
    assert_same(ours(x), torch.relu(theirs(x)), 1e-6, 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients(activation: str | None) -> None:
    ours = Linear(4, 3, activation=activation, dtype=torch.float64)
    theirs = torch.nn.Linear(4, 3, dtype=torch.float64)
    assert (
        str(theirs.load_state_dict(ours.state_dict(), strict=True))
        == "<All keys matched successfully>"
    )
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, 3, dtype=torch.float64)
    results: list[Any] = []
    for y, module in ((ours(x), ours), (ACTIVATIONS[activation](theirs(x)), theirs)):
        results.append((y, torch.autograd.grad(y, [x, *module.parameters()], dy)))
    assert_same(*results)


@pytest.mark.parametrize("way", ["ours to theirs", "theirs to ours"])
def test_state_dict_both_ways(way: str) -> None:
    modules = Linear(4, 3, activation="tanh"), torch.nn.Linear(4, 3)
    source, target = modules if way == "ours to theirs" else modules[::-1]
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict(Linear(5, 3).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": lambda module: saved(module),
}


def saved(module: torch.nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "module", [Linear(4, 3, activation="elu"), Maxout(4, 3)], ids=["linear", "maxout"]
)
def test_copies(module: torch.nn.Module, way: Callable[[Any], Any]) -> None:
    x = torch.randn(2, 4)
    other = way(module)
    assert_same(other(x), module(x), 0, 0)
    assert repr(other) == repr(module)
    assert all(p is not q for p, q in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    for module in (Linear(4, 3, activation="relu"), Maxout(4, 3)):
        x = torch.randn(2, 4)
        wanted = module(x.to(dtype).float())
        y = module.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert_same(y.float(), wanted.float(), 0.02, 0.02)
        with pytest.raises(TypeError, match=r"weight wants the dtype of x"):
            module(x.to(torch.float16 if dtype != torch.float16 else torch.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled(activation: str | None) -> None:
    torch._dynamo.reset()
    module = Linear(4, 3, activation=activation)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, requires_grad=True)
    mine, theirs = (
        torch.autograd.grad(f(x).sin().sum(), [x, *module.parameters()]) for f in (module, compiled)
    )
    assert_same(mine, theirs, 1e-6, 1e-6)


def test_repr() -> None:
    assert repr(Linear(4, 3)) == repr(torch.nn.Linear(4, 3))
    assert (
        repr(Linear(4, 3, False, "elu"))
        == "Linear(in_features=4, out_features=3, bias=False, activation='elu')"
    )
    assert repr(Maxout(4, 3, 5)) == "Maxout(in_features=4, out_features=3, pieces=5, bias=True)"


def test_parametrizations_are_used() -> None:
    x = torch.randn(2, 4)
    modules: list[Any] = [Linear(4, 3), Linear(4, 3, activation="relu"), Maxout(4, 3)]
    for module in modules:
        torch.nn.utils.parametrizations.weight_norm(module)
        module.parametrizations.weight.original0.data.mul_(2)
        plain = copy.copy(module.weight)
        y = module(x)
        wanted = (
            torchbp.functional.maxout(x, plain, module.bias)
            if isinstance(module, Maxout)
            else torchbp.functional.linear(x, plain, module.bias, module.activation)
        )
        assert_same(y, wanted, 0, 0)
        y.sum().backward()
        assert module.parametrizations.weight.original0.grad is not None


@pytest.mark.parametrize("bias", [True, False])
def test_maxout_is_the_largest_of_its_pieces(bias: bool) -> None:
    module: Any = Maxout(4, 3, 2, bias, dtype=torch.float64)
    assert list(module.state_dict()) == ["weight"] + ["bias"] * bias
    first, second = (torch.nn.Linear(4, 3, bias, dtype=torch.float64) for _ in range(2))
    for piece, linear in enumerate((first, second)):
        linear.weight.data = module.weight.data[piece]
        if bias:
            linear.bias.data = module.bias.data[piece]
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_same(module(x), torch.maximum(first(x), second(x)))


def test_maxout_initialisation() -> None:
    module = Maxout(100, 50, 3)
    assert module.weight.shape == (3, 50, 100)
    for parameter in module.parameters():
        assert parameter.abs().max() <= 0.1
        assert abs(parameter.mean().item()) < 0.02
        assert parameter.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.2)
    before = module.weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.weight, before)


WRONG: Any = torch.relu, torch.device("cpu"), 4.0
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Linear(3, 4, activation="gelu"), ValueError, "Linear: activation wants one of .*, got 'gelu'"),
    (lambda: Linear(3, 4, activation=WRONG[0]), TypeError, "Linear: activation wants one of "),
    (lambda: Linear(3, 4, True, WRONG[1]), TypeError, "Linear: activation wants one of .*, got device"),
    (lambda: Maxout(0, 4), ValueError, "Maxout: in_features wants a positive int, got 0"),
    (lambda: Maxout(3, -1), ValueError, "Maxout: out_features wants a positive int, got -1"),
    (lambda: Maxout(3, WRONG[2]), TypeError, "Maxout: out_features wants an int, got float"),
    (lambda: Maxout(3, True), TypeError, "Maxout: out_features wants an int, got bool"),
    (lambda: Maxout(3, 4, 0), ValueError, "Maxout: pieces wants a positive int, got 0"),
    (lambda: Maxout(3, 4, 257), ValueError, "Maxout: pieces wants at most 256, got 257"),
    (lambda: Linear(3, 4)(torch.ones(2, 4)), ValueError, r"linear: x wants shape \(..., 3\)"),
    (lambda: Linear(3, 4)([1.0]), TypeError, "linear: x wants a torch.Tensor, got list"),
    (lambda: Maxout(3, 4)(torch.ones(2, 4)), ValueError, r"maxout: x wants shape \(..., 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (its exact type is asserted below)
        call()
    assert type(caught.value) is error
    assert re.match(message, str(caught.value))
