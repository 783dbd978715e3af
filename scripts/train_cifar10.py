#!/usr/bin/env python3
"""Train a multilayer perceptron on CIFAR-10, or on its synthetic stand-in, which needs no download.

    python scripts/train_cifar10.py                             # synthetic images
    python scripts/train_cifar10.py --data-dir data --download  # the real ones
    python scripts/train_cifar10.py --baseline                  # the same run on torch.nn
    python scripts/train_cifar10.py --hidden                    # no hidden layer: a linear model
    python scripts/train_cifar10.py --device cpu                # also where there is a GPU
    python scripts/train_cifar10.py --resume runs/NAME          # go on with a run that was stopped

Writes a folder runs/TIME-NAME: args.json (the settings), metrics.jsonl (a row an epoch),
model.safetensors (the weights at the end), curves.png, templates.png (first-layer weights as
images), confusion.png, and the checkpoints last.safetensors and best.safetensors, of the last epoch
and of the one with the best test accuracy.

The accuracy in the last line is that of the weights at the end, in model.safetensors, not of the
best epoch, which the test images themselves have chosen. Ctrl-C stops training and ends the run
with what there is.

The run is on a GPU where torch finds one and torchbp was built with CUDA; that has not run on a
GPU yet. --resume goes on where the run was, as on another device it would be another run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import torchbp
from torchbp.data import CIFAR10, BatchLoader, SyntheticCIFAR10
from torchbp.train import (
    Log,
    add_device,
    confusion_matrix,
    device_name,
    figures,
    fit,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    warmup_cosine,
    write_file,
)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
PIXELS = 3 * 32 * 32
# What --resume lets the command line change.
FREE_ON_RESUME = {"resume", "data_dir", "download", "epochs", "threads", "plots"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, no usage


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], Any]:
    """A type for argparse: a finite number of [low, high), or of (low, high) where `above`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not (low <= value < high) or (above and value == low):
            name = "an integer" if kind is int else "a number"
            bound = f"above {low:g}" if above else f"of at least {low:g}"
            limit = "" if high == math.inf else f" and below {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bound}{limit}")
        return value

    return parse


