# fedtri: `make` lists what can be made. Each target installs what it needs in .venv, and says so.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DATA ?= docstrings
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install develop demo test check bench format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## for users: .venv with fedtri and the demo's model

develop: $(VENV)/.developed  ## for developers: .venv with fedtri, all it can use, and the tools for tests and checks

$(VENV)/.installed: pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) scripts/install $(VENV) demo
	@touch $@

$(VENV)/.developed: pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) scripts/install $(VENV) demo,network,dev
	@touch $(VENV)/.installed $@

demo: install  ## fine-tune MiniLM across 8 clients with four methods, on two cores in minutes
	@scripts/demo $(BIN)

test: develop  ## run all tests, one process a core with one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: develop  ## formatting, lint, types, and the one-way imports of the design
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: develop  ## a 3-minute version of all benchmarks; DATA=PATH takes SST-2 in place of the embedded texts
	for name in aggregation server_scale report_page; do $(BIN)/python benchmarks/$$name.py --quick || exit; done
	$(BIN)/python benchmarks/network_bytes.py
	for name in simulation population overheads gpu; do $(BIN)/python benchmarks/$$name.py --quick --data $(DATA) || exit; done

format: develop  ## put the code in shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches, not runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
