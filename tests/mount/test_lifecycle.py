# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the command to a mount and back, and what is left of it: nothing."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import daemons
from daemons import KDBUSFS, MountNamespace, mounted_at, running, serving, wait_until

HELPER = Path(__file__).parents[2] / "mount-helper" / "mount.kdbusfs"
DEAD = os.strerror(errno.ENOTCONN)
KDBUS_CMD_BYEBYE = 0x40089585


@pytest.fixture(autouse=True)
def _mounting() -> None:
    daemons.need_mounting()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount on, with nothing mounted and nobody serving in the end."""
    path = tmp_path / "kdbus"
    path.mkdir()
    yield path
    remains = serving(path), mounted_at(path)
    for pid in serving(path):
        os.kill(pid, signal.SIGKILL)
    while mounted_at(path):
        subprocess.run(["umount", "--lazy", path], check=True)
    assert remains == ([], [])


@pytest.fixture(params=["private", "shared"])
def namespace(request: pytest.FixtureRequest) -> Iterator[MountNamespace]:
    """A mount namespace, so that the machine's own /sys/fs stays as it is."""
    namespace = MountNamespace(request.param)
    yield namespace
    namespace.end()


def kdbusfs(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [KDBUSFS, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=daemons.DEADLINE_SECONDS,
    )


def assert_refused(result: "subprocess.CompletedProcess[str]", code: int, says: str) -> None:
    """One line on stderr, that exit code, and nothing else."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("kdbusfs: ")
    assert says in line


def is_dead(path: Path) -> bool:
    """Whether the filesystem at *path* has nobody any more who answers."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def wait_until_gone(path: Path) -> None:
    wait_until(lambda: not mounted_at(path), f"{path} is still mounted")
    wait_until(lambda: not serving(path), "kdbusfs is still running")


def wait_until_nothing_serves(namespace: MountNamespace, path: Path) -> None:
    wait_until(lambda: not mounted_at(path, namespace.pid), f"{path} is still mounted")
    wait_until(lambda: not serving(path), "kdbusfs is still running")


# --- in the background --------------------------------------------------------------


def test_returns_when_the_mount_answers(directory):
    assert kdbusfs(directory).returncode == os.EX_OK
    assert os.listdir(directory) == ["control"]
    subprocess.run(["umount", directory], check=True)
    wait_until_gone(directory)


def test_the_background_keeps_nothing_of_the_caller(directory):
    assert kdbusfs(directory).returncode == os.EX_OK
    (pid,) = serving(directory)
    process = Path(f"/proc/{pid}")
    assert [os.readlink(process / "fd" / str(number)) for number in range(3)] == ["/dev/null"] * 3
    assert os.readlink(process / "cwd") == "/"
    session_id = int((process / "stat").read_text().rpartition(")")[2].split()[3])
    assert session_id == pid
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_background(directory, number):
    assert kdbusfs(directory).returncode == os.EX_OK
    (pid,) = serving(directory)
    os.kill(pid, number)
    wait_until_gone(directory)


def test_can_be_mounted_again_and_again(directory):
    for _ in range(5):
        assert kdbusfs(directory).returncode == os.EX_OK
        assert os.listdir(directory) == ["control"]
        subprocess.run(["umount", directory], check=True)
        wait_until_gone(directory)


def test_a_relative_path_and_a_link_mean_the_directory(directory, monkeypatch):
    (directory.parent / "link").symlink_to(directory.name)
    monkeypatch.chdir(directory.parent)
    result = kdbusfs("link")
    assert result.returncode == os.EX_OK
    assert mounted_at(directory)
    subprocess.run(["umount", directory], check=True)
    wait_until(lambda: not serving(Path("link")), "kdbusfs is still running")


def test_takes_as_many_descriptors_as_it_can_get(directory):
    subprocess.run(["prlimit", "--nofile=64:", KDBUSFS, directory], check=True)
    (pid,) = serving(directory)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert soft == hard >= resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    subprocess.run(["umount", directory], check=True)
    wait_until_gone(directory)


# --- in the foreground ---------------------------------------------------------------


@pytest.mark.parametrize("pool", daemons.POOL_KINDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_foreground(tmp_path, pool, number):
    with running(tmp_path, pool) as mount:
        assert mount.end(number) == os.EX_OK


@pytest.mark.parametrize("pool", daemons.POOL_KINDS)
def test_umount_ends_the_foreground(tmp_path, pool):
    with running(tmp_path, pool) as mount:
        subprocess.run(["umount", mount.path], check=True)
        assert mount.wait() == os.EX_OK


def test_a_signal_during_the_start_leaves_nothing(directory):
    process = subprocess.Popen([KDBUSFS, "-f", directory], stderr=subprocess.PIPE)
    while not mounted_at(directory):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=daemons.DEADLINE_SECONDS)
    assert process.returncode == os.EX_OK, errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize("pool", daemons.POOL_KINDS)
def test_a_signal_ends_it_under_an_open_file(tmp_path, pool):
    with running(tmp_path, pool) as mount:
        control = os.open(mount.path / "control", os.O_RDWR | os.O_CLOEXEC)
        assert mount.end() == os.EX_OK
        with pytest.raises(OSError, match=DEAD):
            fcntl.ioctl(control, KDBUS_CMD_BYEBYE, bytes(8))
        # Closed it is, whatever the dead filesystem has to say to it.
        with suppress(OSError):
            os.close(control)


def test_umount_of_a_busy_mount_is_refused_and_does_no_harm(tmp_path):
    with running(tmp_path, "cache") as mount:
        with open(mount.path / "control", "rb"):
            assert subprocess.run(["umount", mount.path], stderr=subprocess.DEVNULL).returncode != 0
        assert os.listdir(mount.path) == ["control"]


def test_a_lazy_umount_ends_it_when_the_last_file_is_closed(tmp_path):
    with running(tmp_path, "cache") as mount:
        with open(mount.path / "control", "rb"):
            subprocess.run(["umount", "--lazy", mount.path], check=True)
            assert not mounted_at(mount.path)
            assert mount.process.poll() is None
        assert mount.wait() == os.EX_OK


def test_a_signal_ends_it_under_a_copy_of_the_mount_in_another_namespace(tmp_path):
    with running(tmp_path, "cache") as mount:
        other = MountNamespace("private")
        try:
            copy = other.path(str(mount.path))
            assert os.listdir(copy) == ["control"]
            assert mount.end() == os.EX_OK
            assert mounted_at(mount.path, other.pid)
            with pytest.raises(OSError, match=DEAD):
                os.listdir(copy)
        finally:
            other.end()


def test_a_moved_mount_is_still_the_one_that_is_unmounted(namespace):
    namespace.do(
        "mount -t tmpfs --make-private none /mnt && mkdir /mnt/a /mnt/b"
        f" && {KDBUSFS} /mnt/a && mount --move /mnt/a /mnt/b && mount -t tmpfs other /mnt/a"
    )
    (pid,) = serving(Path("/mnt/a"))
    os.kill(pid, signal.SIGTERM)
    wait_until_nothing_serves(namespace, Path("/mnt/a"))
    assert not mounted_at(Path("/mnt/b"), namespace.pid)
    assert any(" /mnt/a " in line and "tmpfs other" in line for line in namespace.mounts())


def test_a_killed_one_is_cleared_away_by_the_next(directory):
    assert kdbusfs(directory).returncode == os.EX_OK
    (pid,) = serving(directory)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_dead(directory), "kdbusfs survived SIGKILL")
    assert kdbusfs(directory).returncode == os.EX_OK
    assert os.listdir(directory) == ["control"]
    assert len(mounted_at(directory)) == 1
    subprocess.run(["umount", directory], check=True)
    wait_until_gone(directory)


