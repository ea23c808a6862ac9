#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Mount kdbusfs on a temporary directory, make a bus, let programs in C and
# Python talk to each other, unmount. Nothing is left behind. Exit code 0 if
# everyone has said and heard what they should.
#
# Whoever is waited for says so: each program prints a line "ready: ..." once it
# can be talked to. No step takes longer than $LIMIT.

set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/examples
build=${BUILD:-$root/build/examples}
bin=$root/.venv/bin
name=org.example.receiver
LIMIT=20s

work=$(mktemp -d)
mnt=$work/kdbus
maker= receiver=

clean_up() {
	code=$?
	trap - EXIT HUP INT TERM
	exec 3<&-
	for pid in $receiver $maker; do
		kill "$pid" 2>/dev/null || :
		wait "$pid" 2>/dev/null || :
	done
	if mountpoint -q "$mnt"; then
		umount "$mnt" || umount --lazy "$mnt" || code=1
	fi
	rm -rf --one-file-system "$work" || code=1
	[ "$code" = 0 ] || echo "demo.sh: FAILED" >&2
	exit "$code"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# talk HEADING "RECEIVER..." "SENDER..." EXPECTED-SENDER: one message
talk() {
	printf '\n--- %s\n$ %s &\n' "$1" "$2"
	# shellcheck disable=SC2086 # these are command lines
	timeout "$LIMIT" $2 >"$work/received" &
	receiver=$!
	# The sender has to wait until the receiver can be found.
	exec 3<"$work/received"
	IFS= read -r line <&3
	case $line in
	"ready: "*) echo "$line" ;;
	*) echo "demo.sh: the receiver is not ready" >&2; exit 1 ;;
	esac

	echo "$ $3"
	# shellcheck disable=SC2086
	timeout "$LIMIT" $3
	heard=$(cat <&3)
	exec 3<&-
	wait "$receiver"
	receiver=

	echo "$heard"
	for expected in "message: foobar" "length: 6" "sender: $4" \
		"credentials: pid [1-9]*, uid $(id -u), gid $(id -g)"; do
		# shellcheck disable=SC2254 # these are patterns
		case "
$heard
" in
		*"
"$expected"
"*) ;;
		*) echo "demo.sh: expected \"$expected\"" >&2; exit 1 ;;
		esac
	done
}

mkfifo "$work/received" "$work/bus"
mkdir "$mnt"

talk "AF_UNIX, C to C: what everyone knows" \
	"$build/unix-recv $work/socket" "$build/unix-send $work/socket" "@*"

printf '\n--- a domain and a bus\n'
echo "$ kdbusfs $mnt"
timeout "$LIMIT" "$bin/kdbusfs" "$mnt"
echo "$ bus-make $mnt demo &"
"$build/bus-make" "$mnt" demo >"$work/bus" &
maker=$!
IFS= read -r line <"$work/bus"
echo "$line"
bus=${line#ready: }
ls -l "$mnt" "$(dirname "$bus")"

talk "kdbus, C to C" \
	"$build/kdbus-recv $bus $name" "$build/kdbus-send $bus $name" "connection [1-9]*"
talk "kdbus, C to Python" \
	"$bin/python $here/kdbus_recv.py $bus $name" "$build/kdbus-send $bus $name" \
	"connection [1-9]*"
talk "kdbus, Python to C" \
	"$build/kdbus-recv $bus $name" "$bin/python $here/kdbus_send.py $bus $name" \
	"connection [1-9]*"
talk "kdbus, Python to Python" \
	"$bin/python $here/kdbus_recv.py $bus $name" "$bin/python $here/kdbus_send.py $bus $name" \
	"connection [1-9]*"

printf '\n--- the end\n'
echo "$ kill $maker"
kill "$maker"
wait "$maker" || :
maker=
[ "$(ls "$mnt")" = control ] || { echo "demo.sh: the bus is still there" >&2; exit 1; }
echo "$ umount $mnt"
umount "$mnt"
echo "everyone has said and heard what they should"
