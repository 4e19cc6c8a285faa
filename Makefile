# Every target sets up what it needs, in .venv, once; `make clean` forgets all of it.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/simd/*.h csrc/kernels/*.h)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --timeout 600
# One thread a worker: two OpenMP pools on the same cores cost more than they give.
PYTEST_PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist worksteal
say = @echo "$(1)" >&2

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-slow nets bench lint types clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.library ## quantize a small model, compare, write build/demo.html (installs the runtime only)
	@mkdir -p build
	@$(BIN)/fewbits demo --html build/demo.html $(ARGS)

test: $(VENV)/.dev $(VENV)/.library ## run the tests but the slow ones; ARGS="-k name" narrows
	@$(PYTEST_PARALLEL) -m "not slow" $(ARGS)

# Exit status 5 is pytest's word for "nothing selected".
test-slow: $(VENV)/.dev $(VENV)/.library ## run the slow tests
	@$(PYTEST_PARALLEL) -m slow $(ARGS) || { status=$$?; test $$status -eq 5 || exit $$status; }

nets: ## test the C++ library on all instruction sets, with sanitizers and random arguments; ARGS=arm for one
	@PATH="$(CURDIR)/$(BIN):$$PATH" csrc/tests/run $(ARGS)

bench: $(VENV)/.dev $(PEERS)/.done ## time the kernels beside those of other libraries (about 12 minutes)
	@$(BIN)/python benchmarks/kernels.py $(ARGS)

bench-model: $(VENV)/.dev $(PEERS)/.done ## load, prefill and decode a model of 1.1 billion parameters, beside them
	@$(BIN)/python benchmarks/whole_model.py $(ARGS)

bench bench-model: $(VENV)/.library

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
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(call say,Installing torch (the large one))
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(call say,Installing fewbits and what it runs on)
	@$(PIP) scikit-build-core $$(command -v cmake >/dev/null || echo cmake) $$(command -v ninja >/dev/null || echo ninja)
	@$(PIP) --no-build-isolation --editable '.[report]'
	@touch $@

# A change of the C++ library builds it again, and nothing else.
$(VENV)/.library: CMakeLists.txt $(CSRC) | $(VENV)/.runtime
	$(call say,Building the C++ library)
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(call say,Installing the development tools and PEFT and bitsandbytes to compare with)
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# Every peer is optional. llama.cpp is compiled for this machine, which takes minutes.
$(PEERS)/.done: benchmarks/peers.txt | $(BIN)/python
	$(call say,Installing the peers of the benchmarks in $(PEERS))
	@$(PYTHON) -m venv $(PEERS)
	@grep -v '^#' $< | while read -r package; do \
	  echo "  $$package" >&2; \
	  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(PEERS)/bin/python -m pip install --quiet \
	    --disable-pip-version-check --no-binary llama-cpp-python "$$package" </dev/null || \
	    echo "  $$package could not be installed; the benchmarks go on without it" >&2; \
	done
	@touch $@

.PHONY: bench-model clean-peers
clean: clean-peers
clean-peers:
	rm -rf $(PEERS)
