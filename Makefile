# The commands a person types. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLOOR := .venv-floor

# Two workers with one thread each finish sooner than one worker with two threads on small models.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: help install quickstart test test-all test-floor kernels-gate check format bench gpu gpu-tests gpu-kernels \
  gpu-training clean
.DEFAULT_GOAL := help

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V); llmnorm needs Python 3.11 or newer; run make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

install: $(READY)  ## make .venv and install the pinned dependencies

# Threads that sleep instead of spinning lose little on an idle machine and a factor of ten less on a busy one.
quickstart: export OMP_WAIT_POLICY := PASSIVE
quickstart: $(READY)  ## train, evaluate, export and sample a small Mix-LN model on bundled text
	$(BIN)/python train.py --config configs/quickstart.yaml
	$(BIN)/python eval/perplexity.py --model runs/quickstart/export --data samples/tinyshakespeare/validation.txt \
	  --context-length 128 --append-eos
	$(BIN)/llmnorm sample --model runs/quickstart/export --prompt "KING RICHARD:"

test: $(READY)  ## every test that is not marked slow (at most 12 minutes on 2 cores)
	$(PYTEST) -n 2 --dist loadgroup -m "not slow and not gpu"

test-all: $(READY)  ## every test that needs no GPU, the slow grids included
	$(PYTEST) -n 2 --dist loadgroup -m "not gpu"

$(FLOOR)/.ready: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable '.[dev]'
	@touch $@

test-floor: $(FLOOR)/.ready  ## modeling, export and kernel tests on the oldest supported transformers and triton
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" tests/modeling tests/export tests/kernels
	$(FLOOR)/bin/python kernels/gate.py

kernels-gate: $(READY)  ## compile every Triton kernel for four architectures without a GPU
	$(BIN)/python kernels/gate.py

check: $(READY)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy llmnorm kernels/llmnorm_kernels train.py eval

format: $(READY)  ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## speed and memory ratios, written to benchmarks/results/
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# For the machine with the GPU, whose $(PYTHON) has torch for it; each call ends within ten minutes.
ON_GPU := PYTHONPATH=.:kernels timeout --signal=INT 595
gpu: gpu-tests gpu-kernels gpu-training  ## all that needs a GPU, in three calls of at most ten minutes

gpu-tests:  ## every test marked gpu
	$(ON_GPU) $(PYTHON) -m pytest -q -m gpu tests/kernels tests/modeling tests/checkpoint

gpu-kernels:  ## operators and attention sublayers against their peers, into benchmarks/results/ and docs/
	$(ON_GPU) sh -ec '$(PYTHON) benchmarks/kernels.py --budget 7; $(PYTHON) benchmarks/attention.py --device cuda --budget 1'

gpu-training:  ## training steps and optimizer steps against their peers
	$(ON_GPU) sh -ec '$(PYTHON) benchmarks/train_gpu.py --budget 3; \
	  $(PYTHON) benchmarks/train_gpu.py --sizes 130m --lengths 1024 --modes compile graphs --budget 1.5; \
	  $(PYTHON) benchmarks/spectral_gpu.py --parts steps --minutes 1; \
	  $(PYTHON) benchmarks/optimizer_step.py --memory-7b; \
	  $(PYTHON) benchmarks/optimizer_step.py --device cuda --sizes 1b 130m --budget 2'

clean:  ## remove runs and caches, keep the virtual environment
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
