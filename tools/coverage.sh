#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Fails if tests/bus, which need neither a mount nor root, reach too little of kdbusfs/bus.
# Usage: coverage.sh PYTHON
#
# What is compiled can't be measured: the tests are run on a copy of the sources.
# Those that try every fault, or make up what clients do, take long and are left out.
set -eu

python=$(realpath --no-symlinks "$1")
root=$PWD
floor=97
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

find kdbusfs \( -name '*.py' -o -name '_native*.so' \) -exec cp --parents -t "$work" {} +
cd "$work"
"$python" -m coverage run --source=kdbusfs.bus -m pytest --quiet --no-header -p no:cacheprovider \
	--config-file "$root/pyproject.toml" --rootdir "$root" \
	--ignore="$root/tests/bus/test_faults.py" --ignore="$root/tests/bus/test_machine.py" "$root/tests/bus"
"$python" -m coverage report --skip-covered --show-missing --fail-under "$floor"
