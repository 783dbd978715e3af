"""torchbp.train.log: rows anywhere, a bar on a terminal only."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from torchbp.train import Log, Metrics

ROW: dict[str, Any] = {
    "epoch": 12,
    "train_loss": 1.25,
    "train_accuracy": 55.5,
    "test_loss": 1.5,
    "test_accuracy": 100.0,
    "images_per_second": 12345.6,
    "lr": 0.03,
    "seconds": 4.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "stdout", output)
    with Log(epochs=20, batches=3, done=11) as log:
        log.batch(11, 64, Metrics(1.23456, 43.21))
        log.epoch(ROW)
    return output.getvalue().splitlines()


@pytest.mark.parametrize("colour", [None, "1"])
def test_plain_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, colour: str | None
) -> None:
    if colour:
        monkeypatch.setenv("FORCE_COLOR", colour)
    assert run(io.StringIO(), monkeypatch) == [
        "epoch  train loss  accuracy  test loss  accuracy  images/s        lr",
        "   12      1.2500   55.50 %     1.5000  100.00 %     12346      0.03",
    ]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    text = "\n".join(run(Terminal(), monkeypatch))
    for part in ("epoch 12/20", "loss 1.2346", "accuracy 43.21 %", "images/s", "left", "12346"):
        assert part in text


def test_bar_is_taken_down_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    output = Terminal()
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(KeyboardInterrupt), Log(epochs=1, batches=1):
        raise KeyboardInterrupt
    assert output.getvalue().rstrip().endswith("\x1b[2K")  # its line erased, the cursor shown
    assert "\x1b[?25h" in output.getvalue()
