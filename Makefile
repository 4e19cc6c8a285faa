# Every target sets up what it needs, in .venv, once; `make clean` forgets all of it.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --timeout 600
# One thread a worker: two OpenMP pools on the same cores cost more than they give.
PYTEST_PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist worksteal
say = @echo "$(1)" >&2

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench lint types clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## quantize a small model, compare, write build/demo.html (installs the runtime only)
	@mkdir -p build
	@$(BIN)/fewbits demo --html build/demo.html $(ARGS)

test: $(VENV)/.dev ## run the tests but the slow ones; ARGS="-k name" narrows
	@$(PYTEST_PARALLEL) -m "not slow" $(ARGS)

# Exit status 5 is pytest's word for "nothing selected".
test-slow: $(VENV)/.dev ## run the slow tests
	@$(PYTEST_PARALLEL) -m slow $(ARGS) || { status=$$?; test $$status -eq 5 || exit $$status; }

bench: $(VENV)/.dev ## measure loading and decoding
	@$(BIN)/python benchmarks/load_and_decode.py $(ARGS)

lint: $(VENV)/.dev ## ruff
	@$(BIN)/ruff check .

types: $(VENV)/.dev ## mypy, strict
	@$(BIN)/mypy

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "The pinned packages need Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try make PYTHON=python3.12" >&2; exit 1; }
	$(call say,Creating $(VENV) with $$($(PYTHON) -V))
	@$(PYTHON) -m venv $(VENV)

# torch goes in alone and first: a resolver that meets it inside another package's needs may fetch other builds.
$(VENV)/.runtime: pyproject.toml constraints.txt CMakeLists.txt | $(BIN)/python
	$(call say,Installing torch (the large one))
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(call say,Installing fewbits and what it runs on)
	@$(PIP) scikit-build-core $$(command -v cmake >/dev/null || echo cmake)
	@$(PIP) --no-build-isolation --editable '.[report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(call say,Installing the development tools and PEFT and bitsandbytes to compare with)
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
