PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
FAST := -m "not slow and not network and not gpu"

CUDA := $(BIN)/../lib/python*/site-packages/nvidia/cu13
CUDA_WHEELS := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime
CUDA_TARGETS := $(foreach sm,80 90 100,-gencode arch=compute_$(sm),code=sm_$(sm))

.PHONY: setup demo test test-full lint bench gpu-check cuda-check clean

setup: .venv/.installed

# numpy, setuptools and ninja come first so that the extension builds against the torch of this environment.
.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/text/*.cpp csrc/text/*.h csrc/cuda/*)
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

bench: setup
	$(PY) -m benchmarks all --json runs/bench.json

gpu-check: setup
	$(PY) -m benchmarks gpu-check

# Compiles the CUDA sources for three GPUs on a machine without one, warnings being errors. --no-deps: the wheels name
# no versions of each other.
cuda-check: setup
	$(PY) -m pip install --quiet --no-deps -c constraints.txt $(CUDA_WHEELS)
	mkdir -p build && rm -f build/loader.fatbin
	set -- $(CUDA)/bin/nvcc && "$$1" -std=c++20 -O3 --fatbin --Werror all-warnings $(CUDA_TARGETS) \
	  --resource-usage csrc/cuda/loader.cu -o build/loader.fatbin 2>&1 | tee build/cuda-check.txt
	test -s build/loader.fatbin && ! grep -E "[1-9][0-9]* bytes spill" build/cuda-check.txt
	$(CXX) -std=c++20 -fsyntax-only -Wall -Wextra -I$$(echo $(CUDA)/include) \
	  $$($(PY) -c "import sysconfig, torch.utils.cpp_extension as e; print(*(f'-I{p}' for p in (*e.include_paths(), sysconfig.get_path('include'))))") \
	  csrc/cuda/python.cpp

clean:
	rm -rf build .venv kernels/tapelm/*.so kernels/*.egg-info
