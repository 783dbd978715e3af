#!/usr/bin/env bash
# Checks torchbp on the GPU at hand, in less than 8 minutes: builds the extension for it, runs the
# tests marked gpu and the benchmark, and, where compute-sanitizer is, the tests of float32 under its
# four tools. Needs torch 2.11+ with CUDA, nvcc, a C++20 compiler, ninja, pybind11, pytest and what
# torchbp itself needs; installs nothing and needs no network. PYTHON= picks the interpreter;
# arguments go to pytest. The summary comes last, with the benchmark's table.
#
#     scripts/gpu_check.sh [-k relu]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v python3 || command -v python)}
export PATH="$(dirname "$python"):$PATH"  # where a virtual environment keeps ninja
mkdir -p build
log=build/gpu_check.log
times=build/gpu_check_times.txt
summary=()
rm -f "$times"

finish() {
    [ -s "$times" ] && cat "$times"
    echo
    echo "== torchbp on the GPU: $1"
    printf '   %s\n' "${summary[@]}"
    [ "$1" = passed ]
    exit
}

if ! machine=$("$python" - 2>"$log" <<'PYTHON'
import platform
import sys

import pybind11, pytest, setuptools, torch  # noqa: E401, F401

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(f"{torch.cuda.get_device_name()} (sm_{major}{minor}), torch {torch.__version__}, "
      f"Python {platform.python_version()}")
PYTHON
); then
    summary+=("$(tail -n 1 "$log")")
    finish "not run"
fi
summary+=("$machine")

echo "Building for the GPU at hand"
started=$SECONDS
if ! TORCHBP_CUDA=1 "$python" setup.py build_ext --inplace >"$log" 2>&1; then
    tail -n 60 "$log"
    summary+=("the build failed; all it printed: $log")
    finish failed
fi
summary+=("built in $((SECONDS - started)) s")

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m pytest -m gpu -p no:cacheprovider "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
summary+=("$(tail -n 1 "$log" | tr -d '=' | sed 's/^ *//; s/ *$//')")
case $status in
    0) grep -q ' passed' <<<"${summary[-1]}" || finish failed ;;
    5) summary+=("no test is marked gpu") && finish failed ;;
    *) finish failed ;;
esac

failures=0
log=build/gpu_check_benchmark.log
timeout 200 "$python" scripts/benchmark_gpu.py --seconds 1 --json build/benchmark_gpu.json >"$times" 2>"$log"
case $? in
    0) summary+=("benchmark: build/benchmark_gpu.json") ;;
    124) summary+=("benchmark: unfinished after 200 s") ;;
    *) summary+=("benchmark: $(tail -n 1 "$log")") && failures=1 ;;
esac

# Each tool sees every allocation only if PyTorch's allocator keeps none. The tests of one dtype, as a
# kernel takes tens of times as long; all tools at once.
sanitizer=$(command -v compute-sanitizer)
[ -n "$sanitizer" ] || summary+=("compute-sanitizer is not here: not run")
tools=(${sanitizer:+memcheck racecheck initcheck synccheck})
for tool in "${tools[@]}"; do
    {
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 90 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            --target-processes all "$python" -m pytest -m gpu -p no:cacheprovider -q -x \
            -k "forward_and_backward and float32 or optimizers and float32 or batches or 20_steps and tanh"
        echo "exit $?"
    } >"build/gpu_check_$tool.log" 2>&1 &
done
wait
for tool in "${tools[@]}"; do
    log=build/gpu_check_$tool.log
    case $(tail -n 1 "$log") in
        "exit 0") summary+=("$tool: $(grep -E 'passed' "$log" | tail -n 1)") ;;
        "exit 124") summary+=("$tool: unfinished after 90 s") ;;
        *) summary+=("$tool: failed; all it printed: $log") && failures=1 ;;
    esac
done
[ $failures = 0 ] && finish passed || finish failed
