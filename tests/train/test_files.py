"""torchbp.train.files: a file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchbp.train import write_file


def test_writes_bytes_and_text(tmp_path: Path) -> None:
    write_file(tmp_path / "bytes", b"\x00\xff")
    write_file(tmp_path / "text", "µ\n")
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert (tmp_path / "text").read_bytes() == b"\xc2\xb5\n"


def test_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "old")
    write_file(tmp_path / "file", "new")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "new")]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, kind: type[BaseException]
) -> None:
    def stop(*args: object) -> None:
        raise kind("no space left on device")

    write_file(tmp_path / "file", "old")
    monkeypatch.setattr(os, step, stop)
    with pytest.raises(kind, match="no space left"):
        write_file(tmp_path / "file", "new")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "old")]


def test_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def record(name: str) -> None:
        step = getattr(os, name)

        def recorded(*args: object) -> None:
            calls.append(name)
            step(*args)

        monkeypatch.setattr(os, name, recorded)

    record("fsync")
    record("replace")
    write_file(tmp_path / "file", "new")
    assert calls == ["fsync", "replace"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "missing" / "file", "new")
