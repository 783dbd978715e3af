"""torchbp.data.loader: batches against arithmetic on pixels, epochs against (seed, epoch)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchbp import compile_step
from torchbp.data import BatchLoader
from torchbp.data.loader import channel_statistics
from torchbp.nn import MLP
from torchbp.optim import SGD

N, C, H, W = 23, 3, 8, 6
OPS = torch.ops.torchbp_images


@pytest.fixture(scope="module")
def data() -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, C, H, W), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(images=images, targets=torch.arange(N))  # a target names its image


def epoch_of(loader: BatchLoader) -> tuple[torch.Tensor, torch.Tensor]:
    x, target = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(target)


def reference(loader: BatchLoader, image: torch.Tensor) -> torch.Tensor:
    """An image [C, H, W], normalised pixel by pixel in float64."""
    out = torch.empty(image.shape, dtype=torch.float64)
    for c in range(len(image)):
        out[c] = (image[c].double() / 255 - loader.mean[c]) / loader.std[c]
    return out


@pytest.mark.parametrize(
    # The widths of a rounding, and of the cancellation in image * scale + offset: values up to 2.
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-10),
    ],
)
@pytest.mark.parametrize("flatten", [True, False])
def test_normalises(data: Any, dtype: torch.dtype, tolerance: float, flatten: bool) -> None:
    loader = BatchLoader(data, batch_size=4, dtype=dtype, flatten=flatten)
    x, target = epoch_of(loader)
    assert (x.dtype, target.dtype) == (dtype, torch.int64)
    assert x.shape == ((N, C * H * W) if flatten else (N, C, H, W))
    for row, i in zip(x.view(N, C, H, W), target.tolist(), strict=True):
        want = reference(loader, data.images[i])
        assert (row.double() - want).abs().max() <= tolerance * 2


def test_statistics_are_those_of_the_images(data: Any) -> None:
    loader = BatchLoader(data)
    pixels = data.images.double().transpose(0, 1).flatten(1) / 255
    assert loader.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert loader.std == pytest.approx(pixels.std(1, unbiased=False).tolist(), rel=1e-12)
    x, _ = epoch_of(BatchLoader(data, dtype=torch.float64, flatten=False))
    assert x.mean((0, 2, 3)).abs().max() < 1e-12
    assert (x.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-12
    assert channel_statistics(torch.full((2, 1, 2, 2), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))


def test_statistics_can_be_handed_on(data: Any) -> None:
    train = BatchLoader(data)
    other = SimpleNamespace(images=255 - data.images, targets=data.targets)
    test = BatchLoader(other, shuffle=False, mean=train.mean, std=torch.tensor(train.std))
    assert test.mean == train.mean
    assert test.std == pytest.approx(train.std, rel=1e-7)
    half = BatchLoader(data, mean=(0.5, 0.5, 0.5))
    assert (half.mean, half.std) == ((0.5, 0.5, 0.5), train.std)


@pytest.mark.parametrize(
    ("batch_size", "drop_last"),
    [(5, False), (5, True), (23, False), (23, True), (40, False), (40, True)],
)
def test_batches(data: Any, batch_size: int, drop_last: bool) -> None:
    loader = BatchLoader(data, batch_size=batch_size, drop_last=drop_last)
    sizes = [len(target) for _, target in loader]
    full, rest = divmod(N, batch_size)
    assert sizes == [batch_size] * full + ([rest] if rest and not drop_last else [])
    assert len(loader) == len(sizes)


def test_an_epoch_shows_every_image_once(data: Any) -> None:
    loader = BatchLoader(data, batch_size=5)
    for _ in range(3):
        assert sorted(epoch_of(loader)[1].tolist()) == list(range(N))
    assert epoch_of(BatchLoader(data, shuffle=False))[1].tolist() == list(range(N))


AUGMENTED: dict[str, Any] = {"flip": True, "shift": 2}


def test_epochs_differ_and_follow_from_seed_and_epoch(data: Any) -> None:
    loader = BatchLoader(data, batch_size=5, seed=1, **AUGMENTED)
    epochs = []
    for e in range(3):
        assert loader.epoch == e
        epochs.append(epoch_of(loader))
    orders = {tuple(target.tolist()) for _, target in epochs}
    assert len(orders) == 3
    for e in (2, 0, 1):
        # Another loader, another batch size, another state of the global generator.
        torch.manual_seed(e)
        again = BatchLoader(data, batch_size=7, seed=1, **AUGMENTED)
        again.set_epoch(e)
        x, target = epoch_of(again)
        assert torch.equal(x, epochs[e][0])
        assert torch.equal(target, epochs[e][1])
    other, _ = epoch_of(BatchLoader(data, seed=2, **AUGMENTED))
    assert not torch.equal(other, epochs[0][0])


def test_epoch_counts_when_an_iteration_begins(data: Any) -> None:
    loader = BatchLoader(data, batch_size=5)
    first = iter(loader)
    assert loader.epoch == 1
    second = iter(loader)
    assert loader.epoch == 2
    a, b = (torch.cat([target for _, target in it]) for it in (first, second))
    assert not torch.equal(a, b)


def test_state(data: Any) -> None:
    loader = BatchLoader(data, seed=5, **AUGMENTED)
    for _ in range(4):
        iter(loader)
    state = loader.state_dict()
    assert state == {"seed": 5, "epoch": 4}
    resumed = BatchLoader(data, **AUGMENTED)
    resumed.load_state_dict(state)
    assert torch.equal(epoch_of(resumed)[0], epoch_of(loader)[0])


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([], TypeError, "state must be a dict, got list"),
        ({"epoch": 1}, ValueError, r"state must have keys epoch and seed, got \['epoch'\]"),
        ({"epoch": -1, "seed": 0}, ValueError, "epoch must be at least 0, got -1"),
        ({"epoch": 1, "seed": 0.5}, TypeError, "seed must be an integer, got float"),
    ],
)
def test_bad_state(data: Any, state: Any, error: type[Exception], message: str) -> None:
    loader = BatchLoader(data)
    with pytest.raises(error, match=f"BatchLoader: {message}"):
        loader.load_state_dict(state)
    assert loader.state_dict() == {"seed": 0, "epoch": 0}


def moved(image: torch.Tensor, mirrored: bool, down: int, right: int) -> torch.Tensor:
    """Pixel by pixel: mirror, move, fill with zeros."""
    out = torch.zeros_like(image)
    _, h, w = image.shape
    for y in range(h):
        for x in range(w):
            from_y, from_x = y - down, x - right
            if 0 <= from_y < h and 0 <= from_x < w:
                out[:, y, x] = image[:, from_y, w - 1 - from_x if mirrored else from_x]
    return out


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 2), (True, 1), (True, 6)])
def test_augmentation_is_a_flip_and_a_shift(data: Any, flip: bool, shift: int) -> None:
    loader = BatchLoader(data, flip=flip, shift=shift, flatten=False, dtype=torch.float64)
    steps = range(-shift, shift + 1)
    moves = [(m, d, r) for m in ([False, True] if flip else [False]) for d in steps for r in steps]
    seen = []
    for _ in range(2):
        for x, i in zip(*epoch_of(loader), strict=True):
            plain = reference(loader, data.images[i])
            fits = [move for move in moves if torch.allclose(moved(plain, *move), x, atol=1e-12)]
            assert fits  # it is one of them: one alone unless it has left the image
            seen.append(fits[0])
    assert len(set(seen)) >= min(len(moves), 15)  # and not always the same


def augmented_batch(c: int, h: int, w: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Images [N, C, H, W] and what the kernel makes of them, at and beyond every border:
    (images, flip, shift, result [n, C, H, W]); row i is image i % N."""
    generator = torch.Generator().manual_seed(c * h * w)
    images = torch.randint(0, 256, (7, c, h, w), dtype=torch.uint8, generator=generator)
    steps = [
        sorted({0, 1, -1, 3, -2, size - 1, 1 - size, size, -size, size + 2, -300})
        for size in (h, w)
    ]
    cases = [(f, d, r) for f in (0, 1) for d in steps[0] for r in steps[1]]
    flip = torch.tensor([f for f, _, _ in cases], dtype=torch.uint8)
    shift = torch.tensor([move for _, *move in cases], dtype=torch.int32)
    index = torch.arange(len(cases)) % len(images)
    return images, flip, shift, image_batch(images, index, flip, shift, dtype)


