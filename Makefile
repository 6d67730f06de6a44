# make demo   build, then generate from the demo model in all three modes, and ask it some problems
# make test   build, then run the tests          make lint   ruff, clang-format, mypy
# make emulate  build and run the CUDA kernels on the host, under sanitizers, in every order of threads (docs/emulation.md)
# make sanitize  the core under address, undefined-behaviour and thread sanitizers (clang)
# make aarch64  the core cross-compiled, every op under qemu against its reference
# make fuzz     random shapes of every op against float64: N=... calls for each op and dtype, SEED=... of the first
# make fuzz-checkpoint  the loader under libFuzzer (atheris) for TIME=... seconds
# make harden   the scoreboard of docs/reliability.md: fuzz, malformed calls, damaged checkpoints, repeats, a soak of an hour
# make mutate   plant bugs in the kernels and see that they are caught; about an hour
# make bench  build, then time every op and a model: table, benchmarks/results/local-cpu.json, docs/local-*.svg; under 10 min
# make gpu    on a machine with an NVIDIA GPU, nvcc and a CUDA torch: build against that torch, run tests, sanitizers and suite
# All but `make gpu` work inside .venv, which they make; PYTHON chooses the interpreter.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
OUT ?= benchmarks/results
BIN := .venv/bin
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TESTED_CPP := $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
OP_TESTS := $(addprefix tests/test_,edges.py golden_commit.py golden_ops.py gradients.py library.py linear.py ops.py commit_parts.py route.py rows.py sampling.py split.py)
PROGRESS := ^ *(\[[0-9]+/[0-9]+|-- CUDA kernels|Successfully installed)

.PHONY: aarch64 bench demo emulate fuzz fuzz-checkpoint harden mutate sanitize test test-build test-isa lint format gpu clean

.venv/tools: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on -r requirements-dev.txt
	touch $@

# One line a compile step; everything else goes to the log, whose end is shown when the build fails. It is as old as its
# begin: what changes meanwhile is built by the next one.
.venv/built: .venv/tools setup.py pyproject.toml CMakeLists.txt csrc/kernels/cutlass/cutlass.cmake $(CPP)
	@touch .venv/begun
	@$(BIN)/pip install --no-build-isolation --verbose -e '.[test]' 2>&1 \
	  | tee .venv/build.log | grep --line-buffered -E '$(PROGRESS)' || { tail -n 60 .venv/build.log; exit 1; }
	@touch -r .venv/begun $@

.venv/linters: .venv/tools
	$(BIN)/pip install --quiet -r requirements-lint.txt
	touch $@

demo: .venv/built
	@for prompt in "sort qzmbkfad: " "sum 7 12 5 9: " "The for statement is used to "; do \
	  for mode in mask_diffusion mock_ar ar; do \
	    printf '\n%s: %s\n' $$mode "$$prompt"; \
	    $(BIN)/twotower generate --prompt "$$prompt" --max-new-tokens 96 --mode $$mode || exit; \
	  done; \
	done
	@printf '\n'; $(BIN)/twotower evaluate --quick --problems 50

# The kernels' tests on the emulator run two builds at a time; those that need clang are named where there is none.
# EMULATE=--all makes a missing one a failure.
test: .venv/built
	$(BIN)/python -m pytest -m "not gpu and not build and not emulated"
	$(BIN)/python tests/emulate.py $(EMULATE)

emulate: .venv/built
	$(BIN)/python tests/emulate.py $(EMULATE)

aarch64: .venv/built
	$(BIN)/python tests/aarch64.py

fuzz: .venv/built
	$(BIN)/python tests/fuzz.py --calls $(or $(N),1000) --seed $(or $(SEED),0) --json build/fuzz.json

fuzz-checkpoint: .venv/built
	$(BIN)/pip install --quiet atheris
	mkdir -p build/corpus
	$(BIN)/python tests/fuzz_checkpoint.py -max_total_time=$(or $(TIME),60) -max_len=40000 build/corpus tests/corpus/checkpoint

harden: .venv/built
	$(BIN)/python tests/harden.py --write $(HARDEN)

sanitize: .venv/built
	$(BIN)/python tests/sanitize.py $(SANITIZE)

mutate: .venv/built
	$(BIN)/python tests/mutate.py

# The op tests once for every instruction set that this processor has but the best, which all other tests take.
test-isa: .venv/built
	@for isa in $$($(BIN)/python -c 'import twotower_ext as t; print(*t.build_info()["cpu_isas"][:-1])'); do \
	  echo "TWOTOWER_ISA=$$isa"; \
	  TWOTOWER_ISA=$$isa $(BIN)/python -m pytest -m "not gpu and not build and not emulated" $(OP_TESTS) || exit; \
	done

# Installs the package in fresh environments, every way a user can; needs the package index.
test-build: .venv/built
	$(BIN)/python -m pytest -m build

lint: .venv/built .venv/linters
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(TESTED_CPP)
	$(BIN)/mypy

format: .venv/linters
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(TESTED_CPP)

# BENCH=... adds options, for instance BENCH="--compare old.json"; a run that was interrupted goes on where it stopped.
bench: .venv/built
	$(BIN)/python -m twotower_ext.benchmarks --plot $(BENCH)

# Needs no network. Where the tree is a copy without its history, COMMIT=... says what it is a copy of. All of it fits in
# ten minutes on 16 cores: the build has five of them at most, and what it leaves of nine goes to the stages of gpu.py.
gpu:
	started=$$(date +%s); \
	NVCC_APPEND_FLAGS="--threads 4 $$NVCC_APPEND_FLAGS" CMAKE_ARGS="-DTWOTOWER_CUDA=ON $$CMAKE_ARGS" \
	  timeout 300 $(PYTHON) -m pip install --no-build-isolation --no-deps --verbose -e . || exit; \
	$(PYTHON) -m twotower_ext.benchmarks.gpu --out "$(OUT)" --started $$started

clean:
	rm -rf build .venv/built twotower_ext/*.so *.egg-info
