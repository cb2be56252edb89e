# `make demo` and `make test` need python3 (3.11 or newer for the lock), its venv module and make; the rest is installed here.
PYTHON ?= python3
BIN := .venv/bin
# A process per core; each test uses one thread, and the tests of a file stay together.
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: demo test test-slow test-all check install lint types docs wheel oldest lock

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys, venv; sys.exit(None if sys.version_info >= (3, 11) else \
		f'make needs Python 3.11 or newer (the lock pins torch 2.15), this is {sys.version.split()[0]}: make PYTHON=python3.12')"
	@echo "installing the lock into .venv (5.5 GB, a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: install
	$(BIN)/pws demo --force

# What a user's trust needs. The benches and the demonstration are tested by `make test-slow`.
test: install
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: install
	$(BIN)/python -m pytest -m slow $(PARALLEL)

test-all: test test-slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build --strict --quiet

# The wheel in an empty environment, with nothing but its one dependency at the lock's version.
wheel: install
	rm -rf dist build/wheel-env
	$(BIN)/python -m build --wheel --outdir dist . > build.log 2>&1 || (cat build.log; exit 1)
	rm build.log
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock dist/*.whl
	cd build && wheel-env/bin/python -c "import pws, torch; print(pws.__file__, pws.Conv2d(3, 8, 3)(torch.ones(1, 3, 5, 5)).shape)"
	cd build && wheel-env/bin/pws --help > /dev/null

# The oldest torch that pyproject.toml promises, everything else as in the lock: import, layers, optimizers, conversion, fold.
OLDEST := torch==2.6.0 torchvision==0.21.0
OLDEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,public private_names standardize gain layers mark param_groups numbers \
	optim_sgd optim_adamw optim_errors convert fold))

oldest: build/oldest-env/installed
	build/oldest-env/bin/python -m pytest $(OLDEST_TESTS)

build/oldest-env/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv build/oldest-env
	grep -vE '^(torch|torchvision|triton|sympy|nvidia-[a-z0-9-]*|cuda-[a-z]*)==' requirements.lock > build/oldest-env/constraints.txt
	build/oldest-env/bin/pip install --quiet --disable-pip-version-check --constraint build/oldest-env/constraints.txt \
		$(OLDEST) --editable '.[train,kernels]' pytest hypothesis
	touch $@

check: lint types test-all docs wheel oldest

# Resolve the newest versions of everything again; needs `pip install uv`.
lock:
	uv pip compile --universal --python-version 3.11 --extra dev --no-annotate --no-header --no-emit-package pws-torch \
		--constraint constraints.txt pyproject.toml --output-file requirements.lock
