# Every target does its own set-up in .venv; a second run finds it done. `make PYTHON=python3.12 test` picks the Python.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE := $(wildcard csrc/*)
SHELL := /bin/bash

.PHONY: demo test check bench gpu-build test-gpu bench-gpu clean

demo: $(VENV)/native
	$(RUN) -m ssl_fast.cli demo

# A process a core, up to four, whose threads do not spin where they wait: the others need the core.
test: $(VENV)/native $(VENV)/peers
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/native $(VENV)/peers
	$(RUN) -m ssl_fast.cli bench

# On the GPU at hand, offline, with the torch (2.10 or later) of $(PYTHON): nothing is installed or fetched, and all that
# comes of it lies in $(OUT), one page of it in $(OUT)/summary.md. A part (tests, train, bench, sanitize) ends within 8
# minutes, with status 75 where it has more to do: the same line again goes on.
OUT ?= out/gpu
PART ?= all

gpu-build:
	mkdir -p $(OUT)
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -c 'from ssl_fast._op import native_reason as why; assert why("cuda") is None, why("cuda")'
	{ nvidia-smi; nvcc --version; $(PYTHON) -m ssl_fast.info; } 2>&1 | tee $(OUT)/machine.log; exit $${PIPESTATUS[0]}

test-gpu: gpu-build
	$(PYTHON) -m benches.evidence tests $(OUT)

bench-gpu: gpu-build
	$(PYTHON) -m benches.evidence $(PART) $(OUT)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "ssl_fast needs Python 3.10 or later; make PYTHON=..."'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -c constraints.txt torch torchvision "setuptools>=77" ninja
	$(VENV)/bin/pip install --quiet --no-build-isolation -c constraints.txt -e ".[train,dev]"
	touch $@

$(VENV)/native: $(VENV)/installed setup.py $(NATIVE)
	$(RUN) setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/peers: pyproject.toml constraints.txt
	$(VENV)/bin/pip install --quiet -c constraints.txt -e ".[bench]" --no-build-isolation
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info ssl_fast/*.so ssl_fast/_build.json
