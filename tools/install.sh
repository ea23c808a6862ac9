#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Installs kdbusfs and the Python client with the Python packages they need into a directory
# of its own, PREFIX/lib/kdbusfs, so that it meets no other Python program's, and the commands
# kdbusfs and mount.kdbusfs. PYTHON is one that has what requirements/build.txt names.
# Usage: install.sh PYTHON PREFIX DESTDIR HELPERDIR
set -eu

python=$1 prefix=$2 destdir=$3 helperdir=$4
home=$prefix/lib/kdbusfs
staged=$destdir$home
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

pip() {
	"$python" -m pip --disable-pip-version-check "$@"
}

echo "making wheels of what kdbusfs needs"
pip wheel --quiet --quiet --require-hashes --build-constraint requirements/build.txt \
	--wheel-dir "$wheels" --requirement requirements/run.txt
# Modules that the project no longer has may lie here from another time.
rm -rf build/lib build/lib.* build/bdist.* libkdbus/build
echo "making wheels of kdbusfs and of the Python client"
pip wheel --quiet --quiet --no-deps --no-build-isolation --check-build-dependencies \
	--wheel-dir "$wheels" . ./libkdbus

echo "installing into $staged"
rm -rf "$staged"
"$python" -m venv --without-pip "$staged"
pip --python "$staged/bin/python" install --quiet --quiet --no-index --no-deps "$wheels"/*.whl
# Python finds its directory from where it is started, scripts carry it in their
# first line: under DESTDIR that would be the wrong one.
find "$staged/bin" -mindepth 1 ! -name 'python*' -delete

install -d "$destdir$prefix/bin" "$destdir$prefix/share/doc/kdbusfs/docs" \
	"$destdir$prefix/share/doc/kdbusfs/examples" "$destdir$helperdir"
# -I: root must not import what lies in the current directory or PYTHONPATH.
printf '#!/bin/sh\nexec %s/bin/python -I -m kdbusfs "$@"\n' "$home" >"$destdir$prefix/bin/kdbusfs"
chmod 755 "$destdir$prefix/bin/kdbusfs"
sed "s|^kdbusfs=.*|kdbusfs=$prefix/bin/kdbusfs|" mount-helper/mount.kdbusfs >"$destdir$helperdir/mount.kdbusfs"
chmod 755 "$destdir$helperdir/mount.kdbusfs"
ln -sf mount.kdbusfs "$destdir$helperdir/mount.fuse.kdbusfs"
install -m 644 README.md CHANGELOG.md LICENSE "$destdir$prefix/share/doc/kdbusfs"
install -m 644 docs/*.md "$destdir$prefix/share/doc/kdbusfs/docs"
install -m 644 examples/*.c examples/*.py "$destdir$prefix/share/doc/kdbusfs/examples"
# The dynamic linker has to hear of libkdbus, unless this is only a staging directory.
[ -n "$destdir" ] || ! command -v ldconfig >/dev/null || ldconfig
