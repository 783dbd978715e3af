"""torchbp.graph.saved against an independent use of torch's saved-tensor hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchbp.nn
from torchbp import functional as F
from torchbp import functions
from torchbp.graph import saved


def hooked(fn: Callable[..., Any], *inputs: Any) -> tuple[int, int, int]:
    """Tensors, bytes of all of them, bytes of their storages: as the hooks see them."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach())
        return seen[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fn(*inputs)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in seen}
    del y
    return (
        len(seen),
        sum(tensor.numel() * tensor.element_size() for tensor in seen),
        sum(storage.nbytes() for storage in storages.values()),
    )


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


W, B = leaf(4, 3), leaf(4)

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "relu": (torch.relu, (leaf(5),)),
    "our relu": (F.relu, (leaf(5),)),
    "adder": (torch.add, (leaf(5), leaf(5))),
    "square": (lambda x: x * x, (leaf(5),)),
    "half in place": (lambda x: (x * 2).relu_().exp(), (leaf(5),)),
    "view": (lambda x: (x[:2] * x[2:4]).sum(), (leaf(5),)),
    "Function": (functions.Multiply.apply, (leaf(5), leaf(5))),
    "linear": (lambda x: torch.nn.functional.linear(x, W, B).tanh(), (leaf(2, 3),)),
    "our linear": (lambda x: F.linear(x, W, B, "elu"), (leaf(2, 3),)),
    "loss": (lambda x: F.cross_entropy(x, torch.tensor([0, 2])), (leaf(2, 3),)),
    "pool": (nn.MaxPool2d(2), (leaf(1, 2, 4, 4),)),
    "two outputs": (lambda x: {"a": x.exp(), "b": [x.sin()]}, (leaf(5),)),
    "many": (lambda x, y: torch.linalg.multi_dot([x, y, x]), (leaf(3, 3), leaf(3, 3))),
    "parts": (lambda x: torch.stack(x.unbind()).cumprod(0), (leaf(3),)),
    "MLP": (
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)),
        (torch.randn(6, 3),),
    ),
    "our MLP": (torchbp.nn.MLP([3, 8, 2]), (torch.randn(6, 3),)),
    "LSTM": (nn.LSTM(3, 4), (torch.randn(5, 2, 3),)),
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, 0.0), (torch.randn(5, 2, 8),)),
    "half": (torch.sigmoid, (leaf(5).detach().half().requires_grad_(),)),
}


@pytest.mark.parametrize(("fn", "inputs"), CASES.values(), ids=CASES)
def test_totals_are_those_of_the_hooks(fn: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    count, packed, total = hooked(fn, *inputs)
    found = saved(fn, *inputs)
    assert (len(found.kept), found.packed, found.total) == (count, packed, total)
    # Each tensor has its gate, and each gate knows its tensors.
    assert found.unattributed == []
    assert sorted(k for gate in found.nodes for k in gate.kept) == list(range(count))
    for gate in found.nodes:
        assert all(found.kept[k].gate == gate.number for k in gate.kept)
        assert all(found.kept[k].node == gate.node for k in gate.kept)


def test_gates_in_the_order_of_the_forward() -> None:
    found = saved(lambda x: (x + 1).exp().sin(), leaf(5))
    assert [gate.node for gate in found.nodes] == ["AddBackward0", "ExpBackward0", "SinBackward0"]
    assert [gate.kept for gate in found.nodes] == [(), (0,), (1,)]
    result, argument = found.kept
    assert (result.attribute, argument.attribute) == ("result", "self")
    assert (result.shape, result.dtype, result.device, result.bytes) == ((5,), "float32", "cpu", 20)
    assert argument.shared == 0  # exp keeps its output, which sin keeps as its input
    assert found.total == 20
    assert found.packed == 40


def test_roles() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())
    x = leaf(2, 3)
    found = {kept.what: kept for kept in saved(model, x).kept}
    assert set(found) == {"input input", "parameter 0.weight", "output y"}
    assert found["output y"].bytes == saved(model, x).activations == 2 * 4 * 4

    found = {kept.what: kept for kept in saved(lambda x: torch.relu(x @ W.t()) * 3, x).kept}
    assert {"input x", "captured W", "intermediate"} <= set(found)
    whole = saved(lambda x: model(x), x)
    assert "parameter model.0.weight" in {kept.what for kept in whole.kept}
    norm = nn.BatchNorm1d(3).eval()
    assert "buffer running_mean" in {kept.what for kept in saved(norm, x).kept}


def test_a_part_keeps_all_of_its_memory_alive() -> None:
    (kept,) = saved(lambda x: (2 * x)[:1].sin(), leaf(100)).kept[-1:]
    assert (kept.bytes, kept.storage_bytes) == (4, 400)


def test_what_requires_no_grad_is_not_kept_for() -> None:
    """The weight is needed for the gradient of the input alone."""
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    assert [kept.what for kept in saved(layer, x).kept] == ["input input"]
    assert len(saved(layer, x.requires_grad_()).kept) == 2
    # Where nothing requires grad, the inputs do.
    assert [kept.what for kept in saved(torch.sigmoid, torch.ones(3)).kept] == ["output y"]


def test_inputs_of_integers() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    indices = torch.tensor([4, 1])
    assert {kept.what for kept in saved(model, indices).kept} == {
        "input input", "intermediate", "parameter 1.weight",
    }  # fmt: skip


