"""MLP: the Sequential of its layers in everything, however it is used, and fused where it can be."""

# ruff: noqa: E501  (tables: one row a line)
from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import torchbp
from tests.compare import assert_same
from torchbp.nn import MLP

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
}  # fmt: skip
SIZES = [4, 6, 5, 3]


def sequential(
    activation: str = "relu", bias: bool = True, dropout: float = 0.0, dtype: Any = torch.float64
) -> nn.Sequential:
    """The Sequential that MLP(SIZES, ...) stands for."""
    layers: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(pairwise(SIZES)):
        layers.append(nn.Linear(size_in, size_out, bias, dtype=dtype))
        if i + 2 < len(SIZES):
            layers.append(ACTIVATIONS[activation]())
            layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)


def pair(activation: str = "relu", **options: Any) -> tuple[Any, Any]:
    """An MLP and its Sequential, of equal and separate weights."""
    theirs = sequential(activation, **options)
    ours = MLP(SIZES, activation, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def x_of(rows: int = 7) -> Tensor:
    return torch.randn(rows, SIZES[0], dtype=torch.float64)


def assert_same_function(ours: Any, theirs: Any, x: Tensor | None = None) -> None:
    """Equal outputs and gradients, from equal random states."""
    x = x_of() if x is None else x
    results: list[Any] = []
    for model in (ours, theirs):
        x = x.detach().requires_grad_()
        torch.manual_seed(1)
        y = model(x)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        results.append((y, torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True)))
    assert_same(*results)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often functional.mlp ran since the last call."""
    calls: list[int] = []
    original = torchbp.functional.mlp

    def counting(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(torchbp.functional, "mlp", counting)

    def count() -> int:
        n = len(calls)
        calls.clear()
        return n

    return count


# ---- the same as the Sequential ------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_initialisation(activation: str, bias: bool, dropout: float) -> None:
    torch.manual_seed(0)
    theirs = sequential(activation, bias, dropout)
    torch.manual_seed(0)
    ours = MLP(SIZES, activation, bias, dropout, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert repr(ours) == repr(theirs).replace("Sequential", "MLP")
    for _ in range(2):
        assert_same_function(ours, theirs)  # with dropout: the same elements
        ours.eval()
        theirs.eval()


@pytest.mark.parametrize("way", ["ours to theirs", "theirs to ours"])
def test_state_dict_both_ways(way: str) -> None:
    models = MLP(SIZES, dtype=torch.float64), sequential()
    source, target = models if way == "ours to theirs" else models[::-1]
    target.load_state_dict(source.state_dict(), strict=True)
    assert_same_function(*models)


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m)],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies(way: Callable[[Any], Any], fused: Callable[[], int]) -> None:
    ours, theirs = pair("tanh")
    assert_same_function(way(ours), theirs)
    assert fused() == 1
    model = way(ours)
    model[0].weight.data.zero_()
    assert_same_function(ours, theirs)


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = pair("elu")
    y = ours.to(dtype)(x := x_of().to(dtype))
    assert y.dtype == dtype
    assert_same(y.float(), theirs.to(dtype)(x).float(), 0.02, 0.02)


def test_single_layer_and_leading_dimensions() -> None:
    ours, theirs = MLP([4, 3], dtype=torch.float64), nn.Sequential(nn.Linear(4, 3)).double()
    theirs.load_state_dict(ours.state_dict())
    for shape in ((4,), (0, 4), (2, 3, 4)):
        assert_same_function(ours, theirs, torch.randn(shape, dtype=torch.float64))


def test_frozen_and_shared_parameters() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model[0].requires_grad_(False)
        model[2].bias.requires_grad_(False)
    assert_same_function(ours, theirs)
    tied, twin = (
        MLP([4, 4, 4], dtype=torch.float64),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double(),
    )
    tied[2] = tied[0]
    twin.append(twin[0])
    twin.load_state_dict(tied.state_dict())
    assert_same_function(tied, twin)


def test_data_parallel_replica(fused: Callable[[], int]) -> None:
    """What torch.nn.DataParallel makes: no _parameters, the tensors as plain attributes."""
    ours, theirs = pair()
    replica = ours._replicate_for_data_parallel()
    for name, layer in ours._modules.items():
        assert layer is not None
        part = layer._replicate_for_data_parallel()
        for key, value in layer._parameters.items():
            setattr(part, key, value)
        replica._modules[name] = part
    assert_same(replica(x := x_of()), theirs(x))
    assert fused() == 1


# ---- transforms -------------------------------------------------------------------------------------


def test_compile_and_export() -> None:
    for dropout in (0.0, 0.5):
        ours, theirs = pair("tanh", dropout=dropout)
        ours.eval()
        theirs.eval()
        assert_same_function(torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs)
        exported = torch.export.export(ours, (x := x_of(),)).module()
        assert_same(exported(x), theirs(x))


def test_compiled_again_after_a_change() -> None:
    ours, theirs = pair()
    compiled = torch.compile(ours, backend="aot_eager")
    assert_same_function(compiled, theirs)
    for model in (ours, theirs):
        model[1] = nn.Tanh()
    assert_same_function(compiled, theirs)
    for model in (ours, theirs):
        model.append(nn.Sigmoid())
    assert_same_function(compiled, theirs)


def test_per_sample_gradients() -> None:
    ours, theirs = pair("sigmoid")
    x = x_of()
    results: list[Any] = []
    for model in (ours, theirs):

        def loss(parameters: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters: dict[str, Any] = dict(model.named_parameters())
        results.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    assert_same(*results)


# ---- what must not be skipped ---------------------------------------------------------------------


def watch(model: nn.Sequential, register: str) -> list[int]:
    """Registers a hook on every layer; the list it returns grows by a layer's position."""
    seen: list[int] = []
    for i, layer in enumerate(model):
        getattr(layer, register)(lambda *_, i=i: seen.append(i))
    return seen


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_hooks_of_layers(register: str, fused: Callable[[], int]) -> None:
    ours, theirs = pair()
    assert_same_function(ours, theirs)
    assert fused() == 1
    seen = watch(ours, register), watch(theirs, register)
    assert_same_function(ours, theirs)
    assert fused() == 0
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == list(range(5))
    for layer in ours:
        for hooks in vars(layer).values():
            if isinstance(hooks, OrderedDict):
                hooks.clear()
    ours(x_of())
    assert fused() == 1


def test_hooks_that_change_values() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model[1].register_forward_hook(lambda module, args, output: 2 * output)
        model.register_forward_hook(lambda module, args, output: output + 1)
    assert_same_function(ours, theirs)


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_global_hooks(register: Callable[..., Any]) -> None:
    ours, theirs = pair()
    seen: list[str] = []
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        for model in (ours, theirs):
            model(x_of().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert [name.replace("MLP", "Sequential") for name in seen[:6]] == seen[6:]


def lora(model: nn.Sequential) -> None:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x[..., :1]

    model[2] = LoRA(model[2])


def patch(model: Any) -> None:
    original = model[2].forward
    model[2].forward = lambda x: original(x) + 1  # type: ignore[method-assign]


def wakeful(model: nn.Sequential) -> None:
    """Dropout that stays on in a model in eval mode."""
    model.insert(2, nn.Dropout(0.5))
    model.eval()
    model[2].train()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "append": lambda m: m.append(nn.ReLU()),
    "append layers": lambda m: m.append(nn.ReLU()).append(nn.Linear(3, 2, dtype=torch.float64)),
    "append twice": lambda m: m.append(nn.Linear(3, 2, dtype=torch.float64)),
    "insert": lambda m: m.insert(0, nn.Tanh()),
    "insert dropout": lambda m: m.insert(0, nn.Dropout(0.5)),
    "extend": lambda m: m.extend([nn.Softmax(-1), nn.Identity()]),
    "iadd": lambda m: m.__iadd__(nn.Sequential(nn.ReLU(), nn.ReLU())),
    "delete the last": lambda m: m.__delitem__(-1),
    "delete two": lambda m: m.__delitem__(slice(3, None)),
    "delete all": lambda m: m.__delitem__(slice(None)),
    "pop": lambda m: m.pop(1),
    "replace an activation": lambda m: m.__setitem__(1, nn.Tanh()),
    "replace all activations": lambda m: replace_both(m, nn.Tanh()),
    "another slope": lambda m: replace_both(m, nn.LeakyReLU(0.3)),
    "gelu": lambda m: m.__setitem__(3, nn.GELU()),
    "layer norm": lambda m: m.insert(1, nn.LayerNorm(6, dtype=torch.float64)),
    "replace a layer": lambda m: m.__setitem__(0, nn.Linear(4, 6, dtype=torch.float64)),
    "no bias in one": lambda m: m[2].register_parameter("bias", None),
    "lora": lora,
    "forward of a layer": patch,
    "dropout that is on": wakeful,
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m[2]),
    "own parametrization": lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Symmetric()),
    "old weight_norm": lambda m: nn.utils.weight_norm(m[2]),
    "prune": lambda m: nn.utils.prune.l1_unstructured(m[2], "weight", 0.5),
    "pruned bias": lambda m: nn.utils.prune.l1_unstructured(m[0], "bias", 0.5),
    "removed prune": lambda m: nn.utils.prune.remove(nn.utils.prune.l1_unstructured(m[2], "weight", 0.5), "weight"),
    "plain tensor for a weight": lambda m: plain_weight(m[2]),
}  # fmt: skip


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh() * 2


