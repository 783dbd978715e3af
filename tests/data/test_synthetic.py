"""torchbp.data.synthetic: fixed bytes, a cache that mends itself, a task that teaches."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from torchbp.data import CIFAR10, SyntheticCIFAR10, cifar10, synthetic

N = synthetic.BLOCK


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, and files of one block each."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", N)
    monkeypatch.setenv("TORCHBP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Blocks at both ends of what the full set is drawn from. If one of these changes, so do everyone's
# data: raise synthetic.VERSION.
@pytest.mark.parametrize(
    ("seed", "train", "block", "digest"),
    [
        (0, True, 0, "b2f7d61c35c47a0f66e623531726104aab00058ff9c6b97048037b00ec262041"),
        (0, True, 99, "a7de119b5a60026ed5e9edc6d963ed389a8239ee3cc9012cc1f91e40b33a79e1"),
        (0, False, 0, "ec1ca7dfb5d70e46b6c8a94faef345f402a273d33379f50c43fa8c2655a5d81c"),
        (1, True, 0, "15db2a30f7db6776f6a42e5bccecbf375d17e04f8fd300688894ecdc475281fd"),
    ],
)
def test_bytes_are_fixed(seed: int, train: bool, block: int, digest: str) -> None:
    labels, images = synthetic.draw(seed, train, block)
    assert labels.dtype == images.dtype == np.uint8
    assert hashlib.sha256(labels.tobytes() + images.tobytes()).hexdigest() == digest


def test_every_block_is_balanced_and_its_own() -> None:
    blocks = [
        synthetic.draw(*key) for key in ((0, True, 0), (0, True, 1), (0, False, 0), (1, True, 0))
    ]
    for labels, _ in blocks:
        assert np.bincount(labels).tolist() == [N // 10] * 10
    assert len({images.tobytes() for _, images in blocks}) == len(blocks)
    images = np.concatenate([images for _, images in blocks])
    assert len({image.tobytes() for image in images}) == len(images)


def coverage(name: str) -> np.ndarray:
    """Where a shape is: bool [256, 256] over [-1.5, 1.5] squared."""
    grid = (np.arange(256, dtype=np.int32) - 128) * 12
    u, v = np.broadcast_arrays(grid, grid[:, None])
    inside: np.ndarray = synthetic.SHAPES[name](u, v) > 0
    return inside


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("disc", np.pi),
        ("ring", np.pi * (1 - 1 / 4)),
        ("square", (2 * 840 / 1024) ** 2),
        ("triangle", 3 * np.sqrt(3) / 4),
        # Two bars of 2 by 2w less the square in which they cross, w = 330 / 1024.
        ("cross", 8 * (330 / 1024) - 4 * (330 / 1024) ** 2),
        # A pentagram of circumradius 1 (its lines are 0.309 from the centre).
        ("star", 1.1226),
        # Half of the plane: of the 9 that are looked at.
        ("stripes", 4.5),
        ("checkers", 4.5),
    ],
)
def test_shapes_have_their_area(name: str, area: float) -> None:
    measured = coverage(name).sum() * (12 / 1024) ** 2
    assert measured == pytest.approx(area, rel=0.03)  # the outline is some 3 % of the pixels


@pytest.mark.parametrize("name", ["disc", "ring", "square", "triangle", "cross", "star", "heart"])
def test_shapes_are_symmetric(name: str) -> None:
    inside = coverage(name)[1:, 1:]
    # Integer division rounds down on either side, so outlines may differ by a pixel.
    assert (inside != inside[:, ::-1]).mean() < 0.005


def test_integers_alone() -> None:
    # Floating point, and so any dependence on a math library, would show in a dtype.
    grid = np.arange(-2000, 2000, 50, dtype=np.int32)
    u, v = np.broadcast_arrays(grid, grid[:, None])
    assert {shape(u, v).dtype for shape in synthetic.SHAPES.values()} == {np.dtype(np.int32)}


def test_reads_back_what_was_drawn(cache: Path) -> None:
    train, test = SyntheticCIFAR10(seed=7), SyntheticCIFAR10(train=False, seed=7)
    for data, files in ((train, 5), (test, 1)):
        drawn = [synthetic.draw(7, data.train, block) for block in range(files)]
        assert data.images.shape == (files * N, 3, 32, 32)
        assert (data.images.dtype, data.targets.dtype) == (torch.uint8, torch.int64)
        assert data.images.numpy().tobytes() == b"".join(images.tobytes() for _, images in drawn)
        assert data.targets.tolist() == np.concatenate([labels for labels, _ in drawn]).tolist()
    assert train.classes == list(synthetic.SHAPES)
    assert len(set(train.classes)) == 10
    assert repr(test) == f"SyntheticCIFAR10(test, {N} images, root={str(cache)!r})"
    image, target = test[0]
    assert (image.shape, target) == ((3, 32, 32), int(test.targets[0]))


def folder_of(cache: Path, seed: int = 0) -> Path:
    return cache / f"synthetic-cifar10-v{synthetic.VERSION}-seed{seed}" / cifar10.BINARY


def test_the_cache_is_in_the_official_layout(cache: Path) -> None:
    data = SyntheticCIFAR10()
    folder = folder_of(cache)
    twin = CIFAR10(folder)
    assert torch.equal(twin.images, data.images)
    assert torch.equal(twin.targets, data.targets)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["SHA256SUMS", "batches.meta.txt", "test_batch.bin"]
        + [f"data_batch_{i}.bin" for i in range(1, 6)]
    )
    assert [path.name for path in folder.parent.iterdir()] == [cifar10.BINARY]  # no litter


def test_root_is_in_place_of_the_cache(cache: Path, tmp_path: Path) -> None:
    SyntheticCIFAR10(root=tmp_path / "here")
    assert folder_of(tmp_path / "here").is_dir()
    assert not cache.exists()


def test_the_cache_is_in_the_home_folder_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHBP_CACHE", "")
    assert synthetic.cache_dir() == tmp_path / ".cache" / "torchbp"
    monkeypatch.setenv("TORCHBP_CACHE", "~/elsewhere")
    assert synthetic.cache_dir() == tmp_path / "elsewhere"


def test_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = SyntheticCIFAR10()
    monkeypatch.setattr(synthetic, "draw", lambda *key: pytest.fail("drawn again"))
    assert torch.equal(SyntheticCIFAR10().images, first.images)
    SyntheticCIFAR10(train=False)


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["data_batch_2.bin", "batches.meta.txt", "SHA256SUMS"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b"\xff" * 100),
        _flip_a_bit,
    ],
    ids=["missing", "truncated", "overwritten", "bit"],
)
def test_a_damaged_cache_is_drawn_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], object]
) -> None:
    block = synthetic.draw(0, True, 0)
    monkeypatch.setattr(synthetic, "draw", lambda *key: block)  # for speed
    SyntheticCIFAR10()
    files = {path.name: path.read_bytes() for path in folder_of(cache).iterdir()}
    damage(folder_of(cache) / name)
    for train in (True, False):  # each split looks after its own files
        SyntheticCIFAR10(train)
    assert {path.name: path.read_bytes() for path in folder_of(cache).iterdir()} == files


def test_racing_writers_both_succeed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = synthetic.draw(0, True, 0)
    together = threading.Barrier(3)
    publish = cifar10.publish

    def publish_together(files: dict[str, bytes], folder: Path) -> None:
        together.wait(30)  # each has found no cache and drawn the whole
        publish(files, folder)

    monkeypatch.setattr(synthetic, "draw", lambda *key: block)
    monkeypatch.setattr(synthetic, "publish", publish_together)
    results: list[SyntheticCIFAR10] = []
    threads = [
        threading.Thread(target=lambda: results.append(SyntheticCIFAR10())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(data.images, results[0].images) for data in results)
    assert [path.name for path in folder_of(cache).parent.iterdir()] == [cifar10.BINARY]


def test_an_interrupted_drawing_leaves_no_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*key: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SyntheticCIFAR10()
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_one_clear_error(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"SyntheticCIFAR10: cannot write the cache .*TORCHBP_CACHE"):
        SyntheticCIFAR10()


def test_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    SyntheticCIFAR10()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train": "yes"}, TypeError, "train must be True or False, got str"),
        ({"seed": 0.0}, TypeError, "seed must be an integer, got float"),
        ({"seed": True}, TypeError, "seed must be an integer, got bool"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"root": 1}, TypeError, "root must be a path, got int"),
    ],
)
def test_bad_arguments(
    cache: Path, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"SyntheticCIFAR10: {message}"):
        SyntheticCIFAR10(**arguments)  # type: ignore[arg-type]
    assert not cache.exists()


def test_an_mlp_learns_what_a_linear_classifier_cannot() -> None:
    """On a tenth of the data, 5,000 images: the full set gives 48 % and 94 %."""
    drawn = [synthetic.draw(0, True, block) for block in range(12)]
    x = torch.from_numpy(np.concatenate([images for _, images in drawn])).flatten(1) / 255
    x = (x - x.mean()) / x.std()
    y = torch.from_numpy(np.concatenate([labels for labels, _ in drawn])).long()
    torch.manual_seed(0)
    nn = torch.nn
    mlp = nn.Sequential(nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 10))

    def accuracy(model: nn.Module, lr: float) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
        for _ in range(10):
            for rows in torch.randperm(5000).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        return (model(x[5000:]).argmax(1) == y[5000:]).double().mean().item()

    linear, deep = accuracy(nn.Linear(3072, 10), 0.001), accuracy(mlp, 0.02)
    assert 0.2 < linear < 0.55
    assert deep > 0.6
