#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lists the kernels that a program or object holds machine code for, and fails if one is missing.

usage: machine_code.py FILE ARCHITECTURE... -- KERNEL...

An architecture is a number (90), a kernel a part of its mangled name. The file has to be built with
--no-compress: device code is found as ELF images inside it.
"""
import re
import struct
import sys

CUDA = 190  # e_machine


def images(data):
    """Yields (architecture, names of sections) of each ELF image for CUDA."""
    at = data.find(b"\x7fELF")
    while at >= 0:
        if data[at + 4] == 2 and struct.unpack_from("<H", data, at + 18)[0] == CUDA:
            table, flags = struct.unpack_from("<Q", data, at + 40)[0], struct.unpack_from("<I", data, at + 48)[0]
            size, count, names = struct.unpack_from("<HHH", data, at + 58)
            text = struct.unpack_from("<Q", data, at + table + names * size + 24)[0]
            sections = []
            for k in range(count):
                start = at + text + struct.unpack_from("<I", data, at + table + k * size)[0]
                sections.append(data[start:data.index(b"\0", start)].decode("ascii", "replace"))
            # The architecture is in the second byte of the flags, in the first of older images.
            yield (flags >> 8) & 0xFF or flags & 0xFF, sections
        at = data.find(b"\x7fELF", at + 4)


def main(arguments):
    if "--" not in arguments or len(arguments) < 4:
        sys.exit(__doc__)
    split = arguments.index("--")
    file, architectures, kernels = arguments[0], arguments[1:split], arguments[split + 1:]
    with open(file, "rb") as f:
        data = f.read()
    found = {}
    for architecture, sections in images(data):
        text = [s[len(".text."):] for s in sections if s.startswith(".text.")]
        found.setdefault(architecture, set()).update(text)
    missing = []
    for architecture in map(int, architectures):
        here = found.get(architecture, set())
        print(f"sm_{architecture}: {len(here)} kernels")
        missing += [f"sm_{architecture}: {k}" for k in kernels
                    if not any(re.search(k, name) for name in here)]
    if missing:
        print("no machine code for", *missing, sep="\n  ")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
