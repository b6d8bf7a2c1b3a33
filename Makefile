# make demo   trained checkpoints → bundle → parity → picture → timing
# make test   lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKPOINTS := --var train/checkpoints/digits_var.safetensors --vae train/checkpoints/digits_vqvae.safetensors

.PHONY: demo test test-full test-gpu sanitize lint digits kernels pages bench-cpu bench-gpu clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)
	rm -rf out/digits
	$(BIN)/var-deploy export $(CHECKPOINTS) --classes train/checkpoints/digits_classes.txt --license MIT --out out/digits
	$(BIN)/var-deploy verify out/digits $(CHECKPOINTS)
	$(BIN)/python docs/demo.py out/digits out/digits.png
	$(BIN)/var-deploy bench out/digits --batch 1 --batch 8

test: lint
	$(BIN)/python -m pytest -m "not gpu and not full_size"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Published sizes with random weights: d16 and d30 exports, parity and memory. 20 GB of disk, 24 GB of memory.
test-full: $(READY)
	$(BIN)/python -m pytest -m full_size

# What needs a CUDA device, and every kernel's tests, compiled instead of interpreted. Uses the Python it is given, whose
# PyTorch has to be one for CUDA: the pinned one has not.
test-gpu:
	$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no CUDA device: nothing was tested')"
	$(PYTHON) -m pytest -m gpu

# The kernels' memory accesses, checked one by one on a GPU: every kernel at small sizes. Every tensor is an allocation of
# its own, else what is written beyond it would still lie within the cache's block.
sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize:
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -m gpu -x tests/kernels \
		-k "against_the_reference or nothing_outside"

# Registers and shared memory of every kernel, compiled ahead of time; no GPU needed.
kernels: $(READY)
	$(BIN)/python -m var_kernels.resources --markdown docs/results/kernels.md

# The pages of `make bench-gpu`, from the records that lie beside them, or with all rows that it would fill in; no GPU
# needed.
SUITE_RECORD = $(lastword $(filter-out %-kernels.json,$(sort $(wildcard docs/results/gpu-*.json))))
KERNEL_RECORD = $(lastword $(sort $(wildcard docs/results/gpu-*-kernels.json)))
pages: $(READY)
	$(BIN)/python -m var_deploy.bench.suite --table docs/results/gpu.md $(addprefix --record ,$(SUITE_RECORD))
	$(BIN)/python -m var_kernels.benchmark --table docs/results/gpu-kernels.md $(addprefix --record ,$(KERNEL_RECORD))

# Trains the two checkpoints under train/checkpoints again and measures them.
digits: $(READY)
	$(BIN)/python -m var_train.digits train --out out/digits_checkpoints
	$(BIN)/python -m var_train.digits quality --var out/digits_checkpoints/digits_var.safetensors \
		--vae out/digits_checkpoints/digits_vqvae.safetensors

# The timings of docs/results/cpu.md, with random weights.
bench-cpu: $(READY)
	rm -rf out/d16
	$(BIN)/python -m var_train.presets d16 --out out/d16
	$(BIN)/var-deploy export --var out/d16/var_d16.pth --vae out/d16/vae_d16.pth --out out/d16/bundle
	$(BIN)/var-deploy bench out/d16/bundle --batch 1 --batch 4 --repeats 5
	$(BIN)/var-deploy bench out/d16/bundle --batch 1 --repeats 5 --graphs static --no-reference

# On a CUDA device, with the Python given: whole images, then every kernel, with random weights, in less than 8 minutes.
# Results are written after every row, so a run that is cut short still counts; `timeout` cuts what no budget can, a
# compilation.
bench-gpu: export PYTHONPATH := .:export:kernels:train
bench-gpu:
	$(WITHIN) 320 $(PYTHON) -m var_deploy.bench.suite --out docs/results --budget 300 || $(CUT_SHORT)
	$(WITHIN) 140 $(PYTHON) -m var_kernels.benchmark --out docs/results --budget 120 || $(CUT_SHORT)
WITHIN := timeout --foreground --kill-after=10
CUT_SHORT := [ $$? -eq 124 -o $$? -eq 137 ]

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