def parser() -> Parser:
    about, text = (__doc__ or "").split("\n", 1)
    top = Parser(
        "train_cifar10.py",
        description=about,
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction

    group = top.add_argument_group("Data")
    group.add_argument(
        "--data-dir", metavar="DIR", help="folder of CIFAR-10; implies --dataset cifar10"
    )
    group.add_argument("--dataset", choices=["synthetic", "cifar10"], help="(default: synthetic)")
    group.add_argument(
        "--download",
        action=flag,
        default=False,
        help="fetch CIFAR-10 into --data-dir if it is not there",
    )

    group = top.add_argument_group("Model")
    group.add_argument(
        "--hidden",
        type=number(int, 1),
        nargs="*",
        default=[512, 256],
        metavar="UNITS",
        help="units of each hidden layer; none for a linear classifier (default: 512 256)",
    )
    group.add_argument(
        "--activation", choices=sorted(ACTIVATIONS), default="relu", help="(default: %(default)s)"
    )
    group.add_argument(
        "--baseline",
        action=flag,
        default=False,
        help="the same run, from the same weights, on torch.nn alone",
    )

    group = top.add_argument_group(
        "Optimizer: stochastic gradient descent; the rate warms up, then falls on a cosine"
    )
    default = "(default: %(default)s)"
    group.add_argument("--epochs", type=number(int, 1), default=10, metavar="N", help=default)
    group.add_argument(
        "-b", "--batch-size", type=number(int, 1), default=128, metavar="N", help=default
    )
    group.add_argument(
        "--lr",
        type=number(float, 0, above=True),
        default=0.03,
        metavar="LR",
        help=f"peak rate {default}",
    )
    group.add_argument(
        "--momentum",
        type=number(float, 0, 1),
        default=0.9,
        metavar="M",
        help=f"Nesterov's where not 0 {default}",
    )
    group.add_argument(
        "--weight-decay",
        type=number(float, 0),
        default=5e-4,
        metavar="W",
        help="adds W * w to the gradient of each parameter w; the lecture's penalty lambda * R(w),"
        " R(w) = sum of squares, has the gradient 2 * lambda * w, so W = 2 * lambda"
        f" {default}",
    )

    group = top.add_argument_group("Regularisation and augmentation")
    group.add_argument(
        "--label-smoothing", type=number(float, 0, 1), default=0.1, metavar="S", help=default
    )
    group.add_argument(
        "--dropout",
        type=number(float, 0, 1),
        default=0.0,
        metavar="P",
        help=f"of hidden units {default}",
    )
    group.add_argument(
        "--flip",
        action=flag,
        default=True,
        help="mirror half of the training images (default: yes)",
    )

    group = top.add_argument_group("Run")
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63),
        default=0,
        metavar="N",
        help=f"of everything random {default}",
    )
    group.add_argument(
        "--compile",
        action=flag,
        default=True,
        help="do a training step in one operation where that gives the same: on the CPU or a CUDA"
        " device, without --amp, --dropout and --baseline (default: yes)",
    )
    add_device(group)
    group.add_argument(
        "--amp",
        action=flag,
        default=False,
        help="forward in bfloat16 where that is safe (autocast)",
    )
    group.add_argument(
        "--threads", type=number(int, 1), metavar="N", help="CPU threads (default: torch's choice)"
    )
    group.add_argument(
        "--output", default="runs", metavar="DIR", help=f"folder of the run's folder {default}"
    )
    group.add_argument("--plots", action=flag, default=True, help="draw the figures (default: yes)")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on from RUN's last checkpoint, with RUN's settings; of these, only "
        + ", ".join(f"--{name.replace('_', '-')}" for name in sorted(FREE_ON_RESUME - {"resume"}))
        + " may be changed",
    )
    return top


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The command line that gives these settings, so that args.json is checked as any other."""
    flags: list[str] = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            flags += [f"--{option}", *map(str, value)]
        elif value is not None:
            flags += [f"--{option}={value}"]
    return flags


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The settings, checked; with --resume, those of the run and what `argv` changes."""
    top = parser()
    args = top.parse_args(argv)
    if args.resume:
        path = Path(args.resume) / "args.json"
        try:
            saved = json.loads(path.read_bytes())
            flags = as_flags(saved)
        except OSError as error:
            top.error(f"--resume: cannot read {path}: {error.strerror}")
        except (ValueError, AttributeError):
            top.error(f"--resume: {path} does not hold the settings of a run")
        before = top.parse_args(flags)
        args = top.parse_args([*flags, *(sys.argv[1:] if argv is None else argv)])
        changed = {
            name for name, value in vars(args).items() if value != vars(before)[name]
        } - FREE_ON_RESUME
        if changed:
            top.error(f"--resume: --{min(changed).replace('_', '-')} cannot be changed")
    if args.dataset is None:
        args.dataset = "cifar10" if args.data_dir else "synthetic"
    if args.dataset == "cifar10" and not args.data_dir:
        top.error(
            "--dataset cifar10 needs --data-dir, the folder of the data"
            " (with --download, the folder to fetch it to)"
        )
    if args.dataset == "synthetic" and (args.data_dir or args.download):
        top.error("--data-dir and --download are for --dataset cifar10")
    return args


def load_data(args: argparse.Namespace) -> tuple[BatchLoader, BatchLoader, list[str]]:
    """Training batches, test batches, both normalised as the training images, and class names."""
    train: CIFAR10 | SyntheticCIFAR10
    test: CIFAR10 | SyntheticCIFAR10
    if args.dataset == "cifar10":
        train = CIFAR10(args.data_dir, train=True, download=args.download)
        test = CIFAR10(args.data_dir, train=False)
    else:
        train, test = SyntheticCIFAR10(train=True), SyntheticCIFAR10(train=False)
    batches = BatchLoader(
        train, args.batch_size, shuffle=True, flip=args.flip, device=args.device, seed=args.seed
    )
    test_batches = BatchLoader(
        test, batch_size=1000, shuffle=False, mean=batches.mean, std=batches.std, device=args.device
    )
    return batches, test_batches, train.classes


def build_model(args: argparse.Namespace, classes: int) -> tuple[nn.Module, nn.Module]:
    """Model and loss. Both kinds come from one Sequential: a seed gives both the same weights."""
    torch.manual_seed(args.seed)
    layers: list[nn.Module] = []
    inputs = PIXELS
    for units in args.hidden:
        layers += [nn.Linear(inputs, units), ACTIVATIONS[args.activation]()]
        layers += [nn.Dropout(args.dropout)] if args.dropout else []
        inputs = units
    sequential = nn.Sequential(*layers, nn.Linear(inputs, classes)).to(args.device)
    if args.baseline:
        return sequential, nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    model = torchbp.nn.MLP.from_sequential(sequential)
    return model, torchbp.nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)


