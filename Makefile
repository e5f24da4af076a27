# From a clone to a result. Needs only make, the package index and Python 3.11 or newer.
# Everything is installed into .venv, once; "make clean" takes it away again.
# For GNU make 3.81 and newer, and any /bin/sh.

PYTHON ?= python3
ARGS ?=
VENV := .venv
GOAL := $(firstword $(MAKECMDGOALS))
RUN = $(VENV)/bin/python -m
COMMA := ,

# The compilers for TPUs and GPUs stay out of the other targets' way: libtpu makes every start slow.
plans: VENV := .venv-plans

.PHONY: help quickstart test lint format plans clean

help:
	@echo 'make quickstart   train on a small world of moving shapes and open videos made from text (minutes, no GPU)'
	@echo 'make test         lint, then every test (CPU only)'
	@echo 'make lint         ruff: mistakes, import order, formatting; changes nothing'
	@echo 'make format       ruff: put imports and formatting right'
	@echo 'make plans        compile the checked-in plans of the 30B again (6 GB of TPU and GPU compilers, half an hour)'
	@echo 'make clean        remove .venv, .venv-plans and caches; your runs/ stay'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python;  ARGS="..." is handed to the run or to pytest.'

quickstart:
	@$(call install,)
	$(RUN) mgen_jax.main --config=experiments/quickstart.py --workdir=runs/quickstart $(ARGS)

# Two at a time, a file on one of them: its tests share what they have trained.
test: lint
	$(RUN) pytest -n 2 --dist loadfile $(ARGS)

lint:
	@$(call install,[test])
	$(RUN) ruff check --output-format=concise
	$(RUN) ruff format --check

format:
	@$(call install,[test])
	$(RUN) ruff check --fix
	$(RUN) ruff format

plans:
	@echo 'The plans need libtpu and XLA for CUDA, 6 GB, in $(VENV); no TPU and no GPU.'
	@$(call install,[tpu$(COMMA)cuda])
	$(VENV)/bin/python plans/regenerate.py $(ARGS)

clean:
	rm -rf .venv .venv-plans build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,EXTRA): .venv holds mgen_jax with that extra, as pyproject.toml and the pins ask.
# A second call finds the note that the first one left in .venv, and does nothing.
# .venv keeps the Python it was made with until another one is asked for by PYTHON=.
define install
set -eu; \
fail() { echo "$$1" >&2; exit 1; }; \
number='import sys; print("%d.%d" % sys.version_info[:2])'; \
have=`$(VENV)/bin/python -c "import pip; $$number" 2>/dev/null` || have=; \
case $$have in 2.*|3.?|3.10) have=;; esac; \
asked=$$have; \
if [ -z "$$have" ] || [ "$(origin PYTHON)" != file ]; then \
  asked=`"$(PYTHON)" -c "$$number" 2>/dev/null` || \
    fail "No Python answers to '$(PYTHON)': install Python 3.11 or newer, or name yours with make $(GOAL) PYTHON=/path/to/python3.12."; \
  case $$asked in 2.*|3.?|3.10) \
    fail "mgen_jax needs Python 3.11 or newer and '$(PYTHON)' is Python $$asked: name a newer one with make $(GOAL) PYTHON=/path/to/python3.12.";; \
  esac; \
fi; \
if [ "$$asked" != "$$have" ]; then \
  echo "Making $(VENV) with Python $$asked."; \
  "$(PYTHON)" -m venv --clear $(VENV) || \
    fail "Python $$asked could not make $(VENV): see the lines above (Debian and Ubuntu keep venv in the package python$$asked-venv)."; \
fi; \
pins=constraints/py312.txt; \
if [ "$$asked" = 3.11 ]; then pins=constraints/py311.txt; fi; \
note=$(VENV)/installed; \
state="`cat pyproject.toml $$pins | cksum` `pwd`"; \
if ! grep -qxF -e "$$state$(1)" -e "$$state[test]" $$note 2>/dev/null; then \
  echo "Installing mgen_jax$(1) and what it needs into $(VENV); this takes a minute or a few."; \
  $(RUN) pip --disable-pip-version-check install -qq -e ".$(1)" -c $$pins || \
    fail "The install stopped: see pip's lines above, then run make $(GOAL) again."; \
  echo "$$state$(1)" > $$note; \
fi
endef
