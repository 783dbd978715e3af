"""SyntheticCIFAR10: ten classes of drawn 32 x 32 colour images, the same bytes on every machine.

A stand-in for CIFAR-10 that needs no download: six files of 10,000 images in the official binary
layout, drawn once into a cache and read by the reader of `torchbp.data.cifar10`. Each image shows
one of eight shapes or two textures in a random colour, lighter or darker than its background, at a
random place, size and angle, on a background that changes colour from side to side, under noise.

The bytes depend on nothing but the seed: random numbers are the raw stream of PCG64, which NumPy
keeps fixed (its distributions it does not), and all arithmetic is on integers, so no compiler, SIMD
level or math library has a say.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from math import isqrt, prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchbp.data import cifar10
from torchbp.data.cifar10 import (
    BINARY,
    META,
    PIXELS,
    ImageDataset,
    as_path,
    check_bool,
    progress,
    publish,
    read_split,
)

VERSION = 1  # part of the cache's name: raise it whenever the bytes change
BLOCK = 500  # images drawn at a time, 50 of each class, from a stream of their own
CHECKSUMS = "SHA256SUMS"

Ints = npt.NDArray[np.int32]


class SyntheticCIFAR10(ImageDataset):
    """Ten classes of drawn shapes and textures, in the form of CIFAR-10.

    Hard in the way that teaches: a linear classifier on the pixels gets about half of the test set
    right, an MLP nine tenths.

    Args:
        train: the 50,000 training images; otherwise the 10,000 test images.
        seed: of all that is random; each seed is a data set of its own.
        root: the folder to keep the files in; by default `$TORCHBP_CACHE`, or else
            `~/.cache/torchbp`. They are drawn on first use (184 MB, a few seconds) and again
            where they are found damaged.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        OSError: the cache cannot be written.

    Example:
        >>> train = SyntheticCIFAR10()  # doctest: +SKIP
        >>> train.images.shape, train.images.dtype  # doctest: +SKIP
        (torch.Size([50000, 3, 32, 32]), torch.uint8)
    """

    def __init__(
        self, train: bool = True, seed: int = 0, root: str | os.PathLike[str] | None = None
    ) -> None:
        check_bool("SyntheticCIFAR10", "train", train)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"SyntheticCIFAR10: seed must be an integer, got {type(seed).__name__}")
        if seed < 0:
            raise ValueError(f"SyntheticCIFAR10: seed must be at least 0, got {seed}")
        self.root = cache_dir() if root is None else as_path("SyntheticCIFAR10", "root", root)
        self.train = train
        self.seed = seed
        folder = self.root / f"synthetic-cifar10-v{VERSION}-seed{seed}" / BINARY
        if not _is_sound(folder, train):
            _write(folder, seed)
        self.images, self.targets, self.classes = read_split(folder, BINARY, train)


def cache_dir() -> Path:
    """Where generated data is kept: `$TORCHBP_CACHE`, or `~/.cache/torchbp`."""
    return as_path(
        "SyntheticCIFAR10", "TORCHBP_CACHE", os.environ.get("TORCHBP_CACHE") or "~/.cache/torchbp"
    )


# ---- The cache


def _is_sound(folder: Path, train: bool) -> bool:
    """Whether the files of a split are there with the checksums they were written with."""
    try:
        lines = (folder / CHECKSUMS).read_text("ascii").splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        names = [*cifar10.file_names(BINARY, train), META[BINARY]]
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name] for name in names
        )
    except (OSError, ValueError, KeyError):
        return False


def _write(folder: Path, seed: int) -> None:
    """Draw both splits into `folder`, with their checksums in the format of `sha256sum`."""
    files = {META[BINARY]: "".join(f"{name}\n" for name in SHAPES).encode("ascii")}
    blocks = cifar10.IMAGES_PER_FILE // BLOCK
    with progress("drawing synthetic CIFAR-10 (blocks)", 6 * blocks) as advance:
        for train in (True, False):
            for i, name in enumerate(cifar10.file_names(BINARY, train)):
                records = []
                for block in range(i * blocks, (i + 1) * blocks):
                    labels, images = draw(seed, train, block)
                    records.append(
                        np.concatenate([labels[:, None], images.reshape(BLOCK, -1)], axis=1)
                    )
                    advance(1)
                files[name] = np.concatenate(records).tobytes()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    try:
        publish({**files, CHECKSUMS: sums.encode("ascii")}, folder)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"SyntheticCIFAR10: cannot write the cache ({error.strerror}); set TORCHBP_CACHE or "
            "root to a folder that can be written",
            str(folder),
        ) from error


# ---- Shapes
#
# A shape is a function of coordinates (u, v), to the right and down, in which its radius is ONE:
# how far inside the shape a point lies, negative outside, in the same unit; exact near the outline,
# which is all that is looked at.

ONE = 1024


def disc(u: Ints, v: Ints) -> Ints:
    return (ONE * ONE - u * u - v * v) // (2 * ONE)


def ring(u: Ints, v: Ints) -> Ints:
    return np.minimum(disc(u, v), (u * u + v * v - (ONE * ONE) // 4) // ONE)


def square(u: Ints, v: Ints) -> Ints:
    return 840 - np.maximum(abs(u), abs(v))


def triangle(u: Ints, v: Ints) -> Ints:
    return ONE // 2 - np.maximum(
        v, (887 * abs(u) - 512 * v) // ONE
    )  # normals at 90, -30 and 210 degrees


def cross(u: Ints, v: Ints) -> Ints:
    u, v = abs(u), abs(v)
    return np.minimum(ONE - np.maximum(u, v), 330 - np.minimum(u, v))


def star(u: Ints, v: Ints) -> Ints:
    """A pentagram: the points on the inner side of at least four of its five lines."""
    lowest = second = np.full_like(u, 8 * ONE)
    for x, y in ((0, 1024), (974, 316), (602, -828), (-602, -828), (-974, 316)):
        depth = 316 - (x * u + y * v) // ONE
        second = np.minimum(second, np.maximum(lowest, depth))
        lowest = np.minimum(lowest, depth)
    return second


def moon(u: Ints, v: Ints) -> Ints:
    return np.minimum(disc(u, v), -disc(u - 500, v) - 100)


def heart(u: Ints, v: Ints) -> Ints:
    """Two discs on the upper sides of a square that stands on its corner."""
    u, v = abs(u), v + 100
    tilted = (725 * (900 - u - abs(v))) // ONE
    return np.maximum(tilted, (637 * 637 - (u - 450) ** 2 - (v + 450) ** 2) // (2 * 637))


def stripes(u: Ints, v: Ints) -> Ints:
    return abs(v % ONE - ONE // 2) - ONE // 4


def checkers(u: Ints, v: Ints) -> Ints:
    a, b = stripes(v, u), stripes(u, v)
    return np.maximum(np.minimum(a, b), np.minimum(-a, -b))


SHAPES: dict[str, Callable[[Ints, Ints], Ints]] = {
    shape.__name__: shape
    for shape in (disc, ring, square, triangle, cross, star, moon, heart, stripes, checkers)
}


# ---- Drawing

PIXEL = 64  # coordinates are in 1/64 of a pixel
COSINE = np.array(
    [isqrt(ONE * ONE - s * s) for s in range(ONE + 1)], np.int32
)  # of the angle whose sine is s / ONE


def draw(seed: int, train: bool, block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """One block of a split: labels uint8 [500] and images uint8 [500, 3, 32, 32].

    Example:
        >>> labels, images = draw(seed=0, train=True, block=0)
        >>> labels[:10].tolist(), images.shape
        ([7, 9, 9, 0, 0, 0, 0, 5, 0, 9], (500, 3, 32, 32))
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed, int(train), block]))

    def pick(low: int, high: int, *shape: int) -> Ints:
        """Integers from low to high, both included, equally likely: int32 [BLOCK, *shape]."""
        raw = stream.random_raw(BLOCK * prod(shape)).reshape(BLOCK, *shape) >> np.uint64(32)
        return (raw * np.uint64(high - low + 1) >> np.uint64(32)).astype(np.int32) + np.int32(low)

    labels = np.argsort(stream.random_raw(BLOCK), kind="stable") % len(SHAPES)

    # Pose: from pixels to the shape's own coordinates, a turn and a scaling in one product.
    grid = (PIXEL * np.arange(32) - 31 * PIXEL // 2).astype(np.int32)
    right, down = grid, grid[:, None]
    radius = pick(8 * PIXEL, 12 * PIXEL, 1, 1)
    x = right - pick(-3 * PIXEL, 3 * PIXEL, 1, 1)
    y = down - pick(-3 * PIXEL, 3 * PIXEL, 1, 1)
    sine = pick(-350, 350, 1, 1)  # up to 20 degrees either way
    cosine = COSINE[abs(sine)]
    u = (cosine * x + sine * y) // radius
    v = (cosine * y - sine * x) // radius

    cover = np.empty((BLOCK, 32, 32), np.int32)
    for label, shape in enumerate(SHAPES.values()):
        rows = labels == label
        cover[rows] = _coverage(shape(u[rows], v[rows]), radius[rows])

    # Colour: a background that changes from side to side; a figure that is lighter than it in
    # every channel, or, one time in four, darker. That takes a linear classifier's one template a
    # class away from it: half of what the lighter figures teach it the darker ones unteach.
    images = pick(60, 170, 3, 1, 1)
    images = images + (pick(-24, 24, 3, 1, 1) * right + pick(-24, 24, 3, 1, 1) * down) // ONE
    sign = np.where(pick(0, 3, 1, 1, 1) > 0, np.int32(1), np.int32(-1))
    images += sign * pick(20, 110, 3, 1, 1) * cover[:, None] // 256

    # Clutter: two small discs of any colour, in front of it all.
    for _ in range(2):
        radius = pick(3 * PIXEL // 2, 4 * PIXEL, 1, 1)
        x = ONE * (right - pick(-16 * PIXEL, 16 * PIXEL, 1, 1)) // radius
        y = ONE * (down - pick(-16 * PIXEL, 16 * PIXEL, 1, 1)) // radius
        images += (pick(0, 255, 3, 1, 1) - images) * _coverage(disc(x, y), radius)[:, None] // 256

    # Noise: the sum of two bytes, up to 48 levels either way.
    raw = stream.random_raw(BLOCK * PIXELS // 4).astype("<u8").view(np.uint8)
    first, second = raw.astype(np.int32).reshape(2, *images.shape)
    images += (first + second - 255) * 48 // 256
    return labels.astype(np.uint8), np.clip(images, 0, 255).astype(np.uint8)


def _coverage(depth: Ints, radius: Ints) -> Ints:
    """How much of each pixel a shape covers, of 256: its outline is one pixel wide."""
    return np.clip(depth * radius // (ONE * PIXEL // 256) + 128, 0, 256)
