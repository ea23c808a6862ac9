#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Sees to it that what pip can't bring is there: compiler, FUSE headers, Python headers.
# Usage: packages.sh PYTHON, or packages.sh --list to print all that it may install;
# packages.sh PYTHON peers for what bench/peers.py holds kdbusfs against
set -eu

python=${1:-python3}
wanted=

want() { # COMMAND-THAT-TELLS PACKAGE...
	tell=$1
	shift
	if [ "$python" = --list ]; then
		printf '%s\n' "$@"
	elif ! sh -c "$tell" >/dev/null 2>&1; then
		wanted="$wanted $*"
	fi
}

headers="import os, sysconfig; raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
want "command -v cc && command -v gcc" gcc libc6-dev
want "command -v g++" g++
want "command -v make" make
want "command -v pkg-config" pkg-config
want "pkg-config --exists fuse3" libfuse3-dev
want "command -v mount && command -v umount" mount
want "command -v unshare && command -v mountpoint" util-linux
want "$python -c 'raise SystemExit(0)'" python3
want "$python -c \"$headers\"" python3-dev
want "$python -m ensurepip --version" python3-venv
[ "$python" != --list ] || exit 0
if [ "${2:-}" = peers ]; then
	want "command -v dbus-daemon" dbus
	want "command -v dbus-broker" dbus-broker
	want "pkg-config --exists libsystemd" libsystemd-dev
fi
[ -z "$wanted" ] || {
	if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
		echo "installing with apt-get:$wanted"
		log=$(mktemp)
		# shellcheck disable=SC2086
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $wanted; } \
			>"$log" 2>&1 </dev/null || { cat "$log" >&2; rm -f "$log"; exit 1; }
		rm -f "$log"
	else
		echo "kdbusfs needs the packages (by their Debian names)$wanted: please install them, then run make again" >&2
		exit 1
	fi
}
$python -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' || {
	echo "kdbusfs needs Python 3.11 or newer; $python is $($python -V 2>&1): name another one with make PYTHON=..." >&2
	exit 1
}
