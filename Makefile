# make demo | test | lint | bench | test-long.  Each does its own set-up on a fresh machine (see .ci/setup).
#   PYTHON=/path/to/python3.12   build .venv with this Python (default: python3, or the newest of 3.13, 3.12, 3.11)
#   DEMO_FLAGS="--steps 20"      passed to `python -m train demo`
#   TEST_FLAGS="-k contract"     passed to pytest
#   BENCH_FLAGS="--name gpt-tiny" passed to every bench
#   WORKERS=4                    pytest processes (default: one per core, at most 8)
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint bench clean
SHELL := /bin/sh
export PYTHON

WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); [ $$n -gt 8 ] && n=8; echo $$n)
PY := .venv/bin/python
# One worker per core and one thread per worker: small tensors gain nothing from threads, and the workers would fight for cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 6

setup:
	@.ci/setup

demo: setup
	$(PY) -m train demo $(DEMO_FLAGS)

test: setup
	$(PYTEST) -m "not slow" $(TEST_FLAGS)

test-long: setup
	$(PYTEST) $(TEST_FLAGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: setup
	$(PY) -m bench flops $(BENCH_FLAGS)
	$(PY) -m bench throughput $(BENCH_FLAGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
