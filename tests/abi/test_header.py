# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ABI header: it compiles everywhere, has kdbus's numbers, and the daemon has the same.

The numbers below were taken from the original kdbus, by compiling its header; they are written
out here so that a slip in ours can't hide.
"""

import shutil
import struct
import subprocess
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from kdbusfs.abi import numbers, structs
from kdbusfs.abi.numbers import Command, ExtensionCommand
from kdbusfs.abi.specs import COMMAND_SPECS

INCLUDE = Path(__file__).parents[2] / "libkdbus" / "include"
STANDARDS = ("c99", "c11", "c17", "gnu11", "c++11", "c++17", "c++20")

COMMANDS = {
    "BUS_MAKE": (0x40189500, "kdbus_cmd"),
    "ENDPOINT_MAKE": (0x40189510, "kdbus_cmd"),
    "ENDPOINT_UPDATE": (0x40189511, "kdbus_cmd"),
    "HELLO": (0xC0609580, "kdbus_cmd_hello"),
    "UPDATE": (0x40189581, "kdbus_cmd"),
    "BYEBYE": (0x40189582, "kdbus_cmd"),
    "FREE": (0x40209583, "kdbus_cmd_free"),
    "CONN_INFO": (0x80389584, "kdbus_cmd_info"),
    "BUS_CREATOR_INFO": (0x80389585, "kdbus_cmd_info"),
    "LIST": (0x80289586, "kdbus_cmd_list"),
    "SEND": (0x40389590, "kdbus_cmd_send"),
    "RECV": (0x80409591, "kdbus_cmd_recv"),
    "NAME_ACQUIRE": (0x401895A0, "kdbus_cmd"),
    "NAME_RELEASE": (0x401895A1, "kdbus_cmd"),
    "MATCH_ADD": (0x402095B0, "kdbus_cmd_match"),
    "MATCH_REMOVE": (0x402095B1, "kdbus_cmd_match"),
}

EXTENSION_COMMANDS = {
    "FD_SOCKET": (0x402095F0, "kdbusfs_cmd_fd_socket"),
    "RECV": (0xC04095F1, "kdbus_cmd_recv"),
    "SEND": (0xC03895F2, "kdbus_cmd_send"),
}
# Its number says how large the block is; the daemon knows it by that for the smallest.
EXCHANGE = "KDBUSFS_CMD_EXCHANGE(sizeof(struct kdbusfs_cmd_exchange))"

# size, and the offset of each field
STRUCTS: dict[str, tuple[int, dict[str, int]]] = {
    "kdbus_cmd": (24, {"size": 0, "flags": 8, "return_flags": 16, "items": 24}),
    "kdbus_cmd_hello": (
        96,
        {
            "size": 0,
            "flags": 8,
            "return_flags": 16,
            "attach_flags_send": 24,
            "attach_flags_recv": 32,
            "bus_flags": 40,
            "id": 48,
            "pool_size": 56,
            "offset": 64,
            "items_size": 72,
            "id128": 80,
            "items": 96,
        },
    ),
    "kdbus_cmd_free": (32, {"size": 0, "flags": 8, "return_flags": 16, "offset": 24, "items": 32}),
    "kdbus_cmd_info": (
        56,
        {
            "size": 0,
            "flags": 8,
            "return_flags": 16,
            "id": 24,
            "attach_flags": 32,
            "offset": 40,
            "info_size": 48,
            "items": 56,
        },
    ),
    "kdbus_cmd_list": (
        40,
        {"size": 0, "flags": 8, "return_flags": 16, "offset": 24, "list_size": 32, "items": 40},
    ),
    "kdbus_cmd_send": (
        56,
        {
            "size": 0,
            "flags": 8,
            "return_flags": 16,
            "msg_address": 24,
            "reply": 32,
            "reply.offset": 32,
            "reply.msg_size": 40,
            "reply.return_flags": 48,
            "items": 56,
        },
    ),
    "kdbus_cmd_recv": (
        64,
        {
            "size": 0,
            "flags": 8,
            "return_flags": 16,
            "priority": 24,
            "dropped_msgs": 32,
            "msg": 40,
            "msg.offset": 40,
            "msg.msg_size": 48,
            "msg.return_flags": 56,
            "items": 64,
        },
    ),
    "kdbus_cmd_match": (32, {"size": 0, "flags": 8, "return_flags": 16, "cookie": 24, "items": 32}),
    "kdbus_msg": (
        64,
        {
            "size": 0,
            "flags": 8,
            "priority": 16,
            "dst_id": 24,
            "src_id": 32,
            "payload_type": 40,
            "cookie": 48,
            "timeout_ns": 56,
            "cookie_reply": 56,
            "items": 64,
        },
    ),
    "kdbus_msg_info": (24, {"offset": 0, "msg_size": 8, "return_flags": 16}),
    "kdbus_info": (24, {"size": 0, "id": 8, "flags": 16, "items": 24}),
    "kdbus_vec": (16, {"size": 0, "address": 8, "offset": 8}),
    "kdbus_memfd": (24, {"start": 0, "size": 8, "fd": 16}),
    "kdbus_creds": (
        64,
        {
            "uid": 0,
            "euid": 8,
            "suid": 16,
            "fsuid": 24,
            "gid": 32,
            "egid": 40,
            "sgid": 48,
            "fsgid": 56,
        },
    ),
    "kdbus_pids": (24, {"pid": 0, "tid": 8, "ppid": 16}),
    "kdbus_caps": (8, {"last_cap": 0, "caps": 4}),
    "kdbus_audit": (8, {"sessionid": 0, "loginuid": 4}),
    "kdbus_timestamp": (24, {"seqnum": 0, "monotonic_ns": 8, "realtime_ns": 16}),
    "kdbus_name": (8, {"flags": 0, "name": 8}),
    "kdbus_notify_id_change": (16, {"id": 0, "flags": 8}),
    "kdbus_notify_name_change": (32, {"old_id": 0, "new_id": 16, "name": 32}),
    "kdbus_bloom_parameter": (16, {"size": 0, "n_hash": 8}),
    "kdbus_bloom_filter": (8, {"generation": 0, "data": 8}),
    "kdbus_policy_access": (24, {"type": 0, "access": 8, "id": 16}),
    "kdbus_item": (
        80,
        {
            "size": 0,
            "type": 8,
            "data": 16,
            "data32": 16,
            "data64": 16,
            "str": 16,
            "fds": 16,
            "id": 16,
            "vec": 16,
            "memfd": 16,
            "bloom_parameter": 16,
            "bloom_filter": 16,
            "timestamp": 16,
            "creds": 16,
            "pids": 16,
            "caps": 16,
            "audit": 16,
            "name": 16,
            "policy_access": 16,
            "id_change": 16,
            "name_change": 16,
        },
    ),
    "kdbusfs_cmd_fd_socket": (32, {"size": 0, "flags": 8, "return_flags": 16, "fd": 24}),
    "kdbusfs_fd_packet": (16, {"offset": 0, "n_fds": 8}),
    "kdbusfs_cmd_exchange": (
        72,
        {
            "size": 0,
            "flags": 8,
            "return_flags": 16,
            "deadline_ns": 24,
            "dropped_msgs": structs.CMD_EXCHANGE_DROPPED_MSGS,
            "n_free": 40,
            "n_freed": structs.CMD_EXCHANGE_N_FREED,
            "n_send": 48,
            "n_sent": structs.CMD_EXCHANGE_N_SENT,
            "n_recv": 56,
            "n_received": structs.CMD_EXCHANGE_N_RECEIVED,
            "cancel_fd": 64,
            "fd_socket": structs.CMD_EXCHANGE_FD_SOCKET,
        },
    ),
}

CONSTANTS = {
    "KDBUS_IOCTL_MAGIC": 0x95,
    "KDBUS_SRC_ID_KERNEL": 0,
    "KDBUS_DST_ID_NAME": 0,
    "KDBUS_DST_ID_BROADCAST": 2**64 - 1,
    "KDBUS_MATCH_ID_ANY": 2**64 - 1,
    "KDBUS_FLAG_NEGOTIATE": 1 << 63,
    "_KDBUS_ITEM_NULL": 0,
    "_KDBUS_ITEM_USER_BASE": 1,
    "KDBUS_ITEM_NEGOTIATE": 1,
    "KDBUS_ITEM_PAYLOAD_VEC": 2,
    "KDBUS_ITEM_PAYLOAD_OFF": 3,
    "KDBUS_ITEM_PAYLOAD_MEMFD": 4,
    "KDBUS_ITEM_FDS": 5,
    "KDBUS_ITEM_CANCEL_FD": 6,
    "KDBUS_ITEM_BLOOM_PARAMETER": 7,
    "KDBUS_ITEM_BLOOM_FILTER": 8,
    "KDBUS_ITEM_BLOOM_MASK": 9,
    "KDBUS_ITEM_DST_NAME": 10,
    "KDBUS_ITEM_MAKE_NAME": 11,
    "KDBUS_ITEM_ATTACH_FLAGS_SEND": 12,
    "KDBUS_ITEM_ATTACH_FLAGS_RECV": 13,
    "KDBUS_ITEM_ID": 14,
    "KDBUS_ITEM_NAME": 15,
    "KDBUS_ITEM_DST_ID": 16,
    "_KDBUS_ITEM_ATTACH_BASE": 0x1000,
    "KDBUS_ITEM_TIMESTAMP": 0x1000,
    "KDBUS_ITEM_CREDS": 0x1001,
    "KDBUS_ITEM_PIDS": 0x1002,
    "KDBUS_ITEM_AUXGROUPS": 0x1003,
    "KDBUS_ITEM_OWNED_NAME": 0x1004,
    "KDBUS_ITEM_TID_COMM": 0x1005,
    "KDBUS_ITEM_PID_COMM": 0x1006,
    "KDBUS_ITEM_EXE": 0x1007,
    "KDBUS_ITEM_CMDLINE": 0x1008,
    "KDBUS_ITEM_CGROUP": 0x1009,
    "KDBUS_ITEM_CAPS": 0x100A,
    "KDBUS_ITEM_SECLABEL": 0x100B,
    "KDBUS_ITEM_AUDIT": 0x100C,
    "KDBUS_ITEM_CONN_DESCRIPTION": 0x100D,
    "_KDBUS_ITEM_POLICY_BASE": 0x2000,
    "KDBUS_ITEM_POLICY_ACCESS": 0x2000,
    "_KDBUS_ITEM_KERNEL_BASE": 0x8000,
    "KDBUS_ITEM_NAME_ADD": 0x8000,
    "KDBUS_ITEM_NAME_REMOVE": 0x8001,
    "KDBUS_ITEM_NAME_CHANGE": 0x8002,
    "KDBUS_ITEM_ID_ADD": 0x8003,
    "KDBUS_ITEM_ID_REMOVE": 0x8004,
    "KDBUS_ITEM_REPLY_TIMEOUT": 0x8005,
    "KDBUS_ITEM_REPLY_DEAD": 0x8006,
    "KDBUS_ATTACH_TIMESTAMP": 1,
    "KDBUS_ATTACH_CREDS": 2,
    "KDBUS_ATTACH_PIDS": 4,
    "KDBUS_ATTACH_AUXGROUPS": 8,
    "KDBUS_ATTACH_NAMES": 0x10,
    "KDBUS_ATTACH_TID_COMM": 0x20,
    "KDBUS_ATTACH_PID_COMM": 0x40,
    "KDBUS_ATTACH_EXE": 0x80,
    "KDBUS_ATTACH_CMDLINE": 0x100,
    "KDBUS_ATTACH_CGROUP": 0x200,
    "KDBUS_ATTACH_CAPS": 0x400,
    "KDBUS_ATTACH_SECLABEL": 0x800,
    "KDBUS_ATTACH_AUDIT": 0x1000,
    "KDBUS_ATTACH_CONN_DESCRIPTION": 0x2000,
    "_KDBUS_ATTACH_ALL": 0x3FFF,
    "_KDBUS_ATTACH_ANY": 2**64 - 1,
    "KDBUS_MAKE_ACCESS_GROUP": 1,
    "KDBUS_MAKE_ACCESS_WORLD": 2,
    "KDBUS_HELLO_ACCEPT_FD": 1,
    "KDBUS_HELLO_ACTIVATOR": 2,
    "KDBUS_HELLO_POLICY_HOLDER": 4,
    "KDBUS_HELLO_MONITOR": 8,
    "KDBUS_MSG_EXPECT_REPLY": 1,
    "KDBUS_MSG_NO_AUTO_START": 2,
    "KDBUS_MSG_SIGNAL": 4,
    "KDBUS_SEND_SYNC_REPLY": 1,
    "KDBUS_RECV_PEEK": 1,
    "KDBUS_RECV_DROP": 2,
    "KDBUS_RECV_USE_PRIORITY": 4,
    "KDBUS_RECV_RETURN_INCOMPLETE_FDS": 1,
    "KDBUS_RECV_RETURN_DROPPED_MSGS": 2,
    "KDBUS_LIST_UNIQUE": 1,
    "KDBUS_LIST_NAMES": 2,
    "KDBUS_LIST_ACTIVATORS": 4,
    "KDBUS_LIST_QUEUED": 8,
    "KDBUS_MATCH_REPLACE": 1,
    "KDBUS_NAME_REPLACE_EXISTING": 1,
    "KDBUS_NAME_ALLOW_REPLACEMENT": 2,
    "KDBUS_NAME_QUEUE": 4,
    "KDBUS_NAME_IN_QUEUE": 8,
    "KDBUS_NAME_ACTIVATOR": 0x10,
    "KDBUS_NAME_PRIMARY": 0x20,
    "KDBUS_NAME_ACQUIRED": 0x40,
    "_KDBUS_POLICY_ACCESS_NULL": 0,
    "KDBUS_POLICY_ACCESS_USER": 1,
    "KDBUS_POLICY_ACCESS_GROUP": 2,
    "KDBUS_POLICY_ACCESS_WORLD": 3,
    "KDBUS_POLICY_SEE": 0,
    "KDBUS_POLICY_TALK": 1,
    "KDBUS_POLICY_OWN": 2,
    "KDBUS_PAYLOAD_KERNEL": 0,
    "KDBUS_PAYLOAD_DBUS": 0x4442757344427573,
    **{f"KDBUS_CMD_{name}": code for name, (code, _) in COMMANDS.items()},
    **{f"KDBUSFS_CMD_{name}": code for name, (code, _) in EXTENSION_COMMANDS.items()},
    EXCHANGE: 0xC04895F3,
    "KDBUSFS_EXCHANGE_SIZE_MAX": 16376,
    "KDBUSFS_EXCHANGE_WAIT": 1,
    "KDBUSFS_EXCHANGE_CALL": 2,
    "KDBUSFS_ITEM_PAYLOAD_INLINE": 0x0FF0,
}

# How the daemon's enums call their families in C.
FAMILIES: dict[type[IntEnum] | type[IntFlag], str] = {
    numbers.Command: "KDBUS_CMD_",
    numbers.ExtensionCommand: "KDBUSFS_CMD_",
    numbers.ExtensionItemType: "KDBUSFS_ITEM_",
    numbers.ExchangeFlag: "KDBUSFS_EXCHANGE_",
    numbers.ItemType: "KDBUS_ITEM_",
    numbers.AttachFlag: "KDBUS_ATTACH_",
    numbers.MakeFlag: "KDBUS_MAKE_",
    numbers.HelloFlag: "KDBUS_HELLO_",
    numbers.MsgFlag: "KDBUS_MSG_",
    numbers.SendFlag: "KDBUS_SEND_",
    numbers.RecvFlag: "KDBUS_RECV_",
    numbers.RecvReturnFlag: "KDBUS_RECV_RETURN_",
    numbers.ListFlag: "KDBUS_LIST_",
    numbers.MatchFlag: "KDBUS_MATCH_",
    numbers.NameFlag: "KDBUS_NAME_",
    numbers.PolicyType: "KDBUS_POLICY_ACCESS_",
    numbers.PolicyAccess: "KDBUS_POLICY_",
    numbers.PayloadType: "KDBUS_PAYLOAD_",
}

# The daemon's layouts, and the part of the C struct that each stands for.
LAYOUTS: dict[str, tuple[struct.Struct, int]] = {
    "kdbus_cmd": (structs.CMD, 24),
    "kdbus_cmd_hello": (structs.CMD_HELLO, 96),
    "kdbus_cmd_free": (structs.CMD_FREE, 32),
    "kdbus_cmd_info": (structs.CMD_INFO, 56),
    "kdbus_cmd_list": (structs.CMD_LIST, 40),
    "kdbus_cmd_send": (structs.CMD_SEND, 56),
    "kdbus_cmd_recv": (structs.CMD_RECV, 64),
    "kdbus_cmd_match": (structs.CMD_MATCH, 32),
    "kdbus_msg": (structs.MSG, 64),
    "kdbus_msg_info": (structs.MSG_INFO, 24),
    "kdbus_info": (structs.INFO, 24),
    "kdbus_vec": (structs.VEC, 16),
    "kdbus_memfd": (structs.MEMFD, 24),
    "kdbus_creds": (structs.CREDS, 64),
    "kdbus_pids": (structs.PIDS, 24),
    "kdbus_audit": (structs.AUDIT, 8),
    "kdbus_timestamp": (structs.TIMESTAMP, 24),
    "kdbus_notify_id_change": (structs.ID_CHANGE, 16),
    "kdbus_notify_name_change": (structs.NAME_CHANGE, 32),
    "kdbus_bloom_parameter": (structs.BLOOM_PARAMETER, 16),
    "kdbus_policy_access": (structs.POLICY_ACCESS, 24),
    "kdbusfs_cmd_fd_socket": (structs.CMD_FD_SOCKET, 32),
    "kdbusfs_cmd_exchange": (structs.CMD_EXCHANGE, 72),
}


def program() -> str:
    """A program that prints everything of interest as lines "what number"."""
    lines = [f'printf("%s %llu\\n", "{name}", (unsigned long long)({name}));' for name in CONSTANTS]
    for name, (_, fields) in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [
            f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));'
            for field in fields
        ]
    return "\n".join(
        [
            "#include <kdbus/extension.h>",
            "#include <linux/kdbus.h>",
            "#include <stddef.h>",
            "#include <stdio.h>",
            "int main(void) {",
            *lines,
            "return 0; }",
        ]
    )


def expected() -> dict[str, int]:
    """What it should print."""
    result = dict(CONSTANTS)
    for name, (size, fields) in STRUCTS.items():
        result[name] = size
        result |= {f"{name}.{field}": offset for field, offset in fields.items()}
    return result


def compile_and_run(source: str, standard: str, directory: Path) -> str:
    """Compile *source* without a single warning, and run it; its output."""
    compiler = "g++" if "++" in standard else "gcc"
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    path = directory / f"program.{'cc' if '++' in standard else 'c'}"
    path.write_text(source)
    strict = ["-Wall", "-Wextra", "-pedantic", "-Werror", f"-std={standard}"]
    command: list[str | Path] = [
        compiler,
        *strict,
        "-I",
        INCLUDE,
        path,
        "-o",
        directory / "program",
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run(
        [directory / "program"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("standard", STANDARDS)
def test_numbers_and_layouts_are_those_of_kdbus(standard: str, tmp_path: Path) -> None:
    output = compile_and_run(program(), standard, tmp_path)
    found = {
        name: int(value) for name, value in (line.rsplit(" ", 1) for line in output.splitlines())
    }
    assert found == expected()


@pytest.mark.parametrize("standard", STANDARDS)
@pytest.mark.parametrize("header", ["linux/kdbus.h", "kdbus/extension.h", "kdbus/kdbus.h"])
def test_each_header_stands_alone(header: str, standard: str, tmp_path: Path) -> None:
    compile_and_run(f"#include <{header}>\nint main(void) {{ return 0; }}\n", standard, tmp_path)


@pytest.mark.parametrize("standard", ["c99", "c++11"])
def test_items_can_be_filled_in_the_way_programs_do(standard: str, tmp_path: Path) -> None:
    source = """
        #include <linux/kdbus.h>
        #include <stddef.h>
        #include <stdio.h>
        #include <string.h>
        static union { struct kdbus_cmd cmd; char bytes[128]; } buffer;
        int main(void) {
            struct kdbus_item *item = buffer.cmd.items;
            item->size = offsetof(struct kdbus_item, str) + sizeof("a.b");
            item->type = KDBUS_ITEM_NAME;
            strcpy(item->str, "a.b");
            item = (struct kdbus_item *)((char *)item + ((item->size + 7) & ~7ULL));
            item->size = offsetof(struct kdbus_item, fds) + 2 * sizeof(int);
            item->fds[0] = 3;
            item->fds[1] = 4;
            item->policy_access.id = 7;
            printf("%td\\n", (char *)item - buffer.bytes);
            return 0;
        }"""
    assert compile_and_run(source, standard, tmp_path) == "48\n"


@pytest.mark.parametrize(("name", "code", "of"), [(n, *c) for n, c in COMMANDS.items()])
def test_a_code_carries_the_size_of_its_struct(name: str, code: int, of: str) -> None:
    assert code >> 8 & 0xFF == 0x95
    assert code >> 16 & 0x3FFF == STRUCTS[of][0]


def c_name(prefix: str, name: str) -> str:
    """What a member of one of our enums is called in C."""
    return EXCHANGE if prefix + name == "KDBUSFS_CMD_EXCHANGE" else prefix + name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_daemon_has_the_same_numbers(family: type[IntEnum] | type[IntFlag]) -> None:
    prefix = FAMILIES[family]
    ours = {c_name(prefix, member.name): int(member) for member in family}
    assert ours.items() <= CONSTANTS.items()


def test_the_daemon_has_all_numbers() -> None:
    families = {c_name(p, member.name) for f, p in FAMILIES.items() for member in f}
    others = {name for name in CONSTANTS if name.startswith("_")} | {
        "KDBUS_IOCTL_MAGIC",
        "KDBUS_SRC_ID_KERNEL",
        "KDBUS_DST_ID_NAME",
        "KDBUS_DST_ID_BROADCAST",
        "KDBUS_MATCH_ID_ANY",
        "KDBUS_FLAG_NEGOTIATE",
        "KDBUSFS_EXCHANGE_SIZE_MAX",
    }
    assert families | others == CONSTANTS.keys()
    assert CONSTANTS["KDBUS_IOCTL_MAGIC"] == numbers.IOCTL_MAGIC
    assert CONSTANTS["KDBUS_DST_ID_BROADCAST"] == numbers.DST_ID_BROADCAST
    assert CONSTANTS["KDBUS_MATCH_ID_ANY"] == numbers.ID_ANY
    assert CONSTANTS["KDBUS_FLAG_NEGOTIATE"] == numbers.FLAG_NEGOTIATE
    assert CONSTANTS["_KDBUS_ATTACH_ALL"] == numbers.ATTACH_ALL
    assert CONSTANTS["_KDBUS_ATTACH_ANY"] == numbers.ATTACH_ANY


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_daemon_has_the_same_layouts(name: str) -> None:
    layout, size = LAYOUTS[name]
    assert layout.size == size == STRUCTS[name][0]


def test_the_daemon_has_the_same_offsets() -> None:
    assert STRUCTS["kdbus_item"][1]["data"] == structs.ITEM_HEADER_SIZE
    assert STRUCTS["kdbus_msg"][0] == structs.MSG_SIZE
    assert STRUCTS["kdbus_cmd"][0] == structs.CMD_SIZE
    offsets = {f"{prefix}_{field.upper()}": at for prefix, field, at in fields()}
    sizes = {"ITEM_HEADER_SIZE", "MSG_SIZE", "CMD_SIZE"}
    ours = {name: n for name, n in vars(structs).items() if isinstance(n, int) and name.isupper()}
    assert ours.keys() - sizes <= offsets.keys(), "an offset that nothing holds against the header"
    assert all(offsets[name] == ours[name] for name in ours.keys() - sizes)


def fields() -> Iterator[tuple[str, str, int]]:
    """Each field of each struct, as the daemon names it: CMD_RECV, msg_return_flags, its offset."""
    for struct_, (_, found) in STRUCTS.items():
        prefix = struct_.removeprefix("kdbusfs_").removeprefix("kdbus_").upper()
        for field, offset in found.items():
            yield prefix, field.replace(".", "_"), offset


@pytest.mark.parametrize("code", COMMAND_SPECS)
def test_commands_give_back_the_fields_behind_what_is_given(code: int) -> None:
    """What a command returns begins with return_flags. Whatever comes behind that is either all
    of its struct, or nothing."""
    spec = COMMAND_SPECS[code]
    returning = {Command.HELLO, Command.CONN_INFO, Command.BUS_CREATOR_INFO, Command.LIST}
    handing_over = {Command.SEND, Command.RECV, ExtensionCommand.SEND, ExtensionCommand.RECV}
    assert spec.returns == (16, spec.size if code in returning | handing_over else 24)
    assert spec.msg_return_flags == (spec.size - 8 if code in handing_over else 0)
