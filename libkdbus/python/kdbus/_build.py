# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build kdbus._kdbus: libkdbus, compiled in, behind cffi.

Both headers are read for what cffi is to declare, so that numbers, structs and
prototypes are written down once. They are plain enough for that: comments,
preprocessor lines and attributes go; enumerators and struct layouts are left to
the compiler.
"""

import os
import re
from pathlib import Path

from cffi import FFI

LIBKDBUS = Path(os.path.relpath(Path(__file__).resolve().parents[2]))
INCLUDE = LIBKDBUS / "include"

# What the headers include from elsewhere, and the constants they #define.
PREAMBLE = """
typedef unsigned char __u8;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
struct iovec { void *iov_base; size_t iov_len; };

static const unsigned long long KDBUS_SRC_ID_KERNEL;
static const unsigned long long KDBUS_DST_ID_NAME;
static const unsigned long long KDBUS_DST_ID_BROADCAST;
static const unsigned long long KDBUS_MATCH_ID_ANY;
static const unsigned long long KDBUS_DEADLINE_NEVER;
static const unsigned long long KDBUS_POOL_SIZE_DEFAULT;
"""


def declarations(header: str) -> str:
    """The declarations of *header*, as cffi's parser takes them."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"^#ifdef __cplusplus\n.*?^#endif$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^#(.*\\\n)*.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^_KDBUS_DEFINE_FREEP\(.*\)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b__extension__\b|__attribute__\(\(.*?\)\)(?=;)", "", text)
    text = re.sub(r"^(\s+_?KDBUS_\w+)\s*=.*?(,?)\s*$", r"\1 = ...\2", text, flags=re.MULTILINE)
    return re.sub(r"^(\s*struct \w+ \{.*?)^\}", r"\1...; }", text, flags=re.DOTALL | re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(PREAMBLE)
for name in ("linux/kdbus.h", "kdbus/kdbus.h"):
    ffibuilder.cdef(declarations((INCLUDE / name).read_text()))
ffibuilder.set_source(
    "kdbus._kdbus",
    "#include <kdbus/kdbus.h>",
    sources=[str(path) for path in sorted((LIBKDBUS / "src").glob("*.c"))],
    include_dirs=[str(INCLUDE)],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-std=gnu11", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
