# `make` lists the verbs. Each works on a fresh clone: it makes .venv, installs torch and the package, and runs.
#
# PEFTKERN_PYTHON=/path/to/python   use that environment, with the torch it has, instead of making .venv
# PEFTKERN_TORCH="torch==2.13.0"    what to install as torch, pip options included. By default torch's current CUDA build
#                                   where there is an NVIDIA GPU, else 2.13.0: a CPU build if pip sees one (pip's own
#                                   PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS lead it to one), else what the index has
# PYTHON=python3                    makes .venv (3.10 or newer)
# ARGS="..."                        handed on to what the verb runs
# The options of the native build are listed in setup.py.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
THREADS := $(shell t=$$(( $(CORES) / $(WORKERS) )); echo $$(( t > 0 ? t : 1 )))
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
CUDA_TORCH := torch>=2.11,<2.15
export PEFTKERN_TORCH ?= $(if $(filter-out 0,$(GPU)),$(CUDA_TORCH),torch==2.13.0)

ifdef PEFTKERN_PYTHON
PY := $(shell command -v $(PEFTKERN_PYTHON))
STATE := build/state/$(shell echo '$(PY)' | cksum | cut -d' ' -f1)
else
PY := .venv/bin/python
STATE := .venv/state
endif

SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
# The installed torch is written down once and handed to every later pip, so that no other package can replace it.
INSTALL = $(PY) -m pip install --quiet --no-build-isolation -c $(STATE)/constraints.txt

.PHONY: help install test test-all levels sanitize demo bench report gpu lint clean

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

$(STATE)/torch:
	@if [ ! -x $(PY) ]; then echo "making .venv"; $(PYTHON) -m venv .venv; fi
	@mkdir -p $(STATE)
	@if $(PY) -c 'import torch' 2>/dev/null; then echo "using the torch that $(PY) has"; \
	  else echo "installing torch: $$PEFTKERN_TORCH"; $(PY) -m pip install $$PEFTKERN_TORCH; fi
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(STATE)/constraints.txt
	@$(INSTALL) 'setuptools>=77' wheel 'pybind11>=3' ninja 'cmake>=3.18'
	@touch $@

# Editable, so that Python changes count at once; a change of the native sources or of the build comes through here again.
$(STATE)/dev $(STATE)/demo $(STATE)/bench: $(STATE)/%: $(STATE)/torch $(SOURCES)
	@echo "building and installing peftkern[$*]"
	@$(INSTALL) -e '.[$*]'
	@$(PY) -m peftkern --built
	@touch $@

install: $(STATE)/dev  ## make .venv, or build again after a change of the C++ or CUDA sources

test: $(STATE)/dev  ## run the tests (ARGS="-k householder" picks some)
	OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

test-all: $(STATE)/dev  ## run the slow tests as well
	OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup -m "" $(ARGS)

levels: $(STATE)/dev  ## run the tests and write down what they prove: peftkern/_proven.json and the README's table
	OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup --write-levels $(ARGS)

SANITIZED := build/sanitize/lib

sanitize: $(STATE)/dev  ## run the C++ kernels, at every instruction set, under AddressSanitizer and UndefinedBehaviorSanitizer
	PEFTKERN_SANITIZE=1 PEFTKERN_SKIP_CUDA=1 PEFTKERN_REQUIRE_NATIVE=1 \
	  $(PY) setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	cd $(SANITIZED); libraries="$$(for l in asan stdc++; do $${CXX:-g++} -print-file-name=lib$$l.so; done | xargs)"; \
	  sanitized() { LD_PRELOAD="$$libraries" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 "$$@"; }; \
	  sanitized $(abspath $(PY)) -m peftkern --built; \
	  OMP_NUM_THREADS=2 sanitized $(abspath $(PY)) -m pytest $(CURDIR)/tests/ops -k native $(ARGS)

demo: $(STATE)/demo  ## fine-tune a real model with PEFT, then with PEFT accelerated (ARGS="--help" lists options)
	$(PY) examples/finetune.py $(ARGS)

bench: $(STATE)/bench  ## measure against plain PEFT and the frozen layer (ARGS="--bench-set full" for every shape)
	@mkdir -p bench/results
	result=$(or $(RESULT),bench/results/$$($(PY) -m bench.environment).json); \
	  $(PY) -m pytest bench --benchmark-only --benchmark-columns=min,median,iqr,rounds --benchmark-json=$$result $(ARGS)

report: $(STATE)/bench  ## make the benchmark page and the README's tables from the measurements
	$(PY) -m bench.report $(RESULT) $(ARGS)

# Downloads and installs nothing: the Python at hand, with the torch and Triton that it has.
gpu:  ## build, test, check and measure on this machine's GPU in ten minutes (ARGS=--dry-run without a GPU)
	@$(or $(wildcard $(PY)),$(PYTHON)) -m bench.gpu $(ARGS)

lint: $(STATE)/dev  ## check the style of Python and C++
	$(PY) -m ruff check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(dir $(PY))clang-format --dry-run -Werror

clean:  ## remove everything that was built, .venv too
	rm -rf build dist .venv *.egg-info .pytest_cache .ruff_cache peftkern/_native_*.so peftkern/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