def replace_both(model: nn.Sequential, activation: nn.Module) -> None:
    model[1] = model[3] = activation


def plain_weight(layer: Any) -> None:
    value = layer.weight.detach() * 3
    del layer.weight
    layer.weight = value


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_after_construction(change: Callable[[nn.Sequential], Any]) -> None:
    ours, theirs = pair()
    assert_same_function(ours, theirs)
    for model in (ours, theirs):
        torch.manual_seed(0)  # for what the change draws
        change(model)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_function(ours, theirs)


def test_own_layers_with_changed_parameters() -> None:
    ours, theirs = pair("leaky_relu")
    for model in (ours, theirs):
        model[1].negative_slope = 0.5
    assert_same_function(ours, theirs)
    ours, theirs = pair()
    ours[2].activation = "tanh"
    theirs.insert(3, nn.Tanh())
    assert_same_function(ours, theirs)


@pytest.mark.parametrize(
    "part", [slice(None, -1), slice(1, None), slice(2, 4), slice(0, 0), slice(None)]
)
def test_slices(part: slice) -> None:
    ours, theirs = pair()
    assert type(ours[part]) is nn.Sequential
    assert list(ours[part]) == list(ours)[part]
    assert list(ours[part].state_dict()) == list(theirs[part].state_dict())
    x = torch.randn(2, 6 if (part.start or 0) in (1, 2) else 4, dtype=torch.float64)
    assert_same(ours[part](x), theirs[part](x))
    assert ours[-1] is list(ours)[-1]
    with pytest.raises(IndexError):
        ours[5]


def test_sums_and_products() -> None:
    ours, theirs = pair()
    head = nn.Sequential(nn.Linear(3, 4).double())
    for make in (lambda m: m + head, lambda m: head + m, lambda m: (m + head) * 2):
        x = x_of() if make(theirs)[0] is not head[0] else x_of()[:, :3]
        assert_same(make(ours)(x), make(theirs)(x))


def test_subclass(fused: Callable[[], int]) -> None:
    class Scaled(MLP):
        def __init__(self) -> None:
            super().__init__(SIZES, "tanh", dtype=torch.float64)
            self.extra = 1

        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, theirs = Scaled(), sequential("tanh")
    model.load_state_dict(theirs.state_dict())
    assert_same(model(x := x_of()), 2 * theirs(x))
    assert fused() == 1
    assert type(model[1:]) is nn.Sequential
    assert type(Scaled.from_sequential(theirs)) is Scaled


