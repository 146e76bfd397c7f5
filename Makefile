# SPDX-License-Identifier: MIT
# Everything sets itself up: on a fresh Debian or Ubuntu machine `make demo` and `make test` are enough.

VENV := .venv
PYTHON ?= python3
PYTEST := $(VENV)/bin/pytest
QEMUS = $(shell scripts/fetch-qemu --list 2>/dev/null | cut -f2)

.PHONY: help demo test test-fast test-matrix check venv system guest qemus clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv  ## play the scene: a live disk moves from snap2 to copy
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/demo

test: check test-fast  ## linters, types, and all tests on the system's QEMU

test-fast: venv guest
	$(PYTEST) -n 2 --dist worksteal -m "not slow" tests

test-matrix: venv guest qemus  ## all tests on QEMU 5.2, 7.2, 10.0 and the newest
	$(PYTEST) -n 2 --dist worksteal tests/qemu tests/guest $(addprefix --qemu=,$(QEMUS))

check: venv  ## linters and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml | system
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable . --group test --group check
	@touch $@

system:
	@scripts/install-packages

guest: | system
	@scripts/guest

qemus: | system
	@scripts/fetch-qemu

clean:  ## remove what was made here
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache
