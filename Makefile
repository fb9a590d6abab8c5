# `make` lists the targets. Two commands on a fresh machine: `make demo`, `make test`.
PYTHON ?= python3
# The build of torch to test with; another one serves as well (2.6 or newer).
TORCH ?= torch==2.13.0
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: .venv/.base ## replay 8 policies x 4 budgets on the bundled trace (no torch, no network after the install)
	$(BIN)/sim replay --trace sample --buffer 16

test: .venv/.full lint ## install everything, check the code, run all tests
	$(BIN)/python -m pytest

lint: .venv/.full ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.full ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.base: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

# torch first and by exact version: asked for through the extra, pip may pick a build with gigabytes of CUDA.
.venv/.full: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[validate,plots,dev]"
	@touch $@ .venv/.base