# --- mistakes and lacks --------------------------------------------------------------


@pytest.mark.parametrize("where", ["--foreground", "--no-foreground"])
def test_a_kdbusfs_is_mounted_there_already(directory, where):
    assert kdbusfs(directory).returncode == os.EX_OK
    assert_refused(kdbusfs(where, directory), os.EX_CANTCREAT, "mounted there already")
    assert os.listdir(directory) == ["control"]
    assert len(mounted_at(directory)) == 1
    subprocess.run(["umount", directory], check=True)
    wait_until_gone(directory)


# kdbusfs as an older kernel has it: one that takes no backing files.
OLDER_KERNEL = """
import kdbusfs.fuse.router
kdbusfs.fuse.router.can_pass_through = lambda device: False
from kdbusfs.cli import main
raise SystemExit(main())
"""


@pytest.mark.parametrize("where", ["--foreground", "--no-foreground"])
def test_a_kind_of_pool_that_the_kernel_can_not_do(directory, where):
    command = [sys.executable, "-c", OLDER_KERNEL, where, "--pool=passthrough", directory]
    result = subprocess.run(command, capture_output=True, text=True)
    assert_refused(result, os.EX_UNAVAILABLE, "--pool=cache")
    wait_until_gone(directory)


def test_the_kind_of_pool_is_chosen_by_what_the_kernel_can_do(directory):
    command = [sys.executable, "-c", OLDER_KERNEL, directory]
    subprocess.run(command, check=True)
    assert os.listdir(directory) == ["control"]
    subprocess.run(["umount", directory], check=True)
    wait_until_gone(directory)


