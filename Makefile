# Everything runs in private virtual environments below this folder; only Python >= 3.11.3 and make are needed.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

# the first Python on the path that is new enough; override with `make PYTHON=/path/to/python ...`
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11, 3))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
RUN_SETUP := $(VENV)/.installed-run
DEV_SETUP := $(VENV)/.installed-dev
JOBS ?= 2
TEST_OPTIONS ?=
TESTED_PYTHONS := 3.11 3.12 3.13
# how long the kills of `make chaos` go on, in minutes (until all are done where it is not set), and its other long forms
CHAOS_MINUTES ?=
CHAOS_SEED ?= 1
CHAOS_EXAMPLES ?= 300
CHAOS_CANCELS ?= 1000
CHAOS_ACCEPTS ?= 1000
LOCK := uv pip compile -q --universal --generate-hashes --no-header --no-annotate

.PHONY: help
help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "comfyd needs Python 3.11.3 or newer; none was found on the path" >&2; exit 69; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(RUN_SETUP): requirements.lock pyproject.toml | $(BIN)/python
	@echo "installing comfyd and what it needs"
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --require-hashes -r requirements-build.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_SETUP): requirements-dev.lock $(RUN_SETUP)
	@echo "installing what the checks and tests need"
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@

.PHONY: setup
setup: $(DEV_SETUP) ## set up the private environment for development

.PHONY: demo
demo: $(RUN_SETUP) ## run everything once on a simulated ComfyUI and save a picture
	@$(BIN)/comfyd demo

.PHONY: test
test: $(DEV_SETUP) ## run the fast suite
	@$(BIN)/python -m pytest -q -n $(JOBS) $(TEST_OPTIONS)

.PHONY: check
check: $(DEV_SETUP) ## what must hold before a commit: format, lint, types, layers, tests with coverage
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not chaos" --cov --cov-report=term

.PHONY: format
format: $(DEV_SETUP) ## format and mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: test-comfyui
test-comfyui: $(DEV_SETUP) ## run the suite against the real ComfyUI (set up in a cache folder the first time)
	@$(BIN)/python -m tests.support.comfyui setup
	@$(BIN)/python -m tests.sdk.installed
	@$(BIN)/python -m pytest -q --comfyui -m comfyui --timeout 180

.PHONY: versus-proxy
versus-proxy: $(DEV_SETUP) ## comfyd and the official comfy-api-proxy side by side through the same SDK (three minutes)
	@$(BIN)/python -m tests.sdk.installed
	@$(BIN)/python -m tests.sdk.versus_proxy

.PHONY: chaos
chaos: $(DEV_SETUP) ## kill both sides for half an hour, at every failpoint and at random (CHAOS_MINUTES, CHAOS_SEED)
	@$(BIN)/python -m tests.faults.chaos --jobs $(JOBS) --seed $(CHAOS_SEED) $(CHAOS_MINUTES:%=--minutes %)
	@CHAOS_SEED=$(CHAOS_SEED) CHAOS_EXAMPLES=$(CHAOS_EXAMPLES) CHAOS_CANCELS=$(CHAOS_CANCELS) \
		COMFYD_AUDIT=$(CHAOS_ACCEPTS) $(BIN)/python -m pytest -q -n $(JOBS) -rP --timeout 1800 \
		tests/faults/test_fsync_audit.py tests/faults/test_cancels.py tests/faults/test_machine.py

.PHONY: test-pythons
test-pythons: ## run the fast suite on each supported Python that is installed
	@for version in $(TESTED_PYTHONS); do \
		python=$$(tests/support/find-python $$version) || { echo "Python $$version is not installed"; continue; }; \
		echo "Python $$version"; \
		$(MAKE) test PYTHON="$$python" VENV=.venv-$$version TEST_OPTIONS='-m "not chaos"'; \
	done

.PHONY: lock
lock: ## compile the hashed lock files anew (needs uv); all of them agree on every version
	@$(LOCK) pyproject.toml --all-extras -o requirements-all.lock
	@$(LOCK) -c requirements-all.lock pyproject.toml -o requirements.lock
	@$(LOCK) --group build -o requirements-build.lock
	@$(LOCK) -c requirements-all.lock pyproject.toml --all-extras --group dev -o requirements-dev.lock

.PHONY: clean
clean: ## remove the private environments and caches
	@rm -rf .venv .venv-3.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage dist build
