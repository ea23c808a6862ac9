# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: what it understands, and what it says of the rest, in one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdbusfs import __version__, cli, daemon, mount
from kdbusfs.user_error import UserError


@pytest.fixture
def asked_for(monkeypatch):
    """Run the command line up to the daemon; the options the daemon would have got."""

    def parse(*arguments: str) -> daemon.Options:
        asked = []
        monkeypatch.setattr(daemon, "run", lambda options: asked.append(options) or os.EX_OK)
        assert cli.main(arguments) == os.EX_OK
        (options,) = asked
        return options

    return parse


def test_a_mount_point_is_all_it_needs(asked_for):
    assert asked_for("/mnt") == daemon.Options(
        mount_point="/mnt", foreground=False, debug=False, pool="auto", spin_us=None
    )


@pytest.mark.parametrize(
    ("arguments", "foreground", "debug"),
    [
        (["-f"], True, False),
        (["--foreground"], True, False),
        (["-d"], True, True),
        (["--debug"], True, True),
        (["-d", "--no-foreground"], False, True),
        (["--no-foreground"], False, False),
    ],
)
def test_debug_stays_in_the_foreground_unless_told_otherwise(
    asked_for, arguments, foreground, debug
):
    options = asked_for(*arguments, "/mnt")
    assert (options.foreground, options.debug) == (foreground, debug)


@pytest.mark.parametrize("kind", ["auto", "passthrough", "cache"])
@pytest.mark.parametrize("spelling", [["--pool={}"], ["--pool", "{}"], ["-o", "pool={}"]])
def test_pool(asked_for, kind, spelling):
    assert asked_for(*(word.format(kind) for word in spelling), "/mnt").pool == kind


@pytest.mark.parametrize("spelling", [["--spin={}"], ["--spin", "{}"], ["-o", "rw,spin={}"]])
@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("50", 50), ("1000000", 1000000), ("auto", None)]
)
def test_spin(asked_for, spelling, text, value):
    assert asked_for(*(word.format(text) for word in spelling), "/mnt").spin_us == value


def test_source(asked_for):
    assert asked_for("/mnt").source == "kdbusfs"
    for text in ("none", "-", "a b", "//server/share", "\udcff", "x" * 255):
        assert asked_for(f"--source={text}", "/mnt").source == text


def test_generic_mount_options_have_no_effect(asked_for):
    options = "rw,nosuid,nodev,dev,suid,noauto,_netdev,x-systemd.after=a,comment=b,relatime,,"
    assert asked_for("-o", options, "-o", "nofail", "/mnt") == asked_for("/mnt")


def test_sloppy_passes_over_unknown_mount_options(asked_for):
    assert asked_for("-o", "colour=blue,pool=cache,sloppy", "/mnt").pool == "cache"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "MOUNTPOINT"),
        (["/mnt", "/srv"], "/srv"),
        (["--colour", "/mnt"], "--colour"),
        (["--fore", "/mnt"], "--fore"),
        (["--pool=lake", "/mnt"], "lake"),
        (["--pool", "lake", "/mnt"], "lake"),
        (["--spin=fast", "/mnt"], "fast"),
        (["--spin=-1", "/mnt"], "-1"),
        (["--spin=1000001", "/mnt"], "1000001"),
        (["--spin=1.5", "/mnt"], "1.5"),
        (["--spin=", "/mnt"], "''"),
        (["--spin=" + "9" * 5000, "/mnt"], "999"),
        (["-o", "colour=blue", "/mnt"], "colour=blue"),
        (["-o", "ro", "/mnt"], "read-only"),
        (["-o", "ro,remount", "/mnt"], "read-only"),
        (["--source=", "/mnt"], "255"),
        (["--source=" + "x" * 256, "/mnt"], "255"),
        (["--source=" + "\N{SNOWMAN}" * 86, "/mnt"], "255"),
        (["-o", "pool", "/mnt"], "pool"),
        (["-o", "pool=lake", "/mnt"], "lake"),
        (["-o", "spin=fast", "/mnt"], "fast"),
        (["-o", "pool=lake,sloppy", "/mnt"], "lake"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(capsys, arguments, says):
    assert cli.main(arguments) == os.EX_USAGE
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("kdbusfs: ")
    assert says in line


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == os.EX_OK
    assert capsys.readouterr().out == f"kdbusfs {__version__}\n"


def test_help_names_every_exit_code(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == os.EX_OK
    listed = capsys.readouterr().out.partition("exit codes:")[2].split()
    for code in (
        os.EX_OK,
        os.EX_USAGE,
        os.EX_NOINPUT,
        os.EX_UNAVAILABLE,
        os.EX_SOFTWARE,
        os.EX_OSERR,
        os.EX_CANTCREAT,
        os.EX_IOERR,
        os.EX_NOPERM,
    ):
        assert str(code) in listed


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.touch(), "Not a directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["missing", "file", "dangling link", "link to itself"],
)
def test_a_mount_point_that_is_no_directory_is_told_in_one_line(capsys, tmp_path, make, says):
    path = tmp_path / "kdbus"
    make(path)
    assert cli.main([str(path)]) == os.EX_NOINPUT
    assert capsys.readouterr().err == f"kdbusfs: mount point {path}: {says}\n"


def test_a_path_below_a_file_is_told_in_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert cli.main([str(tmp_path / "file" / "kdbus")]) == os.EX_NOINPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "Not a directory" in line


def test_the_module_is_the_command(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "kdbusfs", tmp_path / "missing"], capture_output=True, text=True
    )
    assert result.returncode == os.EX_NOINPUT
    assert result.stderr.count("\n") == 1


