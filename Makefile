PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all env lint bench train

demo: env
	$(BIN)/python -m benchmarks.demo

test: env lint
	$(BIN)/python -m pytest

test-all: env lint
	$(BIN)/python -m pytest -m ""

bench: env
	$(BIN)/python -m benchmarks.throughput

train: env
	$(BIN)/python -m benchmarks.quality.train --out .training

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env:
	$(PYTHON) tools/setup_env.py
