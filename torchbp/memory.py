"""The memory that torchbp keeps for results on the CPU."""

from __future__ import annotations

from . import _C

__all__ = ["empty_cache"]


def empty_cache() -> None:
    """Give back to the system the memory that is kept for results on the CPU.

    A result of 1 MiB or more that is gone leaves its memory to the next of its size, as on a GPU:
    memory fresh from the system costs as much time as the whole operation. At most 256 MiB wait so;
    the environment variable `TORCHBP_CACHE_MIB` sets another limit, 0 for none, before the first
    such result. Tensors that are in use are not touched. The storage of such a result cannot be
    resized, as that of a tensor on NumPy's memory cannot.

    Example:
        >>> import torch, torchbp
        >>> y = torchbp.functional.relu(torch.randn(2**20))
        >>> del y
        >>> torchbp.empty_cache()
    """
    _C.empty_cache()
