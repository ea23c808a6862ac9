# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the command to a mount and back, and what is left of it: nothing."""

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("where", ["--foreground", "--no-foreground"])
def test_needs_no_standard_files(directory, where, closed):
    """Their numbers must not go to the device, or to what reports that it is ready."""
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", KDBUSFS, where, directory])
    if where == "--no-foreground":
        assert process.wait(daemons.DEADLINE_SECONDS) == os.EX_OK
    wait_until(lambda: mounted_at(directory), "kdbusfs never mounted")
    assert os.listdir(directory) == ["control"]
    (pid,) = serving(directory)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(daemons.DEADLINE_SECONDS) == os.EX_OK
    wait_until_gone(directory)


@pytest.mark.parametrize("after_ms", range(0, 1000, 125))
def test_a_signal_at_any_time_leaves_nothing(directory, after_ms):
    process = subprocess.Popen([KDBUSFS, "-f", directory], stderr=subprocess.PIPE)
    with suppress(subprocess.TimeoutExpired):
        process.wait(after_ms / 1000)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=daemons.DEADLINE_SECONDS)
    # Before it listens to signals, it just ends.
    assert process.returncode in (os.EX_OK, -signal.SIGTERM), errors
    assert b"Traceback" not in errors
    assert not mounted_at(directory)


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


def test_what_is_mounted_over_it_is_left_alone(tmp_path, namespace):
    namespace.do("mount -t tmpfs --make-private none /mnt && mkdir /mnt/kdbus")
    path = Path("/mnt/kdbus")
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        command = ["nsenter", f"--mount=/proc/{namespace.pid}/ns/mnt", KDBUSFS, "-f", path]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    wait_until(lambda: mounted_at(path, namespace.pid), "kdbusfs never mounted")
    namespace.do("mount -t tmpfs theirs /mnt/kdbus && touch /mnt/kdbus/theirs")
    process.send_signal(signal.SIGTERM)
    assert process.wait(daemons.DEADLINE_SECONDS) == os.EX_OK
    (warning,) = [line for line in log.read_text().splitlines() if "WARNING" in line]
    assert "/mnt/kdbus is covered by another mount" in warning
    assert os.listdir(namespace.path("/mnt/kdbus")) == ["theirs"]
    # What it can't take away is dead, and cleared away by the next one, once it can be seen.
    namespace.do("umount /mnt/kdbus")
    assert is_dead(namespace.path("/mnt/kdbus"))
    assert namespace.run(KDBUSFS, path).returncode == os.EX_OK
    assert len(mounted_at(path, namespace.pid)) == 1
    (pid,) = serving(path)
    os.kill(pid, signal.SIGTERM)
    wait_until_nothing_serves(namespace, path)


def test_can_be_mounted_over_what_covers_another_one(namespace):
    """Two domains, each of which ends its own mount as soon as it can be seen."""
    namespace.do(
        "mount -t tmpfs --make-private none /mnt && mkdir /mnt/kdbus"
        f" && {KDBUSFS} /mnt/kdbus && mount -t tmpfs theirs /mnt/kdbus"
    )
    path = Path("/mnt/kdbus")
    (lower,) = serving(path)
    namespace.do(f"{KDBUSFS} /mnt/kdbus")
    (upper,) = set(serving(path)) - {lower}
    assert len(mounted_at(path, namespace.pid)) == 2
    os.kill(upper, signal.SIGTERM)
    wait_until(lambda: serving(path) == [lower], "the upper one is still running")
    assert len(mounted_at(path, namespace.pid)) == 1
    namespace.do("umount /mnt/kdbus")
    assert os.listdir(namespace.path("/mnt/kdbus")) == ["control"]
    os.kill(lower, signal.SIGTERM)
    wait_until_nothing_serves(namespace, path)


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


# --- several at one place ------------------------------------------------------------------

N_AT_ONCE = 4


