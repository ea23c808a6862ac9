# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of the daemon: checks, background, mount, session, and back.

Everything that was taken is given back in reverse order, whichever way the end comes:
a signal, an unmount from outside, or a fault. Signals stay blocked from before the
mount until somebody listens to them, so that none can end the process half-way.
"""

import logging
import os
import resource
import signal
import syslog
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from kdbusfs import mount
from kdbusfs.user_error import UserError, one_line

if TYPE_CHECKING:
    from kdbusfs.fuse.session import Session

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Bits of CapEff in proc_pid_status(5): capabilities(7). The first to mount, the
# second to read the memory and the descriptors of the callers.
CAP_SYS_ADMIN = 21
CAP_SYS_PTRACE = 19

GRACE_SECONDS = 5.0
"""How long the router may take to notice that the mount has gone."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    mount_point: str
    foreground: bool = False
    debug: bool = False
    """Log each request and its answer."""
    pool: str = "auto"
    """How pools are made: "passthrough", "cache", or "auto" for what a probe finds."""
    source: str = "kdbusfs"
    """What is shown as the source of the mount, of 1 to 255 bytes."""
    spin_us: int | None = None
    """How long the router polls the device before it sleeps, in microseconds; None: it judges."""


def run(options: Options) -> int:
    """Mount and serve; the exit code. In the background, return when the mount answers.

    Raises UserError for what the user can mend.
    """
    mount_point = mount.check_mount_point(options.mount_point)
    _check_privilege()
    if options.foreground:
        _set_up_log(logging.StreamHandler(), options.debug)
        return _serve_or_log(partial(_serve, options, mount_point, _say_nothing))
    return _in_background(partial(_serve, options, mount_point), options.debug)


def _say_nothing() -> None:
    """The readiness of a kdbusfs in the foreground: nobody waits for it."""


def _serve_or_log(serve: Callable[[], int]) -> int:
    """What *serve* returns, or the exit code for a fault of ours, which is logged in full."""
    try:
        return serve()
    except UserError:
        raise
    except Exception:
        log.critical("a fault of kdbusfs ends it", exc_info=True)
        return os.EX_SOFTWARE


def _check_privilege() -> None:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    effective = int(fields["CapEff"], 16)
    if not (effective >> CAP_SYS_ADMIN & 1 and effective >> CAP_SYS_PTRACE & 1):
        raise UserError("must be run by root (CAP_SYS_ADMIN and CAP_SYS_PTRACE)", os.EX_NOPERM)


# --- serving ----------------------------------------------------------------------------


def _serve(options: Options, mount_point: Path, ready: Callable[[], None]) -> int:
    """Mount, serve until unmounted, unmount."""
    # Only now: a process that merely parses its arguments has no use for the FUSE side.
    from kdbusfs.fuse.session import Session
    from kdbusfs.peer.descriptors import know_as_ours

    _raise_descriptor_limit()
    with ExitStack() as stack:
        stack.enter_context(_blocked(END_SIGNALS))
        mounted = stack.enter_context(mount.FuseMount(mount_point, options.source))
        know_as_ours(mounted.device_number)
        session = Session(
            os.dup(mounted.device), pool=options.pool, trace=options.debug, spin_us=options.spin_us
        )
        stack.callback(session.close)
        # Before the session is closed, so that its router comes back from reading the
        # device. Without effect after an unmount from outside.
        stack.callback(mounted.unmount)
        session.start()
        try:
            trio.run(_serve_until_the_end, session, mounted, ready)
        except BaseExceptionGroup as group:
            # The nursery's wrapping, which would hide a UserError.
            raise _only_one(group) from None
        finally:
            # It is ending already: one more signal must not make it look as if it was killed.
            for number in END_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    log.info("unmounted %s", mount_point)
    return os.EX_OK


async def _serve_until_the_end(
    session: "Session", mounted: mount.FuseMount, ready: Callable[[], None]
) -> None:
    """Serve until the filesystem is unmounted, which a signal has us do ourselves."""
    async with trio.open_nursery() as nursery:
        await nursery.start(_unmount_on_signal, session, mounted)
        await session.serve(partial(_show, mounted, ready))
        nursery.cancel_scope.cancel()


