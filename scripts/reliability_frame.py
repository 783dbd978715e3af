"""The frame of scripts/reliability.py: figures, the pieces that their work is cut into, the state
that keeps what is done, and the processes that measure.

A figure is one claim about torchbp, measured. Its work is cut into pieces, each described by a dict
that says all there is to know of it; a piece is measured in a process of its own, at the SIMD level
that it names, and its result kept as one line of JSON. What is kept is taken again as long as
nothing that it depends on has changed: extension, torch, the Python files that the figure names.

    python -m scripts.reliability_frame     # such a process: requests on stdin, answers on stdout
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

import torchbp

__all__ = ["ROOT", "Figure", "Measured", "Piece", "Result", "State", "end", "key_of", "run"]

ROOT = Path(__file__).resolve().parents[1]

#: What is measured, in JSON's types. "level" is the SIMD level of the process, if it matters;
#: "sample" is there only in pieces that the complete run does without.
Piece = dict[str, Any]

#: What was found, in JSON's types.
Result = dict[str, Any]

#: The pieces of a figure that are done, with what was found.
Measured = Sequence[tuple[Piece, Result]]


class Figure(ABC):
    """One claim about torchbp, and how it is measured.

    Attributes:
        name: what `--only` calls it.
        title: the heading of its section.
        claim: what is claimed, in a paragraph.
        unit: what `size` counts, in the plural.
        sample: the share of the work that the tests do.
        sources: the Python files, beside the extension, that a result depends on: patterns.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[str]
    unit: ClassVar[str]
    sample: ClassVar[float]
    sources: ClassVar[tuple[str, ...]]

    @abstractmethod
    def pieces(self, fraction: float = 1.0) -> list[Piece]:
        """The work: all of it, or a sample of about that share."""

    @abstractmethod
    def size(self, piece: Piece) -> int:
        """How many cases a piece measures."""

    @abstractmethod
    def measure(self, piece: Piece) -> Result:
        """Measure a piece. Called in a process at the piece's level, on one thread."""

    @abstractmethod
    def tables(self, measured: Measured) -> list[str]:
        """What was found, as paragraphs and tables in Markdown."""

    def failures(self, measured: Measured) -> list[str]:
        """Where the claim does not hold, a line each."""
        return [line for _, result in measured for line in result["failures"]]

    def obstacle(self, piece: Piece | None = None) -> str | None:
        """Why it, or one piece of it, cannot be measured on this machine now, if it cannot."""
        return None


def key_of(piece: Piece) -> str:
    return json.dumps(piece, sort_keys=True)


@cache
def _checksum_of_extension() -> str:
    return hashlib.sha256(Path(torchbp._C.__file__).read_bytes()).hexdigest()


def build_of(figure: Figure) -> str:
    """The checksum of all that a result of this figure depends on."""
    files = [path for pattern in figure.sources for path in sorted(ROOT.glob(pattern))]
    parts = [
        _checksum_of_extension(),
        torch.__version__,
        *(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class State:
    """What has been measured: NAME.jsonl in a folder, one line a piece, of this build or older."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, figure: Figure) -> Path:
        return self.folder / f"{figure.name}.jsonl"

    def lines(self, figure: Figure) -> dict[str, dict[str, Any]]:
        """Key of a piece -> its line, of those that this build gave."""
        try:
            text = self.path(figure).read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        build, found = build_of(figure), {}
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off while it was written: not done
                continue
            if entry["build"] == build:
                found[key_of(entry["piece"])] = entry
        return found

    def add(self, figure: Figure, piece: Piece, result: Result, seconds: float) -> None:
        """Keep a result; once this returns it is in the file."""
        entry = {
            "build": build_of(figure),
            "piece": piece,
            "result": result,
            "seconds": round(seconds, 3),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(figure)
        with open(path, "ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # after a line that was cut off
            file.write(json.dumps(entry).encode() + b"\n")


# ---- Processes that measure ----------------------------------------------------------------------


class Worker:
    """A process that measures pieces at one SIMD level, one after another."""

    def __init__(self, level: str | None) -> None:
        self.level = level
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if level is not None:
            environment["TORCHBP_CPU"] = level
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.reliability_frame"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        # What it says last, if it dies: read all the while, so that the pipe never fills up.
        self.said: deque[str] = deque(maxlen=5)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def measure(self, figure: Figure, piece: Piece) -> dict[str, Any]:
        """{"result", "seconds"}, or {"error"}: a line on what it raised or how it died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        kind = type(figure)
        request = {"module": kind.__module__, "class": kind.__qualname__, "piece": piece}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return dict(json.loads(answer))
        code = self.process.wait()
        self.listener.join()
        last = " ".join(line.strip() for line in list(self.said)[-1:])
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return {"error": f"the process died ({how}) {last}".rstrip()}

    def close(self) -> None:
        self.process.kill()
        self.listener.join()
        end(self.process)

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that nobody reads
                pipe.close()


def run(
    work: Sequence[tuple[Figure, Piece]],
    state: State,
    jobs: int = 1,
    tell: Callable[[Figure, Piece], None] = lambda figure, piece: None,
) -> list[str]:
    """Measure pieces in `jobs` processes at a time, and keep each result as it comes.

    Returns:
        A line for each piece that could not be measured; it is not kept, and tried again next time.
    """
    pending = deque(work)
    answers: queue.Queue[tuple[Figure, Piece, dict[str, Any]]] = queue.Queue()
    workers: set[Worker] = set()
    stopped = threading.Event()

    def labour() -> None:
        worker: Worker | None = None
        while not stopped.is_set():
            try:
                figure, piece = pending.popleft()
            except IndexError:
                break
            try:
                if worker is None or worker.dead or worker.level != piece.get("level"):
                    if worker is not None:
                        worker.close()
                        workers.discard(worker)
                    worker = Worker(piece.get("level"))
                    workers.add(worker)
                    if stopped.is_set():  # or nobody would kill this one
                        break
                answer = worker.measure(figure, piece)
            except Exception as error:  # or the parent would wait for ever
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.put((figure, piece, answer))
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=labour) for _ in range(min(jobs, len(work)))]
    for thread in threads:
        thread.start()
    failed = []
    try:
        for _ in work:
            figure, piece, answer = answers.get()
            if "error" in answer:
                failed.append(f"{figure.name}, {words(piece)}: {answer['error']}")
            else:
                state.add(figure, piece, answer["result"], answer["seconds"])
            tell(figure, piece)
    finally:
        stopped.set()
        pending.clear()
        for worker in list(workers):
            if not worker.dead:
                worker.process.kill()
        for thread in threads:
            thread.join()
    return failed


def words(piece: Piece) -> str:
    return " ".join(f"{name}={value}" for name, value in piece.items() if value is not None)


def serve() -> None:
    """Answer requests from stdin until it ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes elsewhere
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            figure = getattr(importlib.import_module(request["module"]), request["class"])()
            began = time.perf_counter()
            result = figure.measure(request["piece"])
            answer = {"result": result, "seconds": time.perf_counter() - began}
        except Exception as error:  # a figure's own fault, to be read in the parent
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    serve()
