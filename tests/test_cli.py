# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: what it understands, and what it says of the rest, in one line."""

import os
import subprocess
import sys

import pytest

from kdbusfs import __version__, cli, daemon


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
        (["-o", "ro", "/mnt"], "ro"),
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