def _show(mounted: mount.FuseMount, ready: Callable[[], None]) -> None:
    """Have the mount seen, now that it answers."""
    mounted.attach()
    ready()


async def _unmount_on_signal(
    session: "Session", mounted: mount.FuseMount, task_status: trio.TaskStatus[None]
) -> None:
    with trio.open_signal_receiver(*END_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
        task_status.started()
        try:
            async for number in signals:
                log.info("unmounting on %s", signal.Signals(number).name)
                try:
                    # In a thread: the tree must stay able to answer the kernel meanwhile.
                    await trio.to_thread.run_sync(mounted.unmount)
                except RuntimeError:
                    # There is none to be had.
                    mounted.unmount()
                await trio.sleep(GRACE_SECONDS)
                session.give_up()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)


def _only_one(error: BaseException) -> BaseException:
    """The exception at the bottom of groups of one; the innermost group if it holds more."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


@contextmanager
def _blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Hold back *signals* from this thread and those it starts, which never take them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise_descriptor_limit() -> None:
    """Allow as many open files as possible: each connection has some in the daemon."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text(encoding="ascii"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (PermissionError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- background -------------------------------------------------------------------------


def _in_background(serve: Callable[[Callable[[], None]], int], debug: bool) -> int:
    """Serve in a process of its own; return its exit code, or 0 as soon as it is ready.

    The child says over a pipe how it went: "CODE MESSAGE", once.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        os.close(read_end)
        # Not back into the caller: what the parent has to do there is the parent's.
        os._exit(_be_daemon(serve, write_end, debug))
    os.close(write_end)
    with open(read_end, encoding="utf-8", errors="surrogateescape") as pipe:
        code, _, message = pipe.read().partition(" ")
    if not code:
        raise UserError("was killed before the mount answered", os.EX_SOFTWARE)
    if int(code):
        raise UserError(message, int(code))
    return os.EX_OK


def _be_daemon(serve: Callable[[Callable[[], None]], int], pipe: int, debug: bool) -> int:
    """The child's whole life, as a process without terminal, directory or parent to hold."""
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    with open(os.devnull, "r+b", buffering=0) as null:
        for standard in range(3):
            os.dup2(null.fileno(), standard)
    _set_up_log(_SyslogHandler(), debug)
    report = _Report(pipe)
    try:
        code = _serve_or_log(partial(serve, partial(report.send, os.EX_OK)))
    except UserError as error:
        if not report.sent:
            report.send(error.exit_code, str(error))
        else:
            log.error("%s", error)
        return error.exit_code
    if not report.sent and code:
        report.send(code, "a fault of kdbusfs ended it, see the system log (or use --foreground)")
    elif not report.sent:
        report.send(os.EX_UNAVAILABLE, "unmounted before the mount answered")
    return code


class _Report:
    """The writing end of the pipe to the parent, which waits for one report."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    @property
    def sent(self) -> bool:
        return self._pipe == -1

    def send(self, code: int, message: str = "") -> None:
        pipe, self._pipe = self._pipe, -1
        # A path in the message may be in no encoding.
        with suppress(BrokenPipeError), open(pipe, "wb", buffering=0) as stream:
            stream.write(f"{code} {message}".encode("utf-8", "surrogateescape"))


# --- log --------------------------------------------------------------------------------


def _set_up_log(handler: logging.Handler, debug: bool) -> None:
    if isinstance(handler, logging.StreamHandler):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("kdbusfs")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)


class _SyslogHandler(logging.Handler):
    """The system log by syslog(3), which a machine without one makes a silent no-op."""

    def __init__(self) -> None:
        super().__init__()
        syslog.openlog("kdbusfs", syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            syslog.syslog(self._priority(record.levelno), one_line(line))

    @staticmethod
    def _priority(level: int) -> int:
        if level >= logging.CRITICAL:
            return syslog.LOG_CRIT
        if level >= logging.ERROR:
            return syslog.LOG_ERR
        if level >= logging.WARNING:
            return syslog.LOG_WARNING
        return syslog.LOG_INFO if level >= logging.INFO else syslog.LOG_DEBUG
