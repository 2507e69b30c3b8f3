# Each target does all the set-up it needs, on a fresh clone too; a second run does only what changed.
#   make demo ARGS="…"    train a GPT larger than memory; ARGS go to examples/train_gpt.py
#   make test             everything CI checks; WORKERS=1: the Python tests in one process
#   make device-test      models and optimizers once more, on the simulated device
#   make gpu-test OUT=…   on a machine with a GPU: tests, sanitizers and benchmarks, logs in OUT
#   make bench ARGS="…"   every benchmark; ARGS="--quick" for a short look
#   make fuzz             libFuzzer on the parsers of on-disk bytes, FUZZ_SECONDS=600; needs clang

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

CPP_FILES = $(shell find csrc tests/cpp tests/fuzz benchmarks -name '*.cc' -o -name '*.h' -o -name '*.cu')
PY_DIRS = $(wildcard setup.py offload tests examples benchmarks)
TYPED_DIRS = $(wildcard offload examples benchmarks)
# High-entropy address layouts break some ThreadSanitizer versions ("unexpected memory mapping").
NO_ASLR := $(shell setarch $$(uname -m) -R true 2>/dev/null && echo setarch $$(uname -m) -R)

# Targets share the venv and two cores are soon full: one at a time, each parallel inside.
.NOTPARALLEL:
.PHONY: demo venv build test cpp-test py-test device-test gpu-test lint format bench fuzz clean

demo: build
	$(BIN)/python examples/train_gpt.py $(ARGS)

# --- set-up ---------------------------------------------------------------------------------------

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/.stamp-dev: requirements-dev.txt $(VENV)/.stamp-run
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

# The editable install records metadata and the path; compiling is `build`'s, each time.
$(VENV)/.stamp-install: pyproject.toml setup.py $(VENV)/.stamp-run
	$(BIN)/python -m pip install --disable-pip-version-check -q \
	  --no-build-isolation --no-deps -e .
	touch $@

venv: $(VENV)/.stamp-dev

build: $(VENV)/.stamp-install
	$(BIN)/python setup.py -q build_ext --inplace

# --- checks ---------------------------------------------------------------------------------------

# Of the extension, too, warnings are errors here.
test: export CMAKE_ARGS := $(CMAKE_ARGS) -DOFFLOAD_WERROR=ON
test: cpp-test py-test lint

# $(call cpp_build,FOLDER,SANITIZERS,CUDA,OPTIMIZATION): configure and compile the C++ tests, after
# tests that run at the same time, and the benchmarks' programs.
cpp_build = \
  $(BIN)/cmake -S . -B build/$(1) -G Ninja --no-warn-unused-cli \
    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=$(4) -DOFFLOAD_WERROR=ON \
    -DOFFLOAD_SANITIZE=$(2) -DOFFLOAD_BUILD_TESTS=ON -DOFFLOAD_BUILD_PYTHON=OFF \
    -DOFFLOAD_BUILD_BENCHMARKS=ON -DOFFLOAD_CUDA=$(3) && \
  nice $(BIN)/cmake --build build/$(1)

# With CUDA where there is some, and without. TSan's tests take minutes and are one thread mostly:
# the other build goes on beside them. What runs for long is worth -O1, ASan's tests are not.
cpp-test: $(VENV)/.stamp-run
	$(call cpp_build,tsan,thread,OFF,-O1)
	$(NO_ASLR) build/tsan/offload_tests >build/tsan.log 2>&1 & tsan=$$!; \
	{ $(call cpp_build,asan,"address$(comma)undefined",AUTO,-Og) && build/asan/offload_tests; }; asan=$$?; \
	wait $$tsan; tsan=$$?; cat build/tsan.log; exit $$((asan | tsan))

comma := ,

# A process of tests for each core. Torch's threads sleep where they wait for one another: spinning,
# they would take the cores of the other process.
WORKERS ?= $(shell nproc)
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
  $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist worksteal)

py-test: build $(VENV)/.stamp-dev
	$(PYTEST)

device-test: build $(VENV)/.stamp-dev
	$(PYTEST) --device simulated:latest \
	  tests/python/runtime tests/python/optim tests/python/parity
	$(PYTEST) --device simulated:latest --update device \
	  tests/python/runtime tests/python/optim
	$(PYTEST) --device simulated:latest,simulated:latest \
	  tests/python/runtime tests/python/parity

# Offline, with the Python and the tools of the machine: see the script.
OUT ?= build/gpu-test

gpu-test:
	.ci/gpu --python $(PYTHON) $(OUT)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(BIN)/mypy --strict $(TYPED_DIRS)
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix-only $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	$(BIN)/clang-format -i $(CPP_FILES)

bench: build $(VENV)/.stamp-dev
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script $(ARGS); done

FUZZ_SECONDS ?= 600
FUZZ_CXX ?= clang++

fuzz: $(VENV)/.stamp-run
	$(BIN)/cmake -S tests/fuzz -B build/fuzz -G Ninja --no-warn-unused-cli \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_CXX_COMPILER=$(FUZZ_CXX) \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
	$(BIN)/cmake --build build/fuzz --target journal_fuzz journal_seeds
	build/fuzz/journal_seeds build/fuzz/journal_seeds.d
	mkdir -p build/fuzz/journal_corpus
	build/fuzz/journal_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/ build/fuzz/journal_corpus build/fuzz/journal_seeds.d

clean:
	rm -rf build dist *.egg-info offload/_native*.so .pytest_cache .mypy_cache .ruff_cache
	find offload tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
