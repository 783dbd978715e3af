"""The log of a run: one table row an epoch, and a progress bar where there is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from torchbp.train.loop import Metrics

HEADER = "epoch  train loss  accuracy  test loss  accuracy  images/s        lr"
ROW = (
    "{epoch:5d}  {train_loss:10.4f}  {train_accuracy:6.2f} %"
    "  {test_loss:9.4f}  {test_accuracy:6.2f} %  {images_per_second:8.0f}  {lr:8.2g}"
)


class Log:
    """Prints the run to standard output; a context manager, since the bar must be taken down.

    Without a terminal there is no bar and no colour, only the header and the rows.

    Args:
        epochs: of the whole run.
        batches: of one epoch.
        done: epochs finished before, where a run goes on from a checkpoint.

    Example:
        >>> with Log(epochs=1, batches=1) as log:
        ...     log.batch(0, 100, Metrics(loss=2.3, accuracy=10.0))
        ...     log.epoch(dict(epoch=1, train_loss=2.3, train_accuracy=10.0, test_loss=2.2,
        ...                    test_accuracy=20.0, images_per_second=1e4, lr=0.1))
        epoch  train loss  accuracy  test loss  accuracy  images/s        lr
            1      2.3000   10.00 %     2.2000   20.00 %     10000       0.1
    """

    def __init__(self, epochs: int, batches: int, done: int = 0) -> None:
        terminal = sys.stdout.isatty()
        self._epochs = epochs
        self._began = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # what the text leaves
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(force_terminal=terminal),
            expand=True,
            transient=True,
            disable=not terminal,
        )
        self._task = self._bar.add_task(
            "", total=epochs * batches, completed=done * batches, status=""
        )

    def __enter__(self) -> Log:
        self._bar.start()
        self._print(HEADER, style="bold")
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def batch(self, epoch: int, images: int, metrics: Metrics) -> None:
        """One more batch of `epoch`, the first of which is 0; the counts are its so far."""
        speed = images / (time.perf_counter() - self._began)
        loss, accuracy = f"loss {metrics.loss:.4f}", f"accuracy {metrics.accuracy:.2f} %"
        self._bar.update(
            self._task,
            advance=1,
            description=f"epoch {epoch + 1}/{self._epochs}",
            status=f"{loss}  {accuracy}  {speed:.0f} images/s",
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """The row of a finished epoch, as `fit` makes it."""
        self._print(ROW.format(**row))
        self._began = time.perf_counter()

    def _print(self, line: str, style: str | None = None) -> None:
        self._bar.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
