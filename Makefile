# One command each, from a fresh clone: scripts/setup.sh makes .venv and installs what is missing, scripts/build.sh builds.
#
#   make bench ARGS="--seq-len 8192 --dtype bfloat16"      flags of benchmarks/bench_forward.py
#   make test  ARGS="-k select"                            flags of pytest
#   make bench PYTHON=/path/to/python                      an interpreter; one with torch >= 2.10 keeps its torch
ARGS ?=
export PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help bench bench-backward bench-decode bench-profile test lint format wheel clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bench:  ## Time the forward against PyTorch's SDPA and xFormers, and check it (ARGS: see --help)
	@scripts/setup.sh
	@scripts/build.sh
	@$(VENV_PYTHON) benchmarks/bench_forward.py $(ARGS)

bench-backward:  ## Time forward + backward against SDPA, xFormers and FlexAttention, and check the gradients
	@scripts/setup.sh
	@scripts/build.sh
	@$(VENV_PYTHON) benchmarks/bench_backward.py $(ARGS)

bench-decode:  ## Time a decode step against SDPA over a dense cache (ARGS: see --help)
	@scripts/setup.sh
	@scripts/build.sh
	@$(VENV_PYTHON) benchmarks/bench_decode.py $(ARGS)

bench-profile:  ## Profile the GPU kernels with Nsight Compute
	@scripts/setup.sh
	@scripts/build.sh
	@$(VENV_PYTHON) benchmarks/profile_forward.py $(ARGS)

test:  ## Build and run the C++ and the Python tests (ARGS: pytest's)
	@scripts/setup.sh --tests
	@scripts/build.sh --tests
	@scripts/test.sh $(ARGS)

lint:  ## Check format, lint and spelling
	@scripts/setup.sh --dev
	@scripts/lint.sh

format:  ## Format the C++, CUDA and Python sources in place
	@scripts/setup.sh --dev
	@scripts/lint.sh --fix

wheel:  ## Build a wheel into dist/
	@scripts/setup.sh --dev
	@$(VENV_PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

clean:  ## Remove what was built (not .venv)
	rm -rf build dist .pytest_cache .ruff_cache python/blackwell_sparsek/*.so
