# Two commands do all the set-up, each by itself: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types contracts unit docs score bench full-size clean

# The main job. Exit code 1 means "a fault was found", which is what this file is for.
demo: .venv/installed
	$(BIN)/nanhunt replay bad_batches/bad_batch_000019.pt || [ $$? -eq 1 ]

test: lint types contracts unit

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell nanhunt detector recipes tests benchmarks docs README.md

types: .venv/installed-dev
	$(BIN)/mypy

contracts: .venv/installed-dev
	$(BIN)/lint-imports

unit: .venv/installed-dev
	$(BIN)/python -m pytest

# One page for each rule, from its docstring; a test compares them.
docs: .venv/installed
	$(BIN)/python -m nanhunt.rules.write_pages docs/rules

# How many faults of the corpus the exact tracer places right, and how often it cries wolf.
score: .venv/installed-dev
	$(BIN)/python tests/corpus/score.py

# What the figures of the README come from; takes several minutes on a quiet machine.
bench: .venv/installed-dev
	$(BIN)/python benchmarks/v3_step.py
	$(BIN)/python benchmarks/watch_overhead.py
	$(BIN)/python benchmarks/full_size_replay.py

# Trains the full-size incident until a step fails, and replays its capture.
full-size: .venv/installed
	$(BIN)/python benchmarks/full_size_replay.py --folder runs/full-size

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv build *.egg-info
