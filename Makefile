# make demo   trained checkpoints → bundle → parity → picture → timing
# make test   lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKPOINTS := --var train/checkpoints/digits_var.safetensors --vae train/checkpoints/digits_vqvae.safetensors

.PHONY: demo test test-slow test-full test-gpu sanitize lint digits photos scaling-law kernels editing report pages bench-cpu bench-train bench-gpu clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(ORACLE)
	touch $(READY)

# What tests compare FID and its network with. It needs torchvision, which this PyTorch cannot be imported beside, and
# torchmetrics imports it wherever it is installed: so without what it needs, in a directory that only those tests add.
ORACLE := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt \
	--target $(VENV)/oracle torch-fidelity

demo: $(READY)
	rm -rf out/digits
	$(BIN)/var-deploy export $(CHECKPOINTS) --license MIT --out out/digits
	$(BIN)/var-deploy verify out/digits $(CHECKPOINTS)
	$(BIN)/python docs/demo.py out/digits out/digits.png
	$(BIN)/var-deploy bench out/digits --batch 1 --batch 8

test: lint
	$(BIN)/python -m pytest -m "not gpu and not slow and not full_size" -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What tells more than `make test` but takes minutes: more kills, more processes, every compute capability.
test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu" -n 2 --dist loadfile

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

# The README's picture of editing, of the demo's bundle: held-out digits, their lower half redrawn as every class.
editing: $(READY)
	$(BIN)/python docs/edit_demo.py out/digits docs/editing.png

# The quality report of the demo's bundle, with the settings that the digits are judged with. On one thread: threads that
# wait for each other take many times as long where other work shares the cores, PyTorch's above all.
report: $(READY)
	$(BIN)/var-deploy report out/digits $(CHECKPOINTS) --guidance 2 --top-k 0 --top-p 0.95 --per-class 6 --repeats 20 --threads 1 \
		--out docs/results/digits_report.html

# Registers and shared memory of every kernel, compiled ahead of time; no GPU needed.
kernels: $(READY)
	$(BIN)/python -m var_kernels.resources --markdown docs/results/kernels.md

# The pages of `make bench-gpu` and `make bench-cpu`, from the records that lie beside them; that of a GPU without a record
# with all rows that it would fill in. Nothing is measured.
SUITE_RECORD = $(lastword $(filter-out %-kernels.json,$(sort $(wildcard docs/results/gpu-*.json))))
KERNEL_RECORD = $(lastword $(sort $(wildcard docs/results/gpu-*-kernels.json)))
pages: $(READY)
	$(BIN)/python -m var_deploy.bench.suite --table docs/results/gpu.md $(addprefix --record ,$(SUITE_RECORD))
	$(BIN)/python -m var_kernels.benchmark --table docs/results/gpu-kernels.md $(addprefix --record ,$(KERNEL_RECORD))
	$(BIN)/python -m var_deploy.bench.cpu_suite --table docs/results/cpu.md --record docs/results/cpu.json

# Trains the two checkpoints under train/checkpoints again, from the configurations in train/configs, and measures them.
# A run that was interrupted goes on.
digits: out/digits_images
	$(BIN)/var-deploy train vqvae train/configs/digits_vqvae.toml --out out/digits_vqvae
	test -d out/digits_tokens || $(BIN)/var-deploy train tokens out/digits_images --enlarge 1 \
		--vqvae out/digits_vqvae/vqvae.safetensors --out out/digits_tokens
	$(BIN)/var-deploy train var train/configs/digits_var.toml --out out/digits_var
	$(BIN)/python -m var_train.digits quality --var out/digits_var/var.safetensors --vae out/digits_vqvae/vqvae.safetensors

out/digits_images: $(READY)
	test -d $@ || $(BIN)/python -m var_train.digits images $@

# Photographs in colour, end to end: data set, VQVAE, VAR, bundle, parity.
photos: $(READY)
	test -d out/photos || $(BIN)/python -m var_train.photos out/photos
	$(BIN)/var-deploy train vqvae train/configs/photos_vqvae.toml --out out/photos_vqvae
	$(BIN)/var-deploy train var train/configs/photos_var.toml --out out/photos_var
	rm -rf out/photos_bundle
	$(BIN)/var-deploy export $(PHOTOS) --out out/photos_bundle
	$(BIN)/var-deploy verify out/photos_bundle $(PHOTOS)
PHOTOS := --var out/photos_var/var.safetensors --vae out/photos_vqvae/vqvae.safetensors

# Five widths on the tokens that the shipped VQVAE gives the digits, and the laws through them.
DEPTHS := 1 2 3 4 5
scaling-law: out/digits_images
	for split in train val; do \
		test -d out/scaling_tokens_$$split || $(BIN)/var-deploy train tokens out/digits_images --split $$split --enlarge 1 \
			--vqvae train/checkpoints/digits_vqvae.safetensors --out out/scaling_tokens_$$split || exit 1; \
	done
	for depth in $(DEPTHS); do \
		$(BIN)/var-deploy train var train/configs/scaling.toml --set model.depth=$$depth --out out/scaling_d$$depth || exit 1; \
	done
	$(BIN)/var-deploy train scaling-law $(DEPTHS:%=out/scaling_d%) --plot docs/results/scaling_law.png

# Seconds and memory of a training step, written to docs/results/training-cpu.json.
bench-train: $(READY)
	$(BIN)/python -m var_train.step_benchmark --preset d12 --preset d16 --preset d20 --out docs/results/training-cpu.json

# Whole images on this machine's CPU beside PyTorch, with random weights: writes docs/results/cpu.json, .md and .png.
# CPU_OPTIONS: of `python -m var_deploy.bench.cpu_suite`, as --batch 1 --repeats 3 --compiled 0. 12 GB of disk.
CPU_OPTIONS ?= --profile
bench-cpu: $(READY)
	rm -rf out/d16
	$(BIN)/python -m var_train.presets d16 --out out/d16
	for precision in fp32 int8; do \
		$(BIN)/var-deploy export --var out/d16/var_d16.pth --vae out/d16/vae_d16.pth \
			--precision $$precision --out out/d16/$$precision || exit 1; \
	done
	$(BIN)/python -m var_deploy.bench.cpu_suite out/d16/fp32 out/d16/int8 $(CPU_OPTIONS)

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
