"""convert: the same function of the same parameters, in every kind of model, the original as it was."""

# ruff: noqa: E501  (tables: one row a line)
from __future__ import annotations

import copy
import functools
import gc
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchbp
from tests.compare import assert_same


def state(module: nn.Module) -> dict[str, Any]:
    """What must not change: classes, attributes and hooks of every module in it, by path."""
    return {
        path: (
            type(part),
            {
                k: copy.copy(v) if isinstance(v, dict | list | set) else v
                for k, v in vars(part).items()
            },
        )
        for path, part in module.named_modules()
    }


def convert(module: nn.Module, left: str | None = None) -> nn.Module:
    """torchbp.convert, checked for what holds of every model; `left`: what the warning has to say."""
    before = state(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = torchbp.convert(module)
    messages = [str(warning.message) for warning in caught]
    if left is None:
        assert messages == []
    else:
        assert len(messages) == 1
        assert re.fullmatch(f"convert left alone: {left}", messages[0]), messages[0]
        assert caught[0].filename == __file__
    assert str(state(module)) == str(before)
    assert result is not module
    assert list(result.state_dict()) == list(module.state_dict())
    for (name, mine), (other, theirs) in zip(
        tensors(result).items(), tensors(module).items(), strict=True
    ):
        assert name == other
        assert mine is theirs
    for part, twin in zip(result.modules(), module.modules(), strict=True):
        assert part is not twin
        assert part.training == twin.training
    result.load_state_dict(module.state_dict(), strict=True)
    module.load_state_dict(result.state_dict(), strict=True)
    return result


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same_function(ours: Any, theirs: Any, *inputs: Tensor) -> None:
    results: list[Any] = []
    for module in (ours, theirs):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        torch.manual_seed(1)
        y = module(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        parameters = [p for p in module.parameters() if p.requires_grad]
        results.append((y, torch.autograd.grad(y.sin().sum(), parameters, allow_unused=True)))
        for name, buffer in module.named_buffers():  # running statistics are shared
            buffer.copy_(buffers[name])
    assert_same(*results)


def own(module: nn.Module) -> set[str]:
    """The names of torchbp's classes in a module."""
    return {
        type(part).__name__
        for part in module.modules()
        if type(part).__module__.startswith("torchbp.")
    }


class Block(nn.Module):
    """A residual block with a norm between, as a user writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size)
        self.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(2)])
        self.acts = nn.ModuleDict({"inner": nn.ELU(0.5), "outer": nn.LeakyReLU(0.2)})
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        h = self.acts["inner"](self.layers[0](self.norm(x)))
        return x + self.acts["outer"](self.layers[1](h)) * self.scale + self.shift


class Shared(nn.Module):
    """One module used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.first = self.encoder[0]
        self.again = self.encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(self.encoder(x)))


class Aliases(nn.Module):
    """Layers kept in plain attributes beside their registration, and a parent pointer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sigmoid()
        self.drop = nn.Dropout(0.5)
        self.chain: list[Any] = [self.fc1, (self.act, self.drop)]
        self.by_name: dict[str, Any] = {"head": [self.fc2]}
        self.call: Any = self.act.forward
        self.bound = functools.partial(self.apply_layer, self.fc2)
        self.forward = self.other_forward  # type: ignore[method-assign]
        object.__setattr__(self.fc1, "parent", self)
        self.alias: Any
        object.__setattr__(self, "alias", self.fc1)

    def apply_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    def other_forward(self, x: Tensor) -> Tensor:
        first, (act, drop) = self.chain
        x = drop(act(first(x)))
        return self.bound(self.call(self.by_name["head"][0](self.alias(x))))


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4))


def frozen() -> nn.Module:
    model = sequential()
    model[0].requires_grad_(False)
    return model


def half_trained() -> nn.Module:
    model = nn.Sequential(sequential(), sequential())
    model[0].eval()
    return model


RELU = nn.ReLU()
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str], str | None]] = {
    "linear": (lambda: nn.Linear(4, 4), {"Linear"}, None),
    "no bias": (lambda: nn.Linear(4, 4, bias=False), {"Linear"}, None),
    "sequential": (sequential, {"MLP", "Linear", "ReLU"}, None),
    "frozen": (frozen, {"MLP", "Linear", "ReLU"}, None),
    "eval in part": (half_trained, {"MLP", "Linear", "ReLU"}, None),
    "named sequential": (
        lambda: nn.Sequential(OrderedDict(fc=nn.Linear(4, 5), act=nn.Tanh(), head=nn.Linear(5, 4))),
        {"MLP", "Linear", "Tanh"}, None),
    "shared activation": (
        lambda: nn.Sequential(nn.Linear(4, 4), RELU, nn.Linear(4, 4), RELU, nn.Linear(4, 4)),
        {"MLP", "Linear", "ReLU"}, None),
    "not an MLP": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.Softmax(-1)),
        {"Linear"}, None),
    "block": (lambda: nn.Sequential(Block(4), Block(4)), {"Linear", "ELU", "LeakyReLU"},
              r"0 \(Block\): no twin; 0.norm \(BatchNorm1d\): no twin; 1 \(Block\): no twin; 1.norm \(BatchNorm1d\): no twin"),
    "shared": (Shared, {"MLP", "Linear", "Tanh"}, None),
    "aliases": (Aliases, {"Linear", "Sigmoid"}, None),
    "already torchbp": (lambda: torchbp.nn.MLP([4, 5, 4]), {"MLP", "Linear", "ReLU"}, None),
    "fused already": (lambda: nn.Sequential(torchbp.nn.Linear(4, 4, activation="elu"), nn.Linear(4, 4)), {"Linear"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("make", "classes", "left"), MODELS.values(), ids=MODELS)
def test_models(make: Callable[[], nn.Module], classes: set[str], left: str | None) -> None:
    model = make().double()
    fast = convert(model, left)
    assert own(fast) == classes
    assert_same_function(fast, model, torch.randn(6, 4, dtype=torch.float64))
    model.eval()
    fast.eval()
    assert_same_function(fast, model, torch.randn(6, 4, dtype=torch.float64))
    assert_same_function(
        convert(copy.deepcopy(fast), left), model, torch.randn(6, 4, dtype=torch.float64)
    )


def test_every_twin() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.Sigmoid(),
                           nn.Tanh(), nn.CrossEntropyLoss()])  # fmt: skip
    fast: Any = convert(model)
    for mine, theirs in zip(list(fast), list(model), strict=True):
        assert type(mine).__module__.startswith("torchbp.nn.")
        assert type(mine).__name__ == type(theirs).__name__
        assert repr(mine) == repr(theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.rand(3)},
        {"ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1},
    ],
)
def test_losses(options: dict[str, Any]) -> None:
    loss = nn.CrossEntropyLoss(**options)
    fast = convert(loss)
    input, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert_same(fast(input, target), loss(input, target), 1e-6, 1e-6)


def test_structure_is_kept() -> None:
    model = Shared()
    fast: Any = convert(model)
    assert fast.encoder is fast.again
    assert fast.first is fast.encoder[0]
    fast = convert(Aliases())
    assert fast.chain[0] is fast.alias is fast.fc1
    assert fast.fc1.parent is fast
    assert fast.by_name["head"][0] is fast.bound.args[0] is fast.fc2
    assert fast.call.__self__ is fast.act
    assert fast.forward.__self__ is fast
    linear = nn.Linear(2, 2)
    linear.note = "kept"  # type: ignore[assignment]
    assert convert(linear).note == "kept"


def test_training_one_trains_the_other() -> None:
    model = nn.Sequential(sequential(), nn.BatchNorm1d(4))
    fast = convert(model, r"1 \(BatchNorm1d\): no twin")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    fast(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name
        assert torch.equal(value, fast.state_dict()[name])


def test_each_has_children_hooks_and_modes_of_its_own() -> None:
    model = nn.Sequential(sequential(), Block(4))
    fast: Any = torchbp.convert(model, verbose=False)
    before = str(state(model))
    fast.eval()
    fast.append(nn.Identity())
    fast[0][0] = nn.Linear(4, 5)
    for part in fast.modules():
        part.register_forward_hook(lambda *_: None)
        part.register_state_dict_post_hook(lambda *_: None)
    fast[1].register_buffer("more", torch.ones(1), persistent=False)
    assert str(state(model)) == before


def test_attention() -> None:
    for model in (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                8, 2, 16, dropout=0.0, activation=nn.ReLU(), batch_first=True
            ),
            2,
        ),
    ):
        model = model.double()
        fast = convert(model, r".*self_attn \(MultiheadAttention\): no twin; .*out_proj \(NonDyn.*")
        assert "Linear" in own(fast)
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        assert_same_function(fast, model, x)
        model.eval()
        fast.eval()
        assert_same_function(fast, model, x)
        with torch.no_grad():
            assert_same(fast(x), model(x))  # torch's fast path, which reads the weights
    attention = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    fast = convert(attention, r"the module itself \(MultiheadAttention\): no twin; out_proj .*")
    assert_same_function(fast, attention, x, x, x)


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def patched() -> nn.Module:
    layer: Any = nn.Linear(4, 4)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1
    return layer


def patched_container() -> nn.Module:
    model: Any = sequential()
    original = model.forward
    model.forward = lambda x: original(x) + 1
    return model


def parametrised(bias: bool = True) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias))


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "subclass": (lambda: MyLinear(4, 4), r"1 \(MyLinear\): no twin"),
    "convolution": (lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1), nn.Flatten()), r"1.1 \(Conv1d\): no twin"),
    "hooks": (hooked, r"1 \(Linear\): has hooks or a forward of its own"),
    "forward of a layer": (patched, r"1 \(Linear\): has hooks or a forward of its own"),
    "forward of a container": (patched_container, r"1 \(Sequential\): has a forward of its own"),
    "parametrised": (parametrised, r"1 \(ParametrizedLinear\): is parametrised"),
    "parametrised, no bias": (lambda: parametrised(False), r"1 \(ParametrizedLinear\): is parametrised"),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), r"1 \(Linear\): has hooks or a forward of its own"),
    "compiled": (lambda: torch.compile(nn.Linear(4, 4), backend="eager"), r"1 \(OptimizedModule\): has a forward of its own"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("make", "left"), LEFT.values(), ids=LEFT)
def test_left_alone_and_named(make: Callable[[], nn.Module], left: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 4)).double()
    with torch.no_grad():
        model(torch.ones(2, 4, dtype=torch.float64))
    fast: Any = convert(model, left)
    assert type(fast[0]) is torchbp.nn.Linear
    assert type(fast[1]) is type(model[1])
    assert_same_function(fast, model, torch.randn(5, 4, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchbp.convert(model, verbose=False)


def test_hooks_of_containers_go_on() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sequential()
            self.seen: list[Any] = []
            self.body.register_forward_hook(self.record)

        def record(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.seen = [self, module]
            return 2 * output

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Watched().double()
    fast: Any = convert(model)
    assert type(fast.body) is torchbp.nn.MLP
    assert_same_function(fast, model, torch.randn(5, 4, dtype=torch.float64))
    assert model.seen == [model, model.body]
    assert fast.seen == [fast, fast.body]


def test_load_state_dict_hooks_outlive_the_original() -> None:
    class Loads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.loads = 0
            self.register_load_state_dict_pre_hook(Loads.count)

        def count(self, *args: Any) -> None:
            self.loads += 1

    fast: Any = torchbp.convert(Loads())
    gc.collect()
    fast.load_state_dict(fast.state_dict())
    assert fast.loads == 1


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"^convert: 0 \(LazyLinear\) has no shapes yet"):
        torchbp.convert(model)
    model(torch.ones(2, 4))
    assert type(convert(model)) is torchbp.nn.MLP


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_module_is_shared() -> None:
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.warns(
        UserWarning, match=r"^convert left alone: 0 \(RecursiveScriptModule\): is a Scr"
    ):
        fast = torchbp.convert(nn.Sequential(scripted, nn.Linear(4, 4)))
    assert fast[0] is scripted  # type: ignore[index]


def test_what_cannot_be_found_still_runs_on_the_same_weights() -> None:
    class Closure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            fc = self.fc
            self.run = lambda x: fc(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    model = Closure().double()
    fast = convert(model)
    assert type(fast.fc) is torchbp.nn.Linear
    assert_same_function(fast, model, torch.randn(2, 4, dtype=torch.float64))


def test_compiled_after_converting() -> None:
    model = nn.Sequential(sequential(), nn.Sigmoid(), nn.Linear(4, 2)).double().eval()
    fast = torch.compile(convert(model), fullgraph=True, backend="aot_eager")
    assert_same_function(fast, model, torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("value", [None, "model", nn.Linear, [nn.Linear(2, 2)], torch.relu])
def test_not_a_module(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^convert: module wants a torch.nn.Module, got "):
        torchbp.convert(value)
