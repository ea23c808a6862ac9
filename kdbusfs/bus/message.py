# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages: what SEND hands over, validated once, and the copies made of it for receivers.

In a receiver's pool a message is its header, the sender's items in their order, metadata for
this receiver, and behind that, from the next multiple of 8, the payload area:

    struct kdbus_msg | items, VEC turned into OFF | metadata | data of all VECs, back to back

The data of a VEC is not aligned by itself. To keep each piece at the alignment it has in the
logical stream, a VEC without data and a memfd leave (size mod 8) bytes of filler in the area.
"""

from __future__ import annotations

from errno import (
    E2BIG,
    EBADF,
    EBADMSG,
    EDESTADDRREQ,
    EDOM,
    EFAULT,
    EINVAL,
    EMFILE,
    EMSGSIZE,
    ENOTUNIQ,
    EOPNOTSUPP,
)
from typing import TYPE_CHECKING, Protocol

from ..abi.errors import CommandError
from ..abi.items import Buffer, Item, build, build_string
from ..abi.numbers import (
    ID_ANY,
    OFFSET_NONE,
    AttachFlag,
    ExtensionItemType,
    ItemType,
    Limit,
    MsgFlag,
    PayloadType,
)
from ..abi.structs import (
    BLOOM_FILTER_DATA,
    I32,
    ID_CHANGE,
    ITEM_HEADER_SIZE,
    ITEM_TYPE,
    MEMFD,
    MEMFD_FD,
    MSG,
    MSG_SIZE,
    MSG_SRC_ID,
    NAME_CHANGE,
    TIMESTAMP,
    U64,
    VEC,
    VEC_OFFSET,
)
from ..abi.valid_names import is_well_known
from .match import Change, Signal
from .metadata import IMPLICIT, PROCESS, ProcessMetadata, join
from .peer import release

if TYPE_CHECKING:
    from .call import Argument
    from .connection import Connection
    from .domain import Clock
    from .names import NameChange as NameChanged
    from .names import NameEntry
    from .peer import Descriptor
    from .quota import User

_EXPECT_REPLY = int(MsgFlag.EXPECT_REPLY)
_SIGNAL = int(MsgFlag.SIGNAL)
_VEC = int(ItemType.PAYLOAD_VEC)
_OFF = int(ItemType.PAYLOAD_OFF)
_MEMFD = int(ItemType.PAYLOAD_MEMFD)
_FDS = int(ItemType.FDS)
_BLOOM = int(ItemType.BLOOM_FILTER)
_INLINE = int(ExtensionItemType.PAYLOAD_INLINE)
_DST_NAME = int(ItemType.DST_NAME)
_TIMESTAMP = int(AttachFlag.TIMESTAMP)
_PIDS = int(AttachFlag.PIDS)
_VEC_SIZE = int(Limit.VEC_SIZE)
_MEMFDS = int(Limit.MESSAGE_MEMFDS)

USER_SPACE_END = 1 << 63
"""No user address lies above; what is unmapped below is found out by the copy."""

_pack_u64 = U64.pack_into
_unpack_header = MSG.unpack_from
_unpack_vec = VEC.unpack_from
_NO_DESCRIPTORS: list[Descriptor] = []
_NO_POSITIONS: list[int] = []
_NO_ITEMS: list[Item] = []
_NO_BLOCK = bytearray()


class Outgoing(Protocol):
    """What can be queued at a connection: a user's message, or a notification."""

    user: User
    """Whom it is charged to."""
    payer: int
    """The real uid whose share of memory is used for a copy that the bus keeps of it."""
    fds: list[Descriptor]
    memfds: list[Descriptor]
    name: NameEntry | None
    """The name it was addressed to."""
    priority: int
    n_payload: int
    """Bytes of its payload area."""

    def image(self, receiver: Connection) -> Buffer:
        """Header, items and metadata for *receiver*, zero-padded to a multiple of 8: what comes
        before the payload area."""

    def fill(self, receiver: Connection, offset: int) -> None:
        """Copy the payload into the pool of *receiver* from *offset*; Fault if unreadable."""

    def payload(self) -> bytes:
        """The payload area's bytes; Fault if unreadable."""

    def fd_positions(self) -> list[int]:
        """Where in the image the numbers of `fds`, then those of `memfds`, stand."""


