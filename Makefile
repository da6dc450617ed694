PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all env lint bench

demo: env
	$(BIN)/python -m benchmarks.demo

test: env lint
	$(BIN)/python -m pytest

test-all: env lint
	$(BIN)/python -m pytest -m ""

bench: env
	$(BIN)/python -m benchmarks.throughput

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env:
	$(PYTHON) tools/setup_env.py
