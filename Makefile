PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
# A test that hangs says where after ten minutes and ends its process.
FAST := -m "not slow and not network and not gpu" -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
CLANG ?= $(or $(shell command -v clang++-19),clang++)
SECONDS ?= 60
FUZZERS := text shards
TEXT := $(wildcard csrc/text/*.cpp)
TEXT_OBJECTS := $(patsubst csrc/%.cpp,build/sanitize/%.o,csrc/python.cpp $(TEXT))
FUZZ_OBJECTS := $(TEXT:csrc/text/%.cpp=build/fuzz/objects/%.o)
HEADERS := $(wildcard csrc/text/*.h csrc/text/*.inl)
SANITIZERS = -O1 -g1 -std=c++20 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

CUDA := $(BIN)/../lib/python*/site-packages/nvidia/cu13
CUDA_WHEELS := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime
CUDA_TARGETS := $(foreach sm,80 90 100,-gencode arch=compute_$(sm),code=sm_$(sm))

.PHONY: setup demo test test-full sanitize fuzz lint static bench check-speed readme-tables gpu-check cuda-check clean

setup: .venv/.installed

# numpy, setuptools and ninja come first so that the extension builds against the torch of this environment.
.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/text/*.cpp csrc/text/*.h csrc/text/*.inl csrc/cuda/*)
	@echo "set-up: packages are installed and csrc is compiled, without a word for three to six minutes on two cores"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt torch setuptools wheel ninja numpy
	$(PY) -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(PY) -m gpt.demo --out runs/demo

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(FAST)

test-full: setup
	$(PY) -m pytest
	$(MAKE) sanitize
	$(MAKE) fuzz SECONDS=600

# The text tests on csrc/text built with ASan and UBSan, then the prefetch thread's ring under TSan. Python is not
# instrumented, so that leaks are not counted, and a test that starts another Python without the sanitizer is left out, as
# are those in which the peers do most of the work, and the exit beside daemon threads, which pybind11 handles by binding
# a reference to the null that a forced unwinding has for an exception. In a fork, the allocator of ASan may stay locked.
SANITIZED_TESTS := not full_disk and not every_code_point and not corpora and not hypothesis_strings and not splits_alike and not daemon_threads and not forked_children and not outlives
sanitize: setup
	$(MAKE) --no-print-directory -j2 build/sanitize/tapelm/_text.so
	ln -sf $(CURDIR)/kernels/tapelm/*.py $(CURDIR)/kernels/tapelm/_C.*.so build/sanitize/tapelm/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:malloc_context_size=2 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
	$(PY) -m pytest -n 2 $(FAST) -k "$(SANITIZED_TESTS)" tests/kernels/test_tokenizer*.py tests/kernels/test_loader*.py \
	tests/kernels/test_encode_files*.py tests/kernels/test_pretokenizer.py
	$(CXX) -O1 -g -std=c++20 -fsanitize=thread -Icsrc/text tests/fuzz/race_prefetch.cpp csrc/text/prefetch.cpp \
	  -pthread -o build/sanitize/race_prefetch
	build/sanitize/race_prefetch

build/sanitize/tapelm/_text.so: $(TEXT_OBJECTS)
	@mkdir -p $(@D)
	$(CXX) -shared $(SANITIZERS) -o $@ $^

# -O0: optimized bindings would take as long to compile as everything else.
build/sanitize/python.o: SANITIZERS += -O0 $(shell $(PY) -c "import sysconfig, importlib.util as util; \
	print('-I' + util.find_spec('torch').submodule_search_locations[0] + '/include', \
	'-I' + sysconfig.get_paths()['include'])")

build/sanitize/%.o: csrc/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZERS) -fPIC -c $< -o $@

# Coverage-guided fuzzing of csrc/text for SECONDS; what fails is left in build/fuzz.
fuzz:
	$(MAKE) --no-print-directory -j2 $(FUZZERS:%=build/fuzz/fuzz_%)
	$(MAKE) --no-print-directory -j2 --output-sync=target $(FUZZERS:%=fuzz-%)

fuzz-%: build/fuzz/fuzz_%
	@mkdir -p build/fuzz/corpus-$*
	$< -max_total_time=$(SECONDS) -max_len=600 -timeout=10 -verbosity=0 -print_final_stats=1 \
	-artifact_prefix=build/fuzz/ build/fuzz/corpus-$* tests/fuzz/seeds/$*

.SECONDARY: $(FUZZ_OBJECTS)
build/fuzz/objects/%.o: csrc/text/%.cpp $(HEADERS)
	@command -v $(CLANG) > /dev/null || { echo "make fuzz: no $(CLANG) found: apt-get install clang-19"; exit 1; }
	@mkdir -p $(@D)
	$(CLANG) $(SANITIZERS) -fsanitize=fuzzer-no-link -c $< -o $@

build/fuzz/fuzz_%: tests/fuzz/fuzz_%.cpp $(FUZZ_OBJECTS)
	$(CLANG) $(SANITIZERS) -fsanitize=fuzzer -Icsrc/text $^ -pthread -o $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(PY)

static: setup
	$(PY) -m benchmarks static --check

bench: setup
	$(PY) -m benchmarks all --out runs/bench

# Two minutes: one shape of every op, correct and as fast beside PyTorch as benchmarks/results says.
check-speed: setup
	$(PY) -m benchmarks ops --check --quick --rounds 5

readme-tables: setup
	$(PY) -m benchmarks.tables

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