class Message:
    """A message of *sender*, past examination."""

    __slots__ = (
        "sender",
        "user",
        "payer",
        "peer",
        "flags",
        "priority",
        "dst_id",
        "payload_type",
        "cookie",
        "timeout",
        "dst_name",
        "bloom",
        "fds",
        "memfds",
        "name",
        "n_payload",
        "_template",
        "_size",
        "_segments",
        "_offsets",
        "_block",
        "_block_address",
        "_from_block",
        "_fd_items",
        "_sender",
        "_seqnum",
        "_stamp",
        "_last",
    )

    def __init__(
        self,
        sender: Connection,
        argument: Argument,
        sync: bool = False,
        block: bytearray = _NO_BLOCK,
        block_address: int = 0,
    ) -> None:
        """Examine the message in *argument*, whose data it takes over; errors are those of SEND.
        *sync*: it was sent with SYNC_REPLY. *block*: the caller's memory at *block_address*, where
        payload may lie."""
        self.sender = sender
        self.user = sender.user
        self.payer = sender.opener.uid
        self.peer = argument.peer
        template = self._template = argument.data
        (
            _,
            self.flags,
            self.priority,
            self.dst_id,
            src_id,
            self.payload_type,
            self.cookie,
            self.timeout,
        ) = _unpack_header(template)
        """timeout: of a request its deadline, of a reply the cookie it answers."""
        if src_id and src_id != sender.id:
            raise CommandError(EINVAL, "src_id is not the sender's")
        _pack_u64(template, MSG_SRC_ID, sender.id)
        self.dst_name: bytes | None = None
        self.bloom: tuple[int, int] | None = None
        """Generation, and the filter as one integer, byte 0 lowest."""
        self.fds = _NO_DESCRIPTORS
        self.memfds = _NO_DESCRIPTORS
        self.name: NameEntry | None = None
        self.n_payload = 0
        self._segments: list[tuple[int, int]] = []
        """(address, size) of each part of the payload area; address 0 for filler."""
        self._offsets: list[tuple[int, int]] = []
        """(position of an OFF item's offset, offset of its data in the payload area)."""
        self._block = block
        self._block_address = block_address
        self._from_block = _NO_BLOCK
        """As much of the payload area as lies in the block."""
        self._fd_items = _NO_ITEMS
        self._sender: ProcessMetadata | None = None
        self._seqnum = 0
        self._stamp: bytes | None = None
        self._last: tuple[bytes, bytearray] | None = None
        self._examine_header(sync)
        self._examine_items(argument.items)

    def _examine_header(self, sync: bool) -> None:
        flags = self.flags
        if not self.payload_type:
            raise CommandError(EINVAL, "payload_type 0 is the kernel's")
        if self.dst_id == ID_ANY:
            if not flags & _SIGNAL:
                raise CommandError(EBADMSG, "a broadcast is a signal")
            if self.timeout:
                raise CommandError(ENOTUNIQ, "a broadcast has no reply")
        if flags & _EXPECT_REPLY:
            if not self.timeout:
                raise CommandError(EINVAL, "EXPECT_REPLY without a timeout")
            if flags & _SIGNAL:
                raise CommandError(ENOTUNIQ, "a signal expects no reply")
        elif sync:
            raise CommandError(EINVAL, "SYNC_REPLY without EXPECT_REPLY")
        elif self.timeout and flags & _SIGNAL:
            raise CommandError(EINVAL, "a signal is no reply")

    def _examine_items(self, items: list[Item]) -> None:
        template, end = self._template, MSG_SIZE
        n_memfds = 0
        for item in items:
            type_, start, size = item
            end = start + size
            if type_ == _VEC:
                self._add_vec(start)
            elif type_ == _INLINE:
                self._add_inline(start)
            elif type_ == _MEMFD:
                n_memfds += 1
                self._add_memfd(item, n_memfds)
            elif type_ == _FDS:
                if size // 4 > Limit.MESSAGE_FDS:
                    raise CommandError(EMFILE, f"{size // 4} descriptors")
                self._fd_items = [*self._fd_items, item]
            elif type_ == _BLOOM:
                self._add_bloom_filter(bytes(template[start:end]))
            elif type_ == _DST_NAME:
                self._add_dst_name(bytes(template[start : end - 1]))
            else:
                raise CommandError(EINVAL, "NEGOTIATE in a message that is sent")
        if (self.flags & _SIGNAL != 0) != (self.bloom is not None):
            raise CommandError(EBADMSG, "signals, and only they, have a bloom filter")
        if not self.dst_id and self.dst_name is None:
            raise CommandError(EDESTADDRREQ, "no destination")
        if self.dst_id == ID_ANY and any(item.type == _FDS for item in self._fd_items):
            raise CommandError(ENOTUNIQ, "descriptors can't be broadcast")
        # The padding of the last item is not part of the message, whether it was given or not.
        self._size = end
        if end != len(template) or end & 7:
            del template[end:]
            template += bytes(-end & 7)

    def _add_vec(self, start: int) -> None:
        template = self._template
        size, address = _unpack_vec(template, start)
        if size > _VEC_SIZE:
            raise CommandError(EMSGSIZE, f"vec of {size} bytes")
        _pack_u64(template, start - ITEM_HEADER_SIZE + ITEM_TYPE, _OFF)
        if not address:
            _pack_u64(template, start + VEC_OFFSET, OFFSET_NONE)
            self._add_filler(size)
            return
        if address + size > USER_SPACE_END:
            raise CommandError(EFAULT, "vec outside user space")
        self._offsets.append((start + VEC_OFFSET, self.n_payload))
        self._segments.append((address, size))
        self.n_payload += size

    def _add_inline(self, start: int) -> None:
        size, offset = _unpack_vec(self._template, start)
        if offset + size > len(self._block):
            raise CommandError(EFAULT, "payload outside the block")
        if self.n_payload + size > len(self._block):
            raise CommandError(EMSGSIZE, "more payload than the block is long")
        _pack_u64(self._template, start - 8, _OFF)
        if len(self._from_block) == self.n_payload:
            # Nothing came before it that is to be fetched from elsewhere.
            if self.n_payload:
                self._from_block += self._block[offset : offset + size]
            else:
                self._from_block = self._block[offset : offset + size]
        self._offsets.append((start + 8, self.n_payload))
        self._segments.append((self._block_address + offset, size))
        self.n_payload += size

    @property
    def is_inline(self) -> bool:
        """Whether all that it brings has come with the request."""
        return not self._fd_items and len(self._from_block) == self.n_payload

    def _add_filler(self, size: int) -> None:
        if size & 7:
            self._segments.append((0, size & 7))
            self.n_payload += size & 7

    def _add_memfd(self, item: Item, n_memfds: int) -> None:
        start, size, _, _ = MEMFD.unpack_from(self._template, item.start)
        if start + size >= 1 << 64:
            raise CommandError(EMSGSIZE, "memfd range overflows")
        if n_memfds > _MEMFDS:
            raise CommandError(E2BIG, f"{n_memfds} memfds")
        self._fd_items = [*self._fd_items, item]
        self._add_filler(size)

    def _add_bloom_filter(self, payload: bytes) -> None:
        n_bloom = len(payload) - BLOOM_FILTER_DATA
        if n_bloom % 8:
            raise CommandError(EFAULT, f"bloom filter of {n_bloom} bytes")
        if n_bloom != self.sender.bus.bloom_size:
            raise CommandError(EDOM, f"bloom filter of {n_bloom} bytes")
        self.bloom = (
            U64.unpack_from(payload)[0],
            int.from_bytes(payload[BLOOM_FILTER_DATA:], "little"),
        )

    def _add_dst_name(self, name: bytes) -> None:
        if not is_well_known(name):
            raise CommandError(EINVAL, "invalid destination name")
        if self.dst_id == ID_ANY:
            raise CommandError(EBADMSG, "a broadcast has no destination name")
        self.dst_name = name

    def take_descriptors(self) -> None:
        """Resolve the caller's descriptors, in the order of the items.

        EBADF: not open. EOPNOTSUPP: a kdbus file, AF_UNIX socket or io_uring. EMEDIUMTYPE,
        ETXTBSY: no memfd, or not sealed in full. EFAULT: the memfd is shorter than said.
        Whatever comes of it, `release_descriptors` has to follow.
        """
        if not self._fd_items:
            return
        self.fds, self.memfds = [], []
        for type_, start, size in self._fd_items:
            if type_ == _FDS:
                for at in range(start, start + size, 4):
                    self._take(I32.unpack_from(self._template, at)[0])
            else:
                begin, length, fd, _ = MEMFD.unpack_from(self._template, start)
                memfd = self.peer.take(fd)
                self.memfds.append(memfd)
                if memfd.is_path():
                    raise CommandError(EBADF, f"{fd} is an O_PATH descriptor")
                if begin + length > memfd.sealed_size():
                    raise CommandError(EFAULT, "memfd is shorter than said")

    def _take(self, fd: int) -> None:
        if fd < 0:
            raise CommandError(EBADF, f"descriptor {fd}")
        descriptor = self.peer.take(fd)
        self.fds.append(descriptor)
        if not descriptor.is_path() and descriptor.can_hold_files():
            raise CommandError(EOPNOTSUPP, f"{fd} is a kdbus file, AF_UNIX socket or io_uring")

    def release_descriptors(self) -> None:
        """Nothing more is done with the message: what it took goes, but for what is queued."""
        if self._fd_items:
            fds, self.fds = self.fds, _NO_DESCRIPTORS
            memfds, self.memfds = self.memfds, _NO_DESCRIPTORS
            release(fds)
            release(memfds)

    def fd_positions(self) -> list[int]:
        if not self._fd_items:
            return _NO_POSITIONS
        fds = [i for item in self._fd_items if item.type == _FDS for i in _range(item)]
        return fds + [item.start + MEMFD_FD for item in self._fd_items if item.type == _MEMFD]

    def number(self, seqnum: int) -> None:
        """Give it its place in the bus's order."""
        self._seqnum = seqnum

    def signal(self) -> Signal:
        """What match rules look at."""
        assert self.bloom is not None
        generation, bloom = self.bloom
        return Signal(self.sender.id, self.dst_id, self.sender.owned_names(), bloom, generation)

    def image(self, receiver: Connection) -> bytearray:
        wanted = receiver.attach_flags_recv
        metadata, n_metadata = join(self._metadata(receiver, wanted)) if wanted else (b"", 0)
        last = self._last
        if last is not None and last[0] == metadata:
            return last[1]
        image = self._template + metadata if metadata else self._template
        _pack_u64(image, 0, len(self._template) + n_metadata if metadata else self._size)
        offset = len(image)
        for position, relative in self._offsets:
            _pack_u64(image, position, offset + relative)
        self._last = metadata, image
        return image

    def fill(self, receiver: Connection, offset: int) -> None:
        if len(self._from_block) == self.n_payload:
            receiver.pool.memory.write(offset, self._from_block)
        elif self._segments:
            self.peer.fill(receiver.pool.memory, offset, self._segments)

    def payload(self) -> bytes:
        if len(self._from_block) == self.n_payload:
            return bytes(self._from_block)
        return b"".join(
            self.peer.read(address, size) if address else bytes(size)
            for address, size in self._segments
        )

    def _metadata(self, receiver: Connection, wanted: int) -> list[bytes]:
        sender = self.sender
        items: list[bytes] = []
        process = wanted & PROCESS
        if process and not sender.faked:
            items = self._process_metadata(receiver, process)
        items += sender.metadata_items(wanted)
        if wanted & _TIMESTAMP:
            if self._stamp is None:
                self._stamp = _timestamp(self._seqnum, sender.bus.domain.clock)
            items.append(self._stamp)
        return items

    def _process_metadata(self, receiver: Connection, wanted: int) -> list[bytes]:
        process = self._sender
        if process is None:
            process = self._sender = ProcessMetadata()
        viewer = receiver.viewer
        namespace = viewer.pid_namespace
        if namespace.level or namespace.hidepid_group is not None:
            self._gather(process, _PIDS)
            if not process.visible(receiver):
                wanted &= self.sender.attach_flags_send | IMPLICIT
        self._gather(process, wanted)
        return process.items(wanted, viewer, self.peer)

    def _gather(self, process: ProcessMetadata, wanted: int) -> None:
        missing = wanted & ~process.gathered
        if missing:
            self.peer.gather(process, missing)
            process.gathered |= missing