# --- where it may be mounted --------------------------------------------------------------


@pytest.fixture
def _no_start(monkeypatch):
    """Whatever passes the check of the mount point ends there."""
    refusal = UserError("passed", os.EX_NOPERM)

    def stop() -> None:
        raise refusal

    monkeypatch.setattr(daemon, "_check_privilege", stop)


@pytest.mark.usefixtures("_no_start")
@pytest.mark.parametrize(
    "mount_point",
    [
        *("", "/", "//", "///", "/.", "/..", "/../..", "/./", "/usr/..", "/proc/self/root"),
        *("/proc", "/proc/", "/proc/self", "/proc/self/fd", "/proc/sys"),
        *("/sys", "/sys/", "/sys/fs", "/sys/fs/", "/sys/fs/.", "/sys/fs/../fs"),
        *("/dev", "/etc", "/usr", "/bin", "/sbin", "/lib", "/run", "/var", "/tmp", "/tmp/"),
        *("/home", "/root", "/boot", sys.prefix, os.path.dirname(sys.base_prefix)),
        os.path.dirname(os.path.dirname(daemon.__file__)),
    ],
)
def test_what_the_whole_system_uses_is_refused(capsys, mount_point):
    if mount_point and not os.path.exists(mount_point):
        pytest.skip(f"there is no {mount_point} here")
    assert cli.main([mount_point]) == os.EX_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kdbusfs: ")


@pytest.mark.usefixtures("_no_start")
@pytest.mark.parametrize("target", ["/", "/usr", "/sys/fs", "/proc/self"])
def test_so_is_a_link_to_it_and_what_is_relative_to_it(capsys, tmp_path, monkeypatch, target):
    (tmp_path / "link").symlink_to(target)
    monkeypatch.chdir(target)
    for path in (str(tmp_path / "link"), str(tmp_path / "link") + "/", ".", "./", "./."):
        assert cli.main([path]) == os.EX_USAGE, path
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("kdbusfs: ")


def test_directories_in_them_are_not_refused(tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    (place / "full").touch()
    monkeypatch.chdir(place)
    for path in (place, ".", "../place", f"{place}//"):
        assert mount.check_mount_point(str(path)) == place
    assert mount.check_mount_point("/mnt") == Path("/mnt").resolve()


def test_two_dots_after_a_link_mean_what_they_mean_to_the_kernel(tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "far" / "kdbus").mkdir()
    (tmp_path / "kdbus").mkdir()
    (tmp_path / "link").symlink_to("far/away")
    found = mount.check_mount_point(f"{tmp_path}/link/../kdbus")
    assert found == tmp_path / "far" / "kdbus"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("loop/kdbus", errno.ELOOP),
        ("missing/../here", errno.ENOENT),
        ("file/../here", errno.ENOTDIR),
        ("file/", errno.ENOTDIR),
        (" ", errno.ENOENT),
        ("x" * 300, errno.ENAMETOOLONG),
        ("x/" * 3000, errno.ENAMETOOLONG),
        ("a\nb\rc\x1b[2J", errno.ENOENT),
        ("\udcff", errno.ENOENT),
    ],
)
def test_odd_paths_are_told_in_one_line(capsys, tmp_path, monkeypatch, path, says):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main([path]) == os.EX_NOINPUT
    text = capsys.readouterr().err
    assert text.endswith(f": {os.strerror(says)}\n")
    assert text[:-1].isprintable()


def test_a_working_directory_that_is_gone_is_told_in_one_line(capsys, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["kdbus"]) == os.EX_NOINPUT
    assert capsys.readouterr().err == "kdbusfs: mount point kdbus: No such file or directory\n"


def test_a_remount_of_what_is_not_mounted_is_told_in_one_line(capsys, tmp_path):
    for path, says in ((tmp_path, "no kdbusfs"), (tmp_path / "missing", "No such file")):
        assert cli.main(["-o", "rw,remount", str(path)]) == os.EX_NOINPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


# --- standard output and error -------------------------------------------------------------

TELL = [["--help"], ["-h"], ["--version"]]
tell = pytest.mark.parametrize("arguments", TELL, ids=lambda arguments: arguments[0])
COMMAND = [sys.executable, "-m", "kdbusfs"]


def shell(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in which "$@" is kdbusfs with *arguments*."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@tell
def test_an_answer_nobody_reads_ends_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (os.EX_OK, b"")


@tell
def test_an_answer_that_is_read_in_part_ends_quietly(arguments):
    result = shell('set -o pipefail; "$@" | head -1', *arguments)
    assert (result.returncode, result.stderr) == (os.EX_OK, "")
    assert result.stdout.count("\n") == 1


@tell
@pytest.mark.parametrize(
    ("redirection", "says"), [(">&-", errno.EBADF), (">/dev/full", errno.ENOSPC)]
)
def test_an_answer_that_can_not_be_written_is_told_in_one_line(arguments, redirection, says):
    result = shell(f'"$@" {redirection}', *arguments)
    assert result.returncode == os.EX_IOERR
    assert result.stderr == f"kdbusfs: standard output: {os.strerror(says)}\n"


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_complaint_that_can_not_be_written_leaves_its_code(redirection):
    result = shell(f'"$@" {redirection}', "--colour", "/mnt")
    assert (result.returncode, result.stdout, result.stderr) == (os.EX_USAGE, "", "")
