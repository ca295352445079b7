"""What a probe on KVM's run function reads beside its arguments: the guest's RFLAGS, where the kernel's types tell.

A fetch argument of isa.probes names members of KVM's structures in braces; the running kernel's type information (BTF)
says where they lie. Without it, the probe is as it would be without that field. Only a vendor module's own types are
gone through: the kernel's own are a hundred times as many. Source: Documentation/bpf/btf.rst
"""

from __future__ import annotations

import re
import struct
from functools import cache
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf.btf_ids import BTF_FOLDER, FIXED_BYTES, MEMBER_BYTES
from kvmtrace.capture.bpf.btf_types import KIND_STRUCT, VENDOR_MODULES
from kvmtrace.isa.probes import PROBES, RUN_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from kvmtrace.isa.probes import Probe

    Offset = Callable[[str, str], int | None]

_MEMBER = re.compile(r"\{(\w+)\.(\w+)\}")
_TYPE, _ROW = struct.Struct("<III"), struct.Struct("<III")
_HEADER = struct.Struct("<HBBIIIII")


def located(text: str, offset: Offset) -> str | None:
    """Return a fetch argument with offsets for the members it names, None if one of them is not known."""
    found = {member[0]: offset(member[1], member[2]) for member in _MEMBER.finditer(text)}
    for name, at in found.items():
        if at is None:
            return None
        text = text.replace(name, str(at))
    return text


def probes_here(offset: Offset | None = None) -> dict[str, Probe]:
    """Return PROBES, with the further fields that the running kernel's types allow."""
    where = member_offset if offset is None else offset
    return {
        name: (function, is_return, (*fields, *_told(RUN_FIELDS.get(name, ()), where)))
        for name, (function, is_return, fields) in PROBES.items()
    }


def _told(fields: Iterable[str], offset: Offset) -> list[str]:
    return [text for text in (located(field, offset) for field in fields) if text is not None]


@cache
def member_offset(structure: str, name: str, folder: Path = BTF_FOLDER) -> int | None:
    """Return where a member lies in a structure of a vendor module, in bytes; None if that is not known."""
    try:
        base = (folder / "vmlinux").read_bytes()
        for module in VENDOR_MODULES:
            if (folder / module).exists():
                found = _find(_Names(base, (folder / module).read_bytes()), structure, name)
                if found is not None:
                    return found
    except (OSError, struct.error, IndexError):
        return None
    return None


class _Names:
    """A module's types and the names in them, which go on behind the kernel's own.

    Parameters
    ----------
    base, data : files of /sys/kernel/btf: the kernel's and the module's
    """

    def __init__(self, base: bytes, data: bytes) -> None:
        _, _, _, header, _, _, names_offset, self._n_base = _HEADER.unpack_from(base)
        self._base, self._base_at = base, header + names_offset
        _, _, _, header, type_offset, type_bytes, names_offset, _ = _HEADER.unpack_from(data)
        self._at = header + names_offset
        self.data, self.begin, self.end = data, header + type_offset, header + type_offset + type_bytes

    def text(self, offset: int) -> bytes:
        """Return the name at an offset."""
        own = offset >= self._n_base
        data, start = (self.data, self._at + offset - self._n_base) if own else (self._base, self._base_at + offset)
        return data[start : data.index(b"\0", start)]

    def structures(self) -> Iterator[tuple[bytes, int, int, bool]]:
        """Yield (name, position of the first member, number of members, whether offsets hold bit sizes, too)."""
        position = self.begin
        while position < self.end:
            name, info, _ = _TYPE.unpack_from(self.data, position)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            if kind == KIND_STRUCT:
                yield self.text(name), position + _TYPE.size, count, bool(info >> 31)
            position += _TYPE.size + FIXED_BYTES.get(kind, 0) + MEMBER_BYTES.get(kind, 0) * count


def _find(names: _Names, structure: str, member: str) -> int | None:
    for name, position, count, packed in names.structures():
        if name != structure.encode():
            continue
        for i in range(count):
            own, _, offset = _ROW.unpack_from(names.data, position + i * _ROW.size)
            if names.text(own) == member.encode():
                return int(offset & 0xFFFFFF if packed else offset) // 8
    return None