def new_folder(args: argparse.Namespace) -> Path:
    """A folder TIME-NAME in --output that was not there before."""
    name = "-".join([args.dataset, "mlp", *map(str, args.hidden), args.activation])
    name = time.strftime("%Y%m%d-%H%M%S-") + name + ("-baseline" if args.baseline else "")
    for count in itertools.count(1):
        folder = Path(args.output, name if count == 1 else f"{name}.{count}")
        with contextlib.suppress(FileExistsError):  # of a run that began in the same second
            folder.mkdir(parents=True)
            return folder
    raise AssertionError  # itertools.count does not end


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        train_batches, test_batches, classes = load_data(args)
    except (OSError, ValueError) as error:
        return fail(error, 2)

    model, criterion = build_model(args, len(classes))
    kind = torch.optim.SGD if args.baseline else torchbp.optim.SGD
    optimizer = kind(
        model.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        nesterov=args.momentum > 0,
        weight_decay=args.weight_decay,
    )
    factor = warmup_cosine(steps=args.epochs * len(train_batches), warmup=0.15)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    step, has_step = None, torch.device(args.device).type in ("cpu", "cuda")
    if args.compile and not (args.baseline or args.amp or args.dropout) and has_step:
        step = torchbp.compile_step(model, optimizer, args.label_smoothing)
    history: list[dict[str, Any]] = []

    def save_metrics() -> None:
        write_file(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def save() -> None:
        save_metrics()
        state = {"history": history, "loader": train_batches.state_dict()}
        save_checkpoint(folder / "last.safetensors", model, optimizer, scheduler, state)
        accuracy = [row["test_accuracy"] for row in history]
        if history and accuracy[-1] > max(accuracy[:-1], default=-1.0):
            save_checkpoint(folder / "best.safetensors", model, optimizer, scheduler, state)

    try:
        if args.resume:
            folder = Path(args.resume)
            state = load_checkpoint(folder / "last.safetensors", model, optimizer, scheduler)
            history += state["history"]
            train_batches.load_state_dict(state["loader"])
        else:
            folder = new_folder(args)
        settings = {name: value for name, value in vars(args).items() if name != "resume"}
        write_file(folder / "args.json", json.dumps(settings, indent=2) + "\n")
        save()
    except (OSError, ValueError) as error:
        return fail(error, 2)

    sizes = "-".join(map(str, [PIXELS, *args.hidden, len(classes)]))
    parameters = sum(p.numel() for p in model.parameters())
    package = "torch.nn" if args.baseline else "torchbp.nn"
    images = [len(batches.dataset.images) for batches in (train_batches, test_batches)]
    print(f"{args.dataset}: {images[0]} training images, {images[1]} test images")
    where = f"{args.device} ({device_name(args.device)})"
    print(f"MLP {sizes}, {args.activation}, {parameters} parameters, {package} on {where}")
    print(folder, flush=True)

    code = 0
    try:
        with Log(args.epochs, len(train_batches), done=len(history)) as log:
            fit(
                model,
                criterion,
                optimizer,
                scheduler,
                train_batches,
                test_batches,
                args.epochs,
                history,
                args.amp,
                log,
                on_epoch=save,
                step=step,
            )
    except KeyboardInterrupt:
        print(f"interrupted in epoch {len(history) + 1}: ending with the weights of the moment")
        code = 130
    except (FloatingPointError, OSError) as error:
        return fail(f"epoch {len(history) + 1}: {error}", 1)

    save_metrics()  # Ctrl-C may have come between a row and its saving
    save_weights(folder / "model.safetensors", model)
    counts = confusion_matrix(model, test_batches, len(classes), args.amp)
    if args.plots:
        if history:
            figures.save_figure(folder / "curves.png", figures.curves(history))
        weight = next(model.parameters())  # of the first layer
        figures.save_figure(folder / "templates.png", figures.templates(weight, classes))
        figures.save_figure(folder / "confusion.png", figures.confusion(counts, classes))
    print(f"test accuracy {100 * counts.trace() / counts.sum():.2f} %")
    return code


def fail(error: object, code: int) -> int:
    print(f"train_cifar10.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before training has begun, or for the second time
        sys.exit(130)
