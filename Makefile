# `make` lists the commands. Each that needs it makes .venv and installs everything into it first; a second run
# does not. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Without a GPU the CPU build of torch (200 MB) does what the CUDA build (3 GB) would. macOS has one build only.
# Empty: whatever the ordinary index serves.
TORCH_INDEX ?= $(if $(and $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi rocminfo),,no-gpu)),https://download.pytorch.org/whl/cpu)

# CUDA kernels compile slowly, for all seven architectures in minutes. One, with its PTX, serves every card since.
export ANIMA_FAST_CUDA_ARCHS ?= 80

# A broken edit of a C++ file must not quietly turn an extension that was there into none.
HAD_EXTENSION := $(if $(wildcard anima_fast/_C*.so),1)

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-install bench lint docs clean
.DELETE_ON_ERROR:

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.extension ## Four prompts in four regions, painted; then the attention at Anima's shapes, checked and timed
	$(BIN)/python examples/demo.py

test: $(VENV)/.extension ## The everyday tests (minutes)
	$(BIN)/python -m pytest

test-full: $(VENV)/.extension ## Every test, thousands of random cases, sdist and wheel contents
	ANIMA_FAST_TEST_PROFILE=full $(BIN)/python -m pytest -m ""

test-install: $(VENV)/.extension ## Every way to install, and one wheel under two torch versions (downloads torch)
	PYTHON=$(BIN)/python TORCH_INDEX=$(TORCH_INDEX) bash tests/install_matrix.sh

bench: $(VENV)/.extension ## Measure every backend and every peer that is installed
	$(BIN)/anima-fast bench attention
	$(BIN)/anima-fast bench scan

lint: $(VENV)/.installed ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Strict: a broken link or anchor, a page that is in no menu and a docstring that does not fit its function are errors.
docs: $(VENV)/.docs ## The docs site, into site/: every link and anchor checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "built: site/index.html"

clean: ## Remove all that make created: .venv, builds, caches
	rm -rf $(VENV) site build dist *.egg-info anima_fast/_build.json anima_fast/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch goes first and alone (--no-deps): one look-up at the extra index, with a short timeout, so that a machine
# that cannot reach it loses seconds. The extension is left to the next rule, whose output pip would hide.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "anima-fast needs Python 3.10 or newer; $(PYTHON) is not. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
ifneq ($(TORCH_INDEX),)
	$(PIP) install --no-deps -c constraints.txt torch --extra-index-url $(TORCH_INDEX) --timeout 10 --retries 1 \
	  || $(PIP) install --no-deps -c constraints.txt torch
	constraints=$$($(BIN)/python -c 'import importlib.metadata as m; \
	  print("constraints.txt" if "triton" in str(m.requires("torch")) else "constraints-cpu.txt")') && \
	  ANIMA_FAST_REQUIRE_EXT= ANIMA_FAST_REQUIRE_CUDA= ANIMA_FAST_NO_EXT=1 $(PIP) install -c $$constraints -e '.[dev]'
else
	ANIMA_FAST_REQUIRE_EXT= ANIMA_FAST_REQUIRE_CUDA= ANIMA_FAST_NO_EXT=1 $(PIP) install -c constraints.txt -e '.[dev]'
endif
	@touch $@

# The package is there already, so this adds what the extra names and builds nothing.
$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install -c constraints.txt 'anima-fast[docs]'
	@touch $@

# Without a compiler there is no stamp: it is tried again, and says again what is missing, until there is one.
$(VENV)/.extension: $(VENV)/.installed $(shell find bindings csrc -type f)
	ANIMA_FAST_REQUIRE_EXT=$${ANIMA_FAST_REQUIRE_EXT:-$(HAD_EXTENSION)} $(BIN)/python setup.py -q build_ext --inplace
	@if ls anima_fast/_C*.so >/dev/null 2>&1; then touch $@; fi
