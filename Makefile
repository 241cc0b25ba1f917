# `make quickstart` and `make test` do all set-up themselves; a second run re-installs nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(shell cat requirements.lock requirements-lm-eval.lock requirements-docs.lock pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: quickstart test lint unit setup docs notebooks clean

quickstart: setup
	$(RUN) -m limbeck quickstart

test: setup lint unit

setup: $(STAMP)

$(STAMP): requirements.lock requirements-lm-eval.lock requirements-docs.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Limbeck needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-lm-eval.lock -r requirements-docs.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.installed-*
	touch $@

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy
	$(RUN) tools/check_code.py

# Two workers of one thread each: what two cores do best.
unit:
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal

# The site, to be opened from disk: build/docs/index.html.  A warning fails it, as it fails tests/integration/test_docs_site.py.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Runs the notebooks in a temporary folder and writes down what they gave.
notebooks: setup
	OMP_NUM_THREADS=1 $(RUN) tools/notebooks.py

clean:
	rm -rf $(VENV) runs build