@pytest.mark.parametrize("capability", ["sys_admin", "sys_ptrace"])
@pytest.mark.parametrize("where", ["--foreground", "--no-foreground"])
def test_no_privilege(directory, where, capability):
    result = subprocess.run(
        ["setpriv", f"--bounding-set=-{capability}", KDBUSFS, where, directory],
        capture_output=True,
        text=True,
    )
    assert_refused(result, os.EX_NOPERM, "root")


@pytest.mark.parametrize("where", ["--foreground", "--no-foreground"])
def test_no_device(namespace, directory, where):
    namespace.do("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3")
    assert_refused(namespace.run(KDBUSFS, where, directory), os.EX_UNAVAILABLE, "/dev/fuse")


@pytest.mark.parametrize("where", ["--foreground", "--no-foreground"])
@pytest.mark.parametrize("mount_point", ["/mnt", "/sys/fs/kdbus"])
def test_a_device_that_is_none(namespace, where, mount_point):
    namespace.do("mount --bind /dev/null /dev/fuse")
    before = namespace.mounts()
    assert_refused(namespace.run(KDBUSFS, where, mount_point), os.EX_OSERR, "can't mount")
    assert namespace.mounts() == before


# --- /sys/fs/kdbus ---------------------------------------------------------------------

SYS_FS_KDBUS = Path("/sys/fs/kdbus")


@pytest.fixture
def sysfs(namespace: MountNamespace) -> Iterator[MountNamespace]:
    """A namespace without /sys/fs/kdbus, checked to have been left as it was found."""
    # A child that is a mount with another one below it, on top of what there is.
    namespace.do("mount -t tmpfs one /sys/fs/fuse && mkdir /sys/fs/fuse/a && touch /sys/fs/fuse/b")
    namespace.do("mount -t tmpfs two /sys/fs/fuse/a && touch /sys/fs/fuse/a/c")
    before = namespace.mounts(), children(namespace)
    assert "kdbus" not in os.listdir(namespace.path("/sys/fs"))
    yield namespace
    assert serving(SYS_FS_KDBUS) == []
    assert (namespace.mounts(), children(namespace)) == before


def children(namespace: MountNamespace) -> dict[str, list[str]]:
    """The names in /sys/fs and those below them, the live cgroup trees left out."""
    top = namespace.path("/sys/fs")
    return {
        entry.name: sorted(os.listdir(entry)) if entry.is_dir() else []
        for entry in sorted(top.iterdir())
    }


def test_sysfs_gains_the_directory_and_keeps_its_children(sysfs):
    before = children(sysfs)
    result = sysfs.run(KDBUSFS, SYS_FS_KDBUS)
    assert result.returncode == os.EX_OK, result.stderr
    assert children(sysfs) == before | {"kdbus": ["control"]}
    assert os.listdir(sysfs.path("/sys/fs/fuse/a")) == ["c"]
    assert not SYS_FS_KDBUS.exists()
    sysfs.do("umount /sys/fs/kdbus")
    wait_until_nothing_serves(sysfs, SYS_FS_KDBUS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sysfs_is_put_back_on_a_signal(sysfs, number):
    assert sysfs.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    (pid,) = serving(SYS_FS_KDBUS)
    os.kill(pid, number)
    wait_until_nothing_serves(sysfs, SYS_FS_KDBUS)


def test_sysfs_unmounted_as_a_whole_ends_it(sysfs):
    assert sysfs.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    sysfs.do("umount --lazy /sys/fs")
    wait_until_nothing_serves(sysfs, SYS_FS_KDBUS)


def test_sysfs_is_put_back_after_one_that_was_killed(sysfs):
    assert sysfs.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    (pid,) = serving(SYS_FS_KDBUS)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_dead(sysfs.path("/sys/fs/kdbus")), "kdbusfs survived SIGKILL")
    assert sysfs.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    assert os.listdir(sysfs.path("/sys/fs/kdbus")) == ["control"]
    sysfs.do("umount /sys/fs/kdbus")
    wait_until_nothing_serves(sysfs, SYS_FS_KDBUS)


def test_sysfs_covered_by_somebody_else_is_left_to_them(namespace):
    assert namespace.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    namespace.do("mount -t tmpfs theirs /sys/fs && mkdir /sys/fs/kdbus")
    (pid,) = serving(SYS_FS_KDBUS)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not serving(SYS_FS_KDBUS), "kdbusfs is still running")
    assert os.listdir(namespace.path("/sys/fs")) == ["kdbus"]


