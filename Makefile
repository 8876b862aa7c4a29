# Two commands for a new checkout: `make quickstart` and `make test`. Both make the environment first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
FAISS ?= cpu  # or gpu

.PHONY: quickstart test test-cluster chaos check install clean

quickstart: install
	$(BIN)/ood-pipeline run quickstart

test: install
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

test-cluster: install
	$(BIN)/pytest -m 'cluster and not chaos' tests/cluster tests/jobs

chaos: install
	$(BIN)/pytest -m chaos tests/cluster

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.installed-$(strip $(FAISS))

$(VENV)/.installed-$(strip $(FAISS)): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(strip $(FAISS)),dev]'
	touch $@

clean:
	rm -rf $(VENV) workspace .coverage* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
