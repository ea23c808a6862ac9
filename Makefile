# SPDX-License-Identifier: LGPL-2.1-or-later
# kdbusfs: everything starts from `make help`.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
# mount(8) looks for its helpers nowhere else.
HELPERDIR ?= /sbin

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
# Versions and hashes are those in requirements/, of what is built in isolation too.
LOCKED := --require-hashes --build-constraint requirements/build.txt
TESTS ?= tests
TIME ?= 600
SEED ?= 0
# Test processes at a time. Each has mounts of its own.
JOBS ?= $(shell nproc)

# What the native module and the Python client are compiled from: a change in
# any of it makes the editable install build them again.
NATIVE_SOURCES = $(filter-out kdbusfs/native/_native.c,$(wildcard kdbusfs/native/*.[ch] kdbusfs/native/build.py))
CLIENT_SOURCES = $(wildcard libkdbus/include/*/*.h libkdbus/src/*.[ch] libkdbus/python/kdbus/_build.py)

# The modules mypyc compiles are listed in setup.py. KDBUSFS_COMPILE=0 runs all of it
# as Python: slower, and an edit needs no make to have an effect.
KDBUSFS_COMPILE ?= 1
export KDBUSFS_COMPILE
ifneq ($(KDBUSFS_COMPILE),0)
COMPILED_SOURCES := $(shell sed -n 's/^    "\(kdbusfs.*\.py\)",/\1/p' setup.py)
endif

# Those for D-Bus only where there is sd-bus: nothing else needs it.
PEER_SOURCES = $(filter-out $(if $(wildcard /usr/include/systemd/sd-bus.h),,%/dbus.c %/broker.c),$(wildcard bench/peers/*.c))
C_SOURCES = $(filter-out %/_native.c,$(wildcard kdbusfs/native/*.c libkdbus/src/*.c examples/*.c \
	bench/*.c tests/*.c tests/*/*.c) $(PEER_SOURCES))
# and what clang-format holds in shape, .clang-format says how
C_FILES = $(C_SOURCES) $(wildcard tests/*/*/*.c kdbusfs/native/*.h libkdbus/src/*.h libkdbus/include/kdbus/*.h \
	bench/*.h bench/peers/*.[ch] tests/*/*.h)
C_WARNINGS := -std=gnu11 -O2 -D_GNU_SOURCE= -Wall -Wextra -Wshadow -Wundef -Wstrict-prototypes \
	-Wmissing-prototypes -Wvla -Werror

REMOVE_COMPILED := rm -f *__mypyc.*.so kdbusfs/abi/*.so kdbusfs/bus/*.so kdbusfs/fuse/*.so kdbusfs/peer/*.so

export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup packages demo test fuzz check coverage bench bench-floor bench-hostile bench-peers peers dist install lock clean library root

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: root setup library ## mount, let programs in C and Python talk to each other, unmount
	@echo "compiling the examples"
	@$(MAKE) --silent -C examples all
	@examples/demo.sh

test: root setup library ## run all tests, JOBS=... at a time (TESTS=... picks some)
	@$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile $(TESTS)

fuzz: root setup library ## throw anything at a bus for TIME seconds (SEED=... repeats a run)
	@KDBUSFS_FUZZ_SECONDS=$(TIME) KDBUSFS_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -s tests/fuzz

check: setup ## ruff, mypy, clang-format, and the C compiler with warnings as errors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	@$(BIN)/mypy
	@$(BIN)/mypy --config-file tests/mypy.ini tests
	@for source in $(C_SOURCES); do \
		$(CC) $(C_WARNINGS) $(CPPFLAGS) -Ilibkdbus/include -Ikdbusfs/native -c -o /dev/null $$source || exit 1; \
	done

coverage: setup ## fail if tests/bus reach less of kdbusfs/bus than they did
	@tools/coverage.sh $(BIN)/python

bench: root setup peers ## time it beside D-Bus and others; fail if a ratio got worse by a third
	@$(BIN)/python bench/peers.py --check

bench-floor: root setup ## time each operation beside the smallest FUSE server in C
	@$(BIN)/python bench/run.py

bench-hostile: root setup ## measure how long others wait while one attacks (AGAINST=... another kdbusfs)
	@$(BIN)/python bench/hostile.py $(if $(AGAINST),--against '$(AGAINST)')

bench-peers: root setup peers $(VENV)/.bench ## the same with more sizes and crowds, and draw the plots
	@$(BIN)/python bench/peers.py --plots docs/performance

dist: $(VENV)/.tools ## build sdists and wheels into dist/, and try each in an empty environment
	@$(BIN)/python tools/dist.py dist

install: $(VENV)/.tools library ## install kdbusfs, libkdbus, the Python client and mount.kdbusfs (PREFIX, DESTDIR)
	@$(MAKE) --silent -C libkdbus install PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)'
	@tools/install.sh '$(BIN)/python' '$(PREFIX)' '$(DESTDIR)' '$(HELPERDIR)'

lock: packages ## resolve the versions in requirements/ anew
	@tools/lock.sh '$(PYTHON)'

clean: ## remove all that was built, the virtual environment too
	@for part in libkdbus examples; do \
		[ ! -e $$part/Makefile ] || $(MAKE) --silent -C $$part clean; \
	done
	rm -rf $(VENV) build dist *.egg-info libkdbus/build libkdbus/python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kdbusfs/native/_native.* libkdbus/python/kdbus/_kdbus.*
	$(REMOVE_COMPILED)
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- done when needed -----------------------------------------------------------

library: packages
	@echo "compiling libkdbus"
	@$(MAKE) --silent -C libkdbus all

# Whose packages can't be had is left out, and told.
peers: packages
	@tools/packages.sh '$(PYTHON)' peers || echo "going on without them" >&2

setup: $(VENV)/.kdbusfs $(VENV)/.kdbus

packages: $(VENV)/.packages

$(VENV)/.packages: tools/packages.sh
	@echo "looking for compilers, headers and Python"
	@tools/packages.sh '$(PYTHON)'
	@mkdir -p $(VENV)
	@touch $@

$(VENV)/.tools: $(VENV)/.packages requirements/build.txt
	@echo "making a virtual environment in $(VENV), with what builds kdbusfs"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --require-hashes --requirement requirements/build.txt
	@touch $@

$(VENV)/.requirements: $(VENV)/.tools requirements/dev.txt
	@echo "installing what kdbusfs needs (pyfuse3 is compiled) and what tests it"
	@$(PIP_INSTALL) $(LOCKED) --requirement requirements/dev.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.requirements requirements/bench.txt
	@$(PIP_INSTALL) $(LOCKED) --requirement requirements/bench.txt
	@touch $@

# What builds these two is in the environment, in the versions of requirements/build.txt.
EDITABLE = $(PIP_INSTALL) --no-deps --no-build-isolation --check-build-dependencies --editable

$(VENV)/.kdbusfs: $(VENV)/.requirements pyproject.toml setup.py $(NATIVE_SOURCES) $(COMPILED_SOURCES)
	@echo "compiling kdbusfs and installing it"
	@$(REMOVE_COMPILED)
	@$(EDITABLE) .
	@touch $@

$(VENV)/.kdbus: $(VENV)/.kdbusfs libkdbus/pyproject.toml libkdbus/setup.py $(CLIENT_SOURCES)
	@echo "compiling the Python client and installing it"
	@$(EDITABLE) ./libkdbus
	@touch $@

root:
	@[ "$$(id -u)" = 0 ] || { echo "kdbusfs mounts a filesystem: please run this as root" >&2; exit 1; }
