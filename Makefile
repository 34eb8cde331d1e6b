# Every target makes what it needs: a virtual environment in .venv, built once, and again when its inputs change.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
INTEROP := .venv-interop# Stanza and Flair bring much with them
CONFIG ?= lstm.yaml
PREFIX ?= quijote # the space belongs to it
ARGS   ?=
BENCH_TEXT   ?=# a text to train on, for the benchmarks that need one
BENCH_STANZA ?=# the python of an environment with Stanza in it
BENCH_RECORD := build/bench.json
BENCHMARKS   := $(filter-out %/common.py %/targets.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo train generate test test-interop kill lint fix docs bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "charlm needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## make the virtual environment

demo: $(STAMP)  ## train on the bundled corpus (under two minutes) and write a text
	$(BIN)/charlm train --config lstm.yaml
	@echo
	@$(BIN)/charlm generate --prefix 'quijote ' --length 292 --seed 1

train: $(STAMP)  ## train: make train CONFIG=gru.yaml ARGS='--set train.epochs=2'
	$(BIN)/charlm train --config $(CONFIG) $(ARGS)

generate: $(STAMP)  ## write with the newest model: make generate PREFIX='Sancho ' ARGS='-n 100'
	@$(BIN)/charlm generate --prefix '$(PREFIX)' $(ARGS)

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

kill: $(STAMP)  ## kill trainings at random moments and resume them: ten minutes; make kill ARGS='--kills 5'
	OMP_NUM_THREADS=1 $(BIN)/python tests/integration/kills.py $(or $(ARGS),--kills 100 --signals 20 --faults)

$(INTEROP)/.installed: pyproject.toml constraints.txt
	rm -rf $(INTEROP)
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e . pytest hypothesis stanza flair
	@touch $@

test-interop: $(INTEROP)/.installed  ## test exports and imports with the real Stanza and Flair
	$(INTEROP)/bin/python -m pytest -W default tests/external $(ARGS)

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)  ## mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/reference.md again, from the commands' help
	$(BIN)/python docs/make_reference.py

bench: $(STAMP)  ## run the benchmarks: make bench BENCH_TEXT=tinyshakespeare.txt
	@rm -f $(BENCH_RECORD)
	@for script in $(BENCHMARKS) benchmarks/targets.py; do echo; echo "== $$script"; \
	  BENCH_TEXT='$(BENCH_TEXT)' BENCH_STANZA='$(BENCH_STANZA)' BENCH_RECORD=$(BENCH_RECORD) \
	  $(BIN)/python $$script || exit 1; done

clean:  ## remove what the targets made, except runs/
	rm -rf $(VENV) $(INTEROP) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
