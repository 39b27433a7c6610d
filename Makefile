# make pretrain | test | check | bench: each does all the set-up it needs, into .venv, on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install install-te pretrain test test-slow test-nightly check format bench validation

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Braid needs Python 3.11 or newer, but $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

install: $(READY) ## the set-up alone: a virtual environment in .venv

install-te: $(READY) ## Transformer Engine, compiled against the installed torch (CUDA only)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.version.cuda and "Transformer Engine needs a CUDA build of torch, but this one is " + torch.__version__)'
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[te]"

RUN    := runs/pretrain-$(shell date +%Y%m%d-%H%M%S)
LAYOUT := parallel.pp=2 parallel.ep=2 parallel.schedule=dualpipe parallel.dispatcher=two_hop parallel.ranks_per_node=1 \
	parallel.recompute=selective precision=bf16

pretrain: $(READY) ## train a small DeepSeek-V3 on real text: 4 ranks, DualPipe, two-hop dispatch; then continue a line
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=4 launch/pretrain.py $(LAYOUT) run.dir=$(RUN) $(ARGS)
	$(BIN)/python launch/generate.py checkpoint=$(RUN)

test: $(READY) ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(READY) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --slow $(ARGS)

test-nightly: $(READY) ## all tests, and a run of 300 steps whose ranks are killed 20 times
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --slow --nightly $(ARGS)

check: $(READY) ## lint, format, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## every benchmark that runs on this machine
	@for b in benchmarks/*.py; do echo "== $$b"; OMP_NUM_THREADS=1 $(BIN)/python $$b || exit 1; done

validation: $(READY) ## every published figure, ours, the error: writes docs/validation.md
	$(BIN)/python launch/validate.py
