# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds kdbusfs.native._native: every *.c of this folder, with every *.h declared to cffi.

The headers of this folder hold nothing but declarations that cffi understands; what needs the
preprocessor is in the .c files, or in headers called *-arch.h.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
HEADERS = sorted(h for h in HERE.glob("*.h") if not h.name.endswith("-arch.h"))

ffibuilder = FFI()
ffibuilder.cdef("\n".join(h.read_text() for h in HEADERS))
ffibuilder.set_source(
    "kdbusfs.native._native",
    "#include <stdint.h>\n" + "\n".join(f'#include "{h.name}"' for h in HEADERS),
    sources=[str(c.relative_to(HERE.parent.parent)) for c in sorted(HERE.glob("*.c"))],
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
