# make demo | test | lint | bench | gpu | clean.   ARGS is handed on: make test ARGS="tests/test_package.py -x"

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/installed
ARGS ?=

.PHONY: demo test lint bench gpu clean

demo: $(READY)
	@$(VENV)/bin/vpt-fast demo $(ARGS)

# A process a core, each with one thread: the tests' models are too small to share one between threads.
test: $(READY)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not gpu" -n auto --dist worksteal --durations=15 $(ARGS)

lint: $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

bench: $(READY)
	@$(VENV)/bin/python benchmarks/throughput.py $(ARGS)

# For a machine whose Python already has torch, triton, timm and pytest-xdist; nothing is downloaded. In parts, of which
# `make gpu` runs as many as fit into nine minutes: `make gpu` again goes on. ARGS="--parts tests" chooses.
gpu:
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(PYTHON) scripts/gpu_suite.py $(ARGS)

# .venv/installing stands from before the first package until after the last, so a set-up that broke off starts afresh.
# Bytecode is compiled by all cores, where pip uses one. Packages have files that are no Python of this version.
$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 10) else \
		f"$(PYTHON) is Python {v}; 3.10 or newer is needed, for example: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo "Setting up $(VENV): once, about 2 minutes (3 GB to download, PyTorch with CUDA; 6 GB on disk) ..."
	@if [ -e $(VENV)/installing ] || ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	@touch $(VENV)/installing
	@echo "  environment made, installing PyTorch and the other packages ..."
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	@$(VENV)/bin/python -c "import vpt_fast"
	@rm $(VENV)/installing && touch $@
	@echo "  ready."

# Leaves .venv and the folders of your own runs.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find vpt_fast kernels benchmarks scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
