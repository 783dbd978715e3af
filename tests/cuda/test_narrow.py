"""Networks of narrow layers in half types, of which a CUDA kernel takes all layers at once
(csrc/cuda/narrow.cu), against float64.

Errors are at most twice those of PyTorch's layers one by one in the same dtype, plus a rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import torchbp.functional as F
from tests.compare import assert_close_in_norm
from tests.machine import EMULATED, GPU
from torchbp.functions.products import ACTIVATIONS

pytestmark = pytest.mark.gpu

REAL = pytest.mark.skipif(EMULATED, reason="the emulator has no streams, and is slow")
EACH_HALF = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)
EACH_ACTIVATION = pytest.mark.parametrize("activation", list(ACTIVATIONS))


class Network:
    """An mlp's inputs, on the CPU, and the gradient of its output."""

    def __init__(
        self, sizes: Sequence[int], rows: Sequence[int], dtype: torch.dtype, bias: bool = True
    ) -> None:
        pairs = list(itertools.pairwise(sizes))
        self.layers = len(pairs)
        self.x = torch.randn(*rows, sizes[0]).to(dtype)
        weights = [(torch.randn(n, m) / m**0.5).to(dtype) for m, n in pairs]
        self.parameters = weights + [torch.randn(n).to(dtype) for _, n in pairs if bias]
        self.dy = torch.randn(*rows, sizes[-1]).to(dtype)

    def tensors(self) -> list[Tensor]:
        return [self.x, *self.parameters]

    def ours(self, activation: str, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: self.layers], parameters[self.layers :]
        return F.mlp(x, weights, biases or None, activation)

    def torchs(self, activation: str, x: Tensor, *parameters: Tensor) -> Tensor:
        biases = parameters[self.layers :] or (None,) * self.layers
        for i, (weight, bias) in enumerate(zip(parameters, biases, strict=False)):
            x = TF.linear(ACTIVATIONS[activation].formula(x) if i else x, weight, bias)
        return x

    def run(
        self,
        function: str,
        activation: str,
        device: str = GPU,
        dtype: torch.dtype | None = None,
        needs: Sequence[bool] | None = None,
    ) -> list[Tensor | None]:
        """(y, gradients of x, weights, biases), None where not needed, on the CPU."""
        tensors = [t.to(device, dtype, copy=True) for t in self.tensors()]
        for i, t in enumerate(tensors):
            t.requires_grad_(needs is None or needs[i])
        y = getattr(self, function)(activation, *tensors)
        y.backward(self.dy.to(device, dtype))
        return [t if t is None else t.detach().cpu() for t in (y, *(t.grad for t in tensors))]


def compare(network: Network, activation: str, needs: Sequence[bool] | None = None) -> None:
    exact = network.run("torchs", activation, "cpu", torch.float64, needs)
    theirs = network.run("torchs", activation, needs=needs)
    ours = network.run("ours", activation, needs=needs)
    for mine, wanted, torchs in zip(ours, exact, theirs, strict=True):
        if wanted is None or torchs is None or mine is None:
            assert mine is None
            assert wanted is None
        else:
            assert_close_in_norm(mine, wanted, torchs)


@EACH_HALF
@EACH_ACTIVATION
@pytest.mark.parametrize("width", [64, 128])
def test_activations(width: int, activation: str, dtype: torch.dtype) -> None:
    compare(Network([width] * 4, [100], dtype), activation)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 129, 1000])
@pytest.mark.parametrize("width", [64, 128])
def test_rows(width: int, rows: int) -> None:
    """Of which the last warp and the last block have few; a block has several pieces of many."""
    compare(Network([width] * 3, [rows], torch.float16), "relu")


@pytest.mark.parametrize("layers", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("activation", "dtype"), [("tanh", torch.bfloat16), ("elu", torch.float16)]
)
def test_layers(activation: str, width: int, layers: int, dtype: torch.dtype) -> None:
    """One launch or several, with h and dz in memory in between."""
    compare(Network([width] * (layers + 1), [40], dtype), activation)