# ---- from_sequential ----------------------------------------------------------------------------------


def linear(size_in: int = 4, size_out: int = 4, **options: Any) -> nn.Linear:
    return nn.Linear(size_in, size_out, dtype=torch.float64, **options)


def accepted() -> Iterator[tuple[str, nn.Sequential]]:
    for activation in ACTIVATIONS:
        for bias in (True, False):
            for dropout in (0.0, 0.5):
                label = f"{activation} bias={bias} dropout={dropout}"
                yield label, sequential(activation, bias, dropout)
    act = nn.ReLU()
    own = torchbp.nn.Linear(4, 4, dtype=torch.float64)
    yield "one layer", nn.Sequential(linear())
    yield "shared activation", nn.Sequential(linear(), act, linear(), act, linear())
    yield "own layers", nn.Sequential(own, torchbp.nn.ReLU(), own)
    yield "named", nn.Sequential(OrderedDict(a=linear(), b=nn.Tanh(), c=linear()))
    yield "dropout first", nn.Sequential(nn.Dropout(0.5), linear(), nn.Tanh(), linear())
    yield "dropout last", nn.Sequential(linear(), nn.Tanh(), linear(), nn.Dropout(0.5))
    yield (
        "dropouts that differ",
        nn.Sequential(
            nn.Dropout(0.1), linear(), nn.Dropout(0.2), nn.Tanh(), nn.Dropout(0.3), linear()
        ),
    )
    yield "inplace", nn.Sequential(linear(), nn.ReLU(inplace=True), linear())
    yield "an MLP", MLP([4, 5, 4], "elu", dtype=torch.float64)


