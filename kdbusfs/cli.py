# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of kdbusfs(8): what is asked for, and one line when that can't be had."""

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from kdbusfs.user_error import UserError, one_line
from kdbusfs.version import VERSION

POOLS = ("auto", "passthrough", "cache")

# Of mount(8)'s and fstab(5)'s options those that say nothing kdbusfs could do
# otherwise, or are for the program that reads fstab.
GENERIC_OPTIONS = frozenset(
    """
    defaults rw suid nosuid dev nodev exec noexec auto noauto user nouser users owner group
    async sync dirsync atime noatime diratime nodiratime relatime norelatime strictatime
    nostrictatime lazytime nolazytime iversion noiversion mand nomand silent loud
    _netdev nofail allow_other default_permissions remount
    """.split()
)
# The last three are what the kernel shows of a mount, which mount(8) repeats for a remount.
GENERIC_PREFIXES = ("x-", "X-", "comment=", "user_id=", "group_id=", "max_read=")
MAX_SOURCE = 255
"""What fsconfig(2) takes, in bytes."""

EPILOG = f"""\
mount options (-o, separated by commas):
  pool=KIND, spin=USEC  as the options above
  remount               change nothing; fails where no kdbusfs is mounted
  sloppy                pass over options that are unknown
  rw, nosuid, noauto, _netdev, x-... and other generic ones have no effect

exit codes:
  {os.EX_OK:2}  mounted (in the foreground: unmounted again)
  {os.EX_USAGE:2}  wrong arguments, or a mount point that the whole system uses, such as /
  {os.EX_NOINPUT:2}  no such mount point, or not a directory
  {os.EX_UNAVAILABLE:2}  no /dev/fuse, or the kernel lacks the kind of pool asked for
  {os.EX_SOFTWARE:2}  a fault of kdbusfs; the log tells more
  {os.EX_OSERR:2}  the kernel refused to mount
  {os.EX_CANTCREAT:2}  a kdbusfs is mounted there already
  {os.EX_IOERR:2}  what --help or --version say can't be written
  {os.EX_NOPERM:2}  not permitted

SIGTERM, SIGINT and umount(8) end kdbusfs.
"""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (kdbusfs --help tells more)", os.EX_USAGE)


def _microseconds(text: str) -> int | None:
    if text == "auto":
        return None
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"not a number of microseconds up to a million: '{text}'")
    return value


def _source(text: str) -> str:
    if not 1 <= len(os.fsencode(text)) <= MAX_SOURCE:
        raise argparse.ArgumentTypeError(f"not of 1 to {MAX_SOURCE} bytes")
    return text


def _parser() -> _Parser:
    parser = _Parser(
        prog="kdbusfs",
        description="Mount a kdbus domain: buses to be used with open, ioctl, mmap and poll.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "mount_point",
        metavar="MOUNTPOINT",
        help="the directory to mount on; /sys/fs/kdbus need not exist",
    )
    parser.add_argument(
        "-f",
        "--foreground",
        action=argparse.BooleanOptionalAction,
        help="stay in the foreground and log to stderr instead of the system log",
    )
    parser.add_argument(
        "-d",
        "--debug",
        action="store_true",
        help="log every request and its answer; in the foreground, unless --no-foreground is given",
    )
    parser.add_argument("--version", action="version", version=f"kdbusfs {VERSION}")
    _add_mounting(parser)
    return parser


def _add_mounting(parser: _Parser) -> None:
    """The options that say how to mount."""
    parser.add_argument(
        "--pool",
        metavar="KIND",
        choices=POOLS,
        default="auto",
        help="how pools are mapped: passthrough (Linux 6.9 or newer), cache, or auto (default)",
    )
    parser.add_argument(
        "--spin",
        metavar="USEC",
        type=_microseconds,
        help="poll for requests that long before sleeping (default: as fits the machine)",
    )
    parser.add_argument(
        "--source",
        metavar="NAME",
        type=_source,
        default="kdbusfs",
        help="what findmnt(8) shows as the source of the mount (default: kdbusfs)",
    )
    parser.add_argument(
        "-o",
        dest="mount_options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="mount options, see below",
    )


def _apply_mount_options(parser: _Parser, arguments: argparse.Namespace) -> None:
    """Carry -o's pool=, spin= and remount over into *arguments*; refuse what is unknown."""
    words = [word for options in arguments.mount_options for word in options.split(",") if word]
    sloppy = "sloppy" in words
    arguments.remount = "remount" in words
    for word in words:
        key, equals, value = word.partition("=")
        if key in ("pool", "spin") and equals:
            # The parser judges them in both spellings; only the last one counts.
            judged = parser.parse_args([f"--{key}={value}", "."])
            setattr(arguments, key, getattr(judged, key))
        elif word == "ro" and not sloppy:
            parser.error("mount option 'ro': a domain can't be mounted read-only")
        elif not (word in GENERIC_OPTIONS or word.startswith(GENERIC_PREFIXES) or sloppy):
            parser.error(f"unknown mount option '{word}'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run kdbusfs with *arguments* (default: the process's own); the exit code.

    SystemExit after --help and --version.
    """
    _open_standard_files()
    try:
        parser = _parser()
        parsed = _parsed(parser, arguments)
        _apply_mount_options(parser, parsed)
        return _run(parsed)
    except UserError as error:
        _complain(f"kdbusfs: {one_line(str(error))}")
        return error.exit_code


def _run(parsed: argparse.Namespace) -> int:
    # Not sooner: --help and a mistyped option need none of what serving needs.
    from kdbusfs import daemon, mount

    if parsed.remount:
        mount.check_remount(parsed.mount_point)
        return os.EX_OK
    options = daemon.Options(
        mount_point=parsed.mount_point,
        foreground=parsed.debug if parsed.foreground is None else parsed.foreground,
        debug=parsed.debug,
        pool=parsed.pool,
        source=parsed.source,
        spin_us=parsed.spin,
    )
    return daemon.run(options)


# --- standard files ---------------------------------------------------------------------


def _open_standard_files() -> None:
    """Have 0, 1 and 2 open, if only on /dev/null, so that no other file gets these numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _parsed(parser: _Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for; SystemExit once it was told what --help or --version say."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            return parser.parse_args(arguments)
    except SystemExit:
        _say(text.getvalue())
        raise


def _say(text: str) -> None:
    """Write to stdout. UserError if that fails, unless nobody wants to read it (any more)."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _give_up(1)
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output: {error.strerror}", os.EX_IOERR) from error


def _complain(text: str) -> None:
    """Write a line to stderr, if there is one."""
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)
    except OSError:
        _give_up(2)


def _give_up(standard: int) -> None:
    """Let what is still to be written to a standard file go nowhere, without a complaint."""
    with open(os.devnull, "wb", buffering=0) as null:
        os.dup2(null.fileno(), standard)
