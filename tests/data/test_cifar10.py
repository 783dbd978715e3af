"""torchbp.data.cifar10: both layouts, and every way in which a file or a server can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchbp.data import CIFAR10, cifar10

N = 12  # images a file, in place of 10,000
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


@pytest.fixture(autouse=True)
def _miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", N)


@pytest.fixture(scope="module")
def content() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels [N] and pixels [N, 3072] of each batch."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 10, N, np.uint8), rng.integers(0, 256, (N, 3072), np.uint8))
        for name in BATCHES
    }


Content = dict[str, tuple[np.ndarray, np.ndarray]]


def binary_files(content: Content) -> dict[str, bytes]:
    files = {"batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode()}
    for name, (labels, pixels) in content.items():
        rows = zip(labels, pixels, strict=True)
        files[f"{name}.bin"] = b"".join(bytes([y]) + x.tobytes() for y, x in rows)
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# The official batches, as Python 2 and NumPy 1.6 pickled them: byte strings, opcode by opcode.


def py2_str(text: str) -> bytes:
    return b"U" + bytes([len(text)]) + text.encode()


def py2_batch(labels: np.ndarray, pixels: np.ndarray, shape: tuple[int, int] = (N, 3072)) -> bytes:
    rows, columns = (b"M" + struct.pack("<H", n) for n in shape)
    out = b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03"
    out += b"U\x06labelsq\x04]q\x05("
    out += b"".join(b"K" + bytes([y]) for y in labels) + b"eU\x04dataq\x06"
    out += b"cnumpy.core.multiarray\n_reconstruct\nq\x07"
    out += b"cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
    out += b"(K\x01" + rows + columns + b"\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
    out += b"(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb\x89"
    out += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    return out + b"U\x09filenamesq\x0c](" + py2_str("leptodactylus_s_0.png") + b"eu."


def py2_files(content: Content) -> dict[str, bytes]:
    files = {name: py2_batch(*batch) for name, batch in content.items()}
    names = b"".join(map(py2_str, NAMES))
    head = b"\x80\x02}(U\x13num_cases_per_batchM\x10\x27U\x0blabel_names]("
    return {**files, "batches.meta": head + names + b"eU\x07num_visM\x00\x0cu."}


def py3_files(content: Content, protocol: int, keys: type) -> dict[str, bytes]:
    def key(text: str) -> str | bytes:
        return text if keys is str else text.encode()

    def dump(value: dict[str | bytes, object]) -> bytes:
        return pickle.dumps(value, protocol)

    files = {
        name: dump({key("labels"): [int(y) for y in labels], key("data"): pixels})
        for name, (labels, pixels) in content.items()
    }
    return {**files, "batches.meta": dump({key("label_names"): [key(name) for name in NAMES]})}


LAYOUTS: dict[str, tuple[str, Callable[[Content], dict[str, bytes]]]] = {
    "binary": (cifar10.BINARY, binary_files),
    "python2": (cifar10.PYTHON, py2_files),
    "python3-bytes": (cifar10.PYTHON, lambda content: py3_files(content, 2, bytes)),
    "python3-str": (cifar10.PYTHON, lambda content: py3_files(content, 4, str)),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["root-holds-it", "root-is-it"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_what_was_written(
    content: Content, tmp_path: Path, layout: str, inside: bool, train: bool
) -> None:
    name, files = LAYOUTS[layout]
    folder = write(tmp_path / (name if inside else "any name"), files(content))
    data = CIFAR10(tmp_path if inside else folder, train=train)
    batches = [content[b] for b in (BATCHES[:5] if train else BATCHES[5:])]
    want = np.concatenate([x for _, x in batches])
    assert data.images.dtype == torch.uint8
    assert data.targets.dtype == torch.int64
    assert data.images.shape == (N * len(batches), 3, 32, 32)
    assert data.targets.tolist() == [int(y) for labels, _ in batches for y in labels]
    # Channel c, row y, column x of an image is byte 1024 c + 32 y + x of its record.
    assert data.images[3, 1, 5, 7] == want[3, 1024 + 32 * 5 + 7]
    assert data.images.flatten().tolist() == want.flatten().tolist()
    assert data.classes == NAMES
    assert data.train is train


def test_is_a_map_style_dataset(content: Content, tmp_path: Path) -> None:
    write(tmp_path / cifar10.BINARY, binary_files(content))
    data = CIFAR10(str(tmp_path), train=False)
    image, target = data[-1]
    assert len(data) == N
    assert (image.shape, type(target)) == ((3, 32, 32), int)
    assert torch.equal(image, data.images[N - 1])
    assert target == content["test_batch"][0][-1]
    assert repr(data) == f"CIFAR10(test, {N} images, root={str(tmp_path)!r})"
    batch, _ = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert torch.equal(batch, data.images[:4])
    with pytest.raises(IndexError, match=f"index {N} is out of range for {N} images"):
        data[N]
    with pytest.raises(TypeError, match="index must be an integer, got float"):
        data[1.0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": 3}, "root must be a path, got int"),
        ({"root": "x", "train": 1}, "train must be True or False, got int"),
        ({"root": "x", "download": "yes"}, "download must be True or False, got str"),
    ],
)
def test_rejects_wrong_types(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=f"CIFAR10: {message}"):
        CIFAR10(**arguments)  # type: ignore[arg-type]


# ---- Damaged files


@pytest.mark.parametrize("root", ["absent", ".", "a file"])
def test_no_data(tmp_path: Path, root: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 in .*cifar-10-batches-bin.*--data"):
        CIFAR10(tmp_path / root)


@pytest.mark.parametrize("layout", ["binary", "python2"])
def test_a_missing_file_is_named(content: Content, tmp_path: Path, layout: str) -> None:
    name, files = LAYOUTS[layout]
    folder = write(tmp_path / name, files(content))
    batch = folder / f"data_batch_3{cifar10.SUFFIX[name]}"
    batch.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{batch} is missing.*--download.*--data-dir"):
        CIFAR10(tmp_path)
    assert len(CIFAR10(tmp_path, train=False)) == N  # which needs nothing of it
    (folder / cifar10.META[name]).unlink()
    with pytest.raises(FileNotFoundError, match=r"batches\.meta.* is missing"):
        CIFAR10(tmp_path, train=False)


def test_prefers_the_layout_that_is_whole(content: Content, tmp_path: Path) -> None:
    write(tmp_path / cifar10.PYTHON, py2_files(content))
    write(tmp_path / cifar10.BINARY, {"data_batch_1.bin": b""})
    assert len(CIFAR10(tmp_path)) == 5 * N


def edit(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-1], rf"has {N * 3073 - 1} bytes, wants {N * 3073}"),
        (lambda d: d[:-3073], rf"has {(N - 1) * 3073} bytes, wants {N * 3073}"),
        (lambda d: d + b"\0", rf"has more bytes, wants {N * 3073}"),
        (lambda d: b"", rf"has 0 bytes, wants {N * 3073}"),
        (lambda d: edit(d, 3073 * 7, b"\x0a"), r"has label 10 at image 7, wants 0 to 9"),
    ],
    ids=["a byte short", "a record short", "a byte long", "empty", "label"],
)
def test_damaged_binary(
    content: Content, tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    files = binary_files(content)
    files["data_batch_2.bin"] = change(files["data_batch_2.bin"])
    write(tmp_path / cifar10.BINARY, files)
    with pytest.raises(ValueError, match=rf"data_batch_2\.bin {message}.*--download.*--data-dir"):
        CIFAR10(tmp_path)


@pytest.mark.parametrize("meta", [b"", b"one\ntwo\n", b"cat\n" * 10, b"\xff\n" * 10])
def test_damaged_class_names(content: Content, tmp_path: Path, meta: bytes) -> None:
    write(tmp_path / cifar10.BINARY, {**binary_files(content), "batches.meta.txt": meta})
    with pytest.raises(ValueError, match=r"batches\.meta\.txt does not hold 10 class names"):
        CIFAR10(tmp_path)


def test_a_folder_in_place_of_a_file(content: Content, tmp_path: Path) -> None:
    folder = write(tmp_path / cifar10.BINARY, binary_files(content))
    (folder / "test_batch.bin").unlink()
    (folder / "test_batch.bin").mkdir()
    with pytest.raises(ValueError, match=r"test_batch\.bin is not a file"):
        CIFAR10(tmp_path, train=False)


Y, X = np.arange(N, dtype=np.uint8) % 10, np.zeros((N, 3072), np.uint8)


class Evil:
    """Pickles as a call."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def dump(**entries: object) -> bytes:
    return pickle.dumps({"labels": Y.tolist(), "data": X, **entries}, protocol=2)


PICKLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a pickle of CIFAR-10"),
    "truncated": (py2_batch(Y, X)[:-9], "is not a pickle of CIFAR-10"),
    "text": (b"<html>404</html>", "is not a pickle of CIFAR-10"),
    "a list": (pickle.dumps([1]), "holds a list, wants a dict"),
    "memo bomb": (b"\x80\x02}r\xff\xff\xff\x7f.", "its memo is not in order"),
    "huge string": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b".", "is not a pickle"),
    "too large": (py2_batch(Y, X) + bytes(2 * N * 3073), "has more than"),
    "no data": (dump(data=None), "has no array under 'data'"),
    "data is bytes": (dump(data=b"0"), "has no array under 'data'"),
    "wrong shape": (dump(data=X[:, :-1].copy()), r"shape \[12, 3071\], wants \[12, 3072\]"),
    "flat": (dump(data=X.reshape(-1)), r"shape \[36864\], wants \[12, 3072\]"),
    "shape over its bytes": (py2_batch(Y, X[:-1]), "is not a pickle of CIFAR-10"),
    "int8": (dump(data=X.astype(np.int8)), "is not of dtype uint8"),
    "objects": (dump(data=np.array([[None]])), "is not of dtype uint8"),
    "fortran": (dump(data=np.asfortranarray(X)), "is not C-contiguous uint8"),
    "no labels": (dump(labels=None), "has no list of integers under 'labels'"),
    "labels as text": (dump(labels=["1"] * N), "has no list of integers under 'labels'"),
    "few labels": (dump(labels=[0]), f"has 1 labels, wants {N}"),
    "label 10": (dump(labels=[0] * (N - 1) + [10]), "has label 10 at image 11"),
    "label -1": (dump(labels=[0] * (N - 1) + [-1]), "has label -1 at image 11"),
    "vast label": (dump(labels=[0] * (N - 1) + [1 << 80000]), "has no list of integers"),
    "eval": (dump(x=Evil(eval, "1")), r"asks for __builtin__\.eval"),
    "getattr": (dump(x=Evil(getattr, "", "join")), r"asks for __builtin__\.getattr"),
    "numpy.load": (dump(x=Evil(np.load, "x")), r"asks for numpy\.load"),
    "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "asks for numpy"),
    "codec": (dump(x=Evil(__import__("codecs").encode, "x", "rot13")), "encodes as 'rot13'"),
    "extension": (b"\x80\x02\x82\x01.", "is not a pickle of CIFAR-10"),
    # BUILD with a state for attributes, on a stand-in for a function:
    "patch": (
        b"\x80\x02c_codecs\nencode\nN}X\x04\0\0\0callNs\x86b.",
        "is not a pickle of CIFAR-10",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_damaged_and_hostile_pickles(content: Content, tmp_path: Path, case: str) -> None:
    data, message = PICKLES[case]
    write(tmp_path / cifar10.PYTHON, {**py2_files(content), "test_batch": data})
    with pytest.raises(ValueError, match=rf"test_batch .*{message}.*--download.*--data-dir"):
        CIFAR10(tmp_path, train=False)


def test_a_pickle_cannot_run_a_command(content: Content, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    data = dump(x=Evil(os.system, f"touch {mark}"))
    pickle.loads(data)
    assert mark.exists()  # the pickle does what it is here to do
    mark.unlink()
    meta = pickle.dumps({"label_names": Evil(os.system, f"touch {mark}")})
    files = {**py2_files(content), "data_batch_1": data, "batches.meta": meta}
    write(tmp_path / cifar10.PYTHON, files)
    for train in (True, False):
        with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system"):
            CIFAR10(tmp_path, train=train)
    assert not mark.exists()


# ---- Downloading


class Server:
    """An HTTP server on loopback that answers every request with `body`."""

    def __init__(self) -> None:
        self.body = b""
        self.status = 200
        self.length: int | None = None  # announced, where not that of the body
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                self.send_response(server.status)
                length = len(server.body) if server.length is None else server.length
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(server.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/cifar-10-binary.tar.gz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answer with `body`, and have it count as the official archive."""
        self.body = body
        monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(body).hexdigest())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr(cifar10, "URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.http.shutdown()
    server.http.server_close()


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", **attributes: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def official(content: Content) -> list[Member]:
    files = {**binary_files(content), "readme.html": b"<html>"}
    folder = member(cifar10.BINARY, type=tarfile.DIRTYPE)
    return [folder] + [member(f"{cifar10.BINARY}/{name}", d) for name, d in files.items()]


def archive(members: list[Member]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_download(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve(archive(official(content)), monkeypatch)
    root = tmp_path / "new" / "root"
    data = CIFAR10(root, download=True)
    assert data.images.flatten().tolist() == [
        int(v) for name in BATCHES[:5] for v in content[name][1].flatten()
    ]
    files = binary_files(content)
    assert tree(root) == sorted([cifar10.BINARY, *(f"{cifar10.BINARY}/{name}" for name in files)])
    for name, want in files.items():
        assert (root / cifar10.BINARY / name).read_bytes() == want
    assert len(CIFAR10(root, train=False, download=True)) == N
    assert len(CIFAR10(root, train=False)) == N
    assert server.requests == 1  # what is there is not fetched again


def test_download_is_silent_without_a_terminal(
    server: Server,
    content: Content,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.serve(archive(official(content)), monkeypatch)
    CIFAR10(tmp_path, download=True)
    assert capfd.readouterr() == ("", "")


def test_download_mends_what_is_broken_and_leaves_other_files_alone(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve(archive(official(content)), monkeypatch)
    folder = write(tmp_path / cifar10.BINARY, {"test_batch.bin": b"half", "mine.txt": b"mine"})
    assert len(CIFAR10(tmp_path, train=False, download=True)) == N
    assert (folder / "mine.txt").read_bytes() == b"mine"
    assert tree(tmp_path) == sorted(
        [cifar10.BINARY, *(f"{cifar10.BINARY}/{n}" for n in [*binary_files(content), "mine.txt"])]
    )


def test_no_download_where_the_python_layout_is_whole(
    server: Server, content: Content, tmp_path: Path
) -> None:
    write(tmp_path / cifar10.PYTHON, py2_files(content))
    assert len(CIFAR10(tmp_path, download=True)) == 5 * N
    assert server.requests == 0


def refused(tmp_path: Path, error: type[BaseException], message: str) -> None:
    """A download fails like this, and leaves nothing behind, inside its root or out."""
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    with pytest.raises(error, match=message):
        CIFAR10(root, download=True)
    assert tree(tmp_path) == ["a", "a/root"]


def test_corrupted(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve(archive(official(content)), monkeypatch)
    server.body = edit(server.body, len(server.body) // 2, b"????")
    got = hashlib.sha256(server.body).hexdigest()
    refused(
        tmp_path, ValueError, f"has SHA-256 {got}, wants {cifar10.SHA256}; nothing of it was used"
    )


def test_nothing_is_parsed_before_the_hash(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = archive(official(content))
    monkeypatch.setattr(cifar10, "_unpack", lambda data: pytest.fail("parsed"))
    refused(tmp_path, ValueError, "has SHA-256")


def test_truncated(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve(archive(official(content)), monkeypatch)
    server.length = len(server.body)
    server.body = server.body[:-1000]
    n = len(server.body)
    refused(tmp_path, ConnectionError, f"ended after {n} of {n + 1000} bytes; try again")


@pytest.mark.parametrize("status", [404, 500])
def test_http_errors(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    refused(tmp_path, ConnectionError, f"cannot download {server.url}: HTTP {status} ")


def test_no_server(server: Server, tmp_path: Path) -> None:
    server.http.shutdown()
    server.http.server_close()
    refused(tmp_path, ConnectionError, f"cannot download {server.url}: .*refused")


@pytest.mark.parametrize("announced", [True, False])
def test_endless_answer(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    monkeypatch.setattr(cifar10, "LIMIT", 100_000)
    server.body = bytes(0 if announced else 300_000)
    server.length = 300_000
    if not announced:
        monkeypatch.setattr(server, "length", "unknown")
    refused(tmp_path, ValueError, "it has (300000|more than 100000) bytes")


FOLDER = cifar10.BINARY
LINK: dict[str, Any] = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
HOSTILE: dict[str, tuple[Callable[[list[Member]], list[Member]], str]] = {
    "parent": (lambda m: [*m, member("../evil", b"x")], r"holds '\.\./evil'"),
    "parent inside": (lambda m: [*m, member(f"{FOLDER}/../../evil", b"x")], "no plain file"),
    "absolute": (lambda m: [*m, member("/tmp/evil", b"x")], r"holds '/tmp/evil'"),
    "symbolic link": (
        lambda m: [*m[:-2], member(f"{FOLDER}/test_batch.bin", **LINK)],
        "test_batch.bin', which is no plain file",
    ),
    "folder as link": (lambda m: [member(FOLDER, **LINK), *m[1:]], "no plain file"),
    "hard link": (
        lambda m: [member(f"{FOLDER}/x", type=tarfile.LNKTYPE, linkname="/etc/passwd"), *m],
        "no plain file",
    ),
    "device": (lambda m: [*m, member(f"{FOLDER}/x", type=tarfile.CHRTYPE)], "no plain file"),
    "twice": (lambda m: [*m, m[2]], r"holds data_batch_1\.bin twice"),
    "missing": (lambda m: m[:2] + m[3:], r"lacks data_batch_1\.bin"),
    "nothing": (lambda m: [], r"lacks batches\.meta\.txt, data_batch_1\.bin"),
    "large": (
        lambda m: [*m[:2], member(m[2][0].name, m[2][1] + b"x"), *m[3:]],
        rf"data_batch_1\.bin has {N * 3073 + 1} bytes, wants {N * 3073}",
    ),
    "small": (
        lambda m: [*m[:2], member(m[2][0].name, m[2][1][:-1]), *m[3:]],
        rf"data_batch_1\.bin has {N * 3073 - 1} bytes, wants {N * 3073}",
    ),
    "large names": (
        lambda m: [m[0], member(m[1][0].name, bytes(5000)), *m[2:]],
        r"batches\.meta\.txt has 5000 bytes, wants at most 4096",
    ),
    "folder as file": (
        lambda m: [member(m[2][0].name, type=tarfile.DIRTYPE), *m[:2], *m[3:]],
        r"lacks data_batch_1\.bin",
    ),
    "bomb": (
        lambda m: [*m, member(f"{FOLDER}/readme.html", bytes(2_000_000))],
        "decompresses to more than 1000000 bytes",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, message = HOSTILE[case]
    monkeypatch.setattr(cifar10, "LIMIT", 1_000_000)
    server.serve(archive(change(official(content))), monkeypatch)
    refused(tmp_path, ValueError, f"cannot be used: .*{message}.*; nothing was written")


def test_a_header_that_promises_more_than_there_is(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{FOLDER}/test_batch.bin"
    info = tarfile.TarInfo(name)
    info.size = N * 3073
    members = [m for m in official(content) if m[0].name != name]
    packed = gzip.decompress(archive(members)).rstrip(b"\0")
    packed += bytes(-len(packed) % 512) + info.tobuf() + b"x" * 100
    server.serve(gzip.compress(packed), monkeypatch)
    refused(tmp_path, ValueError, "cannot be used: .*; nothing was written")


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", gzip.compress(b"no tar" * 200), gzip.compress(bytes(10_000))[:-9]],
    ids=["empty", "html", "no tar", "cut gzip"],
)
def test_no_archive(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    server.serve(body, monkeypatch)
    refused(tmp_path, ValueError, "cannot be used: .*; nothing was written")


def test_an_interrupted_write_leaves_nothing(
    server: Server, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve(archive(official(content)), monkeypatch)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt("here")

    monkeypatch.setattr(os, "fsync", interrupt)
    refused(tmp_path, KeyboardInterrupt, "here")


# ---- The real thing


def test_the_real_data_reads_the_same_in_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.environ.get("CIFAR10_ROOT")
    if not root:
        pytest.skip("CIFAR10_ROOT names no folder with cifar-10-batches-bin and -py")
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", 10_000)
    for train, n in ((True, 50_000), (False, 10_000)):
        binary, python = (CIFAR10(Path(root) / name, train) for name in (FOLDER, cifar10.PYTHON))
        assert torch.equal(binary.images, python.images)
        assert torch.equal(binary.targets, python.targets)
        assert binary.classes == python.classes == NAMES
        assert binary.targets.bincount().tolist() == [n // 10] * 10
        # The mean colour that everyone normalises CIFAR-10 by.
        mean = binary.images.double().mean((0, 2, 3)) / 255
        assert torch.allclose(mean, torch.tensor([0.491, 0.482, 0.447]).double(), atol=5e-3)
