#!/usr/bin/env python3
"""The CIFAR-10 speedrun for plain MLPs: train one from scratch to an accuracy, in little time.

    python scripts/speedrun.py --goal 60 --data-dir data --download
    python scripts/speedrun.py --goal 65 --data-dir data --seeds 10 --json runs.json
    python scripts/speedrun.py --goal 70 --data-dir data --seeds 5  # wants a GPU

In the manner of airbench for CNNs: a goal has one fixed recipe, it is run from several seeds, and
what counts is the mean test accuracy of the weights after the last epoch, never that of the best
epoch, which the test images themselves would have chosen.

The networks are fully connected layers and ReLUs: no convolution, no normalisation layers, nothing
pretrained. Training images are mirrored and shifted. The first layer sees an image's coordinates
along the leading principal components of the training images, a linear map of the pixels that is
computed anew in each run; multiplied into the first layer's weights it gives the MLP on pixels.

It runs on a GPU where torch finds one and torchbp was built with CUDA, else on the CPU. On a GPU
the images are copied there in each run, the products of a large recipe are in TF32, and one epoch
that does not count comes first, since a GPU's libraries take seconds to load. All that is said of a
GPU, and the recipe of 70 % altogether, has not been measured yet.

Columns of the table:
    accuracy    of the network, one look at each test image; the goal is for this one
    averaged    of the mean log-probabilities of ten views of each test image: itself, counted
                twice, and shifted by one pixel in four directions, each also mirrored
    seconds     wall time from bytes in the CPU's memory to trained network: statistics,
                components, training
    evaluation  wall time of both accuracies
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torchbp
from torchbp.data import CIFAR10, BatchLoader
from torchbp.data.cifar10 import ImageDataset, progress
from torchbp.data.loader import Images
from torchbp.optim import SGD, compile_step
from torchbp.train import (
    add_device,
    device_name,
    wait_for,
    warmup_cosine,
    write_file,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long.

    The comments say how the accuracy of goal 60's recipe, with 512 components, changes in
    percentage points where that line alone is changed: one run each, which tells differences above
    about 0.6 from chance.
    """

    limit: dict[str, float]  # seconds: on two CPU cores, on one H100; a goal without any has none
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int  # 256: -0.3
    lr: float  # peak; 0.05: -0.2, 0.2: -2.6
    components: int  # 256: +0.6; pixels instead, at a rate of 0.05: -2.6, for more work
    shift: int  # pixels; 0: -0.8, 2: -0.6
    whiten: float = 0.5  # divides coordinate i by std_i ** whiten; 0: -2.2, 1: -0.8
    flip: bool = True  # without: -0.3
    label_smoothing: float = 0.1  # 0: -0.6
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4  # 0: -0.7
    warmup: float = 0.15  # share of the steps, then half a cosine down to 0; none: -0.1
    tf32: bool = False  # whether a GPU may round what it multiplies to TF32's 10 bits in training
    measured: bool = True  # whether anybody has seen what accuracy it gives


# The accuracies are means of seeds 0, 1, 2, with their standard deviation, on the CPU. The limits
# for a GPU are goals: nothing has been timed there.
RECIPES = {
    60: Recipe(  # 61.70 ± 0.47 %; 1.3 TFLOP
        limit={"cpu": 60, "cuda": 2},
        hidden=(512, 256),
        epochs=9,
        batch_size=128,
        lr=0.1,
        components=256,
        shift=1,
    ),
    65: Recipe(  # 65.35 ± 0.19 %; 7.6 TFLOP
        limit={"cpu": 600},
        hidden=(1024, 512),
        epochs=18,
        batch_size=128,
        lr=0.1,
        components=512,
        shift=1,
    ),
    # NOT YET MEASURED: a guess at what reaches 70 %, made where there was no GPU to try it on. It
    # takes the one above further: four times the width and a third hidden layer, ten times the
    # epochs, and shifts by two pixels against the overfitting that they bring. 670 TFLOP.
    70: Recipe(
        limit={"cuda": 30},
        hidden=(4096, 2048, 1024),
        epochs=180,
        batch_size=256,
        lr=0.1,
        components=512,
        shift=2,
        tf32=True,
        measured=False,
    ),
}
SAMPLE = 10_000  # images that the components are computed from


class Run(NamedTuple):
    """Accuracies in percent."""

    seed: int
    epochs: int
    accuracy: float
    averaged: float
    seconds: float
    evaluation: float


