"""Sizes, times and tables as text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["dims", "dtype_name", "duration", "number", "render", "size", "table"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(count: int) -> str:
    """Bytes in binary units, with four digits.

    Example:
        >>> size(512), size(1536), size(2**38), size(2**44)
        ('512 B', '1.5 KiB', '256 GiB', '16 TiB')
    """
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.4g} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """A time with three digits.

    Example:
        >>> duration(2.2e-05), duration(0.3301)
        ('22 us', '330 ms')
    """
    from torch.utils import benchmark  # slow to import

    unit, scale = benchmark.select_unit(seconds)
    return f"{seconds / scale:.3g} {unit}"


def dims(shape: Sequence[int]) -> str:
    """
    Example:
        >>> dims(torch.Size([2, 3])), dims(())
        ('[2, 3]', '[]')
    """
    return str(list(shape))


def dtype_name(dtype: torch.dtype) -> str:
    """
    Example:
        >>> dtype_name(torch.float32)
        'float32'
    """
    return str(dtype).removeprefix("torch.")


def number(value: Any) -> str:
    """A number with four digits, or nested lists of such; what is no floating one as it is.

    Example:
        >>> number(-2 / 3), number(12), number(float("inf")), number([1.0, 0.5])
        ('-0.6667', '12', 'inf', '[1, 0.5]')
    """
    if isinstance(value, list):
        return f"[{', '.join(map(number, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, title: str, caption: str
) -> Table:
    """A table; a head that begins with ">" has its column on the right. Brackets are no markup."""
    made = Table(title=Text(title), caption=Text(caption), title_justify="left")
    made.caption_justify = "left"
    for head in heads:
        side: Literal["left", "right"] = "right" if head.startswith(">") else "left"
        made.add_column(head.lstrip(">"), justify=side, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def render(part: RenderableType, width: int = 120) -> str:
    """What rich prints, as plain text.

    Example:
        >>> render(Text("[not] a tag"))
        '[not] a tag'
    """
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