def start_at_once(*command: str | Path) -> list["subprocess.Popen[str]"]:
    return [
        subprocess.Popen([*command], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(N_AT_ONCE)
    ]


def assert_one_serves(processes: "list[subprocess.Popen[str]]") -> None:
    """One exit code is 0, all others say that a kdbusfs is there already."""
    said = [process.communicate(timeout=60)[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == [os.EX_OK] + [os.EX_CANTCREAT] * (N_AT_ONCE - 1), said
    for process, text in zip(processes, said, strict=True):
        assert text == "" if process.returncode == os.EX_OK else "mounted there already" in text
        assert text.count("\n") == (process.returncode != os.EX_OK)


@pytest.mark.parametrize("killed", [False, True], ids=["fresh", "after one that was killed"])
def test_of_several_at_once_one_serves(directory, killed):
    if killed:
        assert kdbusfs(directory).returncode == os.EX_OK
        (pid,) = serving(directory)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_dead(directory), "kdbusfs survived SIGKILL")
    assert_one_serves(start_at_once(KDBUSFS, directory))
    assert os.listdir(directory) == ["control"]
    assert len(mounted_at(directory)) == 1
    (pid,) = serving(directory)
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(directory)


def test_of_several_at_once_in_the_foreground_one_serves(directory):
    processes = start_at_once(KDBUSFS, "-f", directory)
    wait_until(
        lambda: len([process for process in processes if process.poll() is None]) == 1,
        "more than one is running",
    )
    assert len(mounted_at(directory)) == 1
    assert os.listdir(directory) == ["control"]
    (server,) = [process for process in processes if process.poll() is None]
    for process in processes:
        if process is not server:
            assert_refused_in(process)
    server.send_signal(signal.SIGTERM)
    _, log = server.communicate(timeout=daemons.DEADLINE_SECONDS)
    assert server.returncode == os.EX_OK, log
    wait_until_gone(directory)


def assert_refused_in(process: "subprocess.Popen[str]") -> None:
    _, log = process.communicate(timeout=daemons.DEADLINE_SECONDS)
    assert process.returncode == os.EX_CANTCREAT, log
    assert log.splitlines()[-1].endswith("a kdbusfs is mounted there already")


# kdbusfs that locks nothing, and has its mount seen when its stdin is closed.
WAITS = """
import sys
from kdbusfs.mount import fuse_mount
fuse_mount.try_lock = lambda directory: True
attach = fuse_mount.FuseMount.attach
def attach_later(self):
    print("ready", flush=True)
    sys.stdin.read()
    attach(self)
fuse_mount.FuseMount.attach = attach_later
from kdbusfs.cli import main
raise SystemExit(main())
"""


@contextmanager
def waiting(directory: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A kdbusfs that is ready, but not seen before its stdin is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", WAITS, "-f", directory], **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_is_not_seen_before_it_answers(directory):
    with waiting(directory) as process:
        assert not mounted_at(directory)
        assert os.listdir(directory) == []
        # Killed by then, it leaves nothing to clear away.
        process.kill()
        process.wait()
        assert not mounted_at(directory)
        assert os.listdir(directory) == []


def test_two_that_do_not_see_each_others_lock_do_not_stay_both(directory):
    """Where directories can't be locked, the one that came to lie on the other withdraws."""
    with waiting(directory) as first, waiting(directory) as second:
        assert first.stdin
        assert second.stdin
        first.stdin.close()
        wait_until(lambda: mounted_at(directory), "kdbusfs never mounted")
        second.stdin.close()
        assert second.wait(daemons.DEADLINE_SECONDS) == os.EX_CANTCREAT
        assert len(mounted_at(directory)) == 1
        assert os.listdir(directory) == ["control"]
        first.send_signal(signal.SIGTERM)
        assert first.wait(daemons.DEADLINE_SECONDS) == os.EX_OK
    wait_until_gone(directory)


def test_a_lock_of_somebody_else_is_not_waited_for_long(directory):
    with open_directory(directory) as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert kdbusfs(directory).returncode == os.EX_OK
        assert os.listdir(directory) == ["control"]
    (pid,) = serving(directory)
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(directory)


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_no_lock_stays(directory):
    """Neither while it serves: what is below can be unmounted as soon as it is."""
    assert kdbusfs(directory).returncode == os.EX_OK
    (pid,) = serving(directory)
    paths = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert str(directory) not in paths
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(directory)
    assert os.listdir(directory) == []
    with open_directory(directory) as locked:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_one_that_lags_behind_does_not_end_the_next_one(directory):
    """The next mount at the same place may well have got the number of the first one by then."""
    assert kdbusfs(directory).returncode == os.EX_OK
    (first,) = serving(directory)
    os.kill(first, signal.SIGSTOP)
    subprocess.run(["umount", "--lazy", directory], check=True)
    assert kdbusfs(directory).returncode == os.EX_OK
    (second,) = set(serving(directory)) - {first}
    os.kill(first, signal.SIGCONT)
    wait_until(lambda: serving(directory) == [second], "the first one is still running")
    assert os.listdir(directory) == ["control"]
    os.kill(second, signal.SIGTERM)
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


# kdbusfs that fails as soon as its mount is seen.
FAILS_LATE = """
from kdbusfs.mount import fuse_mount
attach = fuse_mount.FuseMount.attach
def attach_and_fail(self):
    attach(self)
    raise RuntimeError("on purpose")
fuse_mount.FuseMount.attach = attach_and_fail
from kdbusfs.cli import main
raise SystemExit(main())
"""


@pytest.mark.parametrize("where", ["--foreground", "--no-foreground"])
def test_a_failure_after_the_mount_takes_it_away(directory, where):
    command = [sys.executable, "-c", FAILS_LATE, where, directory]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == os.EX_SOFTWARE
    wait_until_gone(directory)
    assert os.listdir(directory) == []


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


@pytest.mark.parametrize("killed", [False, True], ids=["fresh", "after one that was killed"])
def test_sysfs_is_covered_once_for_several_at_once(sysfs, killed):
    if killed:
        assert sysfs.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
        (pid,) = serving(SYS_FS_KDBUS)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_dead(sysfs.path("/sys/fs/kdbus")), "kdbusfs survived SIGKILL")
    enter = ("nsenter", f"--mount=/proc/{sysfs.pid}/ns/mnt")
    assert_one_serves(start_at_once(*enter, KDBUSFS, SYS_FS_KDBUS))
    assert os.listdir(sysfs.path("/sys/fs/kdbus")) == ["control"]
    assert len([line for line in sysfs.mounts() if " /sys/fs " in line and "tmpfs" in line]) == 1
    (pid,) = serving(SYS_FS_KDBUS)
    os.kill(pid, signal.SIGTERM)
    wait_until_nothing_serves(sysfs, SYS_FS_KDBUS)


def test_sysfs_can_be_covered_again_as_soon_as_it_is_unmounted(sysfs):
    """The next one waits until the one before has taken its cover away."""
    for _ in range(5):
        assert sysfs.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
        assert os.listdir(sysfs.path("/sys/fs/kdbus")) == ["control"]
        sysfs.do("umount /sys/fs/kdbus")
    wait_until_nothing_serves(sysfs, SYS_FS_KDBUS)


@pytest.mark.parametrize(
    "function",
    [
        *(
            "fuse_mount._opened",
            "fuse_mount._locked",
            "fuse_mount._open_device",
            "fuse_mount.FuseMount._create",
        ),
        *(
            "fuse_mount.FuseMount.attach",
            "mountinfo.below",
            "mountinfo.attach",
            "mountinfo.new_filesystem",
        ),
        *("overlay._carry", "overlay.SysfsOverlay._build", "fuse_mount.FuseMount._close_root"),
        # The second time it is the directory in the cover.
        "fuse_mount._opened#2",
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_sysfs_is_put_back_whatever_fails(sysfs, function, when):
    """Somewhere on the way, before or after what is done there."""
    function, _, number = function.partition("#")
    program = f"""
import errno, os
from kdbusfs.mount import {function.partition(".")[0]}
done = {function}
calls = 0
def fail(*arguments, **options):
    global calls
    calls += 1
    if calls != {number or 1}:
        return done(*arguments, **options)
    if "{when}" == "after":
        result = done(*arguments, **options)
        if isinstance(result, int):
            os.close(result)
    raise OSError(errno.EIO, "on purpose")
{function} = fail
from kdbusfs.cli import main
raise SystemExit(main())
"""
    result = sysfs.run(sys.executable, "-c", program, "-f", SYS_FS_KDBUS)
    assert result.returncode in (os.EX_OSERR, os.EX_SOFTWARE), result.stderr
    assert "on purpose" in result.stderr


def test_sysfs_whose_cover_does_not_go_is_told(sysfs):
    assert sysfs.run(KDBUSFS, SYS_FS_KDBUS).returncode == os.EX_OK
    (pid,) = serving(SYS_FS_KDBUS)
    os.kill(pid, signal.SIGSTOP)
    sysfs.do("umount --lazy /sys/fs/kdbus")
    assert_refused(sysfs.run(KDBUSFS, SYS_FS_KDBUS), os.EX_CANTCREAT, "starts or ends there")
    os.kill(pid, signal.SIGCONT)
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
    (programs / "mount.fuse.kdbusfs").symlink_to(installed.name)
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


DOCUMENTED = re.search(
    r"^    (none  /sys/fs/kdbus .*)$",
    (HELPER.parents[1] / "docs" / "kdbusfs.8.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(
    "line",
    [
        DOCUMENTED[1].replace("/sys/fs/kdbus", "DIRECTORY") if DOCUMENTED else "",
        "none DIRECTORY fuse.kdbusfs defaults 0 0",
        "kdbusfs DIRECTORY kdbusfs rw,pool=cache,spin=0,x-a=b 0 0",
        r"a\040b\011c DIRECTORY kdbusfs defaults 0 0",
        "//server/share/ DIRECTORY kdbusfs defaults 0 0",
        "-o DIRECTORY kdbusfs defaults 0 0",
    ],
)
def test_mount8_all_does_nothing_the_second_time(mount8, directory, tmp_path, line):
    fstab = tmp_path / "fstab"
    fstab.write_text(line.replace("DIRECTORY", str(directory)) + "\n")
    for _ in range(2):
        result = mount8.run("mount", "--all", "--fstab", fstab)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert len(mounted_at(directory, mount8.pid)) == 1
        assert len(serving(directory)) == 1
    # Asked for by name, it is an error, as with other file systems.
    result = mount8.run("mount", "--fstab", fstab, directory)
    assert result.returncode == 32
    assert "mounted there already" in result.stderr
    mount8.do(f"umount {directory}")
    wait_until_nothing_serves(mount8, directory)


def test_mount8_all_with_the_documented_line(mount8, tmp_path):
    assert DOCUMENTED
    fstab = tmp_path / "fstab"
    fstab.write_text(DOCUMENTED[1] + "\n")
    for _ in range(2):
        result = mount8.run("mount", "--all", "--fstab", fstab)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.listdir(mount8.path("/sys/fs/kdbus")) == ["control"]
    mount8.do("umount /sys/fs/kdbus")
    wait_until_nothing_serves(mount8, SYS_FS_KDBUS)


@pytest.mark.parametrize("fstype", ["kdbusfs", "fuse.kdbusfs"])
def test_mount8_and_findmnt8_know_source_and_type(mount8, directory, fstype):
    mount8.do(f"mount -t {fstype} 'my bus' {directory}")
    found = mount8.run("findmnt", "-nro", "SOURCE,FSTYPE", "-M", directory)
    assert found.stdout == "my\\x20bus fuse.kdbusfs\n"
    listed = mount8.run("mount", "-t", "fuse.kdbusfs").stdout
    assert f"my bus on {directory} type fuse.kdbusfs (rw,nosuid,nodev,relatime" in listed
    mount8.do(f"umount 'my bus' || umount {directory}")
    wait_until_nothing_serves(mount8, directory)


def test_umount8_lazy_ends_it(mount8, directory):
    mount8.do(f"mount -t kdbusfs none {directory}")
    mount8.do(f"umount --lazy {directory}")
    wait_until_nothing_serves(mount8, directory)


@pytest.mark.parametrize("fstype", ["kdbusfs", "fuse.kdbusfs"])
@pytest.mark.parametrize("listed", [True, False], ids=["in fstab", "not in fstab"])
def test_mount8_remount_changes_nothing(mount8, directory, tmp_path, fstype, listed):
    fstab = tmp_path / "fstab"
    fstab.write_text(f"none {directory} {fstype} pool=cache,nofail 0 0\n" if listed else "\n")
    mount8.do(f"mount -t {fstype} -o pool=cache none {directory}")
    before = mounted_at(directory, mount8.pid)
    for options in ("remount", "remount,rw", "remount,nosuid,noatime"):
        result = mount8.run("mount", "--fstab", fstab, "-o", options, directory)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), options
        assert mounted_at(directory, mount8.pid) == before
    for options, says in (("remount,ro", "read-only"), ("remount,colour=blue", "colour=blue")):
        result = mount8.run("mount", "--fstab", fstab, "-o", options, directory)
        assert result.returncode == 1
        assert says in result.stderr
        assert result.stderr.count("\n") == 1
        assert mounted_at(directory, mount8.pid) == before
    mount8.do(f"mount --fstab {fstab} -o remount,bind,ro {directory}")
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        os.open(mount8.path(f"{directory}/control"), os.O_RDWR)
    mount8.do(f"umount {directory}")
    wait_until_nothing_serves(mount8, directory)


def test_mount8_remount_of_what_is_not_mounted(mount8, directory, tmp_path):
    fstab = tmp_path / "fstab"
    fstab.write_text(f"none {directory} kdbusfs defaults 0 0\n")
    result = mount8.run("mount", "--fstab", fstab, "-o", "remount", directory)
    assert result.returncode == 32
    assert result.stderr == f"kdbusfs: {directory}: no kdbusfs is mounted there\n"


@pytest.mark.parametrize("path", ["/", "/usr", "/tmp"])
def test_mount8_on_what_the_whole_system_uses(mount8, path):
    before = mount8.mounts()
    result = mount8.run("mount", "-t", "kdbusfs", "none", path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert mount8.mounts() == before


# What systemd.automount(5) does: a direct autofs mount, whose daemon is this very process.
AUTOMOUNT = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
reader, writer = os.pipe()
os.set_inheritable(writer, True)
options = f"fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
if libc.mount(b"automount", os.fsencode(sys.argv[2]), b"autofs", 0, options.encode()):
    sys.exit(77)
daemon = subprocess.run(sys.argv[1:], timeout=15, start_new_session=True, close_fds=True)
sys.exit(daemon.returncode)
"""


def test_an_automount_point_is_mounted_on_without_asking_it(namespace, directory):
    """It would wait for the very mount that is just being made."""
    result = namespace.run(sys.executable, "-c", AUTOMOUNT, KDBUSFS, directory)
    if result.returncode == 77:
        pytest.skip("no autofs")
    assert (result.returncode, result.stderr) == (0, "")
    assert mounted_at(directory, namespace.pid)
    assert not mounted_at(directory)
    namespace.do(f"umount {directory}")
    wait_until_nothing_serves(namespace, directory)


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
    assert (
        result.stdout
        == f"mount.kdbusfs: kdbusfs --source=none -o colour=blue,rw,sloppy -- {directory}\n"
    )


def test_the_helper_without_kdbusfs(directory):
    result = subprocess.run(
        [HELPER, "none", directory], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert result.returncode == 2
