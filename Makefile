# Needs python3 (3.11 or newer, with venv) and make; everything else goes into a venv made here.
#   PYTHON=python3.12  another interpreter, by name or path, in a venv of its own: .venv-3.12
#   EXTRAS=cuda        install this extra as well: cuda, tpu, test-kernels, docs (several: commas)
#   ARGS="..."         options for the main job or for pytest

PYTHON ?= python3
ifeq ($(PYTHON),python3)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
comma := ,
PY := $(VENV)/bin/python
READY := $(VENV)/.ready$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))
HALF_MADE := $(VENV)/.installing
LOG := $(VENV)/install.log
# The suite is bound by compilation, one thread each: two workers halve it. ARGS="-n 0" for one.
PYTEST := $(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help train bench-tpu test lint format types docs-check wheel-check venv clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@sed -n 's/^#   /  /p' Makefile

train: $(READY)  ## the main job: sparse training on the bundled text (options: ARGS=--help)
	@$(PY) -m experiments.train_lm $(ARGS)

bench-tpu:  ## on a TPU: are the kernels right, how fast, and with which tiles (ARGS=--help)
	@$(MAKE) --no-print-directory venv EXTRAS=$(or $(EXTRAS),tpu)
	@$(PY) -m experiments.bench_tpu $(ARGS)

test: $(READY)  ## the whole test suite, with doctests, README and notebooks
	@$(PYTEST) $(ARGS)

lint: $(READY)  ## ruff: rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(READY)  ## mend what ruff can mend
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(READY)  ## pyright
	@$(PY) -m pyright --pythonpath $(PY)

docs-check: $(READY)  ## doctests, code blocks of README and docs, notebooks
	@$(PYTEST) jaxsparse pallas_kernels tests/test_docs.py

wheel-check: $(READY)  ## build the wheel and use it from an empty venv
	@bash tests/wheel.sh $(PY)

venv: $(READY)  ## only make the venv, or bring it up to date

clean:  ## remove venvs and caches
	rm -rf .venv .venv-* .hypothesis .pytest_cache .ruff_cache build dist

# A half-made venv (its install was interrupted) is made again from nothing; a sound one is updated.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "jaxsparse needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: PYTHON=python3.12" \
	  % sys.version_info[:2])'
	@if [ -e $(HALF_MADE) ] || ! $(PY) -c "" 2>/dev/null; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(HALF_MADE)
	@echo "$(VENV): installing jaxsparse and its tools (a minute or two; log: $(LOG))"
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@{ $(PY) -m pip install --progress-bar off --disable-pip-version-check \
	    -e ".[experiments,test$(if $(EXTRAS),$(comma)$(EXTRAS))]" && rm $(HALF_MADE); } 2>&1 \
	  | tee $(LOG) | awk '/\([0-9][0-9]+[.0-9]* [MG]B\)/ { sub(/^ +/, ""); print "  " $$0; fflush() } \
	    /^Installing collected/ { print "  installing " NF - 3 " packages"; fflush() }'
	@if [ -e $(HALF_MADE) ]; then tail -n 30 $(LOG); exit 1; fi
	@$(PY) -c 'import platform, importlib.metadata as m; \
	  print("$(VENV): ready, Python", platform.python_version(), "jax", m.version("jax"))'
	@touch $@
