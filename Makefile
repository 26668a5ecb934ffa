# `make demo` and `make test` need only Python 3.10 or newer with venv, git and make; they make .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all test-oldest test-triton lint types docs format figures clean

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/corrdit demo --output demo

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

# The oldest versions that setup.py claims of diffusers and what it stands on, laid over the environment.
OLDEST := build/oldest
test-oldest: $(INSTALLED)
	$(BIN)/pip install --quiet --upgrade --no-deps --target $(OLDEST) --requirement constraints-oldest.txt
	PYTHONPATH=$(OLDEST) $(PYTEST) -m "not slow" tests/diffusers tests/lightning

# The main kernels compiled by an older triton, which machines with a GPU have, in a folder of its own.
TRITON := 3.6.0
OTHER_TRITON := build/triton-$(TRITON)
$(OTHER_TRITON)/.installed: $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OTHER_TRITON) triton==$(TRITON)
	touch $@

test-triton: $(OTHER_TRITON)/.installed
	CORRDIT_ANOTHER_TRITON=$(abspath $(OTHER_TRITON)) $(PYTEST) tests/kernels/test_ahead_of_time.py -k another_triton

$(VENV)/.linted: $(INSTALLED)
	$(BIN)/pip install --constraint constraints.txt ruff mypy
	touch $@

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.linted
	$(BIN)/mypy --config-file pyproject.toml --package corrdit

$(VENV)/.documented: $(INSTALLED)
	$(BIN)/pip install --constraint constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

# The site of docs/ in build/site; a link that leads nowhere is an error.
docs: $(VENV)/.documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Every figure of the embedded model, from the shipped checkpoint and the committed curves of its training.
figures: $(INSTALLED)
	$(BIN)/python benchmarks/embedded_figures.py
	$(BIN)/python benchmarks/result_tables.py

format: $(VENV)/.linted
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build demo *.egg-info
