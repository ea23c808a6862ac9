# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of mounts, in which anybody's mounts are lines."""

import io
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import daemons
from daemons import KDBUSFS, MountNamespace, mounted_at, serving, wait_until
from kdbusfs.mount import mountinfo
from kdbusfs.mount.mountinfo import Mount, MountId

LINE = (
    rb"36 35 98:0 /mnt1 /mnt\0402 rw,noatime shared:1 master:2"
    rb" - ext\0413 /dev/r\134oot rw,errors=continue"
)

ODD_NAMES = {
    "no UTF-8": b"\xff\xfe",
    "carriage return": b"a\rb",
    "vertical tab, form feed": b"a\x0bb\x0cc",
    "file separators": b"a\x1cb\x1db\x1e",
    "next line": "a\N{NEXT LINE}b".encode(),
    "line separator": "a\N{LINE SEPARATOR}b".encode(),
    "latin-1 next line": b"a\x85b",
    "newline": b"a\nb",
    "blank and tab": b"a b\tc",
    "backslash": rb"a\b\040",
    "hash": b"#a",
    "separator": b" - fuse.kdbusfs - ",
    "deleted": b"a (deleted)",
}


def test_a_line_is_taken_apart():
    assert Mount.parse(LINE) == Mount(
        id=36,
        parent_id=35,
        device=os.makedev(98, 0),
        path="/mnt 2",
        fstype="ext!3",
        source="/dev/r\\oot",
        options="rw,errors=continue",
    )


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"rw",
        b"36 35 98:0 / /mnt rw",
        b"36 35 98:0 / - ext4 /dev/root rw",
        b"36 35 98:0 / /mnt rw - ext4 /dev/root",
        b"x 35 98:0 / /mnt rw - ext4 /dev/root rw",
        b"36 35 98 / /mnt rw - ext4 /dev/root rw",
        b"36 35 98:0:0 / /mnt rw - ext4 /dev/root rw",
        b"\xff 35 98:0 / /mnt rw - ext4 /dev/root rw",
    ],
)
def test_what_is_no_line_is_told(line):
    with pytest.raises(ValueError, match=r"unpack|literal"):
        Mount.parse(line)


@pytest.mark.parametrize("source", [b"", b"\xff", b"a\rb", b"\\012"])
def test_a_source_may_be_anything(source):
    line = b"36 35 0:40 / /mnt rw - tmpfs %b rw,a b" % source
    mount = Mount.parse(line)
    assert os.fsencode(mount.source) == source.replace(b"\\012", b"\n")
    assert mount.options == "rw,a b"


def test_lines_that_make_no_sense_are_passed_over(monkeypatch):
    text = b"\n".join([LINE, b"a line of its own", LINE.replace(b"36 ", b"37 "), b""])
    monkeypatch.setattr("builtins.open", lambda path, mode: io.BytesIO(text))
    assert [mount.id for mount in mountinfo.mounts()] == [36, 37]
    assert mountinfo.fstype_of(os.makedev(98, 0)) == "ext!3"
    assert mountinfo.fstype_of(os.makedev(8, 0)) is None


def test_the_table_is_what_the_descriptors_say():
    listed = {mount.id: mount for mount in mountinfo.mounts()}
    with mountinfo.opened("/proc") as descriptor:
        mount_id = MountId.of(descriptor)
    assert listed[mount_id.id].path == "/proc"
    assert mountinfo.mount_at(Path("/proc")) == (mount_id, listed[mount_id.id])
    assert mountinfo.mount_at(Path("/proc/self")) is None
    assert mountinfo.mount_at(Path("/missing")) is None
    assert mountinfo.mount_at(Path("/proc/version/x")) is None
    assert mountinfo.fstype_of(os.stat("/proc").st_dev) == "proc"


# --- mounts elsewhere, of whatever name --------------------------------------------------


@pytest.fixture
def namespace() -> Iterator[MountNamespace]:
    """A mount namespace with a directory for mounts in it; others must not see odd ones."""
    daemons.need_mounting()
    namespace = MountNamespace("private")
    namespace.do("mount -t tmpfs none /mnt && mkdir /mnt/kdbus /mnt/beside /mnt/odd")
    ours = os.readlink(f"/proc/{namespace.pid}/ns/mnt")
    yield namespace
    for entry in Path("/proc").glob("[0-9]*/ns/mnt"):
        # What a failed test left running.
        with suppress(OSError):
            if os.readlink(entry) == ours and int(entry.parts[2]) != namespace.pid:
                os.kill(int(entry.parts[2]), signal.SIGKILL)
    namespace.end()


def mount_odd(namespace: MountNamespace) -> list[Path]:
    """Mount things whose paths and sources are odd; the paths."""
    paths = [Path("/mnt/odd", os.fsdecode(name)) for name in ODD_NAMES.values()]
    for path in paths:
        namespace.path(str(path)).mkdir()
        result = namespace.run("mount", "-t", "tmpfs", path.name, path)
        assert result.returncode == 0, result.stderr
    return paths


