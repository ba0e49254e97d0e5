# Commands for a newcomer, each with its own set-up: `make train`, `make test`, `make docs`, `make bench`.
# `make train ARGS="--threads 1"` passes options on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test torture bench docs lint clean

train: $(VENV)/.base
	$(BIN)/fivestep train gpt-chars $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

torture: $(VENV)/.dev
	$(BIN)/python -m pytest tests/torture tests/processes tests/promises -m torture

# Writes docs/benchmarks.md; `make bench ARGS=startup` measures one. The machine should have nothing else to do.
bench: $(VENV)/.peers
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -n docs docs/_build
	@echo "the site is docs/_build/index.html"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests examples benchmarks docs
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) docs/_build

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fivestep needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "setting up $(VENV): a minute or two, once"
	test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(PIP) -e '.[peers]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]'
	-$(PIP) -e '.[browser]'  # where there is none for this system, the tests that look at pages are skipped
	touch $@
