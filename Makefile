# SPDX-License-Identifier: LGPL-2.1-or-later
# kdbusfs: everything starts from `make help`.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_OPTIONS := --quiet --quiet --disable-pip-version-check

# What the native module and the Python client are compiled from: a change in
# any of it makes the editable install build them again.
NATIVE_SOURCES = $(filter-out kdbusfs/native/_native.c,$(wildcard kdbusfs/native/*.[ch] kdbusfs/native/build.py)) \
	$(wildcard libkdbus/include/*/*.h libkdbus/src/*.[ch] libkdbus/python/kdbus/_build.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check bench install clean setup root

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

# --- set-up, done when needed -------------------------------------------------

setup: $(VENV)/.installed ## make .venv with kdbusfs in it (the other targets do this by themselves)

$(VENV)/.packages: tools/packages.sh
	@tools/packages.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(PIP_OPTIONS) --upgrade 'setuptools>=77' 'cffi>=1.15'
	@touch $@

$(VENV)/.installed: $(VENV)/.packages pyproject.toml setup.py $(NATIVE_SOURCES)
	@echo "installing kdbusfs into $(VENV)"
	@$(BIN)/pip install $(PIP_OPTIONS) --no-build-isolation --editable '.[dev]'
	@touch $@
