"""CIFAR-10: a strict reader of its two official layouts, and a download checked before use.

Both layouts hold the same 60,000 colour images of 32 x 32 pixels in ten classes, five files of
10,000 training images and one of 10,000 test images (Krizhevsky, "Learning Multiple Layers of
Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html):

- `cifar-10-batches-bin`: records of 3,073 bytes, the label and then the red, green and blue planes,
  row by row;
- `cifar-10-batches-py`: the same pixels and labels in pickles of Python 2.

A pickle is a program, so the second is read by an unpickler that knows five names and resolves them
to small stand-ins of its own; nothing else can be called. Every file is read once, checked, and
only then used.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import operator
import os
import pickle
import pickletools
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
TIMEOUT = 30  # seconds without a byte from the server

BINARY = "cifar-10-batches-bin"
PYTHON = "cifar-10-batches-py"
SUFFIX = {BINARY: ".bin", PYTHON: ""}
META = {BINARY: "batches.meta.txt", PYTHON: "batches.meta"}
FILES = {True: [f"data_batch_{i}" for i in range(1, 6)], False: ["test_batch"]}  # by `train`

IMAGES_PER_FILE = 10_000
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS
NUM_CLASSES = 10

LIMIT = 256 << 20  # bytes; of downloading and decompressing (the official archive: 170, 184 MB)
META_LIMIT = 4096  # bytes of a file of class names (the official one: 61)
CURE = "delete it and pass download=True (--download), or point root (--data-dir) at a good copy"

Bytes = npt.NDArray[np.uint8]


class ImageDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images in memory: what `CIFAR10` and `SyntheticCIFAR10` share.

    Attributes:
        images: uint8 tensor [N, 3, 32, 32], channels red, green, blue.
        targets: int64 tensor [N], classes 0 to 9.
        classes: the ten names.
        root: the folder the data was asked for in.
        train: whether this is the training split.
    """

    images: torch.Tensor
    targets: torch.Tensor
    classes: list[str]
    root: Path
    train: bool

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index`, a uint8 tensor [3, 32, 32] (a view, not a copy), and its class.

        Raises:
            TypeError: `index` is not an integer.
            IndexError: `index` is not in [-N, N).
        """
        name, n = type(self).__name__, len(self)
        try:
            i = operator.index(index)
        except TypeError:
            raise TypeError(
                f"{name}: index must be an integer, got {type(index).__name__}"
            ) from None
        if not -n <= i < n:
            raise IndexError(f"{name}: index {i} is out of range for {n} images")
        return self.images[i], int(self.targets[i])

    def __repr__(self) -> str:
        split = "train" if self.train else "test"
        return f"{type(self).__name__}({split}, {len(self)} images, root={str(self.root)!r})"


class CIFAR10(ImageDataset):
    """The CIFAR-10 data set (Krizhevsky, 2009), whole in memory: 184 MB for both splits.

    Args:
        root: a folder that holds `cifar-10-batches-bin` or `cifar-10-batches-py`, or is one.
        train: the 50,000 training images; otherwise the 10,000 test images.
        download: if `root` holds no complete copy, fetch the official binary archive (170 MB) into
            `root/cifar-10-batches-bin`. Its SHA-256 is checked before anything in it is looked at.

    Raises:
        TypeError: an argument is of the wrong type.
        FileNotFoundError: `root` holds no CIFAR-10, or a file of it is missing.
        ValueError: a file is truncated, damaged or hostile, or the archive is not the official one.
        ConnectionError: the download failed.

    Example:
        >>> train = CIFAR10("~/data", download=True)  # doctest: +SKIP
        >>> train.images.shape, train.classes[:2]  # doctest: +SKIP
        (torch.Size([50000, 3, 32, 32]), ['airplane', 'automobile'])
    """

    def __init__(
        self, root: str | os.PathLike[str], train: bool = True, download: bool = False
    ) -> None:
        check_bool("CIFAR10", "train", train)
        check_bool("CIFAR10", "download", download)
        self.root = as_path("CIFAR10", "root", root)
        self.train = train
        if download and not any(_is_whole(*candidate) for candidate in _candidates(self.root)):
            _download(self.root)
        folder, layout = _locate(self.root, train)
        self.images, self.targets, self.classes = read_split(folder, layout, train)


def check_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {type(value).__name__}")


def as_path(owner: str, name: str, value: object) -> Path:
    """`value` as an absolute path, `~` expanded."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{owner}: {name} must be a path, got {type(value).__name__}")
    return Path(value).expanduser().absolute()


# ---- Where the files are


def file_names(layout: str, train: bool) -> list[str]:
    """The files of one split, in order."""
    return [name + SUFFIX[layout] for name in FILES[train]]


def _candidates(root: Path) -> list[tuple[Path, str]]:
    return [(root / BINARY, BINARY), (root / PYTHON, PYTHON), (root, BINARY), (root, PYTHON)]


def _is_whole(folder: Path, layout: str) -> bool:
    """Whether both splits are there, as far as names and (in the binary layout) sizes tell."""
    files = [folder / name for train in (True, False) for name in file_names(layout, train)]
    if not all(file.is_file() for file in [*files, folder / META[layout]]):
        return False
    return layout == PYTHON or all(f.stat().st_size == IMAGES_PER_FILE * RECORD for f in files)


def _locate(root: Path, train: bool) -> tuple[Path, str]:
    """The candidate with the fewest files missing; `read_split` names a file that is."""

    def missing(candidate: tuple[Path, str]) -> int:
        folder, layout = candidate
        return sum(
            not (folder / name).is_file() for name in [*file_names(layout, train), META[layout]]
        )

    best = min(_candidates(root), key=missing)
    if missing(best) == len(FILES[train]) + 1:
        raise FileNotFoundError(
            f"CIFAR10: no CIFAR-10 in {root}: wants a folder that holds {BINARY} or {PYTHON}, "
            "or is one; pass download=True (--download), or point root (--data-dir) at it"
        )
    return best


# ---- Reading


def read_split(
    folder: Path, layout: str, train: bool
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images uint8 [N, 3, 32, 32], targets int64 [N] and class names from a folder in either
    layout.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be.
    """
    read: Callable[[Path], tuple[npt.NDArray[Any], Bytes]]
    read = _read_binary if layout == BINARY else _read_python
    names = file_names(layout, train)
    images = np.empty((len(names), IMAGES_PER_FILE, PIXELS), np.uint8)
    targets = np.empty((len(names), IMAGES_PER_FILE), np.int64)
    for i, name in enumerate(names):
        targets[i], images[i] = read(folder / name)
    classes = _read_classes(folder / META[layout], layout)
    return torch.from_numpy(images).view(-1, *SHAPE), torch.from_numpy(targets).view(-1), classes


def _bad(path: Path, what: str) -> ValueError:
    return ValueError(f"CIFAR10: {path} {what}; {CURE}")


def _read_bytes(path: Path, limit: int) -> bytes:
    """The whole file; if it is too large, which must not fill the memory, `limit + 1` bytes."""
    if not path.exists():
        raise FileNotFoundError(
            f"CIFAR10: {path} is missing; pass download=True (--download), or point root "
            "(--data-dir) at a whole copy"
        )
    if not path.is_file():
        raise _bad(path, "is not a file")
    with open(path, "rb") as file:
        return file.read(limit + 1)


def _check_labels(path: Path, labels: npt.NDArray[Any]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= NUM_CLASSES))
    if len(wrong):
        first = wrong[0]
        raise _bad(
            path, f"has label {labels[first]} at image {first}, wants 0 to {NUM_CLASSES - 1}"
        )


def _read_binary(path: Path) -> tuple[Bytes, Bytes]:
    """Labels uint8 [N], pixels uint8 [N, 3072] from records of a label and 3,072 pixel bytes."""
    size = IMAGES_PER_FILE * RECORD
    data = _read_bytes(path, size)
    if len(data) != size:
        got = f"{len(data)}" if len(data) < size else "more"
        raise _bad(path, f"has {got} bytes, wants {size} ({IMAGES_PER_FILE} records of {RECORD})")
    records = np.frombuffer(data, np.uint8).reshape(IMAGES_PER_FILE, RECORD)
    labels, pixels = records[:, 0], records[:, 1:]
    _check_labels(path, labels)
    return labels, pixels


def _read_python(path: Path) -> tuple[npt.NDArray[np.int64], Bytes]:
    """Labels int64 [N] and pixels uint8 [N, 3072] from a pickled batch."""
    batch = _unpickle(path, 2 * IMAGES_PER_FILE * RECORD)
    data, labels = batch.get("data"), batch.get("labels")
    wanted = (IMAGES_PER_FILE, PIXELS)
    if not isinstance(data, _Array) or data.value is None:
        raise _bad(path, f"has no array under 'data', wants uint8 {list(wanted)}")
    if data.value.shape != wanted:
        raise _bad(path, f"has 'data' of shape {list(data.value.shape)}, wants {list(wanted)}")
    if not isinstance(labels, list) or not all(map(_is_int64, labels)):
        raise _bad(path, f"has no list of integers under 'labels', wants {IMAGES_PER_FILE} of them")
    if len(labels) != IMAGES_PER_FILE:
        raise _bad(path, f"has {len(labels)} labels, wants {IMAGES_PER_FILE}")
    array = np.array(labels, np.int64)
    _check_labels(path, array)
    return array, data.value


def _is_int64(value: object) -> bool:
    return type(value) is int and value.bit_length() < 64


def _read_classes(path: Path, layout: str) -> list[str]:
    found: object
    if layout == PYTHON:
        found = _unpickle(path, META_LIMIT).get("label_names")
    else:
        found = _read_bytes(path, META_LIMIT).splitlines()
    names = [_as_text(name) for name in found] if isinstance(found, list) else []
    classes = [name for name in names if isinstance(name, str) and name and name.isprintable()]
    if len(set(classes)) != NUM_CLASSES or len(classes) != NUM_CLASSES:
        raise _bad(path, f"does not hold {NUM_CLASSES} class names")
    return classes


# ---- The unpickler


class _Dtype:
    """Stands in for `numpy.dtype` where that is uint8, and for nothing else."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        if _as_text(code) != "u1":
            raise pickle.UnpicklingError("its array is not of dtype uint8")

    def __setstate__(self, state: object) -> None:
        """Byte order, fields and so on: a uint8 has none."""


class _Array:
    """Stands in for `numpy.ndarray`: a C-contiguous uint8 array whose bytes fill its shape."""

    def __init__(self) -> None:
        self.value: Bytes | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or fortran or not isinstance(data, bytes):
            raise pickle.UnpicklingError("its array is not C-contiguous uint8")
        self.value = np.frombuffer(data, np.uint8).reshape(shape)


# The stand-ins for functions are objects without attributes: a pickle can set attributes on what it
# was given.
class _Reconstruct:
    __slots__ = ()

    def __call__(self, kind: object, shape: object, code: object) -> _Array:
        return _Array()


class _Encode:
    __slots__ = ()

    def __call__(self, text: str, encoding: object) -> bytes:
        if _as_text(encoding) != "latin1":
            raise pickle.UnpicklingError(f"it encodes as {encoding!r:.40}")
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _as_text(value: object) -> object:
    """Text that Python 2 pickled comes as bytes, that Python 3 pickled as str."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def _unpickle(path: Path, limit: int) -> dict[object, Any]:
    """The dict in a pickle, keys as str; nothing is imported or called but the stand-ins."""
    data = _read_bytes(path, limit)
    if len(data) > limit:
        raise _bad(path, f"has more than {limit} bytes")
    try:
        # A first pass, without running anything, finds truncation and memo slots far apart, for
        # which the unpickler would set memory aside.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) >= len(data):
                raise pickle.UnpicklingError("its memo is not in order")
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle fails in any way at all; each means the same
        raise _bad(path, f"is not a pickle of CIFAR-10 ({error!s:.200})") from error
    if not isinstance(batch, dict):
        raise _bad(path, f"holds a {type(batch).__name__}, wants a dict")
    return {_as_text(key): value for key, value in batch.items()}


# ---- Downloading


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, silent without a terminal; gives what advances it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def _download(root: Path) -> None:
    """Fetch the official archive, check it, and put its files into `root/cifar-10-batches-bin`."""
    archive = _fetch(URL)
    got = hashlib.sha256(archive).hexdigest()
    if got != SHA256:
        raise ValueError(
            f"CIFAR10: {URL} has SHA-256 {got}, wants {SHA256}; nothing of it "
            "was used. Try again later, or unpack a copy of the archive and point root "
            "(--data-dir) at it"
        )
    publish(_unpack(archive), root / BINARY)


def _fetch(url: str) -> bytes:
    """The body of `url`, whole and in memory, so that what is checked is what is parsed."""
    failed = f"CIFAR10: cannot download {url}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            if total is not None and total > LIMIT:
                raise ValueError(f"{failed}: it has {total} bytes, wants at most {LIMIT}")
            body = io.BytesIO()
            with progress("downloading CIFAR-10 (bytes)", total) as advance:
                while chunk := response.read(1 << 16):
                    advance(body.write(chunk))
                    if body.tell() > LIMIT:
                        raise ValueError(f"{failed}: it has more than {LIMIT} bytes")
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"{failed}: HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise ConnectionError(f"{failed}: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{failed}: {error or type(error).__name__}") from error
    if total is not None and body.tell() != total:
        raise ConnectionError(
            f"{failed}: the connection ended after {body.tell()} of {total} bytes; try again"
        )
    return body.getvalue()


def _unpack(archive: bytes) -> dict[str, bytes]:
    """The seven files of the binary layout by name, from the bytes of the `.tar.gz`; nothing
    touches the disk.

    Raises:
        ValueError: the archive is damaged or too large, or holds a link, a path that leads
            elsewhere, the same file twice or one of the wrong size, or lacks one.
    """
    sizes = {
        name: IMAGES_PER_FILE * RECORD
        for train in (True, False)
        for name in file_names(BINARY, train)
    }
    sizes[META[BINARY]] = META_LIMIT
    found: dict[str, bytes] = {}
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as packed:
            data = packed.read(
                LIMIT + 1
            )  # bounded here, so that no header in the tar can ask for more
        if len(data) > LIMIT:
            raise ValueError(f"it decompresses to more than {LIMIT} bytes")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                parts = member.name.split("/")
                if parts[0] != BINARY or ".." in parts or not (member.isdir() or member.isreg()):
                    raise ValueError(
                        f"it holds {member.name!r:.100}, which is no plain file in {BINARY}"
                    )
                name = "/".join(parts[1:])
                if name not in sizes or member.isdir():
                    continue  # the folder itself, readme.html
                exact = name != META[BINARY]
                if member.size > sizes[name] or (exact and member.size != sizes[name]):
                    most = "" if exact else "at most "
                    raise ValueError(
                        f"its {name} has {member.size} bytes, wants {most}{sizes[name]}"
                    )
                if name in found:
                    raise ValueError(f"it holds {name} twice")
                file = tar.extractfile(member)
                found[name] = file.read(sizes[name]) if file else b""
                if len(found[name]) != member.size:
                    raise ValueError(
                        f"its {name} ends after {len(found[name])} of {member.size} bytes"
                    )
        if missing := sorted(sizes.keys() - found.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (ValueError, EOFError, OSError, zlib.error, tarfile.TarError) as error:
        raise ValueError(
            f"CIFAR10: the archive from {URL} cannot be used: {error}; nothing was written"
        ) from error
    return found


def publish(files: dict[str, bytes], folder: Path) -> None:
    """Write `files` into `folder` so that no one ever sees half a file, whoever else writes it at
    the same time.

    They are written beside it, synced, and renamed: the folder in one step where it is new, file by
    file where it is there already. What was not renamed is deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in files.items():
            with open(work / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        work.chmod(0o755)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            for name in files:
                os.replace(work / name, folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
