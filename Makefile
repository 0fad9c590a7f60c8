# Windows has no make: README.md gives the same commands for pip and python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup setup-dev demo test test-slow test-docs lint clean

$(BIN)/tsotsallm: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $(BIN)/tsotsallm

$(VENV)/dev-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(VENV)/dev-installed

setup: $(BIN)/tsotsallm

setup-dev: $(VENV)/dev-installed

demo: setup
	$(BIN)/python examples/demo.py demo

# two processes of one thread each: small matrices gain nothing from a second thread
test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

# browsers and damaged inputs have the machine to themselves; the rest runs in two processes
ALONE := $(filter-out tests/serve/test_fuzz.py tests/serve/test_bundle.py,$(wildcard tests/serve/test_*.py)) tests/fuzz
test-slow: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not pages" -n 2 --durations=12 $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest -m "slow and not pages" --durations=12 $(ALONE)

# the slow commands of the pages in docs/, a quarter of an hour and more
test-docs: setup-dev
	$(BIN)/python -m pytest -m pages tests/docs tests/cli

lint: setup-dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo
