# `make demo`, `make test` and `make docs` need python3 with pip and venv, and nothing else.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
RUN := $(VENV)/bin/python

.PHONY: demo test docs lint format clean

demo: $(VENV)/.plot
	$(RUN) -m trainax_pk.demo

test: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

# Into site/. Its search needs a server: `python3 -m http.server --directory site`.
docs: $(VENV)/.docs
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m mkdocs build --strict

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv-* demo_output site .pytest_cache .ruff_cache .hypothesis

# One environment per Python; the stamps say which extras it holds.
$(VENV)/.plot $(VENV)/.test $(VENV)/.docs: $(VENV)/.%: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
