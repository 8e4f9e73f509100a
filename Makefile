# SPDX-License-Identifier: Apache-2.0
# Thin: what happens is in scripts/. KVBM_VENV=DIR puts the virtual environment elsewhere;
# PYTEST_ARGS goes to pytest (make test-fast PYTEST_ARGS="-x -k segment"). MINUTES and SEED
# are those of the soak.

PYTHON ?= python3
VENV := $(or $(KVBM_VENV),.venv)
RUN := $(VENV)/bin/python
SETUP := $(PYTHON) scripts/setup_env.py
PYTEST := $(RUN) -m pytest -q $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm build demo test test-fast e2e test-versions stress soak bench lint
.PHONY: test-vllm-units tsan asan clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup:  ## virtual environment with kvbm built in place and the development tools
	@$(SETUP)

setup-vllm:  ## the same with vLLM: the installed one, else its CPU build
	@$(SETUP) --vllm

build: setup  ## the extension modules in place

demo: setup-vllm  ## vLLM with and without kvbm on a multi-turn workload, and a table of both
	@$(RUN) -m bench.demo

test: setup-vllm  ## everything that needs no GPU, with real vLLM
	@$(RUN) scripts/run_tests.py $(PYTEST_ARGS)

test-fast: setup  ## the unit tests, within two minutes
	@$(PYTEST) -m "not gpu and not stress and not e2e and not slow"

e2e: setup-vllm  ## the tests against real vLLM
	@$(PYTEST) -m "e2e and not gpu"

test-versions: setup  ## the tests against real vLLM on each minor version of it; resumable
	@$(RUN) scripts/vllm_versions.py $(VERSIONS)

test-vllm-units: setup-vllm  ## vLLM's own connector tests with kvbm's; downloads them once
	@$(RUN) scripts/vllm_unit_tests.py -- $(PYTEST_ARGS)

stress: setup  ## kills, crash points, corrupt segments, sanitized builds; SECONDS=60 a part
	@KVBM_STRESS_SECONDS=$(or $(SECONDS),60) $(PYTEST) tests/stress -o timeout=0

soak: setup-vllm  ## real vLLM under random traffic and faults for half an hour, outputs compared
	@$(RUN) -m tests.soak --minutes $(or $(MINUTES),30) --seed $(or $(SEED),1)

bench: setup  ## the benchmarks; bench/README.md says what they measure
	@$(PYTEST) bench -o python_files='bench_*.py' -o timeout=0 --benchmark-columns=min,median,ops

lint: setup  ## ruff, mypy, stubtest, cython-lint, codespell, and the project's own rules
	@$(RUN) scripts/lint.py

tsan: setup  ## the tests of kvbm/_fast on a build with ThreadSanitizer
	@$(RUN) scripts/sanitize.py thread

asan: setup  ## the same with AddressSanitizer and UndefinedBehaviorSanitizer
	@$(RUN) scripts/sanitize.py address

clean:  ## what a build leaves; the virtual environment stays
	@rm -rf build dist kvbm.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	@rm -f kvbm/_fast/*.so
