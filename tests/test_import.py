"""Importing torchbp loads nothing slow that only some of it needs."""

from __future__ import annotations

import subprocess
import sys

SLOW = ["matplotlib", "torch._dynamo", "torch._inductor", "torch.utils.benchmark", "sympy"]


def test_nothing_slow_is_imported() -> None:
    """What `import torch` itself loads does not count."""
    code = f"""
import sys, torch
before = set(sys.modules)
import torchbp
print([name for name in {SLOW} if name in sys.modules and name not in before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