def _range(item: Item) -> range:
    return range(item.start, item.start + item.size, 4)


def _timestamp(seqnum: int, clock: Clock) -> bytes:
    stamp = TIMESTAMP.pack(seqnum, clock.monotonic_ns(), clock.realtime_ns())
    return build(ItemType.TIMESTAMP, stamp)


class Notification:
    """A message of the bus itself (kdbus.message(7)): one item that tells what happened, and a
    timestamp, whether the receiver asked for it or not."""

    __slots__ = (
        "user",
        "payer",
        "fds",
        "memfds",
        "name",
        "priority",
        "n_payload",
        "change",
        "dst_id",
        "_item",
        "_cookie_reply",
        "_seqnum",
        "_clock",
        "_image",
    )

    def __init__(
        self,
        user: User,
        clock: Clock,
        seqnum: int,
        item: bytes,
        *,
        change: Change | None = None,
        dst_id: int = ID_ANY,
        cookie_reply: int = 0,
    ) -> None:
        self.user = user
        self.payer = 0
        self.fds = _NO_DESCRIPTORS
        self.memfds = _NO_DESCRIPTORS
        self.name: NameEntry | None = None
        self.priority = 0
        self.n_payload = 0
        self.change = change
        """What match rules look at; None for REPLY_*, which need no match."""
        self.dst_id = dst_id
        self._item = item
        self._cookie_reply = cookie_reply
        self._seqnum = seqnum
        self._clock = clock
        self._image: bytes | None = None

    def image(self, receiver: Connection) -> bytes:
        if self._image is None:
            body = self._item + _timestamp(self._seqnum, self._clock)
            flags = 0 if self.change is None else _SIGNAL
            header = MSG.pack(
                MSG_SIZE + len(body),
                flags,
                0,
                self.dst_id,
                0,
                PayloadType.KERNEL,
                0,
                self._cookie_reply,
            )
            self._image = header + body
        return self._image

    def fill(self, receiver: Connection, offset: int) -> None:
        pass

    def payload(self) -> bytes:
        return b""

    def fd_positions(self) -> list[int]:
        return _NO_POSITIONS


def id_item(type_: ItemType, id_: int, flags: int) -> tuple[bytes, Change]:
    """An ID_ADD or ID_REMOVE item, and what rules look at in it."""
    return build(type_, ID_CHANGE.pack(id_, flags)), Change(type_, id_)


def name_item(change: NameChanged) -> tuple[bytes, Change]:
    """A NAME_ADD, NAME_REMOVE or NAME_CHANGE item, and what rules look at in it."""
    payload = NAME_CHANGE.pack(change.old_id, change.old_flags, change.new_id, change.new_flags)
    item = build_string(change.type, payload + change.name)
    return item, Change(change.type, 0, change.old_id, change.new_id, change.name)
