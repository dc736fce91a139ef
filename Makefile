# `make train` on a fresh machine: a virtual environment, the package, and a small GPT trained on the embedded text.
# `make test`: the same environment with the test extras, and the quick tests; `make test-all`: the slow ones too.
# `make gpu-check`: ten minutes that show whether a machine's GPUs compute, learn and resume as they should, and how fast.
# PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test test-all gpu-check lint docs clean

train: $(VENV)/.installed
	$(BIN)/pretrain train

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow' -n auto

test-all: test
	$(BIN)/pytest -m slow

gpu-check: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu_check.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, for a browser: site/index.html.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist site
