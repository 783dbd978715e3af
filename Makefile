# `make train` and `make test` are each complete on a fresh machine with Python 3.10+, a C++20
# compiler and make: they create .venv, install pinned dependencies, build the extension, and run.
# `make help` lists the targets.

PYTHON      ?= python3
TORCH       ?= torch==2.13.0
ARGS        ?=
PYTEST_ARGS ?=
ifeq ($(origin CXX),default)  # not given
found := $(foreach name,c++ g++ clang++,$(shell command -v $(name) 2>/dev/null))
CXX   := $(notdir $(firstword $(found) c++))
endif
export CXX TORCH

MAKEFLAGS += --no-print-directory
BIN       := .venv/bin
PIP       := $(BIN)/python -m pip -qq --disable-pip-version-check
SOURCES   := $(sort $(shell find csrc -type f 2>/dev/null))
CXX_FILES  = $(filter %.h %.cuh %.cpp %.cu,$(SOURCES))

# A step that is done leaves a stamp in .venv, whose name ends in the checksum of what the step was
# made from: another TORCH=, another line in a source, and the stamp that make looks for is not
# there. A step begins by removing its old stamps and ends by touching the new one, so that one
# which was interrupted is done again.
#   $(call stamp,STEP,VALUES,FILES)
stamp     = .venv/.$(1)-$(firstword $(shell $(checksum)))
checksum  = { printf '%s\n' '$(2)'; cat /dev/null $(3) 2>/dev/null; } | cksum
identity  = import sys; print(*sys.version_info[:2], sys.base_prefix)
switches  = $(CXX) $(shell command -v nvcc 2>/dev/null) $(CUDA_HOME) \
    $(TORCHBP_CUDA) $(TORCHBP_CUDA_ARCHS) $(TORCHBP_NATIVE)
VENV     := $(call stamp,venv,$(shell $(PYTHON) -c '$(identity)' 2>/dev/null) $(CURDIR))
PACKAGES := $(call stamp,packages,$(VENV) $(TORCH),requirements.txt)
BUILD    := $(call stamp,build,$(PACKAGES) $(SOURCES) $(switches),setup.py $(SOURCES))
BENCH    := $(call stamp,bench,$(PACKAGES),requirements-bench.txt)
EDITABLE := $(call stamp,editable,$(PACKAGES),setup.py pyproject.toml torchbp/version.py)

# $(call check,ARGUMENTS of scripts/check_environment): stops with its one line if something is
# missing.
check    = $(call stop,$(shell sh scripts/check_environment $(1)))
stop     = $(if $(1),$(error $(1)))

.PHONY: help build train test bench reliability asan ubsan tsan mutants sanitizer \
    torch-versions lint format lock clean distclean torch-imports

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile
	@printf '\nVariables: %s\n' 'PYTHON=$(PYTHON)  TORCH=$(TORCH)  CXX=$(CXX)  ARGS=  PYTEST_ARGS='

build: $(BUILD) $(EDITABLE)  ## create .venv, install what is pinned, build the extension

train: build  ## build, then train an MLP on images: make train ARGS="--epochs 10 --hidden 1024"
	@$(BIN)/python scripts/train_cifar10.py $(ARGS)

test: lint build  ## lint, build, then every test: make test PYTEST_ARGS="-k relu"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

bench: build $(BENCH)  ## install JAX, time everything against it and torch: make bench ARGS="--case loop"
	@$(BIN)/python scripts/benchmark.py $(ARGS)

reliability: build  ## measure how far it can be relied on (hours; goes on where it stopped), write RELIABILITY.md
	@$(BIN)/python scripts/reliability.py $(ARGS)

asan: SANITIZER = address
asan: sanitizer  ## the op tests on a build with AddressSanitizer (build/trees/address)

ubsan: SANITIZER = undefined
ubsan: sanitizer  ## the same with UndefinedBehaviorSanitizer

tsan: SANITIZER = thread
tsan: sanitizer  ## the same with ThreadSanitizer, on 2 and on 4 threads

mutants: build  ## every fault that the tests have to notice, in one build, then the tests on each (hours)
	@$(BIN)/python -m scripts.reliability_tree mutants
	@$(BIN)/python scripts/reliability.py --only mutation $(ARGS)

TORCH_VERSIONS ?= 2.11.0 2.15.0
torch-versions: build  ## install TORCH_VERSIONS (gigabytes) in build/torch-*, run the op tests on each
	@for version in $(TORCH_VERSIONS); do \
	    test -e build/torch-$$version/done && continue; \
	    echo "Installing torch==$$version in build/torch-$$version"; \
	    $(BIN)/python -m venv --clear build/torch-$$version || exit 1; \
	    pip="build/torch-$$version/bin/python -m pip -qq --disable-pip-version-check"; \
	    $$pip install "torch==$$version" && $$pip install --no-deps -r requirements.txt || exit 1; \
	    touch build/torch-$$version/done; \
	done
	@$(BIN)/python scripts/reliability.py --only versions $(ARGS)

sanitizer: build
	@$(BIN)/python -m scripts.reliability_tree $(SANITIZER)
	@$(BIN)/python scripts/reliability.py --only sanitizers:$(SANITIZER) $(ARGS)

lint: $(PACKAGES)  ## ruff, clang-format and mypy
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/ruff format --check
	@$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	@$(BIN)/mypy

format: $(PACKAGES)  ## rewrite the sources as lint wants them
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format --quiet
	@$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

# What only the benchmark needs is in a file of its own, its pins those of the first file.
pin  = uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate \
    --custom-compile-command "make lock" pyproject.toml

lock:  ## pin the requirements anew from pyproject.toml (needs uv)
	$(pin) --extra dev --group build -o requirements.txt
	$(pin) --extra bench --constraint requirements.txt -o requirements-bench.txt

clean:  ## remove what was built
	@rm -rf build dist *.egg-info .venv/.build-* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find torchbp -name '*.so' -delete
	@find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	@rm -rf .venv

$(VENV):
	$(call check,build '$(PYTHON)' '$(CXX)')
	@echo "Creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

# torch comes first and on its own; then exactly what requirements.txt lists (--no-deps), so that
# nothing replaces it. -qq: errors only.
$(PACKAGES): $(VENV)
	$(call check,build '$(PYTHON)' '$(CXX)')
	@rm -rf .venv/.packages-* build
	@echo "Installing $(TORCH)"
	@$(PIP) install $$TORCH
	@echo "Installing requirements.txt"
	@$(PIP) install --no-deps -r requirements.txt
	@touch $@

$(BENCH): $(PACKAGES)
	@rm -f .venv/.bench-*
	@echo "Installing requirements-bench.txt"
	@$(PIP) install --no-deps -r requirements-bench.txt
	@touch $@

torch-imports: $(PACKAGES)
	$(call check,torch $(BIN)/python)
	@:

# A build that fails shows what the compiler said, without setuptools' traceback.
build_ext = import runpy, sys; sys.tracebacklimit = 0; \
    sys.argv = ["setup.py", "build_ext", "--inplace"]; runpy.run_path("setup.py", None, "__main__")

$(BUILD): $(PACKAGES) | torch-imports
	$(call check,build '$(PYTHON)' '$(CXX)')
	@rm -f .venv/.build-*
	@mkdir -p build
	@echo "Building the extension"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c '$(build_ext)' >build/log 2>&1 \
	    || { cat build/log; exit 1; }
	@touch $@

$(EDITABLE): $(PACKAGES) | $(BUILD)
	@rm -f .venv/.editable-*
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
