# SPDX-License-Identifier: LGPL-2.1-or-later
# kdbusfs: everything starts from `make help`.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
# mount(8) looks for its helpers nowhere else.
HELPERDIR ?= /sbin

VENV := .venv
BIN := $(VENV)/bin
PIP_OPTIONS := --quiet --quiet --disable-pip-version-check
TESTS ?= tests
TIME ?= 600
SEED ?= 0

# What the native module and the Python client are compiled from: a change in
# any of it makes the editable install build them again.
NATIVE_SOURCES = $(filter-out kdbusfs/native/_native.c,$(wildcard kdbusfs/native/*.[ch] kdbusfs/native/build.py)) \
	$(wildcard libkdbus/include/*/*.h libkdbus/src/*.[ch] libkdbus/python/kdbus/_build.py)

# The modules mypyc compiles are listed in setup.py. KDBUSFS_COMPILE=0 runs all of it
# as Python: slower, and an edit needs no make to have an effect.
KDBUSFS_COMPILE ?= 1
export KDBUSFS_COMPILE
ifneq ($(KDBUSFS_COMPILE),0)
COMPILED_SOURCES := $(shell sed -n 's/^    "\(kdbusfs.*\.py\)",/\1/p' setup.py)
endif

C_SOURCES = $(filter-out %/_native.c,$(wildcard kdbusfs/native/*.c libkdbus/src/*.c examples/*.c \
	bench/*.c tests/*.c tests/*/*.c))
C_WARNINGS := -std=gnu11 -O2 -D_GNU_SOURCE= -Wall -Wextra -Wshadow -Wundef -Wstrict-prototypes \
	-Wmissing-prototypes -Wvla -Werror

REMOVE_COMPILED := rm -f *__mypyc.*.so kdbusfs/abi/*.so kdbusfs/bus/*.so kdbusfs/fuse/*.so kdbusfs/peer/*.so

export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test fuzz check bench install clean library root

help: ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: root setup library ## mount, let programs in C and Python talk to each other, unmount
	@$(MAKE) --silent -C examples all
	@examples/demo.sh

test: root setup library ## run all tests, on both kinds of pool (TESTS=... picks some)
	@$(BIN)/python -m pytest $(TESTS)

fuzz: root setup library ## throw anything at a bus for TIME seconds (SEED=... repeats a run)
	@KDBUSFS_FUZZ_SECONDS=$(TIME) KDBUSFS_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -s tests/fuzz

check: setup ## ruff, mypy, and the C compiler with warnings as errors
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@for source in $(C_SOURCES); do \
		$(CC) $(C_WARNINGS) $(CPPFLAGS) -Ilibkdbus/include -Ikdbusfs/native -c -o /dev/null $$source || exit 1; \
	done

bench: root setup library ## measure, beside the smallest FUSE server in C, and print tables
	@$(BIN)/python bench/run.py

install: setup library ## install kdbusfs, libkdbus and mount.kdbusfs (PREFIX, DESTDIR)
	@$(MAKE) --silent -C libkdbus install PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)'
	@tools/install.sh '$(PYTHON)' '$(PREFIX)' '$(DESTDIR)' '$(HELPERDIR)'

clean: ## remove all that was built, the virtual environment too
	@for part in libkdbus examples; do \
		[ ! -e $$part/Makefile ] || $(MAKE) --silent -C $$part clean; \
	done
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kdbusfs/native/_native.* libkdbus/python/kdbus/_kdbus.*
	$(REMOVE_COMPILED)
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- done when needed -----------------------------------------------------------

library: setup
	@$(MAKE) --silent -C libkdbus all

setup: $(VENV)/.installed

$(VENV)/.packages: tools/packages.sh
	@tools/packages.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(PIP_OPTIONS) --upgrade 'setuptools>=77' 'cffi>=1.15' 'mypy>=1.15'
	@touch $@

$(VENV)/.installed: $(VENV)/.packages pyproject.toml setup.py $(NATIVE_SOURCES) $(COMPILED_SOURCES)
	@echo "installing kdbusfs into $(VENV)"
	@$(REMOVE_COMPILED)
	@$(BIN)/pip install $(PIP_OPTIONS) --no-build-isolation --editable '.[dev]'
	@touch $@

root:
	@[ "$$(id -u)" = 0 ] || { echo "kdbusfs mounts a filesystem: please run this as root" >&2; exit 1; }