@EACH_HALF
@pytest.mark.parametrize(
    "sizes",
    [
        (16, 64, 64, 16),
        (48, 64, 64, 112),
        (128, 64, 64, 64),
        (32, 128, 128, 16),
        (16, 16, 16),
        (80, 32, 96, 48),
    ],
    ids=str,
)
@pytest.mark.parametrize(("activation", "bias"), [("sigmoid", True), ("leaky_relu", False)])
def test_sizes(activation: str, bias: bool, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Narrower than the kernel, where f(0) of what pads is not 0; more leading dimensions."""
    compare(Network(sizes, [3, 7], dtype, bias), activation)


@EACH_HALF
def test_padding_is_not_multiplied(dtype: torch.dtype) -> None:
    """1 / 0 of what pads a layer would make nan of all."""
    x, weights = torch.rand(5, 16) + 1, [torch.rand(16, 16) + 1 for _ in range(3)]
    on_gpu = [t.to(GPU, dtype) for t in (x, *weights)]
    y, *saved = torch.ops.torchbp.mlp(on_gpu[0], on_gpu[1:], [], "reciprocal", 0.0)
    h = 1 / (1 / (x @ weights[0].mT) @ weights[1].mT)
    # Roundings of x, the weights and each h, as large as eps / 2 in the norm.
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.cpu().float(), h @ weights[2].mT, rtol=rtol, atol=0)
    assert [t.isfinite().all().item() for t in saved] == [True, True]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "needed",
    [(0,), (4,), (8,), (1, 8), (3, 7), (2,), (0, 5)],
    ids=["x", "last", "last_bias", "w0_b3", "w2_b2", "w1", "x_b0"],
)
def test_needs(needed: tuple[int, ...], width: int) -> None:
    """Gradients of some: numbers of (x, four weights, four biases)."""
    network = Network([width] * 5, [50], torch.float16)
    compare(network, "relu", [i in needed for i in range(9)])
    compare(network, "elu", [i in needed for i in range(9)])


@EACH_HALF
@pytest.mark.parametrize("sizes", [(64, 60, 64), (64, 144, 64), (8, 64, 64), (64, 64), (64, 64, 1)])
def test_what_does_not_fit_goes_layer_by_layer(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(Network(sizes, [20], dtype), "relu")


@pytest.mark.parametrize("lay", ["shifted", "transposed", "expanded"])
def test_layouts(lay: str) -> None:
    """Of any of the tensors, and of dy."""

    def laid_out(t: Tensor) -> Tensor:
        if lay == "shifted":
            return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
        if lay == "transposed":
            return t.mT.contiguous().mT if t.dim() > 1 else t
        return t.flatten()[:1].expand(t.shape)  # of stride 0

    network = Network([64] * 4, [20], torch.float16)
    ours = [t.to(GPU) for t in network.tensors()]
    for i in range(len(ours) + 1):
        mine, theirs, exact = (
            [t.to(device, dtype) for t in [*network.tensors(), network.dy]]
            for device, dtype in ((GPU, None), (GPU, None), ("cpu", torch.float64))
        )
        for tensors in (mine, theirs, exact):
            tensors[i] = laid_out(tensors[i])
        results = []
        for function, (*inputs, dy) in (
            (network.ours, mine),
            (network.torchs, theirs),
            (network.torchs, exact),
        ):
            free = [t.detach().requires_grad_() for t in inputs]
            y = function("tanh", *free)
            results.append([t.detach().cpu() for t in (y, *torch.autograd.grad(y, free, dy))])
        for own, peer, wanted in zip(*results, strict=True):
            assert_close_in_norm(own, wanted, peer)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "dy"])
@EACH_ACTIVATION
def test_special_values(activation: str, where: str, value: float) -> None:
    """Are where PyTorch has them, layer by layer in the same dtype, and nowhere else."""
    network = Network([64, 64, 64], [33], torch.float16)
    tensor = {
        "x": network.x, "weight": network.parameters[0], "bias": network.parameters[3],
        "dy": network.dy,
    }[where]  # fmt: skip
    tensor[5 if tensor.dim() > 1 else ...].view(-1)[7] = value
    ours, theirs = (network.run(function, activation) for function in ("ours", "torchs"))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine is not None
        assert wanted is not None
        assert torch.equal(mine.isnan(), wanted.isnan())
        assert torch.equal(mine.isinf(), wanted.isinf())


@EACH_HALF
@pytest.mark.parametrize("width", [64, 128])
def test_the_same_at_each_run(width: int, dtype: torch.dtype) -> None:
    rows = 300 if EMULATED else 100_000
    network = Network([width] * 5, [rows], dtype)
    first, second = (network.run("ours", "tanh") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@REAL
@EACH_HALF
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("rows", [2**14, 2**18 + 5])
def test_large_batches(rows: int, width: int, dtype: torch.dtype) -> None:
    compare(Network([width] * 5, [rows], dtype), "relu")


@REAL
@pytest.mark.parametrize("width", [64, 128])
def test_graph_capture(width: int) -> None:
    network = Network([width] * 4, [1000], torch.float16)
    tensors = [t.to(GPU).requires_grad_() for t in network.tensors()]
    dy = network.dy.to(GPU)

    def step() -> tuple[Tensor, ...]:
        y = network.ours("relu", *tensors)
        return y, *torch.autograd.grad(y, tensors, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wanted = [t.clone() for t in step()]
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.detach().zero_()
    graph.replay()
    for result, want in zip(results, wanted, strict=True):
        assert torch.equal(result, want)