def test_sparse_tensors_count_what_they_hold() -> None:
    eye = torch.eye(100).to_sparse()
    (kept,) = saved(lambda x: torch.sparse.mm(eye, x), leaf(100, 2)).kept
    assert kept.bytes == kept.storage_bytes == 100 * (2 * 8 + 4)


def test_meta() -> None:
    x, w = torch.ones(64, 4096, device="meta"), torch.ones(4096, 4096, device="meta")
    found = saved(F.matmul, x, w)
    assert found.total == (64 * 4096 + 4096 * 4096) * 4
    assert [kept.name for kept in found.kept] == ["x", "w"]


def test_unattributed_is_listed() -> None:
    def fn(x: Tensor) -> Tensor:
        x.exp()  # leads to no output
        return x.sin()

    x = leaf(5)
    found = saved(fn, x)
    assert (len(found.kept), found.packed, found.total) == hooked(fn, x)
    (lost,) = found.unattributed
    assert (lost.gate, lost.node, lost.bytes) == (None, None, 20)
    assert "? not attributed" in str(found)


def test_a_graph_from_before_is_none_of_its_gates() -> None:
    before = leaf(5).exp()
    found = saved(lambda x: x * before, leaf(5))
    assert [gate.node for gate in found.nodes] == ["MulBackward0"]
    assert {kept.what for kept in found.kept} == {"input x", "captured before"}


def test_checkpoint_keeps_its_input_alone() -> None:
    def fn(x: Tensor) -> Any:
        return checkpoint(lambda x: x.exp().sin().cos(), x, use_reentrant=False)

    x = leaf(5)
    found = saved(fn, x)
    assert (len(found.kept), found.packed, found.total) == hooked(fn, x)
    assert {kept.what for kept in found.kept} <= {"input x"}


def test_nothing_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.ReLU(inplace=True)).train()
    x = leaf(4, 3)
    copy, state = x.detach().clone(), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    for fn in (model, lambda x: model(x)):
        str(saved(fn, x))
    assert torch.equal(x, copy)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    saved(torch.relu_, x)  # in place, on a copy
    assert torch.equal(x, copy)


def test_under_no_grad() -> None:
    with torch.no_grad():
        assert len(saved(torch.relu, leaf(3)).kept) == 1


# ---- comparison ----------------------------------------------------------------------------------


def test_comparison_of_relu_after_linear_with_the_fused_gate() -> None:
    x = leaf(64, 3)

    def apart(x: Tensor) -> Tensor:
        return F.relu(F.linear(x, W, B))

    def fused(x: Tensor) -> Tensor:
        return F.linear(x, W, B, activation="relu")

    a, b = saved(apart, x), saved(fused, x)
    found = a.compare(b)
    assert len(a.nodes) > len(b.nodes)
    assert found.difference == b.total - a.total == hooked(fused, x)[2] - hooked(apart, x)[2]
    text = str(found)
    for words in ("apart", "fused", "ReLUBackward", "LinearBackward", "captured W [4, 3]", "total"):
        assert words in text
    assert found.to_json()["difference"] == found.difference


def test_comparison_says_which_keeps_more() -> None:
    x = leaf(256)
    one, two = saved(torch.sigmoid, x), saved(lambda x: x.exp().sin(), x)
    three = saved(lambda x: (x.exp() * 2).sin(), x)
    assert one.compare(two).summary == "<lambda> keeps as much as sigmoid: 1 KiB"
    found = two.compare(three, names=("one", "other"))
    assert found.summary.startswith("other keeps 1")
    assert found.difference > 0
    assert "less than" in three.compare(two).summary
    with pytest.raises(TypeError, match="compare: other wants a Saved, got int"):
        one.compare(3)  # type: ignore[arg-type]


# ---- what it shows -------------------------------------------------------------------------------


def test_table_repr_and_json() -> None:
    found = saved(lambda x: (x + 1).exp().sin(), leaf(5))
    text = str(found)
    for words in ("0 AddBackward0", "nothing", "1 ExpBackward0", "result", "with #0", "20 B in 1"):
        assert words in text
    assert repr(found).startswith("<Saved by <lambda>: 20 B in 1 storage (2 tensors)")
    data = json.loads(json.dumps(found.to_json()))
    assert data["total"] == 20
    assert [gate["kept"] for gate in data["nodes"]] == [[], [0], [1]]
    assert data["kept"][1]["shape"] == [5]
    assert data["kept"][1]["shared"] == 0


# ---- errors --------------------------------------------------------------------------------------


def test_errors() -> None:
    x = leaf(3)
    with pytest.raises(TypeError, match="saved: fn wants a function or module, got str"):
        saved("relu", x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"relu wants to return .*, got a tensor of torch\.int64"):
        saved(torch.relu, torch.tensor([1]))
    with pytest.raises(ValueError, match="LazyLinear has parameters that its first call"):
        saved(nn.LazyLinear(2), x)
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        saved(torch.func.grad(torch.sum), x)
    with pytest.raises(TypeError, match="saved: argmax wants to return"):
        saved(torch.argmax, x)
    for fn in (lambda x: x.detach(), lambda x: torch.ones(2)):
        with pytest.raises(ValueError, match="saved: autograd cannot differentiate <lambda>"):
            saved(fn, x)