def test_sysfs_covered_for_one_domain_has_room_for_another(namespace):
    assert namespace.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    second = Path("/sys/fs/second")
    assert_refused(namespace.run(KDBUSFS, second), os.EX_NOINPUT, "No such file")
    namespace.do(f"mkdir {second}")
    assert namespace.run(KDBUSFS, second).returncode == os.EX_OK
    namespace.do(f"umount {second}")
    wait_until_nothing_serves(namespace, second)
    assert os.listdir(namespace.path("/sys/fs/kdbus")) == ["control"]
    namespace.do("umount /sys/fs/kdbus")
    wait_until_nothing_serves(namespace, SYS_FS_KDBUS)
    assert "second" not in os.listdir(namespace.path("/sys/fs"))


def test_sysfs_with_files_and_links_in_it(namespace):
    namespace.do(
        "mount -t tmpfs mine /sys/fs && cd /sys/fs && mkdir directory"
        " && echo content >file && ln -s file link && ln -s nowhere dangling"
    )
    before = namespace.mounts()
    assert namespace.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    top = namespace.path("/sys/fs")
    assert sorted(os.listdir(top)) == ["dangling", "directory", "file", "kdbus", "link"]
    assert (top / "link").read_text() == "content\n"
    assert os.readlink(top / "dangling") == "nowhere"
    assert (top / "directory").is_dir()
    namespace.do("umount /sys/fs/kdbus")
    wait_until_nothing_serves(namespace, SYS_FS_KDBUS)
    assert namespace.mounts() == before


def test_sysfs_that_has_the_directory_is_not_covered(namespace):
    namespace.do("mount -t tmpfs mine /sys/fs && mkdir /sys/fs/kdbus")
    before = namespace.mounts()
    assert namespace.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    assert len(namespace.mounts()) == len(before) + 1
    namespace.do("umount /sys/fs/kdbus")
    wait_until_nothing_serves(namespace, SYS_FS_KDBUS)
    assert namespace.mounts() == before


# --- mount(8) ----------------------------------------------------------------------------

PATH = {"PATH": f"{KDBUSFS.parent}:/usr/sbin:/usr/bin:/sbin:/bin"}


@pytest.fixture
def mount8(namespace: MountNamespace, tmp_path: Path) -> Iterator[MountNamespace]:
    """A namespace in which mount(8) finds the helper."""
    programs = tmp_path / "sbin"
    programs.mkdir()
    installed = programs / "mount.kdbusfs"
    shutil.copy(HELPER, installed)
    installed.write_text(HELPER.read_text().replace("kdbusfs=kdbusfs ", f"kdbusfs={KDBUSFS} "))
    namespace.do(f"mount --bind {programs} $(realpath /sbin)")
    yield namespace
    assert serving(tmp_path) == []


def test_mount8_and_umount8(mount8, directory):
    command = ["mount", "-t", "kdbusfs", "-o", "rw,noauto,pool=cache,x-a=b", "none", directory]
    result = mount8.run(*command)
    assert result.returncode == 0, result.stderr
    assert os.listdir(mount8.path(str(directory))) == ["control"]
    mount8.do(f"umount {directory}")
    wait_until_nothing_serves(mount8, directory)


def test_mount8_reads_fstab(mount8, directory, tmp_path):
    fstab = tmp_path / "fstab"
    fstab.write_text(f"kdbusfs {directory} kdbusfs defaults,noauto,nofail,_netdev 0 0\n")
    result = mount8.run("mount", "--fstab", fstab, directory)
    assert result.returncode == 0, result.stderr
    assert mounted_at(directory, mount8.pid)
    mount8.do(f"umount {directory}")
    wait_until_nothing_serves(mount8, directory)


def test_mount8_faked_mounts_nothing(mount8, directory):
    assert mount8.run("mount", "-f", "-t", "kdbusfs", "none", directory).returncode == 0
    assert not mounted_at(directory, mount8.pid)


def helper(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([HELPER, *arguments], env=PATH, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 1),
        (["none"], 1),
        (["none", "DIRECTORY", "-x"], 1),
        (["none", "DIRECTORY", "extra"], 1),
        (["none", "DIRECTORY", "-N", "1"], 1),
        (["none", "DIRECTORY", "-o", "colour=blue"], 1),
        (["none", "DIRECTORY/missing"], 32),
        (["none", "-missing"], 32),
    ],
)
def test_the_helper_answers_with_the_exit_codes_of_mount8(directory, arguments, code):
    result = helper(*(argument.replace("DIRECTORY", str(directory)) for argument in arguments))
    assert result.returncode == code
    (line,) = result.stderr.splitlines()[-1:]
    assert line


def test_the_helper_tells_what_it_runs_and_can_be_sloppy(directory):
    options = ["-sfvn", "-o", "colour=blue", "-o", "rw"]
    result = helper("none", directory, *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"mount.kdbusfs: kdbusfs -o colour=blue,rw,sloppy -- {directory}\n"


def test_the_helper_without_kdbusfs(directory):
    result = subprocess.run(
        [HELPER, "none", directory], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert result.returncode == 2
