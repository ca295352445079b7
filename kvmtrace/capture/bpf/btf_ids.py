"""Ids in the kernel's type information (BTF), for kernel variables and functions of modules.

Only ids and names are wanted, so the types are stepped over, not understood. Source:
Documentation/bpf/btf.rst
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from kvmtrace.capture.bpf.bpf_syscall import (
    BTF_GET_FD_BY_ID,
    BTF_GET_NEXT_ID,
    OBJ_GET_INFO,
    SYS_BPF,
    address_of,
    bpf,
    raw_syscall,
)
from kvmtrace.lazy_dataclass import dataclass

BTF_FOLDER = Path("/sys/kernel/btf")
KIND_FUNC, KIND_VAR = 12, 14
# bytes behind the 12 of struct btf_type, by kind: fixed, and per member
FIXED_BYTES = {1: 4, 3: 12, 14: 4, 17: 4}
MEMBER_BYTES = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


@dataclass(frozen=True)
class BtfIds:
    """What was found in one BTF.

    Parameters
    ----------
    n_types : int, the highest id
    names_bytes : int, length of its string section
    found : (name, kind) -> id
    """

    n_types: int
    names_bytes: int
    found: dict[tuple[str, int], int]


def find_name(data: bytes, name: str, start: int, n_bytes: int) -> int:
    """Return where a name stands in the strings of a BTF, -1 if it does not; a module's first has no NUL before it."""
    text = name.encode() + b"\0"
    if data.startswith(text, start):
        return start
    at = data.find(b"\0" + text, start, start + n_bytes)
    return at + 1 if at >= 0 else -1


def scan_btf(data: bytes, wanted: set[tuple[str, int]], base: BtfIds | None = None) -> BtfIds:
    """Find named types.

    Parameters
    ----------
    data : bytes, a file of /sys/kernel/btf
    wanted : (name, kind) pairs
    base : BtfIds of vmlinux if this is a module's: ids and string offsets go on from there
    """
    _, _, _, header, type_offset, type_bytes, names_offset, names_bytes = struct.unpack_from("<HBBIIIII", data)
    names_at = header + names_offset
    first_name = base.names_bytes if base else 0
    by_offset = {}
    for name, kind in wanted:
        place = find_name(data, name, names_at, names_bytes)
        if place >= 0:
            by_offset[place - names_at + first_name, kind] = name
    found: dict[tuple[str, int], int] = {}
    unpack = struct.Struct("<II").unpack_from
    position, number = header + type_offset, base.n_types if base else 0
    end = position + type_bytes
    while position < end:
        number += 1
        name_offset, info = unpack(data, position)
        kind = info >> 24 & 0x1F
        if (name_offset, kind) in by_offset:
            found.setdefault((by_offset[name_offset, kind], kind), number)
        position += 12 + FIXED_BYTES.get(kind, 0) + MEMBER_BYTES.get(kind, 0) * (info & 0xFFFF)
    return BtfIds(number, names_bytes, found)


def find_variable(name: str) -> int | None:
    """Return the BTF id of a variable of the kernel proper, None if it has none."""
    try:
        data = (BTF_FOLDER / "vmlinux").read_bytes()
    except OSError:
        return None
    return scan_btf(data, {(name, KIND_VAR)}).found.get((name, KIND_VAR))


def find_functions(names: set[str]) -> dict[str, tuple[str, int]]:
    """Find functions in the kernel and its KVM modules; return name -> (BTF's name, id)."""
    try:
        data = (BTF_FOLDER / "vmlinux").read_bytes()
    except OSError:
        return {}
    wanted = {(name, KIND_FUNC) for name in names}
    base = scan_btf(data, wanted)
    result = {name: ("vmlinux", number) for (name, _), number in base.found.items()}
    for path in sorted(BTF_FOLDER.glob("kvm*")):
        found = scan_btf(path.read_bytes(), wanted, base).found
        result.update({name: (path.name, number) for (name, _), number in found.items()})
    return result


def open_module_btf(module: str) -> int:
    """Return a descriptor of a module's BTF, found by walking the kernel's BTF objects.

    Raises
    ------
    OSError
        Not allowed, or there is none of that name.
    """
    number = 0
    while True:
        query = struct.pack("<III", number, 0, 0)
        number = _next_id(query)
        fd = bpf(BTF_GET_FD_BY_ID, struct.pack("<III", number, 0, 0))
        if _btf_name(fd) == module:
            return fd
        os.close(fd)


def _next_id(query: bytes) -> int:
    """Call BTF_GET_NEXT_ID, whose answer stands in its attributes."""
    buffer = ctypes.create_string_buffer(query, len(query))
    raw_syscall(SYS_BPF, ctypes.c_int(BTF_GET_NEXT_ID), buffer, ctypes.c_uint(len(query)))
    return int(struct.unpack_from("<I", buffer.raw, 4)[0])


def _btf_name(fd: int) -> str:
    name = ctypes.create_string_buffer(64)
    # struct bpf_btf_info: btf, btf_size, id, name, name_len, kernel_btf
    info = ctypes.create_string_buffer(struct.pack("<QIIQII", 0, 0, 0, address_of(name), len(name), 0), 32)
    bpf(OBJ_GET_INFO, struct.pack("<IIQ", fd, len(info), address_of(info)))
    return name.value.decode("utf-8", "replace")
