"""Batches of normalised images, shuffled and augmented anew in every epoch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..functions.table import HAS_CUDA

# Bytes have no gradient.
_library = torch.library.Library("torchbp_images", "IMPL")
for _name in ("open", "on_gpu"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
_open = torch.ops.torchbp_images.open.default._op
_batch = torch.ops.torchbp_images.batch.default._op
_close = torch.ops.torchbp_images.close.default._op
_on_gpu = torch.ops.torchbp_images.on_gpu.default._op

# What the kernel writes.
FUSED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Images(Protocol):
    """What `BatchLoader` reads: `images` uint8 [N, C, H, W] and `targets` int64 [N]."""

    images: torch.Tensor
    targets: torch.Tensor


class Plan(NamedTuple):
    """An epoch, image by image.

    Attributes:
        order: int64 [N], which image of the data set.
        flip: uint8 [N], 1 where it is mirrored; None where none is.
        shift: int32 [N, 2], by how many pixels it is moved down and right; None where none is.
        target: int64 [N], its class.
    """

    order: torch.Tensor
    flip: torch.Tensor | None
    shift: torch.Tensor | None
    target: torch.Tensor

    def of(self, rows: slice) -> Plan:
        """The plan of some of the images."""
        flip, shift = (None if part is None else part[rows] for part in (self.flip, self.shift))
        return Plan(self.order[rows], flip, shift, self.target[rows])


class Opened:
    """A plan that the binary makes batches of, until this is gone: (x, target) of the batch that
    begins at an image."""

    def __init__(self, loader: BatchLoader, plan: Plan) -> None:
        affine = loader._affine()
        rest = loader.dtype, loader.batch_size, loader.flatten
        self.number = _open(loader.images, *plan, *affine, *rest)
        weakref.finalize(self, _close, self.number)

    def __call__(self, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _batch(self.number, begin)  # type: ignore[no-any-return]


class BatchLoader:
    """Iterates over `(x, target)`, one pass an epoch.

    `x` is (image / 255 - mean) / std, channel by channel, in `dtype`: [B, C * H * W] with
    `flatten`, else [B, C, H, W]; `target` is int64 [B]; both on `device`. The order and the
    augmentation of an epoch are determined by `(seed, epoch)` alone: the same on every run, for
    every batch size and number of threads, different in every epoch.

    A batch is the caller's to keep and to change. Its memory is used again once it is gone, and so
    `resize_` cannot enlarge it, as it cannot a tensor from NumPy.

    Args:
        dataset: anything with `images`, uint8 [N, C, H, W], and `targets`, int64 [N].
        batch_size: images a batch; the last batch of an epoch may be smaller.
        shuffle: a new random order each epoch; otherwise the order of the data set.
        flip: mirror each image left to right with probability 1/2.
        shift: move each image by up to this many pixels along each axis, uniformly; what comes in
            is the mean colour, 0 after normalisation.
        mean: mean of each channel, in units of [0, 1]; computed from `dataset` where None.
        std: standard deviation of each channel, likewise; a channel that is constant counts as 1.
        dtype: a floating dtype.
        device: where batches are wanted. For a GPU the data set is copied there, in bytes, at the
            first epoch, and again if it was changed in place; one kernel makes a batch. Otherwise
            it stays where it is, and bytes travel, not floats.
        drop_last: leave out a last batch that is not full.
        seed: of order and augmentation.
        flatten: whether `x` is a matrix, as an MLP wants it.

    Attributes:
        mean: the mean in use, a float for each channel.
        std: the standard deviation in use.
        epoch: the epoch that the next `iter()` gives; it counts up with each.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.

    Example:
        >>> from types import SimpleNamespace
        >>> images = torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2)
        >>> data = SimpleNamespace(images=images, targets=torch.arange(5))
        >>> train = BatchLoader(data, batch_size=2, flip=True)
        >>> [tuple(x.shape) for x, target in train]
        [(2, 12), (2, 12), (1, 12)]
        >>> len(train), train.epoch
        (3, 1)

        The test set is to be normalised as the training set was:

        >>> test = BatchLoader(data, shuffle=False, mean=train.mean, std=train.std)
    """

    def __init__(
        self,
        dataset: Images,
        batch_size: int = 128,
        shuffle: bool = True,
        flip: bool = False,
        shift: int = 0,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        seed: int = 0,
        flatten: bool = True,
    ) -> None:
        images, targets = _check_dataset(dataset)
        for name, value in (
            ("shuffle", shuffle),
            ("flip", flip),
            ("drop_last", drop_last),
            ("flatten", flatten),
        ):
            if not isinstance(value, bool):
                raise TypeError(
                    f"BatchLoader: {name} must be True or False, got {type(value).__name__}"
                )
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"BatchLoader: dtype must be a torch.dtype, got {type(dtype).__name__}")
        if not dtype.is_floating_point:
            raise ValueError(f"BatchLoader: dtype must be a floating dtype, got {dtype}")
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"BatchLoader: device must be a device, got {type(device).__name__}")
        self.dataset = dataset
        self.images, self.targets = images, targets
        self.batch_size = _integer("batch_size", batch_size, 1)
        self.shift = _integer("shift", shift, 0, min(images.shape[2:]))
        self.seed = _integer("seed", seed, 0)
        self.shuffle, self.flip, self.drop_last, self.flatten = shuffle, flip, drop_last, flatten
        self.dtype, self.device = dtype, torch.device(device)
        channels = images.shape[1]
        computed = channel_statistics(images) if mean is None or std is None else None
        self.mean = _per_channel("mean", mean, channels) if mean is not None else computed[0]  # type: ignore[index]
        self.std = _per_channel("std", std, channels) if std is not None else computed[1]  # type: ignore[index]
        if min(self.std) <= 0:
            raise ValueError(f"BatchLoader: std must be positive, got {list(self.std)}")
        self.epoch = 0
        self._copy: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        n = len(self.images)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch = self.epoch
        self.epoch += 1
        return self._batches(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Have the next `iter()` give this epoch."""
        self.epoch = _integer("epoch", epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """What determines the epochs to come: `{"seed": ..., "epoch": ...}`."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict()` was taken.

        Raises:
            TypeError, ValueError: `state` is not such a dict.
        """
        if not isinstance(state, dict):
            raise TypeError(f"BatchLoader: state must be a dict, got {type(state).__name__}")
        if state.keys() != {"seed", "epoch"}:
            raise ValueError(
                f"BatchLoader: state must have keys epoch and seed, got {sorted(map(str, state))}"
            )
        seed, epoch = _integer("seed", state["seed"], 0), _integer("epoch", state["epoch"], 0)
        self.seed, self.epoch = seed, epoch

    def __repr__(self) -> str:
        size = f"{len(self.images)} images, {len(self)} batches of {self.batch_size}"
        return f"BatchLoader({size}, epoch={self.epoch})"

    def _batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        read = self._reader(self._plan(epoch))
        yield from map(read, range(0, len(self) * self.batch_size, self.batch_size))

    def _plan(self, epoch: int) -> Plan:
        """All that an epoch leaves to chance, drawn from `(seed, epoch)`."""
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        n = len(self.images)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        # Drawn in any case, so that an epoch is moved alike with and without flips.
        flip = torch.rand(n, generator=generator) < 0.5
        shift = None
        if self.shift:
            shift = torch.randint(-self.shift, self.shift + 1, (n, 2), generator=generator)
        return Plan(
            order,
            flip.to(torch.uint8) if self.flip else None,
            None if shift is None else shift.to(torch.int32),
            self.targets.index_select(0, order.to(self.targets.device)),
        )

    def _is_on_cpu(self) -> bool:
        parts = self.images, self.targets, self
        return all(part.device.type == "cpu" for part in parts)

    def _is_on(self, device: torch.device) -> bool:
        """Whether one kernel makes a batch on that GPU."""
        mine = self.device
        if mine.type == "cuda" and mine.index is None:
            mine = torch.device("cuda", torch.cuda.current_device())
        return mine == device and self.dtype in FUSED

    def _affine(self) -> tuple[list[float], list[float]]:
        """(image / 255 - mean) / std as image * scale + offset, for each channel."""
        scale = [1 / (255 * std) for std in self.std]
        offset = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        return scale, offset

    def _reader(self, plan: Plan) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        """What makes the batch of a plan that begins at an image.

        On the CPU that is one call and one pass with all threads, made when it is asked for: a
        batch of 128 CIFAR images takes 1 % of a step of [3072, 512, 256, 10], which keeps both of
        two cores busy, and a thread that worked ahead of it gained nothing that could be measured.
        """
        if self._is_on_cpu() and self.dtype in FUSED:
            return Opened(self, plan)
        if self.device.type == "cuda" and self.dtype in FUSED and HAS_CUDA:
            return self._reader_on_gpu(plan)

        scale, offset = self._affine()
        wide = torch.promote_types(self.dtype, torch.float32)  # to compute in
        columns = torch.tensor([scale, offset], dtype=torch.float64).to(self.device, wide)
        scales, offsets = columns.view(2, -1, 1, 1)

        def fill(rows: Plan) -> torch.Tensor:
            x = self.images[rows.order].to(self.device)
            x = torch.addcmul(offsets, x.to(wide), scales)
            return self._augment(x, rows.flip, rows.shift).to(self.dtype)

        return self._reader_by(fill, plan)

    def _reader_on_gpu(self, plan: Plan) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The same where data set and plan are on a GPU: one kernel a batch, or for as many images
        as a second argument says."""
        if self._copy is None or self._copy[0] != self.images._version:
            self._copy = self.images._version, self.images.to(self.device)
        images = self._copy[1]
        flip, shift = (None if t is None else t.to(self.device) for t in (plan.flip, plan.shift))
        there = Plan(plan.order.to(self.device), flip, shift, plan.target.to(self.device))
        affine = torch.tensor(self._affine(), dtype=torch.float64, device=self.device)

        def fill(rows: Plan) -> torch.Tensor:
            return _on_gpu(images, rows.order, rows.flip, rows.shift, affine, self.dtype)  # type: ignore[no-any-return]

        return self._reader_by(fill, there)

    def _reader_by(
        self, fill: Callable[[Plan], torch.Tensor], plan: Plan
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """A reader whose images [B, C, H, W] are made by `fill` from their part of the plan."""
        flatten = self.flatten

        def read(begin: int, count: int = self.batch_size) -> tuple[torch.Tensor, torch.Tensor]:
            rows = plan.of(slice(begin, begin + count))
            x = fill(rows)
            return (x.flatten(1) if flatten else x), rows.target.to(self.device, copy=True)

        return read

    def _augment(
        self, x: torch.Tensor, flip: torch.Tensor | None, shift: torch.Tensor | None
    ) -> torch.Tensor:
        """Mirror, then move, images [B, C, H, W]: one gather from images padded with zeros."""
        if flip is None and shift is None:
            return x
        b, c, h, w = x.shape
        s = self.shift
        column = torch.arange(w, device=x.device).expand(b, w)
        row = torch.arange(h, device=x.device).expand(b, h) + s
        if shift is not None:  # where in the padded image a row and a column come from
            shift = shift.to(x.device)
            row, column = row - shift[:, :1], column - shift[:, 1:]
        if flip is not None:
            column = torch.where(flip.to(x.device, torch.bool)[:, None], w - 1 - column, column)
        column = column + s
        padded = torch.nn.functional.pad(x, (s, s, s, s))
        image = torch.arange(b, device=x.device).view(b, 1, 1, 1)
        channel = torch.arange(c, device=x.device).view(1, c, 1, 1)
        return padded[image, channel, row.view(b, 1, h, 1), column.view(b, 1, 1, w)]


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of [0, 1], of uint8 images [N, C, H,
    W].

    Exact, from a count of the 256 values: no sum over 50 million pixels that a float32 could lose.

    Example:
        >>> channel_statistics(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        ((0.5,), (0.5,))
    """
    value = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).cpu().double() / channel.numel()
        mean = share @ value
        variance = share @ (value - mean).square()
        means.append(mean.item())
        stds.append(math.sqrt(variance.item()) or 1.0)
    return tuple(means), tuple(stds)


def _check_dataset(dataset: Images) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = getattr(dataset, "images", None), getattr(dataset, "targets", None)
    if not isinstance(images, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise TypeError(
            "BatchLoader: dataset must have the tensors images and targets, "
            f"got {type(dataset).__name__}"
        )
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            "BatchLoader: dataset.images must be uint8 [N, C, H, W], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
        raise ValueError(
            f"BatchLoader: dataset.targets must be int64 [{len(images)}], "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    if not images.numel():
        raise ValueError(f"BatchLoader: dataset.images is empty, got shape {list(images.shape)}")
    return images, targets


def _integer(name: str, value: object, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"BatchLoader: {name} must be an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"BatchLoader: {name} must be {wanted}, got {value}")
    return value


def _per_channel(
    name: str, values: Sequence[float] | torch.Tensor, channels: int
) -> tuple[float, ...]:
    try:
        result = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise TypeError(
            f"BatchLoader: {name} must be {channels} numbers, got {type(values).__name__}"
        ) from None
    if len(result) != channels or not all(map(math.isfinite, result)):
        raise ValueError(
            f"BatchLoader: {name} must be {channels} finite numbers, got {list(result)}"
        )
    return result
