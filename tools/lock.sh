#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Resolves all Python packages anew, for each Python and machine that kdbusfs runs on, and
# writes their versions and hashes to requirements/. Usage: lock.sh PYTHON
#
#   run.txt     what the installed daemon and client need
#   dev.txt     that, and what tests and checks them
#   bench.txt   what draws plots
#   build.txt   what builds kdbusfs, kdbus and those of the others that come as source
set -eu

python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

resolve() { # FILE ARGUMENT...
	file=requirements/$1
	shift
	rm -f "$file"
	"$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command "make lock" --output-file "$file" "$@"
	echo "$file: $(grep -c == "$file") packages"
}

resolve build.txt --group build
resolve dev.txt --constraint requirements/build.txt --group dev pyproject.toml libkdbus/pyproject.toml
resolve bench.txt --constraint requirements/dev.txt --group bench
resolve run.txt --constraint requirements/dev.txt pyproject.toml libkdbus/pyproject.toml
