# Every target does its own set-up in .venv; a second run finds it done. `make PYTHON=python3.12 test` picks the Python.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE := $(wildcard csrc/*)

.PHONY: demo test check bench test-gpu bench-gpu clean

demo: $(VENV)/native
	$(RUN) -m ssl_fast.cli demo

test: $(VENV)/native
	$(RUN) -m pytest

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/native $(VENV)/peers
	$(RUN) -m benches.bench_nt_xent

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
