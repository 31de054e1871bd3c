# make train: set up .venv and train the reference system on the digits (again: ARGS=--overwrite). make test: the tests.
# make bench: the headline benchmarks on the CPU, the tables and the pictures, ten minutes.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
ARGS ?=
WORKERS ?= 3
BIN := $(VENV)/bin
comma := ,
RIVALS ?= open_clip_torch pytorch-metric-learning info-nce-pytorch lightly lpips piq kornia torchmetrics pytorch-msssim faiss-cpu
NVCC ?= nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 \
	nvidia-cuda-runtime==13.0.96
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml

.PHONY: train test interpret aot fuzz sanitize lint bench bench-check rivals gpu triton36 cuda clean

train: $(VENV)/.train
	$(BIN)/fastloss train $(ARGS)

test: $(VENV)/.test
	FASTLOSS_TRITON36=$(wildcard $(VENV)/triton36) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Every test on interpreted Triton kernels; `make test` has every other one.
interpret: $(VENV)/.test
	FASTLOSS_INTERPRET=all $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/triton/test_aot.py -k interpreted $(ARGS)

# Every launch of every kernel compiled for GPUs that are not here, on the installed Triton and on 3.6; `make test` has
# each kernel once. Hours on two cores: ARGS="softmax_loss --targets sm_90" chooses.
aot: $(VENV)/.test $(VENV)/triton36
	$(BIN)/python -m tests.triton.aot --all $(ARGS)
	PYTHONPATH=$(VENV)/triton36 $(BIN)/python -m tests.triton.aot --all $(ARGS)

# Drawn calls of the whole public API against the float64 reference: ARGS="--calls 100000 --loss clip_loss --replay ...".
fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz $(ARGS)

# The C++ kernels under AddressSanitizer and UBSan, every instruction set, one thread and two, each test in one of these
# runs (ARGS=--all: in every one, which takes hours); not part of CI.
# ARGS="--isa avx2 --calls 0 tests/image/test_pixel.py" chooses; a change in csrc/ builds again what it touches.
sanitize: $(VENV)/.test
	$(BIN)/python -m tests.sanitize $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*/*)

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run --device cpu --headline --minutes 8 --out benchmarks/results $(ARGS)
	$(BIN)/python -m benchmarks.train_steps --device cpu --batches 4096 --minutes 1
	$(BIN)/python -m benchmarks.plot

# Measures the headline rows again: did one get worse by more than 15 %, by its ratios to eager and to torch.compile?
bench-check: $(VENV)/.bench
	$(BIN)/python -m benchmarks.check $(ARGS)

# The other libraries that run on a CPU, each where pip finds it; without them their rows say "absent".
rivals: $(VENV)/.bench
	for name in $(RIVALS); do $(BIN)/pip install -q $$name || echo "$$name: not installed"; done

# All that a GPU is needed for, in parts of at most 9 minutes; what has finished for this commit is skipped. For a machine
# that is lent for minutes: ARGS="--minutes 9.5 --archive OUT.tar.gz". Needs no network and no installed project: any
# python with torch, triton, numpy, pytest and hypothesis; with pytest-xdist the tests run in several workers.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# An older Triton beside the installed one, for the ahead-of-time checks.
triton36: $(VENV)/triton36
$(VENV)/triton36: | $(VENV)/.torch
	$(BIN)/pip install -q --no-deps --target $@.new triton==3.6.0 && mv $@.new $@

# The kernels in CUDA C++ (csrc/*/*.cu), for sm_90a: compiled, linked and loaded, which needs no GPU. The compiler is
# that of pip's packages, 270 MB, of the CUDA version that torch is built with.
cuda: $(VENV)/.test $(VENV)/cuda
	CUDA_HOME=$(abspath $(VENV))/cuda/nvidia/cu13 FASTLOSS_CUDA=only $(BIN)/python setup.py -q build_ext --inplace
	FASTLOSS_CUDA=1 $(BIN)/python -m pytest -q tests/core/test_cuda_library.py

$(VENV)/cuda: | $(VENV)/.torch
	$(BIN)/pip install -q --no-deps --target $@.new $(NVCC) && mv $@.new $@

$(VENV)/.torch:
	@echo "downloading torch; with its CUDA libraries it takes 5 GB on disk"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" ninja
	$(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "installing, and compiling the C++ kernels: some minutes without output"
	$(BIN)/pip install -q --no-build-isolation -e .
	touch $@

# fastloss is there: of "fastloss[test]" pip installs what the extra names, and compiles nothing again.
$(VENV)/.train $(VENV)/.test $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: $(VENV)/.installed
	$(BIN)/pip install -q "fastloss[$(if $(filter train,$*),train,train$(comma)$*)]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fastloss/_C*.so