@pytest.mark.parametrize("theirs", [pytest.param(s, id=label) for label, s in accepted()])
def test_from_sequential(theirs: nn.Sequential, fused: Callable[[], int]) -> None:
    theirs = copy.deepcopy(theirs)
    ours = MLP.from_sequential(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine is other
    assert_same_function(ours, theirs)
    assert ours.eval().training is False
    assert theirs.training
    assert all(layer.training for layer in theirs)
    fused()
    ours(x_of())
    assert fused() == 1
    theirs.eval()
    assert_same_function(ours, theirs)


def test_from_sequential_keeps_modes_and_hooks() -> None:
    theirs = sequential(dropout=0.5)
    theirs[2].eval()
    theirs[0].register_forward_hook(lambda module, args, output: output + 1)
    ours = MLP.from_sequential(theirs)
    assert [layer.training for layer in ours] == [layer.training for layer in theirs]
    assert_same_function(ours, theirs)
    ours[1].register_forward_hook(lambda module, args, output: output + 1)
    assert not theirs[1]._forward_hooks


REFUSED: list[tuple[list[nn.Module], str]] = [
    ([], "a Linear at position 0, got the end"),
    ([nn.ReLU()], r"a Linear at position 0, got ReLU\(\)"),
    ([linear(), nn.ReLU()], "a Linear at position 2, got the end"),
    ([linear(), linear()], r"an activation at position 1, got Linear\("),
    ([linear(), nn.ReLU(), nn.ReLU(), linear()], r"a Linear at position 2, got ReLU\(\)"),
    ([linear(), nn.GELU(), linear()], r"the one activation of .* at position 1, got GELU\("),
    (
        [linear(), nn.ReLU(), linear(), nn.Tanh(), linear()],
        r"the one activation of .* at position 3",
    ),
    ([linear(), nn.LeakyReLU(0.1), linear()], r"with default parameters, at position 1, got Leaky"),
    ([linear(), nn.ELU(0.5), linear()], "with default parameters, at position 1, got ELU"),
    ([linear(), nn.ReLU(), linear(bias=False)], "if and only if the first has one, at position 2"),
    ([linear(bias=False), nn.ReLU(), linear()], "if and only if the first has one, at position 2"),
    ([torchbp.nn.Linear(4, 4, activation="relu")], "a Linear without an activation at position 0"),
    ([linear(), nn.BatchNorm1d(4), nn.ReLU(), linear()], "at position 1, got BatchNorm1d"),
    ([nn.Sequential(linear()), nn.ReLU(), linear()], "a Linear at position 0, got Sequential"),
    ([nn.LazyLinear(4)], "a Linear at position 0, got LazyLinear"),
    ([nn.utils.parametrizations.weight_norm(linear())], "a Linear at position 0, got Parametr"),
    ([nn.Flatten(), linear()], "a Linear at position 0, got Flatten"),
]


@pytest.mark.parametrize(("layers", "message"), REFUSED)
def test_from_sequential_refuses(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MLP.from_sequential wants .*{message}"):
        MLP.from_sequential(nn.Sequential(*layers))


@pytest.mark.parametrize("value", [nn.Linear(2, 2), [nn.Linear(2, 2)], nn.ModuleList(), None])
def test_from_sequential_of_something_else(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^MLP.from_sequential wants a torch.nn.Sequential, got "):
        MLP.from_sequential(value)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sizes": 4}, TypeError, "sizes wants a list of int, got int"),
    ({"sizes": None}, TypeError, "sizes wants a list of int, got NoneType"),
    ({"sizes": []}, ValueError, r"sizes wants \[in_features, ..., out_features\], got \[\]"),
    ({"sizes": [4]}, ValueError, r"sizes wants \[in_features, ..., out_features\], got \[4\]"),
    ({"sizes": [4, 0, 2]}, ValueError, r"sizes\[1\] wants a positive int, got 0"),
    ({"sizes": [4, -1]}, ValueError, r"sizes\[1\] wants a positive int, got -1"),
    ({"sizes": [4.0, 2]}, TypeError, r"sizes\[0\] wants an int, got float"),
    ({"sizes": [4, True]}, TypeError, r"sizes\[1\] wants an int, got bool"),
    ({"sizes": "43"}, TypeError, r"sizes\[0\] wants an int, got str"),
    ({"activation": "gelu"}, ValueError, "activation wants one of 'relu', .*, got 'gelu'"),
    ({"activation": "none"}, ValueError, "activation wants one of 'relu', .*, got 'none'"),
    ({"activation": None}, TypeError, "activation wants one of 'relu', .*, got NoneType"),
    ({"activation": nn.ReLU}, TypeError, "activation wants one of 'relu', .*, got type"),
    ({"dropout": 1.0}, ValueError, r"dropout wants a probability in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout wants a probability in \[0, 1\), got -0.1"),
    ({"dropout": torch.nan}, ValueError, r"dropout wants a probability in \[0, 1\), got nan"),
    ({"dropout": "0.5"}, TypeError, "dropout wants a number, got str"),
    ({"dropout": None}, TypeError, "dropout wants a number, got NoneType"),
    ({"dropout": True}, TypeError, "dropout wants a number, got bool"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (its exact type is asserted below)
        MLP(**{"sizes": SIZES, **arguments})
    assert type(caught.value) is error
    assert re.match(f"MLP: {message}", str(caught.value)), caught.value


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_bad_input(dropout: float) -> None:
    model = functools.partial(MLP(SIZES, dropout=dropout))
    op = "linear" if dropout else "mlp"
    with pytest.raises(ValueError, match=rf"^{op}: x wants shape \(\.\.\., 4\)"):
        model(torch.ones(2, 3))
    with pytest.raises(TypeError, match=f"^{op}: x wants a torch.Tensor, got list"):
        model([1.0])
    with pytest.raises(TypeError, match=f"^{op}: x wants dtype float64"):
        model(torch.ones(2, 4, dtype=torch.int64))


def test_on_the_meta_device() -> None:
    model = MLP(SIZES, device="meta")
    assert model(torch.empty(2, 4, device="meta")).shape == (2, 3)
