# A fresh clone needs python3 (3.11 or newer, with venv), git and make. `make demo` and `make test` do the rest.
#
#   PYTHON       the interpreter that makes .venv
#   PIP_ARGS     extra arguments for pip, such as the index of another torch build
#   CONSTRAINTS  pinned versions; empty for none
#
# .venv is installed once, then again only when pyproject.toml or the constraints change. After a change of these
# variables, `make clean` first.

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt

export MPLBACKEND ?= Agg

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install $(PIP_ARGS) $(addprefix -c ,$(CONSTRAINTS))

.PHONY: help demo test lint format docs clean

help:
	@echo "make demo    fit, plot and score an example; results in demo_output/"
	@echo "make test    lint, then the tests"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make format  let ruff mend and format the code"
	@echo "make docs    the documentation, in docs/_build/html"
	@echo "make clean   remove .venv and everything that was built"

# Threads that wait spin by default, and two busy processes on few cores then run many times slower: let them give way.
demo: .venv/.base
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tutorials/demo.py --output demo_output

# The fits of the tests are too small to gain from a second thread.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages show the figures of the tutorials.
docs: .venv/.doc
	MPLBACKEND=module://matplotlib_inline.backend_inline OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv build dist docs/_build docs/generated demo_output .pytest_cache .ruff_cache

.venv/.base: pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	$(INSTALL) -e .
	@touch $@

.venv/.test: .venv/.base
	$(INSTALL) -e ".[test,dev]"
	@touch $@

.venv/.doc: .venv/.base
	$(INSTALL) -e ".[doc]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("neurst needs Python 3.11 or newer, but $(PYTHON) is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