class Components:
    """Batches of images as coordinates along the principal components of the training images.

    Iterates over `(x, target)` with x [B, components]. The mirror image of an image is as likely as
    the image, so components are symmetric or antisymmetric under mirroring: two problems of half
    the size, a quarter of the work.

    Args:
        batches: gives x [B, 3072].
        sample: normalised images, [N, 3, 32, 32].
        count: of components, those of the largest variance.
        whiten: coordinate i is divided by its standard deviation to this power. All are then
            scaled by one number, so that their mean square is 1.
    """

    def __init__(self, batches: BatchLoader, sample: Tensor, count: int, whiten: float) -> None:
        self.batches = batches
        left, right = sample.chunk(2, dim=3)
        variances, vectors = [], []
        mean = ((left + right.flip(3)) / 2).mean(0)
        mean = torch.cat([mean, mean.flip(2)], dim=2).flatten()
        for sign in (1, -1):
            half = (left + sign * right.flip(3)).flatten(1) / math.sqrt(2)
            if sign == 1:
                half = half - half.mean(0)
            variance, vector = torch.linalg.eigh(half.T @ half / len(half))
            vector = vector.view(*left.shape[1:], -1)  # a column each
            variances.append(variance)
            both = torch.cat([vector, sign * vector.flip(2)], dim=2)
            vectors.append(both.flatten(0, 2) / math.sqrt(2))
        variance, order = torch.cat(variances).topk(count)
        variance = variance.clamp(min=1e-6 * float(variance[0]))  # fewer images than components
        scale = variance ** (-whiten / 2)
        scale = scale / (variance * scale**2).mean().sqrt()
        self.matrix = torch.cat(vectors, dim=1)[:, order] * scale  # [3072, count]
        self.offset = -mean @ self.matrix

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.offset, x, self.matrix)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self(x), target) for x, target in self.batches)


def on(device: torch.device, data: Images) -> Images:
    """A data set's images and targets there."""
    return SimpleNamespace(images=data.images.to(device), targets=data.targets.to(device))


@contextlib.contextmanager
def products_in_tf32(allowed: bool) -> Iterator[None]:
    """What a GPU's products may round float32 to; on the CPU nothing is to change."""
    setting = torch.backends.cuda.matmul
    before, setting.allow_tf32 = setting.allow_tf32, allowed
    try:
        yield
    finally:
        setting.allow_tf32 = before


def train(
    data: Images,
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], None],
    device: torch.device = CPU,
) -> tuple[torch.nn.Module, Components]:
    """A network and what prepares its input; `advance(1)` after each epoch.

    Raises:
        FloatingPointError: the loss is infinite or NaN.
    """
    torch.manual_seed(seed)
    data = on(device, data)
    images = BatchLoader(
        data,
        recipe.batch_size,
        flip=recipe.flip,
        shift=recipe.shift,
        device=device,
        drop_last=True,
        seed=seed,
    )
    some = BatchLoader(
        data,
        SAMPLE,
        mean=images.mean,
        std=images.std,
        device=device,
        seed=seed,
        flatten=False,
    )
    batches = Components(images, next(iter(some))[0], recipe.components, recipe.whiten)
    # Made on the CPU: a seed gives the same weights on every device.
    model = torchbp.nn.MLP([recipe.components, *recipe.hidden, 10]).to(device)
    optimizer = SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    factor = warmup_cosine(recipe.epochs * len(batches), recipe.warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    step = compile_step(model, optimizer, label_smoothing=recipe.label_smoothing)
    with products_in_tf32(recipe.tf32 and device.type == "cuda"):
        for epoch in range(recipe.epochs):
            for x, target in batches:
                loss = step(x, target)
                scheduler.step()
            if not math.isfinite(loss):
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is {float(loss)}")
            advance(1)
    return model, batches


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, prepare: Components, data: ImageDataset
) -> tuple[float, float]:
    """The columns accuracy and averaged, on the device of what prepares the input."""
    batches = prepare.batches
    loader = BatchLoader(
        data,
        1000,
        shuffle=False,
        mean=batches.mean,
        std=batches.std,
        device=batches.device,
        flatten=False,
    )
    once, averaged = torch.zeros(2, dtype=torch.int64, device=batches.device)
    for x, target in loader:
        h, w = x.shape[2:]
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        total = x.new_zeros(len(x), 10)
        for down, right in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
            view = padded[:, :, down : down + h, right : right + w]
            middle = (down, right) == (1, 1)
            for mirrored in (False, True):
                logits = model(prepare((view.flip(3) if mirrored else view).flatten(1)))
                if middle and not mirrored:
                    once += (logits.argmax(1) == target).sum()
                total += (2 if middle else 1) * logits.log_softmax(1)
        averaged += (total.argmax(1) == target).sum()
    n = len(data)
    return 100 * int(once) / n, 100 * int(averaged) / n


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (0 for one run) of each measured column."""
    result: dict[str, dict[str, float]] = {"mean": {}, "std": {}}
    for name in ("accuracy", "averaged", "seconds", "evaluation"):
        values = [getattr(run, name) for run in runs]
        result["mean"][name] = statistics.fmean(values)
        result["std"][name] = statistics.stdev(values) if len(values) > 1 else 0.0
    return result


def table(runs: Sequence[Run]) -> Table:
    result = Table("seed", "epochs", "accuracy", "averaged", "seconds", "evaluation")
    for column in result.columns:
        column.justify = "right"

    def row(name: object, epochs: object, run: dict[str, float]) -> None:
        percent = [f"{run[key]:.2f} %" for key in ("accuracy", "averaged")]
        seconds = [f"{run[key]:.1f}" for key in ("seconds", "evaluation")]
        result.add_row(str(name), str(epochs), *percent, *seconds)

    for run in runs:
        row(run.seed, run.epochs, run._asdict())
    result.add_section()
    for name, values in summary(runs).items():
        row(name, "", values)
    return result


def positive(text: str) -> int:
    """A type for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, text = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        "speedrun.py",
        description=about,
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--goal", type=int, choices=RECIPES, default=60, help="percent (default: %(default)s)")
    add("--data-dir", metavar="DIR", required=True, help="folder of CIFAR-10")
    add("--download", action="store_true", help="fetch CIFAR-10 into it if it is not there")
    add("--seeds", type=positive, default=3, metavar="N", help="runs, from seeds 0 to N - 1")
    add("--epochs", type=positive, metavar="N", help="other than the recipe's, to try it out")
    add_device(parser)
    add("--threads", type=positive, metavar="N", help="of PyTorch (default: its own choice)")
    add("--json", metavar="FILE", help="write recipe, runs and machine there")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = RECIPES[args.goal]
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs)
    try:
        data = CIFAR10(args.data_dir, train=True, download=args.download)
        test = CIFAR10(args.data_dir, train=False)
    except (OSError, ValueError) as error:
        return fail(error, 2)

    runs: list[Run] = []
    shown = (
        contextlib.nullcontext(lambda n: None)
        if args.quiet
        else progress("epochs", args.seeds * recipe.epochs)
    )
    device = torch.device(args.device)
    try:
        if device.type == "cuda":  # libraries load when they are first used
            evaluate(*train(data, replace(recipe, epochs=1), 0, lambda n: None, device), test)
        with shown as advance:
            for seed in range(args.seeds):
                wait_for(device)
                start = time.perf_counter()
                model, prepare = train(data, recipe, seed, advance, device)
                wait_for(device)
                trained = time.perf_counter()
                accuracy, averaged = evaluate(model, prepare, test)
                seconds, evaluation = trained - start, time.perf_counter() - trained
                runs.append(Run(seed, recipe.epochs, accuracy, averaged, seconds, evaluation))
    except FloatingPointError as error:
        return fail(f"seed {len(runs)}, {error}", 1)
    except KeyboardInterrupt:  # ends with the runs that there are
        if not runs:
            raise

    mean = summary(runs)["mean"]
    limit = recipe.limit.get(device.type, math.inf)
    reached = mean["accuracy"] >= args.goal and mean["seconds"] <= limit
    where = device_name(device)
    Console(width=None if sys.stdout.isatty() else 80).print(table(runs))
    print(
        f"goal {args.goal} %{'' if math.isinf(limit) else f' in {limit:g} s'}: "
        f"{'reached' if reached else 'missed'}, "
        f"{mean['accuracy']:.2f} % in {mean['seconds']:.1f} s on {where}"
    )
    if not recipe.measured:
        print(f"The recipe of {args.goal} % is a guess that had not been measured before this run.")
    if args.json:
        report = {
            "goal": args.goal,
            "reached": reached,
            "recipe": asdict(recipe),
            "runs": [run._asdict() for run in runs],
            **summary(runs),
            "torch": torch.__version__,
            "torchbp": torchbp.__version__,
            "threads": torch.get_num_threads(),
            "device": where,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        }
        try:
            write_file(Path(args.json), json.dumps(report, indent=2) + "\n")
        except OSError as error:
            return fail(error, 2)
    return 0


def fail(error: object, code: int) -> int:
    print(f"speedrun.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
