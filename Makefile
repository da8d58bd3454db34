PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
FAST := -m "not slow and not network and not gpu"

.PHONY: setup demo test test-full lint static bench gpu-check clean

setup: .venv/.installed

# numpy, setuptools and ninja come first so that the extension builds against the torch of this environment.
.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/text/*.cpp csrc/text/*.h)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt torch setuptools wheel ninja numpy
	$(PY) -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(PY) -m gpt.demo --out runs/demo

test: setup
	$(PY) -m pytest $(FAST)

test-full: setup
	$(PY) -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(PY)

static: setup
	$(PY) -m benchmarks static --check

bench: setup
	$(PY) -m benchmarks all --json runs/bench.json

gpu-check: setup
	$(PY) -m benchmarks gpu-check

clean:
	rm -rf build .venv kernels/tapelm/*.so kernels/*.egg-info
