"""Copies of the whole project, built in another way: with a sanitizer, or with every mutant in it.

    python -m scripts.reliability_tree address     # build/trees/address: make asan, ubsan, tsan
    python -m scripts.reliability_tree mutants     # reliability_mutants.py: make mutants

A copy holds the sources, tests and scripts as they are now and an extension of its own, so that the
one in use is not touched and its tests run as they always do. Only what has changed is copied and
compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

__all__ = ["SANITIZERS", "Tree", "checksum", "importing", "sanitizer_tree"]

#: What of a checkout is neither a source nor a test.
LEFT_OUT = {"build", "dist", "runs", "__pycache__", "node_modules"}

#: The value of TORCHBP_SANITIZE -> the make target that builds with it.
SANITIZERS = {"address": "asan", "undefined": "ubsan", "thread": "tsan"}


def files(folder: Path) -> Iterator[Path]:
    """Every source below a folder."""
    for path in sorted(folder.iterdir()):
        if path.name in LEFT_OUT or path.name.startswith(".") or path.suffix == ".so":
            continue
        if path.is_dir():
            yield from files(path)
        else:
            yield path


def checksum(texts: Iterator[bytes] | list[bytes]) -> str:
    """One short checksum of them all."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(hashlib.sha256(text).digest())
    return whole.hexdigest()[:16]


class Tree:
    """A copy of the project with an extension of its own.

    Attributes:
        folder: where it is.
        environment: what setup.py is to be told.
        changes: path -> the text that the copy has there instead, or beside.
    """

    def __init__(
        self, name: str, environment: Mapping[str, str], changes: Mapping[str, str] | None = None
    ) -> None:
        self.folder = ROOT / "build" / "trees" / name
        self.environment = dict(environment)
        self.changes = dict(changes or {})
        self.stamp = self.folder / "build" / "built"

    @cache  # noqa: B019 (there are a handful of trees)
    def wanted(self) -> str:
        """The checksum of all that the extension is made from."""
        sources = [ROOT / "setup.py", *files(ROOT / "csrc"), *files(ROOT / "tests" / "sanitizers")]
        texts = [
            f"{torch.__version__} {os.environ.get('CXX', '')} {sorted(self.environment.items())} "
            f"{sorted(self.changes.items())}".encode(),
            *(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes() for path in sources),
        ]
        return checksum(texts)

    @property
    def current(self) -> bool:
        """Whether its extension is that of these sources."""
        return self.stamp.exists() and self.stamp.read_text() == self.wanted()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process copies or builds meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def copy(self) -> None:
        """Bring the copy's sources up to date."""
        with self.locked():
            kept = set()
            for path in files(ROOT):
                name = str(path.relative_to(ROOT))
                kept.add(name)
                if name not in self.changes:
                    self._write(name, path.read_bytes())
            for name, text in self.changes.items():
                kept.add(name)
                self._write(name, text.encode())
            for path in list(files(self.folder)):
                if str(path.relative_to(self.folder)) not in kept:
                    path.unlink()

    def _write(self, name: str, text: bytes) -> None:
        target = self.folder / name
        if not target.exists() or target.read_bytes() != text:  # or ninja would compile it again
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)

    def build(self) -> None:
        """Compile what is not compiled yet; raise RuntimeError with what the compiler said."""
        self.copy()
        with self.locked():
            if self.current:
                return
            self.stamp.unlink(missing_ok=True)
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            environment = {**os.environ, "TORCHBP_CUDA": "0", "PATH": path, **self.environment}
            result = subprocess.run(
                command, cwd=self.folder, env=environment, text=True, stderr=subprocess.STDOUT,
                stdout=subprocess.PIPE,
            )  # fmt: skip
            if result.returncode:
                raise RuntimeError(f"{self.folder} could not be built:\n{result.stdout}")
            self.stamp.write_text(self.wanted())

    def borrow(self) -> None:
        """Take the extension that is in use instead of building one."""
        import torchbp

        used = Path(torchbp._C.__file__)
        with self.locked():
            target = self.folder / "torchbp" / used.name
            if not target.exists() or target.read_bytes() != used.read_bytes():
                beside = target.with_suffix(".new")
                beside.write_bytes(used.read_bytes())
                beside.replace(target)

    def python(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment of a Python process in the copy's folder that imports the copy."""
        return importing(self.folder, environment)


def importing(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a Python process that imports what is in a folder, and is no worker of
    the tests that may run this.
    """
    own = {**os.environ, "PYTHONPATH": str(folder), **environment}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        own.pop(name, None)
    return own


def sanitizer_tree(sanitizer: str) -> Tree:
    """The tree of a sanitizer."""
    return Tree(sanitizer, {"TORCHBP_SANITIZE": sanitizer})


def main(names: list[str]) -> int:
    from scripts.reliability_mutants import native_tree  # which imports this module

    trees: dict[str, Callable[[], Tree]] = {
        name: partial(sanitizer_tree, name) for name in SANITIZERS
    }
    trees["mutants"] = native_tree
    for name in names:
        if name not in trees:
            print(f"wants some of {', '.join(trees)}, got {name!r}", file=sys.stderr)
            return 2
        try:
            trees[name]().build()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
