"""The device of a run: which one to take, what it is called, and waiting for it.

What is said of CUDA here has not run on a GPU yet.
"""

from __future__ import annotations

import argparse

import torch

from ..functions.table import HAS_CUDA


def default_device() -> str:
    """ "cuda" where torch finds a GPU and torchbp has its kernels for it, else "cpu"."""
    return "cuda" if HAS_CUDA and torch.cuda.is_available() else "cpu"


def usable_device(text: str) -> str:
    """A type for argparse: a device that torch and torchbp can use here.

    Raises:
        argparse.ArgumentTypeError: it is not there, or torchbp was built without CUDA.

    Example:
        >>> usable_device("cpu")
        'cpu'
    """
    try:
        torch.empty(0, device=text)
    except Exception as error:  # torch raises RuntimeError and AssertionError, among others
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used: {str(error).splitlines()[0]}"
        ) from None
    if torch.device(text).type == "cuda" and not HAS_CUDA:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used: torchbp was built without its CUDA kernels"
        )
    return text


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add the option `--device` of a script, or of a group of its options.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_device(parser)
        >>> parser.parse_args(["--device", "cpu"]).device
        'cpu'
    """
    parser.add_argument(
        "--device",
        type=usable_device,
        default=default_device(),
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ... (default: cuda if it can be used, else cpu; here %(default)s)",
    )


def device_name(device: str | torch.device) -> str:
    """What a reader of a result has to know of the device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{threads} CPU thread{'s' if threads > 1 else ''}"
    return str(device)


def wait_for(device: str | torch.device) -> None:
    """Return when the device has done all that it was given, so that a clock may be read.

    A GPU works on while Python goes ahead; the CPU does not.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
