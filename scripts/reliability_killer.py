"""A process that runs tests against mutants: it imports what is slow once, and forks for each.

    python -m scripts.reliability_killer [native]     # a request a line on stdin, answers on stdout

It runs in the folder of the copy whose tests it runs (reliability_tree.py). With `native` it
imports torchbp as well: a check in C++ asks which mutant lives each time that it is passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import sympy
import torch

from scripts.reliability_mutants import Mutant, plant

#: What children would import themselves otherwise.
SLOW = (hypothesis, numpy, sympy, torch)

#: A mutant may loop for ever: that is noticed, too.
TIMEOUT = 300.0


def child(mutant: dict[str, Any] | None, number: int, tests: list[str], output: int) -> int:
    """Run the tests with the mutant alive; the exit status is pytest's."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    if mutant is not None and mutant["kind"] == "native":
        import torchbp

        library = ctypes.CDLL(torchbp._C.__file__)
        ctypes.c_int.in_dll(library, "torchbp_mutant").value = number
        os.environ["TORCHBP_MUTANT_NUMBER"] = str(number)  # in a process that a test starts
    elif mutant is not None and mutant["kind"] == "python":
        plant(Mutant(**mutant))
    elif mutant is not None:
        os.environ["TORCHBP_MUTANT_NUMBER"] = str(number)
        os.environ["TORCHBP_MUTANT"] = json.dumps(mutant)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    return int(pytest.main([*options, "--no-header", "--tb=line", *tests]))


def run(mutant: dict[str, Any] | None, number: int, tests: list[str]) -> dict[str, Any]:
    """{"status", "by"}: pytest's exit status (negative: a signal's number), and who noticed."""
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if process == 0:
            status = 70
            try:
                os.setpgid(0, 0)
                status = child(mutant, number, tests, output.fileno())
                sys.stdout.flush()
            finally:
                os._exit(status)
        status = wait(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", text, re.M)
    lines = text.strip().splitlines()
    by = failed[-1] if failed else ""
    passed = re.search(r"(\d+) passed", text)
    return {
        "status": status,
        "by": by,
        "passed": int(passed.group(1)) if passed else 0,
        "last": lines[-1] if lines else "",
    }


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
        time.sleep(0.02)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path.cwd()))
    if "native" in sys.argv[1:]:
        import tests.ops  # noqa: F401 (and torchbp with it)
    for line in sys.stdin:
        out.write(json.dumps(run(**json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