def image_batch(
    images: torch.Tensor,
    index: torch.Tensor,
    flip: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The whole of a plan in one batch."""
    numbers = affine(images.shape[1])
    size = max(len(index), 1)
    opened = OPS.open(images, index, flip, shift, index, *numbers, dtype, size, False)
    x, target = OPS.batch(opened, 0)
    OPS.close(opened)
    assert torch.equal(target, index)
    return x  # type: ignore[no-any-return]


def affine(channels: int) -> tuple[list[float], list[float]]:
    """scale, offset: two numbers for each channel, none like another."""
    return [1 / (50 + 10 * c) for c in range(channels)], [-2.5 + c for c in range(channels)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # A rounding of values and of products of up to 5.1, twice.
    [
        (torch.float64, 2**-50),
        (torch.float32, 2**-21),
        (torch.bfloat16, 2**-6),
        (torch.float16, 2**-9),
    ],
)
@pytest.mark.parametrize(
    "shape", [(3, 8, 6), (1, 1, 1), (2, 5, 33), (1, 3, 70), (3, 32, 32)], ids=str
)
def test_kernel(dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int]) -> None:
    """Flips and shifts up to, at and beyond the borders, in sizes that are no whole vectors."""
    images, flip, shift, x = augmented_batch(*shape, dtype)
    assert (x.dtype, x.shape[1:], x.is_contiguous()) == (dtype, shape, True)
    scale, offset = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in affine(shape[0]))
    seen = 0
    for i in range(0, len(x), 1 if shape[1] * shape[2] < 100 else 7):
        image = images[i % len(images)].double() * scale + offset
        down, right = shift[i].tolist()
        want = moved(image, bool(flip[i]), down, right)
        assert (x[i].double() - want).abs().max() <= tolerance
        shown = moved(torch.ones_like(image), bool(flip[i]), down, right) == 1
        assert (x[i][~shown] == 0).all()  # exactly
        seen += int(shown.any())
    assert seen >= 2


@pytest.mark.parametrize("width", [6, 32])
def test_layouts_of_the_data_set(width: int) -> None:
    """Channels last, every other image, a part of a larger image, one image many times: the same
    numbers as of contiguous images."""
    images, flip, shift, x = augmented_batch(3, 5, width, torch.float32)
    wide = torch.zeros(14, 3, 9, 2 * width + 1, dtype=torch.uint8)
    layouts = [
        images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        images.transpose(0, 3).contiguous().transpose(0, 3),
        wide[::2, :, 2:7, 1::2].copy_(images),
        wide[1::2, :, 2:7, :width].copy_(images),
    ]
    index = torch.arange(len(x)) % len(images)
    for layout in layouts:
        assert not layout.is_contiguous()
        assert torch.equal(image_batch(layout, index, flip, shift), x)
    once = image_batch(images[:1].expand(9, 3, 5, width), index % 9, flip, shift)
    assert torch.equal(once, image_batch(images[:1], index * 0, flip, shift))
    # The vectors of the plan may be of any layout too.
    plan = (
        torch.stack([index, index], 1)[:, 0],
        torch.stack([flip, flip], 1)[:, 0],
        shift.T.contiguous().T,
    )
    assert torch.equal(image_batch(images, *plan), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (150, 3, 32, 32), dtype=torch.uint8, generator=generator)
    many = SimpleNamespace(images=images, targets=torch.arange(150))
    threads, epochs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            epochs.append(epoch_of(BatchLoader(many, batch_size=128, dtype=dtype, **AUGMENTED)))
    finally:
        torch.set_num_threads(threads)
    for x, target in epochs[1:]:
        assert torch.equal(x, epochs[0][0])
        assert torch.equal(target, epochs[0][1])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_other_devices_get_the_same(
    data: Any, monkeypatch: pytest.MonkeyPatch, flip: bool, shift: int, dtype: torch.dtype
) -> None:
    """The path of other devices and dtypes, here on the CPU, differs by a rounding."""
    loader = BatchLoader(data, batch_size=5, flip=flip, shift=shift, dtype=dtype, flatten=False)
    x, target = epoch_of(loader)
    monkeypatch.setattr("torchbp.data.loader.FUSED", ())
    loader.set_epoch(0)
    y, same = epoch_of(loader)
    assert torch.equal(target, same)
    assert x.dtype == y.dtype
    spacing = torch.finfo(dtype).eps * 4  # of numbers from 2 to 4
    assert (x.double() - y.double()).abs().max() <= spacing
    assert torch.equal(x == 0, y == 0)


def test_plan(data: Any) -> None:
    """What an epoch shows, image by image, whatever the size of its batches."""
    options: dict[str, Any] = {"flip": True, "shift": 2, "flatten": False, "dtype": torch.float64}
    loader = BatchLoader(data, batch_size=5, seed=3, **options)
    plan = loader._plan(1)
    assert (plan.order.dtype, plan.order.shape) == (torch.int64, (N,))
    assert plan.flip is not None
    assert plan.shift is not None
    assert (plan.flip.dtype, plan.flip.shape) == (torch.uint8, (N,))
    assert (plan.shift.dtype, plan.shift.shape) == (torch.int32, (N, 2))
    assert torch.equal(plan.target, data.targets[plan.order])
    loader.set_epoch(1)
    x, target = epoch_of(loader)
    assert torch.equal(target, plan.target)
    for row, i, mirrored, move in zip(x, plan.order, plan.flip, plan.shift.tolist(), strict=True):
        want = moved(reference(loader, data.images[i]), bool(mirrored), *move)
        assert (row - want).abs().max() < 1e-12
    again = BatchLoader(data, batch_size=23, seed=3, **options)._plan(1)
    assert all(torch.equal(a, b) for a, b in zip(plan, again, strict=True))  # type: ignore[arg-type]
    plain = BatchLoader(data, shuffle=False)._plan(0)
    assert plain.order.tolist() == list(range(N))
    assert (plain.flip, plain.shift) == (None, None)


def test_an_epoch_is_moved_alike_with_and_without_flips(data: Any) -> None:
    with_flips, without = (BatchLoader(data, flip=f, shift=2)._plan(0) for f in (True, False))
    assert with_flips.shift is not None
    assert without.shift is not None
    assert torch.equal(with_flips.shift, without.shift)
    assert torch.equal(with_flips.order, without.order)


def test_large_shifts() -> None:
    """Further than a byte counts."""
    images = torch.randint(0, 256, (40, 1, 200, 300), dtype=torch.uint8)
    many = SimpleNamespace(images=images, targets=torch.arange(40))
    loader = BatchLoader(many, batch_size=16, shift=200, flatten=False, dtype=torch.float64)
    plan = loader._plan(0)
    assert plan.shift is not None
    assert plan.shift.abs().max() > 127
    for x, i, (down, right) in zip(
        epoch_of(loader)[0], plan.order.tolist(), plan.shift.tolist(), strict=True
    ):
        padded = torch.nn.functional.pad(reference(loader, images[i]), (200, 200, 200, 200))
        want = padded[:, 200 - down : 400 - down, 200 - right : 500 - right]
        assert (x - want).abs().max() < 1e-12


def test_batches_are_the_users_to_keep_and_to_change(data: Any) -> None:
    loader = BatchLoader(data, batch_size=5, **AUGMENTED)
    whole, targets = epoch_of(BatchLoader(data, batch_size=N, **AUGMENTED))
    batches = list(loader)
    assert torch.equal(torch.cat([x for x, _ in batches]), whole)
    for x, target in batches[::2]:
        x.zero_()
        target.zero_()
        assert target.untyped_storage().nbytes() == target.nbytes  # no part of a larger one
    for k, (x, target) in enumerate(batches):
        if k % 2:
            assert torch.equal(x, whole[5 * k : 5 * k + 5])
            assert torch.equal(target, targets[5 * k : 5 * k + 5])


def test_batches_that_share_memory_one_after_the_other() -> None:
    """Whoever keeps a batch, a view of it or its storage keeps its memory, in whatever thread; of
    what nobody keeps, a few blocks wait for the next."""
    images = torch.randint(0, 256, (160, 3, 32, 32), dtype=torch.uint8)
    many = SimpleNamespace(images=images, targets=torch.arange(160))
    loader = BatchLoader(many, batch_size=16, **AUGMENTED)  # 196,608 bytes a batch
    whole = torch.cat([x for x, _ in loader])
    assert len({x.data_ptr() for x, _ in loader}) < len(loader)
    loader.set_epoch(0)
    with ThreadPoolExecutor() as pool:
        batches = iter(loader)
        kept = [pool.submit(next, batches).result()[0] for _ in range(6)]
        views = [x[3:] for x in kept[1:3]]
        pool.submit(kept.clear).result()
        rest = [x for x, _ in batches]
    assert torch.equal(torch.cat(views), torch.cat([whole[19:32], whole[35:48]]))
    assert torch.equal(torch.cat(rest), whole[96:])
    for x in rest:
        assert x.untyped_storage().nbytes() == x.nbytes
        assert x.data_ptr() % 64 == 0


def test_iterators_are_independent(data: Any) -> None:
    """Two at once, and one that is left in the middle of its epoch."""
    epochs = [BatchLoader(data, batch_size=5, **AUGMENTED) for _ in range(3)]
    for e, loader in enumerate(epochs):
        loader.set_epoch(e)
    want = [list(loader) for loader in epochs]
    loader = BatchLoader(data, batch_size=5, **AUGMENTED)
    left = iter(loader)
    next(left)
    pairs = list(zip(loader, loader, strict=True))
    for k, (first, second) in enumerate(pairs):
        assert torch.equal(first[0], want[1][k][0])
        assert torch.equal(second[0], want[2][k][0])
    assert torch.equal(next(left)[0], want[0][1][0])
    left.close()  # type: ignore[attr-defined]
    assert loader.epoch == 3


def test_nothing_to_read() -> None:
    images, none = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    assert image_batch(images, none).shape == (0, 3, 4, 5)
    assert image_batch(images[:0], none).shape == (0, 3, 4, 5)
    empty = image_batch(images[..., :0], torch.tensor([1]), dtype=torch.bfloat16)
    assert (empty.shape, empty.dtype) == ((1, 3, 4, 0), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 5)}, "images wants ScalarType 0, got 6"),
        ({"images": torch.zeros(2, 4, 5).byte()}, r"images wants shape \(N, C, H, W\)"),
        ({"index": torch.tensor([0, 2])}, r"index\[1\] is 2, out of range for 2 images"),
        ({"index": torch.tensor([-1, 0])}, r"index\[0\] is -1, out of range for 2 images"),
        ({"index": torch.zeros(2, 1).long()}, r"index wants shape \(n\), got \(2, 1\)"),
        ({"index": torch.zeros(2).int()}, "index wants ScalarType 4, got 3"),
        ({"flip": torch.zeros(3).byte()}, r"flip wants shape \(2\), got \(3\)"),
        ({"flip": torch.zeros(2)}, "flip wants ScalarType 0, got 6"),
        ({"shift": torch.zeros(2).int()}, r"shift wants shape \(2, 2\), got \(2\)"),
        ({"shift": torch.zeros(2, 2).long()}, "shift wants ScalarType 3, got 4"),
        ({"targets": torch.zeros(2)}, "targets wants ScalarType 4, got 6"),
        ({"targets": torch.zeros(3).long()}, r"targets wants shape \(2\), got \(3\)"),
        ({"scale": [1.0]}, "scale and offset want 3 numbers each, got 1 and 3"),
        ({"scale": [1.0], "offset": [0.0]}, "scale and offset want 3 numbers each, got 1 and 1"),
        ({"offset": [0.0] * 2}, "scale and offset want 3 numbers each, got 3 and 2"),
        ({"dtype": torch.int32}, "dtype wants float64, float32, bfloat16 or float16"),
        ({"batch_size": 0}, "batch_size wants at least 1, got 0"),
        ({"index": torch.tensor([0, 1]).to("meta")}, "index is on another device"),
        ({"targets": torch.tensor([7, 8]).to("meta")}, "targets is on another device"),
        ({"offset": [0.0] * 4}, "scale and offset want 3 numbers each, got 3 and 4"),
    ],
)
def test_bad_arguments_of_the_kernel(change: dict[str, Any], message: str) -> None:
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # where a tensor of meta does not go
    with pytest.raises(RuntimeError, match=f"torchbp::images: {message}"):
        OPS.open.default.redispatch(cpu, *{**plan_of_two(), **change}.values())


def plan_of_two() -> dict[str, Any]:
    scale, offset = affine(3)
    return {
        "images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8),
        "index": torch.tensor([0, 1]),
        "flip": torch.zeros(2, dtype=torch.uint8),
        "shift": torch.zeros(2, 2, dtype=torch.int32),
        "targets": torch.tensor([7, 8]),
        "scale": scale,
        "offset": offset,
        "dtype": torch.float32,
        "batch_size": 2,
        "flatten": True,
    }


def test_an_opened_plan() -> None:
    """A batch that is not there, a plan that is closed, and tensors changed since it was opened."""
    plan = plan_of_two()
    opened = OPS.open(**plan)
    assert [tuple(part.shape) for part in OPS.batch(opened, 1)] == [(1, 60), (1,)]
    assert [tuple(part.shape) for part in OPS.batch(opened, 2)] == [(0, 60), (0,)]
    for begin in (-1, 3):
        with pytest.raises(RuntimeError, match=f"begin wants 0 to 2, got {begin}"):
            OPS.batch(opened, begin)
    plan["index"][1] = 2
    with pytest.raises(RuntimeError, match=r"index\[1\] is 2, out of range for 2 images"):
        OPS.batch(opened, 0)
    plan["index"].resize_(1)
    with pytest.raises(RuntimeError, match="torchbp::images: flip wants shape"):
        OPS.batch(opened, 0)
    OPS.close(opened)
    with pytest.raises(RuntimeError, match=f"there is no images {opened}"):
        OPS.batch(opened, 0)
    OPS.close(opened)


def test_an_opened_plan_trains_from_a_row_that_it_has() -> None:
    model = MLP([60, 10])
    step = compile_step(model, SGD(model.parameters(), lr=0.1))
    step(torch.randn(2, 60), torch.tensor([7, 8]))
    opened = OPS.open(**plan_of_two())
    epoch = torch.ops.torchbp_trainer.epoch
    assert [epoch(step._trainer, opened, i, False, step._hyper()).numel() for i in (0, 2)] == [1, 0]
    for begin in (-1, 3):
        with pytest.raises(RuntimeError, match=f"torchbp::images: begin wants 0 to 2, got {begin}"):
            epoch(step._trainer, opened, begin, False, step._hyper())
    OPS.close(opened)


def test_a_plan_is_closed_with_its_iterator(data: Any) -> None:
    before = OPS.open(**plan_of_two())
    for taken in (1, 2, N):  # of so many batches; without one it is not opened
        batches = iter(BatchLoader(data, batch_size=1))
        for _ in range(taken):
            next(batches)
        del batches
    after = OPS.open(**plan_of_two())
    assert after == before + 4
    for number in range(before + 1, after):
        with pytest.raises(RuntimeError, match=f"there is no images {number}"):
            OPS.batch(number, 0)
    OPS.close(before)
    OPS.close(after)


def test_augmentation_is_even(data: Any) -> None:
    n = 5000
    image = torch.zeros(1, 1, 7, 7, dtype=torch.uint8)
    image[0, 0, 3, 2] = 255  # mirrored: column 4
    many = SimpleNamespace(images=image.expand(n, 1, 7, 7), targets=torch.zeros(n).long())
    loader = BatchLoader(many, flip=True, shift=1, mean=[0.0], std=[1.0])
    counts = epoch_of(loader)[0].sum(0).view(7, 7)
    column = torch.tensor([0, 1, 1, 2, 1, 1, 0]) / 6  # two places, each moved by -1, 0, 1
    row = torch.tensor([0, 0, 1, 1, 1, 0, 0]) / 3
    share = row[:, None] * column
    sigma = (n * share * (1 - share)).sqrt()
    assert ((counts - n * share).abs() <= 5 * sigma).all()


def test_the_data_set_is_not_changed(data: Any) -> None:
    images, targets = data.images.clone(), data.targets.clone()
    for x, target in BatchLoader(data, shuffle=False, batch_size=N, **AUGMENTED):
        x.zero_()
        target.zero_()
    assert torch.equal(data.images, images)
    assert torch.equal(data.targets, targets)


def test_repr(data: Any) -> None:
    assert repr(BatchLoader(data, 5)) == "BatchLoader(23 images, 5 batches of 5, epoch=0)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device(data: Any) -> None:
    loader, twin = (BatchLoader(data, device=d, **AUGMENTED) for d in ("cuda", "cpu"))
    (x, target), (want, same) = next(iter(loader)), next(iter(twin))
    assert x.device.type == target.device.type == "cuda"
    assert torch.equal(target.cpu(), same)
    assert torch.allclose(x.cpu(), want, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8.0}, TypeError, "batch_size must be an integer, got float"),
        ({"shuffle": None}, TypeError, "shuffle must be True or False, got NoneType"),
        ({"flip": 1}, TypeError, "flip must be True or False, got int"),
        ({"drop_last": "no"}, TypeError, "drop_last must be True or False, got str"),
        ({"flatten": 0}, TypeError, "flatten must be True or False, got int"),
        ({"shift": -1}, ValueError, r"shift must be in \[0, 6\], got -1"),
        ({"shift": 7}, ValueError, r"shift must be in \[0, 6\], got 7"),
        ({"shift": True}, TypeError, "shift must be an integer, got bool"),
        ({"seed": -3}, ValueError, "seed must be at least 0, got -3"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got str"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got str"),
        ({"dtype": torch.uint8}, ValueError, "dtype must be a floating dtype, got torch.uint8"),
        ({"device": 0}, TypeError, "device must be a device, got int"),
        ({"mean": 0.5}, TypeError, "mean must be 3 numbers, got float"),
        ({"mean": ["a"] * 3}, TypeError, "mean must be 3 numbers, got list"),
        ({"mean": [0.5, 0.5]}, ValueError, r"mean must be 3 finite numbers, got \[0.5, 0.5\]"),
        ({"mean": [0.5, 0.5, math.nan]}, ValueError, "mean must be 3 finite numbers"),
        ({"std": [0.5, 0.5, 0]}, ValueError, r"std must be positive, got \[0.5, 0.5, 0.0\]"),
        ({"dataset": [1]}, TypeError, "dataset must have the tensors images and targets, got list"),
    ],
)
def test_bad_arguments(
    data: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"BatchLoader: {message}"):
        BatchLoader(**{"dataset": data, **arguments})


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2).long(),
            r"uint8 \[N, C, H, W\], got torch.float32",
        ),
        (
            torch.zeros(2, 48).byte(),
            torch.zeros(2).long(),
            r"uint8 \[N, C, H, W\], got .*\[2, 48\]",
        ),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), r"int64 \[2\], got .*\[3\]"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), r"int64 \[2\], got torch.float32"),
        (torch.zeros(0, 3, 4, 4).byte(), torch.zeros(0).long(), r"images is empty"),
    ],
)
def test_bad_datasets(images: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchLoader(SimpleNamespace(images=images, targets=targets))
