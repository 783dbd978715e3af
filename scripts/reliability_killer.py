"""A process that runs tests against mutants: it imports and collects once, and forks for each.

    python -m scripts.reliability_killer tests/functions/test_check.py -k "not compiled"

Requests are read from stdin and answered on stdout, one line each. It runs in the folder of the
copy whose tests it runs (reliability_tree.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import pytest

from scripts.reliability_mutants import Mutant, plant

#: A mutant may loop for ever: that is noticed, too.
TIMEOUT = 300.0


class Killer:
    """A plugin of pytest that answers requests instead of running what was collected."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self.requests, self.answers = requests, answers
        self.failed = ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed or not session.items:
            self.answer({"error": f"{session.testsfailed} errors, {len(session.items)} tests"})
            return True
        self.answer({"tests": len(session.items)})
        for line in self.requests:
            self.answer(self.fork(session, **json.loads(line)))
        return True

    def answer(self, found: dict[str, Any]) -> None:
        self.answers.write(json.dumps(found) + "\n")
        self.answers.flush()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def fork(self, session: pytest.Session, mutant: Any, number: int, word: str) -> dict[str, Any]:
        """{"killed", "by", "ran"}: the test that noticed, or the signal; how many tests ran."""
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            status = 70
            try:
                os.close(reading)
                os.setpgid(0, 0)
                if mutant is not None:
                    plant(Mutant(**mutant), number)
                ran = self.run([item for item in session.items if word in item.nodeid])
                os.write(writing, json.dumps({"by": self.failed, "ran": ran}).encode())
                status = 0
            except BaseException as error:
                os.write(writing, json.dumps({"error": repr(error)}).encode())
            finally:
                os._exit(status)
        os.close(writing)
        status = wait(process)
        with open(reading) as pipe:
            text = pipe.read()
        found: dict[str, Any] = json.loads(text) if text else {"by": how(status), "ran": 0}
        return {**found, "killed": bool(found.get("by"))}

    def run(self, items: Sequence[pytest.Item]) -> int:
        """Run tests until one fails; how many ran."""
        for i, item in enumerate(items):
            following = items[i + 1] if i + 1 < len(items) else None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return i + 1
        return len(items)


def how(status: int) -> str:
    """How a process ended, in words."""
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def wait(process: int) -> int:
    until = time.monotonic() + TIMEOUT
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.005)


def main(arguments: Sequence[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:terminalreporter"]
    options += ["-W", "ignore", "--capture=no"]
    killer = Killer(requests, answers)
    status = pytest.main([*options, *arguments], plugins=[killer])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        killer.answer({"error": f"pytest ended with {status!r}"})


if __name__ == "__main__":
    main(sys.argv[1:])
