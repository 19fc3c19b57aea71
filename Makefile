# Everything runs in .venv, which the first target that needs it makes.
#
#   make demo        the whole loop on a small real model; installs without the test tools
#   make test        lint, types and the quick tests
#   make test-slow   the rest of the tests
#   make install     .venv with all that the tests need
#
# PYTHON=/path/to/python3 chooses the Python that .venv is made of (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt

# The first of these names that is new enough; empty where there is none.
IS_NEW_ENOUGH = 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for name in python3 python3.12 python3.13 python3.11 python; do \
  $$name -c $(IS_NEW_ENOUGH) 2>/dev/null && echo $$name && break; done)

# Most of a test is compilation and the start of processes, which one processor does. A third worker
# would want memory that a laptop has not, and so would two tests of the real model at once: more
# than 24 GB.
WORKERS := 2

# A stamp is newer than setup.py and constraints.txt when .venv holds what they ask for.
HAS_PYTHON := $(VENV)/.has-python
HAS_PACKAGE := $(VENV)/.has-package
HAS_TESTS := $(VENV)/.has-tests
ASKED := setup.py constraints.txt

.PHONY: install demo test test-slow lint clean

install: $(HAS_TESTS)

demo: $(HAS_PACKAGE)
	$(BIN)/humpback run --config=configs/smollm2_demo.py --workdir=runs/demo --json

test: lint
	$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: $(HAS_TESTS)
	$(BIN)/python -m pytest -q -m "slow and not real_model" -n $(WORKERS) --dist loadfile
	$(BIN)/python -m pytest -q -m "slow and real_model"

lint: $(HAS_TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy humpback_jax

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(HAS_PYTHON):
	@python='$(PYTHON)'; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	if ! "$$python" -c $(IS_NEW_ENOUGH); then \
	  echo "$$python is not Python 3.11 or newer: $$("$$python" --version 2>&1)" >&2; exit 1; \
	fi; \
	if ! "$$python" -m venv $(VENV); then \
	  echo "$$python cannot make $(VENV); Debian and Ubuntu need: apt install python3-venv" >&2; exit 1; \
	fi
	@touch $@

$(HAS_PACKAGE): $(ASKED) | $(HAS_PYTHON)
	@echo "Installing into $(VENV); this takes a few minutes."
	$(PIP_INSTALL) -e .
	@touch $@

$(HAS_TESTS): $(ASKED) | $(HAS_PYTHON)
	@echo "Installing into $(VENV), test tools included; this takes a few minutes."
	$(PIP_INSTALL) -e '.[test,dev]'
	@touch $(HAS_PACKAGE) $@
