# The only door. Targets: setup, run, test, test-compose, test-faults, check, docs, dashboards, bench,
# test-gpu, bench-gpu, clean.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
STUBS := $(VENV)/.stubs
# On a terminal pip shows its progress bars; in a log it says only what went wrong.
PIP = $(BIN)/python -m pip install --disable-pip-version-check $$(test -t 1 || echo --quiet)
PROTOS := $(wildcard protos/*.proto)
PYTEST_FLAGS ?=
MODEL ?= models/demo
SAMPLE ?= In the beginning

.PHONY: help setup run test test-compose test-faults check format docs dashboards bench require-gpu test-gpu bench-gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make setup   virtual environment, dependencies, gRPC stubs (quick when done)"
	@echo "make run     setup, then a mesh on $(MODEL) until Ctrl-C"
	@echo "make test    setup, then the whole test suite; PYTEST_FLAGS='-k name' narrows it"
	@echo "make test-compose  setup, then the mesh of compose.yaml in containers (minutes; root and docker)"
	@echo "make test-faults   setup, then every fault in every phase (minutes; make test runs the most telling)"
	@echo "make check   format, lint, types, import contracts, protos, size budget"
	@echo "make docs    writes docs/telemetry.md from the tables of metrics and spans"
	@echo "make dashboards   writes the Grafana boards dashboards/*.json from their Python"
	@echo "make bench   setup, then a short load test of a mesh of its own"
	@echo "make test-gpu, make bench-gpu   setup, then tests or benchmarks on this machine's NVIDIA GPU;"
	@echo "             BENCHMARKS='gemm norm' narrows them"
	@echo "make clean   removes the environment, stubs and caches"

setup: $(INSTALLED) $(STUBS)

$(INSTALLED): pyproject.toml requirements-nixl.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "kvmesh needs Python 3.11 or newer; $(PYTHON) is" \
	        "$$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] kvmesh and its dependencies (torch is the large one; minutes on a slow network)"
	@$(PIP) -e '.[dev]'
	@echo "[3/4] NIXL, without its CUDA dependencies"
	@$(PIP) --no-deps -r requirements-nixl.txt
	@touch $@

$(STUBS): $(PROTOS) $(INSTALLED)
	@echo "[4/4] gRPC stubs from protos/"
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. $(PROTOS)
	@touch $@

# On a terminal kvmesh gets its own foreground process group (set -m; without the exit the shell would
# become kvmesh instead): Ctrl-C then reaches kvmesh, which drains and exits 0, and not make, which
# would report an error.
run: setup
	@if [ -t 0 ]; then set -m; fi; \
	    $(BIN)/kvmesh up --model $(MODEL) --sample "$(SAMPLE)"; exit $$?

test: setup
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-compose: setup
	@$(BIN)/python -m pytest tests/compose -m "compose or not compose" $(PYTEST_FLAGS)

test-faults: setup
	@$(BIN)/python -m pytest tests/e2e/faults -m "slow or not slow" $(PYTEST_FLAGS)

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright --warnings
	@$(BIN)/lint-imports --no-logo --config pyproject.toml
	@$(BIN)/buf lint
	@$(BIN)/python -m tests.rules.budget

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup
	@$(BIN)/python -m tools.telemetry_docs

dashboards: setup
	@$(BIN)/python -m dashboards.build

bench: setup
	@$(BIN)/kvmesh bench --start --model $(MODEL)

# GPU_PYTHON: another interpreter with the packages installed, instead of the environment's.
GPU_PYTHON ?= $(BIN)/python
BENCHMARKS ?=
# The kernels run in Triton's interpreter where TRITON_INTERPRET is set: not here.
require-gpu:
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
	    f"no CUDA GPU: torch {torch.__version__} sees none; needed: one NVIDIA GPU, its driver and a " \
	    "CUDA build of torch (pip install torch from your index, see README)")'

test-gpu: $(if $(findstring $(VENV),$(GPU_PYTHON)),setup) require-gpu
	@env -u TRITON_INTERPRET $(GPU_PYTHON) -m pytest tests/gpu $(PYTEST_FLAGS)

bench-gpu: $(if $(findstring $(VENV),$(GPU_PYTHON)),setup) require-gpu
	@env -u TRITON_INTERPRET $(GPU_PYTHON) -m benchmarks.gpu $(BENCHMARKS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f protos/*_pb2.py protos/*_pb2.pyi protos/*_pb2_grpc.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
