# make demo            the whole loop on data that comes with Python; DEMO=digits for the other demo
# make test            the tests that take seconds; make test-slow: the others
# make lint            style, types, and whether the generated pages are up to date
# make league          the league's tables on all tracks (see docs/league.md)
# make bench           the benchmarks; make bench-gradients, bench-filters: one of them; make docs: write the generated pages anew

PYTHON ?= python3
DEMO ?= text
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint league bench docs clean

demo: $(STAMP)
	$(BIN)/assay demo $(DEMO) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python docs/generate.py --check

league: $(STAMP)
	$(BIN)/assay league $(ARGS)

bench: $(STAMP)
	set -e; for file in benchmarks/*.py; do $(BIN)/python $$file $(ARGS); done

bench-%: $(STAMP)
	$(BIN)/python benchmarks/$*.py $(ARGS)

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Installs when the dependencies changed, and not otherwise.
$(STAMP): pyproject.toml constraints.txt tests/requirements-oracles.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-oracles.txt
	touch $@
