# SPDX-License-Identifier: MIT
# Everything sets itself up: on a fresh Debian or Ubuntu machine `make demo` and `make test` are enough.

VENV := .venv
PYTHON ?= python3
PYTEST := $(VENV)/bin/pytest
QEMUS = $(shell scripts/fetch-qemu --list 2>/dev/null | sort -V | cut -f2)
OLDEST_AND_NEWEST = $(firstword $(QEMUS)) $(lastword $(QEMUS))
MORE_TESTS := tests/docs/test_docs.py $(addprefix tests/qemu/test_, creation_options.py sparseness.py network_servers.py \
	network_drivers.py image_sizes.py next_start.py carried_options.py destination_refusals.py \
	blockcommit.py blockpull.py snapshot.py recipes.py move_storage.py migrate.py migrate_failures.py cli_migrate.py \
	interrupted_recover.py)
ON_ALL_VERSIONS := $(addprefix tests/guest/test_, group.py verbs.py migrate.py)
VERSIONS_TESTS := $(addprefix tests/qemu/test_, hazards.py hazards_elsewhere.py cancel_by_force.py) tests/guest

.PHONY: help demo test test-fast test-more test-versions test-matrix bench check docs package venv system guest qemus clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv  ## play the scene: a live disk moves from snap2 to copy
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/demo

test: check test-fast  ## linters, types, and the quick tests on the system's QEMU

test-fast: venv guest
	@scripts/install-packages tests
	$(PYTEST) -n 2 --dist worksteal -m "not slow" $(addprefix --ignore=,$(MORE_TESTS) $(ON_ALL_VERSIONS)) tests

test-more: venv guest  ## every kind of destination, the other verbs, and every example of the documentation
	@scripts/install-packages tests
	$(PYTEST) -n 2 --dist worksteal -m "not slow" $(MORE_TESTS)

test-versions: venv guest qemus  ## the scene, the hazards and the guest on QEMU 5.2, 7.2, 10.0 and the newest
	$(PYTEST) -n 2 --dist worksteal -m "not slow" $(VERSIONS_TESTS) $(addprefix --qemu=,$(QEMUS))

test-matrix: venv guest qemus  ## all tests on all of them, and the kill tests; takes an hour
	$(PYTEST) -n 2 --dist worksteal -m "not slow" tests/qemu tests/guest $(addprefix --qemu=,$(QEMUS))
	$(PYTEST) -n 2 --dist worksteal -m slow tests $(addprefix --qemu=,$(OLDEST_AND_NEWEST))

bench: venv guest  ## what a guest notices of the end of a copy, beside virsh where a libvirtd runs
	@$(VENV)/bin/python scripts/bench $(BENCH)

check: venv  ## linters and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: venv  ## build the documentation in docs/_build; warnings are errors
	$(VENV)/bin/pip install --quiet --group docs
	$(VENV)/bin/sphinx-build -W --keep-going -q -b html docs docs/_build

package: venv  ## build sdist and wheel, and use them with the oldest and newest dependencies
	$(VENV)/bin/pip install --quiet --group package
	scripts/check-package

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
	rm -rf $(VENV) docs/_build .cache .mypy_cache .pytest_cache .ruff_cache
