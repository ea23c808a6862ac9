# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections: messages in and out, names, matches, and questions to the bus."""

from __future__ import annotations

import errno
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from kdbus._kdbus import ffi, lib
from kdbus.errors import KdbusError, check, fail
from kdbus.fds import HasFileno, fileno
from kdbus.match import Bloom, Match
from kdbus.message import Message, ReceivedMessage
from kdbus.metadata import Creds, Metadata, Pids, parse_metadata
from kdbus.numbers import (
    POOL_SIZE_DEFAULT,
    AttachFlag,
    HelloFlag,
    ListFlag,
    MakeFlag,
    MatchFlag,
    NameFlag,
)
from kdbus.policy import Policy


@dataclass(frozen=True, slots=True)
class Info:
    """struct kdbus_info: what the bus tells of a connection or, with MakeFlags, of itself."""

    id: int
    flags: int
    metadata: Metadata


_RECV_MANY_MAX = 64
_GOES_ON = (-errno.EINTR, -errno.EAGAIN)
"""How a wait may end without a message: a signal handler has run, or messages were lost."""


def _deadline(timeout: float | None) -> int:
    if timeout is None:
        return int(lib.KDBUS_DEADLINE_NEVER)
    if timeout <= 0:
        return 0
    return int(lib.kdbus_deadline(min(int(timeout * 1e9), 2**63)))


def _encode(string: str | None) -> Any:
    """A C string; the caller has to keep it."""
    return ffi.NULL if string is None else ffi.new("char[]", os.fsencode(string))


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in _connections:
        connection._inherit()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Connection:
    """A connection to the endpoint at *path* (kdbus.connection(7)).

    *attach_send* and *attach_recv* say what others may ask about us, and what we
    want to know about messages. *name* and *policy* are for activators and policy
    holders. *creds*, *pids* and *seclabel* pretend to be somebody else, which is
    for the owner of the bus.

    Several threads may use it at once. It can be waited for with select(), trio's
    wait_readable() and the like: readable means that `recv_nowait` is worth a try.

    It belongs to the process that made it. In a child made by os.fork() it can be
    closed, which leaves the parent's alone, and messages received before can be read
    as long as the parent keeps them; `fileno` still tells the descriptor. All else
    raises `Inherited`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        flags: HelloFlag = HelloFlag.ACCEPT_FD,
        attach_send: AttachFlag = AttachFlag.NONE,
        attach_recv: AttachFlag = AttachFlag.NONE,
        pool_size: int = POOL_SIZE_DEFAULT,
        description: str | None = None,
        name: str | None = None,
        policy: Policy | None = None,
        creds: Creds | None = None,
        pids: Pids | None = None,
        seclabel: str | None = None,
    ) -> None:
        # Calls that are going on: the last one to leave frees a closed connection.
        self._lock = threading.Lock()
        self._n_calls = 0
        self._closed = True
        self._inherited = False
        _connections.add(self)

        options = ffi.new("struct kdbus_conn_options *")
        options.flags = flags
        options.attach_flags_send, options.attach_flags_recv = attach_send, attach_recv
        options.pool_size = pool_size
        kept = [_encode(string) for string in (description, name, seclabel)]
        options.description, options.name, options.seclabel = kept
        options.policy = policy._policy if policy else ffi.NULL
        if creds:
            kept.append(c := ffi.new("struct kdbus_creds *"))
            for field in Creds.__slots__:
                setattr(c, field, getattr(creds, field))
            options.creds = c
        if pids:
            kept.append(p := ffi.new("struct kdbus_pids *", (pids.pid, pids.tid, pids.ppid)))
            options.pids = p

        connp = ffi.new("struct kdbus_conn **")
        check(lib.kdbus_conn_new(connp, os.fsencode(path), options), os.fspath(path))
        self._conn = connp[0]
        self._closed = False
        self.path = os.fspath(path)
        self._read_identity()

    def _read_identity(self) -> None:
        """What HELLO has told."""
        self.id: int = lib.kdbus_conn_get_id(self._conn)
        self.flags = HelloFlag(lib.kdbus_conn_get_flags(self._conn))
        self.bus_flags = MakeFlag(lib.kdbus_conn_get_bus_flags(self._conn))
        self.bus_id = uuid.UUID(bytes=ffi.buffer(lib.kdbus_conn_get_bus_id(self._conn), 16)[:])
        bloom = lib.kdbus_conn_get_bloom(self._conn)
        self.bloom = Bloom(bloom.size, bloom.n_hash)
        self.pool_size: int = lib.kdbus_conn_get_pool_size(self._conn)
        self.has_fd_socket: bool = lib.kdbus_conn_has_fd_socket(self._conn)

    def _inherit(self) -> None:
        """Start anew in a child: threads that were inside of calls are not here, and the lock
        may be held by one of them for ever."""
        self._lock = threading.Lock()
        self._n_calls = 0
        self._inherited = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the connection is closed")

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._lock:
            self._check_open()
            if self._inherited:
                fail(errno.ECHILD, self.path)
            self._n_calls += 1
        try:
            return function(self._conn, *args)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._n_calls -= 1
            last = self._closed and not self._n_calls
        if last:
            lib.kdbus_conn_free(self._conn)

    # --- its end ---

    def close(self) -> None:
        """Disconnect. Messages received stay readable.

        Where another thread is inside a call on it, that is woken up, unless
        messages are queued; the connection then ends with the call.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            busy = self._n_calls > 0
            self._n_calls += 1
        if busy:
            lib.kdbus_conn_byebye(self._conn)
        self._leave()

    @property
    def closed(self) -> bool:
        return self._closed

    def byebye(self) -> None:
        """KDBUS_CMD_BYEBYE: disconnect, unless messages are queued (OSError EBUSY)."""
        check(self._call(lib.kdbus_conn_byebye))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor: readable while there is something to receive."""
        with self._lock:
            self._check_open()
            return int(lib.kdbus_conn_get_fd(self._conn))

    def __repr__(self) -> str:
        if self._closed:
            return "<Connection closed>"
        return f"<Connection {self.id} on {self.path}>"

    # --- out ---

    def send(self, message: Message, *, timeout: float | None = None) -> int:
        """KDBUS_CMD_SEND: send a message, and return its cookie.

        With a *timeout* in seconds it is a request: a message with that cookie as
        `cookie_reply` will come, be it the reply or a notification of failure.
        """
        if timeout is not None:
            deadline = lib.kdbus_deadline(int(max(timeout, 0) * 1e9))
            check(lib.kdbus_message_set_deadline(message._message, deadline))
        check(self._call(lib.kdbus_conn_send, message._message))
        return message.cookie

    def call(
        self,
        message: Message,
        *,
        timeout: float | None = None,
        cancel: int | HasFileno | None = None,
    ) -> ReceivedMessage:
        """KDBUS_CMD_SEND with KDBUS_SEND_SYNC_REPLY: send a request, return its reply.

        *timeout* is in seconds, None for ever. When *cancel* becomes readable,
        `NoReply` is raised at once.
        """
        replyp = ffi.new("struct kdbus_message **")
        deadline = _deadline(timeout)
        cancel_fd = -1 if cancel is None else fileno(cancel)
        # A signal handler may raise between two rounds; else the wait goes on.
        result = -errno.EINTR
        while result == -errno.EINTR:
            result = self._call(lib.kdbus_conn_call, message._message, deadline, cancel_fd, replyp)
        check(result)
        return ReceivedMessage(replyp[0])

    def send_many(self, messages: Sequence[Message]) -> None:
        """`send` each of these, as many with one call as fit in 16 KiB with their payload. The
        first that is refused raises, and those after it are not sent; `n_sent` of the exception
        says how many were."""
        pointers = ffi.new("struct kdbus_message *[]", [m._message for m in messages])
        n_sentp = ffi.new("size_t *")
        result = self._call(lib.kdbus_conn_send_many, pointers, len(messages), n_sentp)
        try:
            check(result)
        except KdbusError as error:
            error.n_sent = int(n_sentp[0])
            raise

    def reply(self, request: ReceivedMessage, message: Message) -> None:
        """Answer *request* with *message*, whose destination is set here."""
        check(self._call(lib.kdbus_conn_reply, request._get(), message._message))

    # --- in ---

    def wait(self, timeout: float | None = None) -> None:
        """Wait until there is something to receive; `TimedOut` after *timeout* seconds."""
        deadline = _deadline(timeout)
        result = -errno.EINTR
        while result == -errno.EINTR:
            result = self._call(lib.kdbus_conn_wait, deadline)
        check(result)

    def _receive(self, function: Callable[..., Any], *args: Any) -> ReceivedMessage:
        messagep = ffi.new("struct kdbus_message **")
        check(self._call(function, *args, messagep))
        return ReceivedMessage(messagep[0])

    def recv_nowait(self, *, priority: int | None = None) -> ReceivedMessage:
        """KDBUS_CMD_RECV: the oldest message; `NoMessage` if there is none.

        With a *priority*: the most urgent of those with this value or a lower one.
        """
        if priority is None:
            return self._receive(lib.kdbus_conn_recv)
        return self._receive(lib.kdbus_conn_recv_priority, priority)

    def recv(self, timeout: float | None = None) -> ReceivedMessage:
        """The oldest message, once there is one; `TimedOut` after *timeout* seconds."""
        return self._recv_until(_deadline(timeout))

    def _recv_until(self, deadline: int) -> ReceivedMessage:
        messagep = ffi.new("struct kdbus_message **")
        result = -errno.EINTR
        # A signal handler may raise between two rounds; else the wait goes on.
        while result in _GOES_ON:
            result = self._call(lib.kdbus_conn_recv_wait, deadline, -1, messagep)
        check(result)
        return ReceivedMessage(messagep[0])

    def recv_many(self, most: int, timeout: float | None = None) -> list[ReceivedMessage]:
        """Up to *most* messages, 64 at a time, once there is one, in one call; `TimedOut` after
        *timeout* seconds. One that brings descriptors is the last."""
        messages = ffi.new("struct kdbus_message *[]", min(most, _RECV_MANY_MAX))
        np = ffi.new("size_t *")
        deadline = _deadline(timeout)
        result = -errno.EINTR
        while result in _GOES_ON:
            result = self._call(lib.kdbus_conn_recv_many, deadline, -1, messages, len(messages), np)
        check(result)
        return [ReceivedMessage(messages[n]) for n in range(np[0])]

    def reply_recv(
        self, request: ReceivedMessage, message: Message, timeout: float | None = None
    ) -> ReceivedMessage:
        """`reply`, and `recv` the next message, in one call. What `reply` raises is raised without
        having waited."""
        deadline = _deadline(timeout)
        messagep = ffi.new("struct kdbus_message **")
        args = (request._get(), message._message, deadline, -1, messagep)
        result = self._call(lib.kdbus_conn_reply_recv, *args)
        if result in _GOES_ON:
            # The reply has been sent.
            return self._recv_until(deadline)
        check(result)
        return ReceivedMessage(messagep[0])

    def peek(self, *, priority: int | None = None) -> ReceivedMessage:
        """A copy of what `recv_nowait` would return, without descriptors."""
        if priority is None:
            return self._receive(lib.kdbus_conn_peek)
        return self._receive(lib.kdbus_conn_peek_priority, priority)

    def drop(self) -> None:
        """Throw the oldest message away; `NoMessage` if there is none."""
        check(self._call(lib.kdbus_conn_drop))

    def take_lost(self) -> int:
        """How many signals and notifications did not fit in the pool, as reported by
        receiving since this was called last."""
        return int(self._call(lib.kdbus_conn_take_lost))

    # --- names ---

    def acquire_name(self, name: str, flags: NameFlag = NameFlag.NONE) -> NameFlag:
        """KDBUS_CMD_NAME_ACQUIRE: own a name, or queue for it; how it is held now.

        `NameTaken` if another owns it, `NotPermitted` if the policy says so.
        """
        flagsp = ffi.new("uint64_t *")
        check(self._call(lib.kdbus_conn_acquire_name, os.fsencode(name), flags, flagsp))
        return NameFlag(flagsp[0])

    def release_name(self, name: str) -> None:
        """KDBUS_CMD_NAME_RELEASE: give a name back, or leave its queue.

        `NoDestination` (ESRCH) if nobody has it, OSError EADDRINUSE if others have.
        """
        check(self._call(lib.kdbus_conn_release_name, os.fsencode(name)))

    # --- questions ---

    def _ask(self, function: Callable[..., Any], *args: Any) -> list[Info]:
        listp = ffi.new("struct kdbus_info_list **")
        check(self._call(function, *args, listp))
        list_ = ffi.gc(listp[0], lib.kdbus_info_list_free)
        infos = []
        info = lib.kdbus_info_list_next(list_, ffi.NULL)
        while info:
            items = []
            item = lib.kdbus_info_next_item(info, ffi.NULL)
            while item:
                items.append(item)
                item = lib.kdbus_info_next_item(info, item)
            infos.append(Info(info.id, info.flags, parse_metadata(items)))
            info = lib.kdbus_info_list_next(list_, info)
        return infos

    def list(self, flags: ListFlag = ListFlag.UNIQUE | ListFlag.NAMES) -> list[Info]:
        """KDBUS_CMD_LIST: connections and names; a record for each name has it in
        `metadata.names`."""
        return self._ask(lib.kdbus_conn_list, flags)

    def _ask_one(self, function: Callable[..., Any], *args: Any) -> Info:
        infos = self._ask(function, *args)
        if not infos:
            fail(errno.EBADMSG)
        return infos[0]

    def info(
        self, id_: int = 0, name: str | None = None, attach_flags: AttachFlag = AttachFlag.ALL
    ) -> Info:
        """KDBUS_CMD_CONN_INFO: about a connection, by id or by a name it owns.

        `NoDestination` if there is none.
        """
        string = ffi.NULL if name is None else os.fsencode(name)
        return self._ask_one(lib.kdbus_conn_info, id_, string, attach_flags)

    def creator_info(self, attach_flags: AttachFlag = AttachFlag.ALL) -> Info:
        """KDBUS_CMD_BUS_CREATOR_INFO: about the bus and who made it."""
        return self._ask_one(lib.kdbus_conn_creator_info, attach_flags)

    # --- what to receive ---

    def add_match(
        self, match: Match | None = None, *, cookie: int = 0, flags: MatchFlag = MatchFlag.NONE
    ) -> None:
        """KDBUS_CMD_MATCH_ADD: receive what passes *match* (None: everything)."""
        rules = match._match if match else ffi.NULL
        check(self._call(lib.kdbus_conn_add_match, cookie, flags, rules))

    def remove_matches(self, cookie: int = 0) -> None:
        """KDBUS_CMD_MATCH_REMOVE: all with this cookie; `NotWaiting` if there is none."""
        check(self._call(lib.kdbus_conn_remove_matches, cookie))

    def update(
        self,
        *,
        attach_send: AttachFlag | None = None,
        attach_recv: AttachFlag | None = None,
        policy: Policy | None = None,
    ) -> None:
        """KDBUS_CMD_UPDATE: change what is not None; all of it, or nothing on failure."""
        attach = (attach_send, attach_recv)
        flags = [ffi.NULL if f is None else ffi.new("uint64_t *", f) for f in attach]
        check(self._call(lib.kdbus_conn_update, *flags, policy._policy if policy else ffi.NULL))
