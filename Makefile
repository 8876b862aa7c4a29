# Two commands for a new checkout: `make quickstart` and `make test`. Both make the environment first.
ifndef PYTHON
PYTHON := $(firstword $(foreach version,3.13 3.12 3.11,$(shell python$(version) -c "print('python$(version)')" 2>/dev/null)) python3)
endif
VENV := .venv
BIN := $(VENV)/bin
FAISS ?= cpu  # or gpu

# Tests start many processes: what these import is compiled once, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-cluster test-slow test-browser test-gpu test-corpus coverage check install clean

PYTEST = -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

quickstart: install
	$(BIN)/ood-pipeline run quickstart

test: install
	$(BIN)/python $(PYTEST)

test-cluster: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder -m 'cluster and not chaos and not slow and not gpu'

# Takes three quarters of an hour: the whole table of architectures, simulations, processes killed at many moments of
# every stage, and every fault of a cluster.
test-slow: install
	$(BIN)/python $(PYTEST) -m 'slow and not chaos'
	$(BIN)/python -m pytest -m chaos tests/cluster
	$(BIN)/python -m pytest -m browser tests/results

# Needs Debian's packages chromium and chromium-driver. What was seen lies in .screenshots.
test-browser: install
	$(BIN)/python -m pytest -m browser tests/results

# Needs an NVIDIA GPU, and the FAISS that runs on it: make test-gpu FAISS=gpu.
test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu

# Fetches the source packages of Pillow and PngSuite from the package registry, 47 MB.
test-corpus: install
	$(BIN)/python -m pytest -m corpus -s tests/corpus

coverage: install
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) -m 'not slow and not chaos and not browser and not gpu and not corpus'
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
STAMP := $(VENV)/.installed-$(strip $(FAISS))-$(VERSION)

install: $(STAMP)

# An environment of another Python is made anew. uv installs several GB in a fraction of pip's time.
$(STAMP): pyproject.toml
	test -e $(VENV)/bin/python$(VERSION) || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[$(strip $(FAISS)),dev]'
	touch $@

clean:
	rm -rf $(VENV) workspace .coverage* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
