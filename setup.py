"""Builds torchbp's binaries: `torchbp._C` (CPU) and, where nvcc is found, `torchbp/_cuda.so`.

Both use the LibTorch stable ABI: a binary built with one torch runs on every torch from 2.11 on.
Environment:

    TORCHBP_CUDA=0|1         never / always build the CUDA library (default: if nvcc is found)
    TORCHBP_CUDA_ARCHS=90a   compute capabilities, separated by spaces, the newest last: newer GPUs
                             compile it for themselves (default: the GPU at hand, else 80 90)
    TORCHBP_NATIVE=1         let the compiler use all of this machine's instructions everywhere
    TORCHBP_SANITIZE=address, undefined or thread: with that sanitizer, and a planted bug for it to
                             find (make asan, ubsan, tsan; such a binary runs nowhere else)
    CUDA_HOME, CXX, MAX_JOBS as in torch.utils.cpp_extension
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).parent.resolve()

# The oldest torch whose stable ABI the sources use: 2.11.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# Before torch's own copy of pybind11, which refuses to compile under TARGET before torch 2.13.
INCLUDES = [pybind11.get_include()]

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    # Neither changes a value; both let where() and floor() become vector instructions.
    "-fno-math-errno",
    "-fno-trapping-math",
    # A product's innermost loop is as long as two cache lines. Across three it takes up to an
    # eighth longer, on a core that another thread keeps busy, and where it falls changes with any
    # change to the sources.
    "-falign-loops=64",
    "-Wall",
    "-Wno-unknown-pragmas",
    TARGET,
]


def nvcc() -> str | None:
    """The CUDA compiler to use, or None."""
    if os.environ.get("TORCHBP_CUDA") == "0":
        return None
    candidate = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    found = str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")
    if found is None and os.environ.get("TORCHBP_CUDA") == "1":
        raise SystemExit("TORCHBP_CUDA=1, but nvcc was not found: set CUDA_HOME or PATH")
    return found


def cuda_archs() -> list[str]:
    """Compute capabilities to build for, as in sm_90."""
    wanted = os.environ.get("TORCHBP_CUDA_ARCHS")
    if wanted:
        return wanted.split()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return [f"{major}{minor}"]
    return ["80", "90"]


class Build(BuildExtension):  # type: ignore[misc]
    """BuildExtension, and then the CUDA library with nvcc.

    The CUDA sources need nothing of a CUDA build of torch, so they compile (and are checked)
    against the CPU-only wheel too, which `CUDAExtension` refuses.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")  # lasting, for `pip install -e` too

    def run(self) -> None:
        super().run()
        target = Path(self.get_ext_fullpath("torchbp._C")).with_name("_cuda.so")
        compiler = nvcc()
        if compiler is not None:
            self.build_cuda(compiler, target)
        else:
            target.unlink(missing_ok=True)  # of older sources

    def build_cuda(self, compiler: str, target: Path) -> None:
        """Runs ninja, which knows what changed and compiles the sources side by side."""
        build = ROOT / "build" / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        library = Path(torch.__file__).parent / "lib"
        # A CPU-only torch has no torch_cuda: what is called there is found when _cuda.so is loaded.
        names = ["torch", "torch_cuda", "torch_cpu", "c10"]
        libraries = [f"-l{name}" for name in names if (library / f"lib{name}.so").exists()]
        includes = [f"-I{path}" for path in [*INCLUDES, *include_paths()]]
        flags = ["-std=c++20", "-O3", "-DUSE_CUDA", TARGET, "--expt-relaxed-constexpr"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(cuda_archs()), *includes]
        link_flags = ["-shared", f"-L{library}", "-Xlinker=--no-as-needed", *libraries]
        sources = sorted((ROOT / "csrc").rglob("*.cu"))
        objects = [build / f"{source.stem}.o" for source in sources]
        lines = [
            "rule compile",
            f"  command = {shell(compiler)} -c $in -o $out -MD -MF $out.d {shell(*flags)}",
            "  description = nvcc $in",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shell(compiler)} $in -o $out {shell(*link_flags)}",
            "  description = nvcc $out",
            *map("build {}: compile {}".format, map(escape, objects), map(escape, sources)),
            f"build {escape(target.resolve())}: link {' '.join(map(escape, objects))}",
        ]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*ninja(), "-C", str(build), *jobs]).returncode:
            raise SystemExit(
                f"{compiler} could not compile csrc/cuda (its messages are above). "
                "TORCHBP_CUDA=0 builds torchbp without CUDA."
            )


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags: machine code for each architecture, and PTX of the last for newer GPUs."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if archs[-1].isdigit():  # 90a runs on nothing newer
        flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return flags


def ninja() -> list[str]:
    """How to run ninja."""
    found = shutil.which("ninja")
    return [found] if found else [sys.executable, "-m", "ninja"]


def shell(*words: str) -> str:
    """Words of a command in a ninja file."""
    return shlex.join(words).replace("$", "$$")


def escape(path: Path) -> str:
    """A path in a ninja file's list of files."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


# -O1 keeps the lines of a report right, and the build short.
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer"]
SANITIZERS = {
    "address": ["-fsanitize=address"],
    # vptr wants the types of pybind11's hidden classes; -fwrapv, which Python's own flags may have,
    # would define what overflow is.
    "undefined": ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-wrapv"],
    "thread": ["-fsanitize=thread"],
}


def sanitizer() -> list[str]:
    """The flags of the sanitizer that was asked for, to compile and to link with."""
    wanted = os.environ.get("TORCHBP_SANITIZE")
    if not wanted:
        return []
    if wanted not in SANITIZERS:
        raise SystemExit(f"TORCHBP_SANITIZE wants one of {', '.join(SANITIZERS)}, got {wanted!r}")
    return SANITIZERS[wanted]


def sources() -> list[str]:
    """Every C++ source, relative to the root as setuptools wants them."""
    folders = ["csrc", *(["tests/sanitizers"] if sanitizer() else [])]
    return sorted(
        str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.cpp")
    )


native = ["-march=native"] if os.environ.get("TORCHBP_NATIVE") == "1" else []
setup(
    ext_modules=[
        CppExtension(
            "torchbp._C",
            sources(),
            include_dirs=[*INCLUDES],
            extra_compile_args={
                "cxx": [*CXX_FLAGS, *native, *(SANITIZED if sanitizer() else []), *sanitizer()]
            },
            extra_link_args=sanitizer(),
        )
    ],
    cmdclass={"build_ext": Build},
)
