"""Builds csrc/cuda for the CPU, with the emulator in CUDA's place: how its kernels are tested where
there is no GPU."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

__all__ = ["build"]

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def build(folder: Path) -> Path:
    """The library, made in a folder. Loaded, it takes the place of torchbp's kernels on the CPU.

    Raises:
        RuntimeError: the compiler's messages.
    """
    flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}"]
    flags += [f"-I{path}" for path in include_paths()]
    kernels = ["-include", str(HERE / "instead_of_cpu.h"), "-x", "c++"]

    def compiled(source: Path) -> str:
        to = folder / f"{source.name}.o"
        _run(
            [*flags, *(kernels if source.suffix == ".cu" else []), "-c", str(source), "-o", str(to)]
        )
        return str(to)

    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted(HERE.glob("*.c*"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "cuda_on_cpu.so"
    torch_library = Path(torch.__file__).parent / "lib"
    names = ["-ltorch", "-ltorch_cpu", "-lc10"]
    _run(["-shared", *objects, "-o", str(library), f"-L{torch_library}", *names])
    return library


def _run(arguments: list[str]) -> None:
    done = subprocess.run([get_cxx_compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
