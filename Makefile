# make train: set up .venv and train the reference system on the digits. make test: the same for the tests.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
ARGS ?=
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

.PHONY: train test lint bench gpu triton36 clean

train: $(VENV)/.train
	$(BIN)/fastloss train $(ARGS)

test: $(VENV)/.test
	FASTLOSS_TRITON36=$(wildcard $(VENV)/triton36) $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/fastloss bench $(ARGS)

# Device tests, then every benchmark row. Needs no network and no installed project: any python with torch and triton.
gpu:
	$(PYTHON) -m pytest -m gpu -q -p no:cacheprovider tests/test_losses.py tests/test_gpu.py
	$(PYTHON) -m benchmarks.run --device cuda $(ARGS)

# An older Triton beside the installed one, for the ahead-of-time checks.
triton36: $(VENV)/triton36
$(VENV)/triton36: | $(VENV)/.torch
	$(BIN)/pip install -q --no-deps --target $@.new triton==3.6.0 && mv $@.new $@

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" ninja
	$(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/.train $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[train,$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fastloss/_C*.so
