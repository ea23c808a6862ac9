# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkdbus: as it is built, by itself, and against a real bus."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import daemons
import kdbus
from programs import once

HERE = Path(__file__).parent
LIBKDBUS = HERE.parents[1] / "libkdbus"
INCLUDE = LIBKDBUS / "include"
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Longer than any of the programs takes on a busy machine.
LIMIT_SECONDS = 120

Command = list[str | Path]


def run(*command: str | Path) -> str:
    """Run a command that has to succeed; what it wrote."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


def compile_program(source: str, target: Path, *options: str) -> Path:
    """Compile a program together with the library's sources, sanitized and without warnings."""
    command: Command = ["gcc", "-std=gnu11", "-O1", "-g", "-D_GNU_SOURCE=", "-pthread", "-Werror"]
    command += [*WARNINGS, *SANITIZERS, *options, "-I", INCLUDE, HERE / source]
    command += [*sorted((LIBKDBUS / "src").glob("*.c")), "-o", target]
    run(*command)
    return target


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built."""

    def build(directory: Path) -> None:
        run("make", "-C", LIBKDBUS, "all", f"BUILD={directory}", "CFLAGS=-O2 -Werror")

    return once(tmp_path_factory, "libkdbus", build)


@pytest.fixture(scope="session", params=["socket", "plain"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program; once as it is, once without descriptor socket."""
    options = ["-DPLAIN"] if request.param == "plain" else []

    def build(directory: Path) -> None:
        compile_program("client.c", directory / "client", *options)

    return once(tmp_path_factory, f"client-{request.param}", build) / "client"


def public_functions() -> set[str]:
    header = re.sub(r"/\*.*?\*/", "", (INCLUDE / "kdbus/kdbus.h").read_text(), flags=re.DOTALL)
    return set(re.findall(r"\b(kdbus_\w+)\(", header))


def test_exactly_what_the_header_says_is_exported(built: Path) -> None:
    table = run("nm", "--dynamic", "--defined-only", built / "libkdbus.so.0")
    found = {line.split()[2] for line in table.splitlines()}
    assert found == {"LIBKDBUS_0"} | {f"{name}@@LIBKDBUS_0" for name in public_functions()}


def test_each_command_is_issued_in_one_place() -> None:
    """So a message, however it is sent or received, and each slice takes the same way."""
    places: dict[str, list[str]] = {}
    for source in sorted((LIBKDBUS / "src").glob("*.c")):
        code = re.sub(r"/\*.*?\*/", "", source.read_text(), flags=re.DOTALL)
        for command in re.findall(r"\bKDBUS(?:FS)?_CMD_\w+", code):
            places.setdefault(command, []).append(source.name)
    assert {command: where for command, where in places.items() if len(where) > 1} == {}
    assert places["KDBUS_CMD_SEND"] == places["KDBUS_CMD_RECV"] == places["KDBUS_CMD_FREE"]


def test_the_archive_keeps_to_its_prefix(built: Path) -> None:
    table = run("nm", "--extern-only", "--defined-only", built / "libkdbus.a")
    names = [line.split()[2] for line in table.splitlines() if len(line.split()) == 3]
    assert names
    assert [name for name in names if not name.startswith("kdbus_")] == []


def test_the_library_knows_its_name_and_is_complete(built: Path) -> None:
    dynamic = run("readelf", "--dynamic", built / "libkdbus.so.0")
    assert "Library soname: [libkdbus.so.0]" in dynamic
    assert set(re.findall(r"NEEDED.*\[(.*)\]", dynamic)) == {"libc.so.6"}


@pytest.mark.parametrize("linkage", [["-lkdbus"], ["-l:libkdbus.a", "-pthread"]])
def test_what_is_installed_can_be_used(linkage: list[str], tmp_path: Path, built: Path) -> None:
    root = tmp_path / "root"
    run("make", "-C", LIBKDBUS, "install", f"BUILD={built}", f"DESTDIR={root}", "PREFIX=/usr")
    pc = (root / "usr/lib/pkgconfig/libkdbus.pc").read_text()
    assert "libdir=/usr/lib\n" in pc
    assert re.search(r"^Version: \d+\.\d+\.\d+$", pc, re.MULTILINE)

    source = tmp_path / "program.c"
    source.write_text(
        "#include <kdbus/kdbus.h>\n#include <errno.h>\n"
        "int main(void) { struct kdbus_conn *conn;"
        ' return kdbus_conn_new(&conn, "/nonexistent", NULL) != -ENOENT; }\n'
    )
    lib = root / "usr/lib"
    flags: Command = ["-I", root / "usr/include", "-L", lib, f"-Wl,-rpath,{lib}"]
    run("gcc", "-Wall", "-Werror", *flags, source, "-o", tmp_path / "program", *linkage)
    run(tmp_path / "program")


def test_inside(tmp_path: Path) -> None:
    run(compile_program("unit.c", tmp_path / "unit"))


# As in client.c, which lists them; a test below holds both against each other.
CLIENT_TESTS = (
    "hello unicast slices_are_freed forward peek_drop_priority fds accept_fd call"
    " interrupted_call many reply_recv names info signals lost update kinds endpoint end fork"
    " threads"
).split()


def test_no_client_test_is_left_out(client: Path) -> None:
    assert run(client).split() == CLIENT_TESTS


@pytest.mark.parametrize("name", CLIENT_TESTS)
def test_client(mount: daemons.Mount, client: Path, name: str) -> None:
    run(client, mount.path, name)


@pytest.mark.parametrize("program", ["bus-make", "kdbus-recv", "kdbus-send", "unix-recv"])
def test_examples_tell_how_they_are_used(program: str, tmp_path: Path) -> None:
    examples = HERE.parents[1] / "examples"
    run("make", "-C", examples, f"BUILD={tmp_path}", "CFLAGS=-O2 -Werror", tmp_path / program)
    done = subprocess.run([tmp_path / program], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"usage: {program} " in done.stderr


def test_a_bus_stays_until_its_maker_is_ended(mount: daemons.Mount, tmp_path: Path) -> None:
    examples = HERE.parents[1] / "examples"
    run("make", "-C", examples, f"BUILD={tmp_path}", tmp_path / "bus-make")
    # as a shell starts what a script ends with &
    command: Command = [tmp_path / "bus-make", mount.path, "stays"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        path = Path(os.fsdecode(maker.stdout.readline()).removeprefix("ready: ").rstrip())
        with pytest.raises(subprocess.TimeoutExpired):
            maker.wait(0.5)
        kdbus.Connection(path).close()
        maker.terminate()
    daemons.wait_until(lambda: not path.exists(), "the bus is still there")


def test_the_demo_leaves_nothing_behind() -> None:
    daemons.need_mounting()
    root = HERE.parents[1]
    run("make", "-C", root / "examples", "all")
    output = run(root / "examples/demo.sh")
    assert output.count("message: foobar") == 5
    mount_point = re.search(r"^\$ umount (.*)$", output, re.MULTILINE)
    assert mount_point is not None
    assert not Path(mount_point[1]).parent.exists()
    assert not daemons.mounted_at(Path(mount_point[1]))
    path = Path(mount_point[1])
    daemons.wait_until(lambda: not daemons.serving(path), "the daemon is still there")
