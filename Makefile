PYTHON ?= python3
OP ?= lora_linear
ARGS ?=
PY := .venv/bin/python

.PHONY: setup test test-all demo bench gpu doctor build lint clean
.DEFAULT_GOAL := help

help:      ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*##/  make \1\t/' | expand -t 18

setup: .venv/.stamp .venv/quantized/.stamp  ## create .venv, install the pinned requirements, compile the extension (the verbs below do it too)
	@$(PY) peft_fast/build.py --if-possible

test: setup  ## the test suite, half an hour on 2 cores
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: setup  ## every test, the long ones too
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

demo: setup  ## fine-tune a real model twice, stock and fast, and write the report
	$(PY) -m peft_fast demo $(ARGS)

bench: setup  ## one benchmark: make bench OP=train_step ARGS=--quick
	$(PY) -m peft_fast bench $(OP) $(ARGS)

gpu:       ## everything that needs a GPU, with the python3 and torch this machine has (PYTHON=...)
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(ARGS)

doctor: setup  ## what is installed, which backends are live, and what to do about the others
	@$(PY) -m peft_fast doctor $(ARGS)

build: .venv/.stamp  ## recompile the C++ kernels
	$(PY) -m peft_fast build $(ARGS)

lint: setup  ## ruff
	$(PY) -m ruff check .

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info peft_fast/*.so peft_fast/build_info.json .pytest_cache .ruff_cache .hypothesis .benchmarks

.venv/.stamp: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned requirements need Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install "$$(grep -m1 '^torch==' requirements.txt)"
	$(PY) -m pip install --requirement requirements.txt
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# without them the tests of quantized bases are skipped, and CI says so; hqq would build its CUDA kernels
.venv/quantized/.stamp: requirements-quantized.txt | .venv/.stamp
	-@rm -rf .venv/quantized && DISABLE_CUDA=1 $(PY) -m pip install --quiet --no-deps --no-build-isolation \
		--target .venv/quantized --requirement requirements-quantized.txt && touch $@
