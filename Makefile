PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-next env lint docs bench quality train quality-from-scratch pictures

demo: env
	$(BIN)/python -m benchmarks.demo

# A file is run by one process, as its tests share engines.
test: env lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: env lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ""

# On the Python sources of a vLLM that has no build for the CPU: the newest one that was tested, or another, as in
# VLLM=0.34.0.
ON_NEXT := tests/unit tests/engine/test_blocks.py tests/engine/test_chosen_layer.py tests/engine/test_drafters.py \
	tests/engine/test_one_request.py tests/engine/test_prefix_cache.py tests/engine/test_stock.py
test-next: env
	$(BIN)/python -m tools.setup_next $(VLLM)
	VLLM_VTW_ALLOW_UNTESTED=1 .venv-next/bin/python -m pytest -n 2 --dist loadfile $(ON_NEXT)

bench: env
	$(BIN)/python -m benchmarks.serving small

quality: env
	$(BIN)/python -m benchmarks.quality.evaluate

train: env
	$(BIN)/python -m benchmarks.quality.train --out .training

# Hours on two cores. What training has done already is in .training: remove it to begin anew.
quality-from-scratch: train
	$(BIN)/python -m benchmarks.quality.evaluate --checkpoint .training/checkpoint --samples 500 --check \
		--layers 1,2,3,4,5,6,7,8,9,10,11,12 --out benchmarks/results/quality.json
	cp .training/checkpoint/* benchmarks/quality/checkpoint/

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

pictures: env
	$(BIN)/python -m tools.report_picture
	$(BIN)/python -m tools.dashboard_picture

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env:
	$(PYTHON) tools/setup_env.py
