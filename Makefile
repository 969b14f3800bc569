# Everything a contributor or a first user runs. Needs a C++ compiler and Python with venv, nothing else:
#
#   make demo        train and certify a small network on the digits; writes a plot
#   make test        lint, build and run the tests (under 10 minutes from nothing, on 2 cores)
#
# Variables:
#   PYTHON=python3.12          the interpreter a new environment is made with
#   VENV=path                  the environment to use (default .venv); VENV= uses PYTHON's own environment
#   TORCH=torch==2.11          which torch; by default the one that is there, else torch==2.13.0
#   PYTEST_ARGS="-k relu"      passed on to pytest
#   BENCH="NAME --peer auto_LiRPA=path"   what to measure (default: all)
#
# Finished steps leave a stamp in the environment, so that a second run only does what has changed.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH ?= all
ifeq ($(VENV),)
  PY := $(PYTHON)
  STAMPS := build/stamps
else
  PY := $(VENV)/bin/python
  STAMPS := $(VENV)/.stamps
endif
ifeq ($(origin TORCH),undefined)
  TORCH := torch==2.13.0
  KEEP_TORCH := yes
endif
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SAY := @printf '==> %s\n'
# One process a core, four at most, each with one thread.
PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

TORCH_STAMP := $(STAMPS)/torch-is-$(subst /,_,$(subst =,_,$(TORCH)))
CPP_SOURCES := $(shell find csrc -type f 2>/dev/null)
FORMATTED := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.NOTPARALLEL: # one pip at a time
.PHONY: help install demo test test-all test-cuda lint format docs bench dist clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile
	@printf '%s\n' 'Targets: demo test test-all test-cuda lint format docs bench dist install clean'

# ---- environment -------------------------------------------------------------------------------

$(STAMPS)/venv:
ifneq ($(VENV),)
	$(SAY) "using the environment in $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
endif
	@mkdir -p $(STAMPS) && touch $@

$(TORCH_STAMP): $(STAMPS)/venv
	@if [ -n "$(KEEP_TORCH)" ] && $(PY) -c 'import torch' 2>/dev/null; then \
	  printf '==> using torch %s, which is installed\n' "$$($(PY) -c 'import torch; print(torch.__version__)')"; \
	else printf '==> installing $(TORCH), a large download\n' && $(PIP) '$(TORCH)' numpy; fi
	@rm -f $(STAMPS)/torch-is-* && touch '$@'

# One stamp an extra: the demo does not wait for Sphinx.
$(STAMPS)/extra-%: pyproject.toml tools/extras.py $(TORCH_STAMP)
	$(SAY) "installing what '$*' needs"
	@$(PIP) $$($(PY) tools/extras.py $*)
	@touch $@

$(STAMPS)/installed: setup.py pyproject.toml pycert/_version.py $(CPP_SOURCES) $(STAMPS)/extra-build
	$(SAY) "building pycert and installing it into the environment (first time: 2 to 4 minutes on 2 cores)"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

install: $(STAMPS)/installed

# ---- what people run ---------------------------------------------------------------------------

demo: $(STAMPS)/installed $(STAMPS)/extra-demo
	$(SAY) "training and certifying a small network on the digits"
	@$(PY) -m pycert.cli demo

test: lint $(STAMPS)/installed $(STAMPS)/extra-test
	$(SAY) "running the tests (the exhaustive ones: make test-all)"
	@$(PARALLEL) -m "not slow and not cuda" $(PYTEST_ARGS)

test-all: lint $(STAMPS)/installed $(STAMPS)/extra-test
	$(SAY) "running every test that needs no GPU"
	@$(PARALLEL) -m "not cuda" $(PYTEST_ARGS)

test-cuda: $(STAMPS)/installed $(STAMPS)/extra-test
	$(SAY) "running the tests that need a CUDA build and a GPU"
	@$(PY) -m pytest -m cuda $(PYTEST_ARGS)

lint: $(STAMPS)/extra-lint
	$(SAY) "ruff, mypy and clang-format"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(if $(FORMATTED),$(dir $(PY))clang-format --dry-run -Werror $(FORMATTED))

format: $(STAMPS)/extra-lint
	$(SAY) "formatting Python and C++"
	@$(PY) -m ruff check --fix --exit-zero .
	@$(PY) -m ruff format .
	@$(if $(FORMATTED),$(dir $(PY))clang-format -i $(FORMATTED))

docs: $(STAMPS)/installed $(STAMPS)/extra-docs
	$(SAY) "building the documentation into docs/_build/html"
	@$(PY) -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html
	$(SAY) "open docs/_build/html/index.html"

bench: $(STAMPS)/installed $(STAMPS)/extra-demo
	$(SAY) "running the benchmarks: $(BENCH)"
	@$(PY) -m benchmarks $(BENCH)

dist: $(STAMPS)/installed $(STAMPS)/extra-dist
	$(SAY) "building an sdist and a wheel into dist/"
	@$(PY) -m build

clean:
	$(SAY) "removing builds, caches and documentation; $(or $(VENV),the environment) stays"
	@rm -rf build dist *.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -f pycert/*.so pycert/_build_info.py $(STAMPS)/installed
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
