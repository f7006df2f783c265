# Every target does the set-up that it needs; a second call does not repeat it.
#
#   make demo DEMO_TEXT=path     the demo on your own text files
#   make setup TORCH_INDEX=URL   take torch from this package index, for example a CPU-only one
#   make setup PYTHON=path       use this Python 3.12
#   make test PYTEST_ARGS='-k exposure -x'

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
PYTEST_ARGS ?=
DEMO_DIR ?= demo
DEMO_TEXT ?=
DEMO_QUICK ?=

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
SHELL_SCRIPTS := .ci/run $(wildcard tools/*.sh)

# Megatron takes about ten seconds to compile. Where the environment forbids bytecode, every process of
# every run would pay that again, so bytecode goes to a cache folder of this checkout instead.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache

# An environment that was copied or moved with its folder points at the old place: build it again.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.PHONY: help setup demo test test-slow test-gpu lint bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; sed -n '3,6s/^# *//p' $(MAKEFILE_LIST)

setup: $(READY) ## virtual environment in .venv with the versions of constraints.txt

$(READY): pyproject.toml $(CONSTRAINTS) tools/install.sh tools/find_python.sh
	@PYTHON="$(PYTHON)" CONSTRAINTS="$(CONSTRAINTS)" TORCH_INDEX="$(TORCH_INDEX)" tools/install.sh $(VENV)
	@printf '%s' "$(CURDIR)" > $@

demo: $(READY) ## a paired run of standard CPT against EXACT on two processes; writes demo/report.md
	@$(BIN)/python tools/run_demo.py --output "$(DEMO_DIR)" $(if $(DEMO_TEXT),--text "$(DEMO_TEXT)") \
		$(if $(DEMO_QUICK),--quick)

test: $(READY) ## tests that take seconds each
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(READY) ## tests that take minutes: many ranks, whole runs
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-gpu: $(READY) ## tests of the GPU path, in a process of their own
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

lint: $(READY) ## ruff, mypy, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

bench: $(READY) ## time packing and counting on a synthetic corpus
	$(BIN)/python benchmarks/packing.py

clean: ## remove everything that is not part of the sources: environment, caches, demo
	rm -rf $(VENV) .cache demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
