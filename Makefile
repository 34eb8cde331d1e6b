# Every target creates what it needs: the virtual environment .venv is built once, and again when its inputs change.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
INTEROP := .venv-interop# Stanza and Flair have many dependencies
CONFIG ?= lstm.yaml
PREFIX ?= quijote # with the space
ARGS   ?=
BENCH_TEXT   ?=# a text to train on, for the benchmarks that need one
BENCH_STANZA ?=# the python of an environment with Stanza in it
BENCH_RECORD := build/bench.json
BENCHMARKS   := $(filter-out %/common.py %/targets.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo train generate test test-matrix test-interop kill browser lint fix docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "charlm needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## create the virtual environment

demo: $(STAMP)  ## train on the bundled corpus (under two minutes) and generate a text
	$(BIN)/charlm train --config lstm.yaml
	@echo
	@$(BIN)/charlm generate --prefix 'quijote ' --length 292 --seed 1

train: $(STAMP)  ## train: make train CONFIG=gru.yaml ARGS='--set train.epochs=2'
	$(BIN)/charlm train --config $(CONFIG) $(ARGS)

generate: $(STAMP)  ## generate with the newest model: make generate PREFIX='Sancho ' ARGS='-n 100'
	@$(BIN)/charlm generate --prefix '$(PREFIX)' $(ARGS)

test: $(STAMP)  ## run the tests (one is skipped without Chromium: make browser)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# As other processors run the suite: each value of each factor, most of them in pairs. Where two threads wait for each
# other, they yield the processor: the tests run in two processes.
MATRIX := \
  CHARLM_KERNELS=off,OMP_NUM_THREADS=2 \
  CHARLM_KERNELS=off,CHARLM_TEST_PRECISION=bfloat16 \
  CHARLM_KERNELS=off,ATEN_CPU_CAPABILITY=default \
  ATEN_CPU_CAPABILITY=default,OMP_NUM_THREADS=2 \
  ATEN_CPU_CAPABILITY=avx2 \
  ATEN_CPU_CAPABILITY=avx2,OMP_NUM_THREADS=2 \
  CHARLM_TEST_PRECISION=bfloat16 \
  CHARLM_TEST_PRECISION=bfloat16,OMP_NUM_THREADS=2

test-matrix: $(STAMP)  ## run the tests as other processors do: a quarter of an hour
	@set -e; for row in $(MATRIX); do echo; echo "== $$row"; \
	  env $$(echo $$row | tr , ' ') OMP_WAIT_POLICY=passive \
	  $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS); done

kill: $(STAMP)  ## kill trainings at random moments and resume them: a quarter of an hour; make kill ARGS='--kills 5'
	OMP_NUM_THREADS=1 $(BIN)/python tests/integration/kills.py $(or $(ARGS),--kills 100 --signals 20 --faults)

$(INTEROP)/.installed: pyproject.toml constraints.txt
	rm -rf $(INTEROP)
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e . pytest hypothesis stanza flair
	@touch $@

test-interop: $(INTEROP)/.installed  ## test exports and imports with the real Stanza and Flair
	$(INTEROP)/bin/python -m pytest -W default tests/external $(ARGS)

browser:  ## install Chromium with apt-get, if possible: for one test
	@command -v chromium >/dev/null || { apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || \
	  echo "Chromium was not installed; the test of the report in a browser is skipped"

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)  ## apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## generate docs/reference.md and the README's configuration
	$(BIN)/python docs/make_reference.py

bench: $(STAMP)  ## run the benchmarks: make bench BENCH_TEXT=tinyshakespeare.txt
	@rm -f $(BENCH_RECORD)
	@for script in $(BENCHMARKS) benchmarks/targets.py; do echo; echo "== $$script"; \
	  BENCH_TEXT='$(BENCH_TEXT)' BENCH_STANZA='$(BENCH_STANZA)' BENCH_RECORD=$(BENCH_RECORD) \
	  $(BIN)/python $$script || exit 1; done

clean:  ## remove what the targets created, except runs/
	rm -rf $(VENV) $(INTEROP) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