def test_starts_and_ends_beside_odd_mounts(namespace):
    mount_odd(namespace)
    path = Path("/mnt/beside")
    result = namespace.run(KDBUSFS, path)
    assert (result.returncode, result.stderr) == (0, "")
    assert os.listdir(namespace.path("/mnt/beside")) == ["control"]
    end(namespace, path)
    assert not mounted_at(path, namespace.pid)


def end(namespace: MountNamespace, path: Path) -> None:
    """End the kdbusfs that was started for *path*."""
    (pid,) = serving(path)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not serving(path), "kdbusfs is still running")


PASS_FILES = """
import os, sys
from kdbus import Bus, Connection, Message
with Bus(sys.argv[1], f"{os.geteuid()}-odd") as bus:
    alice, bob = Connection(bus.path), Connection(bus.path)
    for path in sys.argv[2:]:
        file = os.open(path, os.O_RDONLY)
        alice.send(Message(b"foobar", fds=[file], dst_id=bob.id))
        print(bob.recv().payload().decode())
"""


def test_a_running_one_passes_descriptors_beside_odd_mounts(namespace, tmp_path):
    """Whether a file is a node of some kdbusfs is looked up in the mountinfo."""
    path = Path("/mnt/kdbus")
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        command = ["nsenter", f"--mount=/proc/{namespace.pid}/ns/mnt", KDBUSFS, "-f", path]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        wait_until(lambda: mounted_at(path, namespace.pid), "kdbusfs never mounted")
        files = [odd / "file" for odd in mount_odd(namespace)]
        for file in files:
            namespace.path(str(file)).touch()
        python = KDBUSFS.with_name("python")
        result = namespace.run(python, "-c", PASS_FILES, path, *files)
        assert (result.returncode, result.stdout) == (0, "foobar\n" * len(files)), result.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(daemons.DEADLINE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    text = log.read_text(errors="replace")
    assert not [fault for fault in daemons.FAULTS if fault in text], text


@pytest.mark.parametrize(
    "name", ["no UTF-8", "carriage return", "newline", "blank and tab", "backslash", "next line"]
)
def test_can_be_mounted_on_an_odd_path_and_have_an_odd_source(namespace, name):
    path = Path("/mnt/odd", os.fsdecode(ODD_NAMES[name]))
    namespace.path(str(path)).mkdir()
    result = namespace.run(KDBUSFS, f"--source={path.name}", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert os.listdir(namespace.path(str(path))) == ["control"]
    again = namespace.run(KDBUSFS, path)
    assert again.returncode == os.EX_CANTCREAT
    assert again.stderr[:-1].isprintable()
    lines = (os.fsencode(line) for line in daemons.mount_table(namespace.pid))
    (listed,) = [mount for mount in map(Mount.parse, lines) if mount.path == str(path)]
    assert (listed.fstype, listed.source) == ("fuse.kdbusfs", path.name)
    end(namespace, path)
    assert not os.listdir(namespace.path(str(path)))


def test_a_mount_that_got_the_number_of_another_one_is_not_taken_for_it(namespace):
    """Run in the namespace: it mounts, and asks for the end of a mount of the same number."""
    script = """
import sys
from pathlib import Path
from kdbusfs.mount import mountinfo
path = Path("/mnt/odd")
mount_id, mount = mountinfo.mount_at(path)
assert mount.source == "one"
if not mount_id.unique:
    sys.exit(77)
assert mountinfo.detach(mount_id._replace(unique=mount_id.unique - 1))
assert mountinfo.mount_at(path) == (mount_id, mount)
assert mountinfo.detach(mount_id)
assert mountinfo.mount_at(path) is None
assert mountinfo.detach(mount_id)
"""
    namespace.do("mount -t tmpfs one /mnt/odd")
    result = namespace.run(KDBUSFS.with_name("python"), "-c", script)
    if result.returncode == 77:
        pytest.skip("Linux before 6.8 has no numbers that are never given again")
    assert (result.returncode, result.stderr) == (0, "")


def test_what_is_covered_is_not_unmounted_and_nor_is_its_cover(namespace):
    script = """
import subprocess
from pathlib import Path
from kdbusfs.mount import mountinfo
path = Path("/mnt/odd")
lower, _ = mountinfo.mount_at(path)
subprocess.run(["mount", "-t", "tmpfs", "two", path], check=True)
upper, mount = mountinfo.mount_at(path)
assert mountinfo.below(upper).id == lower.id
assert not mountinfo.detach(lower)
assert mountinfo.mount_at(path) == (upper, mount)
assert mountinfo.detach(upper)
assert mountinfo.detach(lower)
assert mountinfo.mount_at(path) is None
"""
    namespace.do("mount -t tmpfs one /mnt/odd")
    result = namespace.run(KDBUSFS.with_name("python"), "-c", script)
    assert (result.returncode, result.stderr) == (0, "")
