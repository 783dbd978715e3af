"""Training steps on a GPU: in one kernel where the network is small, else as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORE", "Network", "Runner", "is_gpu"]

_trainer = torch.ops.torchbp_trainer
_fits = _trainer.fits.default._op
_steps = _trainer.steps.default._op
_begin_step = _trainer.begin_step.default._op
_update = _trainer.update.default._op
_logits = _trainer.logits.default._op
_kernels = torch.ops.torchbp_kernels
_mlp, _mlp_backward = _kernels.mlp.default._op, _kernels.mlp_backward.default._op
_ce_with_gradient = _kernels.softmax_ce_with_gradient.default._op
_UPDATES = {
    "sgd": torch.ops.torchbp.sgd_.default._op, "adamw": torch.ops.torchbp.adamw_.default._op
}  # fmt: skip

IGNORE = -100  # torch's default ignore_index
_UNFIT = "torchbp::trainer: xs and targets want a batch as the network takes it"
_MEAN = 1  # as the raw operations count reductions

#: Graphs that a runner keeps, one for each number of rows; batches of other sizes run without.
MOST_GRAPHS = 8


def is_gpu(device: torch.device) -> bool:
    """Whether steps on a device are a Runner's."""
    return device.type == "cuda"


class Network(NamedTuple):
    """What a step is of.

    Attributes:
        weights, biases: of the layers; biases is empty where they have none.
        activation: its name and its parameter, as the raw operations take them.
        label_smoothing: of the cross-entropy.
        trained: whether each of the weights, then of the biases, is trained.
        groups: of each that is trained, its row of hyperparameters.
        state: of each that is trained in turn what the optimizer keeps.
        rule: "sgd" or "adamw".
        width: numbers in a row of hyperparameters.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: tuple[str, float]
    label_smoothing: float
    trained: Sequence[bool]
    groups: Sequence[int]
    state: Sequence[Tensor]
    rule: str
    width: int


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor
    target: Tensor
    loss: Tensor
    logits: Tensor


class Runner:
    """Runs the steps of a trainer (csrc/cuda/train.cu) on a GPU, without waiting for it.

    A network that fits into one block of threads runs there, all steps of a call in one kernel.
    Any other runs as a row of operations. The first step with as many rows runs them one by one,
    on a stream of its own: that warms up what they need. The next one records them as a CUDA
    graph, from which they are replayed after that. A graph reads the batch from memory of its own,
    and the numbers of the update from the trainer's, so that schedulers need no other graph;
    parameters or state that have moved do.
    """

    def __init__(self, trainer: int, network: Network) -> None:
        self._trainer, self._network = trainer, network
        self._like = network.weights[0].detach()
        layers = len(network.weights)
        self._need_weights = [int(need) for need in network.trained[:layers]]
        self._need_biases = [int(need) for need in network.trained[layers:]]
        everything = [*network.weights, *network.biases]
        self._trained = [p for p, need in zip(everything, network.trained, strict=True) if need]
        self._fits: dict[int, bool] = {}
        self._last: Tensor | None = None  # the logits, where a graph or operations made them
        self._on_cuda = self._like.is_cuda
        self._graphs: dict[int, _Graph | None] = {}  # by rows; None: warmed up
        self._version = -1
        if self._on_cuda:
            with self._device():
                self._stream = torch.cuda.Stream()
                self._pool = torch.cuda.graph_pool_handle()

    def steps(self, xs: Tensor, targets: Tensor, hyper: list[float]) -> Tensor:
        """What the operation of the same name does on the CPU.

        Raises:
            RuntimeError: a batch that no step takes.
            ValueError: inside the capture of a CUDA graph, with AdamW.
        """
        self._check(xs, targets)
        many = xs.dim() == 3
        rows = xs.shape[-2]
        captured = self._on_cuda and torch.cuda.is_current_stream_capturing()
        if not captured:
            fits = self._fits.get(rows)
            if fits is None:
                fits = self._fits[rows] = _fits(self._trainer, rows, self._like)
            if fits:
                self._last = None
                return _steps(self._trainer, xs, targets, hyper)  # type: ignore[no-any-return]
        if captured and self._network.rule == "adamw":
            raise ValueError(
                "compile_step: a CUDA graph would do the same step of AdamW again and again: "
                "run the step outside of it"
            )
        count = len(xs) if many else 1
        width = self._network.width if len(hyper) > self._network.width else 0
        losses = self._like.new_empty(count)
        if captured:
            step = self._by_itself
        else:
            step = self._graphed if self._on_cuda else self._as_recorded
        with self._device(), torch.no_grad():
            for i in range(count):
                x, target = (xs[i], targets[i]) if many else (xs, targets)
                row = hyper[i * width : (i + 1) * width] if width else hyper
                loss, self._last = step(x, target, row)
                losses[i].copy_(loss)
        return losses if many else losses[0]

    def logits(self) -> Tensor:
        """Of the last step, before its update."""
        if self._last is not None:
            return self._last.clone()
        return _logits(self._trainer, self._like)  # type: ignore[no-any-return]

    def _device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._like.device) if self._on_cuda else nullcontext()

    def _check(self, xs: Any, targets: Any) -> None:
        """A graph would take what it is given, of other dtypes and shapes too."""
        like = self._like
        for value, dtype in ((xs, torch.float32), (targets, torch.int64)):
            if not (
                isinstance(value, Tensor)
                and value.dtype == dtype
                and value.device == like.device
                and value.layout == torch.strided
            ):
                raise RuntimeError(_UNFIT)
        shape = xs.shape
        if not 2 <= len(shape) <= 3 or shape[-1] != like.shape[1] or targets.shape != shape[:-1]:
            raise RuntimeError(_UNFIT)

    # ---- one step

    def _operations(
        self, x: Tensor, target: Tensor, update: Callable[[list[Tensor]], None]
    ) -> tuple[Tensor, Tensor]:
        """A step as operations: what a graph is recorded from. Returns (loss, logits)."""
        network = self._network
        weights, biases, smoothing = network.weights, network.biases, network.label_smoothing
        logits, *saved = _mlp(x, weights, biases, *network.activation)
        loss, grad = _ce_with_gradient(logits, target, None, IGNORE, _MEAN, smoothing)
        if self._trained:
            _, *grads = _mlp_backward(
                grad, x, weights, saved, *network.activation, False, self._need_weights,
                self._need_biases,
            )  # fmt: skip
            update([g for g, need in zip(grads, network.trained, strict=True) if need])
        return loss, logits

    def _graphed(self, x: Tensor, target: Tensor, hyper: list[float]) -> tuple[Tensor, Tensor]:
        """A step as a graph; the first with as many rows as operations."""
        rows = len(x)
        if rows not in self._graphs:
            result = self._aside(lambda: self._as_recorded(x, target, hyper))
            if len(self._graphs) < MOST_GRAPHS:
                self._graphs[rows] = None
            return result
        self._begin(hyper)
        graph = self._graphs[rows]
        if graph is None:
            graph = self._graphs[rows] = self._record(x, target)
        graph.x.copy_(x)
        graph.target.copy_(target)
        graph.graph.replay()
        return graph.loss, graph.logits

    def _as_recorded(self, x: Tensor, target: Tensor, hyper: list[float]) -> tuple[Tensor, Tensor]:
        """The very operations of a graph, without one."""

        def update(grads: list[Tensor]) -> None:
            self._begin(hyper)
            _update(self._trainer, grads)

        return self._operations(x, target, update)

    def _by_itself(self, x: Tensor, target: Tensor, hyper: list[float]) -> tuple[Tensor, Tensor]:
        """The same with the numbers of the update as they are now: for a graph of somebody else."""
        network = self._network
        width = network.width // (max(network.groups) + 1) if network.groups else 0

        def update(grads: list[Tensor]) -> None:
            groups: list[float] = []
            for group in network.groups:
                groups += [1, *hyper[group * width : (group + 1) * width]]
            _UPDATES[network.rule](self._trained, grads, network.state, groups)

        return self._operations(x, target, update)

    def _begin(self, hyper: list[float]) -> None:
        """Hand the numbers of a step to the trainer; forget the graphs if they are out of date."""
        version = _begin_step(self._trainer, hyper, self._like)
        if version != self._version:
            self._version = version
            self._graphs = dict.fromkeys(self._graphs)

    def _aside(self, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What graphs are recorded on is no default stream, and so is not what warms them up."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        for tensor in result:
            tensor.record_stream(current)
        return result

    def _record(self, x: Tensor, target: Tensor) -> _Graph:
        x, target = x.new_empty(x.shape), target.new_zeros(target.shape)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            loss, logits = self._operations(x, target, lambda grads: _update(self._trainer, grads))
        return _Graph(graph, x, target, loss, logits)
