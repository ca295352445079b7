"""What the kernel's type information (BTF) says of tracepoint arguments and structure members.

A raw or BTF tracepoint hands a program the arguments that KVM gave the tracepoint; where each stands, and where a
member lies in a structure, is looked up here by name, so that nothing is known by kernel version. Source:
Documentation/bpf/btf.rst
"""

from __future__ import annotations

import struct
from array import array
from functools import cache
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf.btf_ids import BTF_FOLDER, FIXED_BYTES, MEMBER_BYTES, find_name
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from pathlib import Path

KIND_INT, KIND_PTR, KIND_STRUCT, KIND_UNION, KIND_ENUM, KIND_TYPEDEF, KIND_FUNC = 1, 2, 4, 5, 6, 8, 12
KIND_ENUM64 = 19
MODIFIERS = frozenset({8, 9, 10, 11, 18})  # typedef, volatile, const, restrict, type tag
VENDOR_MODULES = ("kvm", "kvm_intel", "kvm_amd")


@dataclass(frozen=True)
class Argument:
    """An argument of a tracepoint.

    Parameters
    ----------
    slot : int, which of the program's 8-byte arguments it is
    size : int, bytes
    is_number : bool, an integer, bool or enumeration; else a pointer
    """

    slot: int
    size: int
    is_number: bool


@dataclass(frozen=True)
class Member:
    """A structure's member.

    Parameters
    ----------
    offset : int, bytes from the structure's beginning
    size : int, bytes; 8 for a pointer
    target : id of the structure it is or points to, 0 for others
    """

    offset: int
    size: int
    target: int


class TypeInfo:
    """The types of one BTF, a module's on top of the kernel's.

    Parameters
    ----------
    data : bytes, a file of /sys/kernel/btf
    base : TypeInfo of vmlinux if this is a module's
    """

    def __init__(self, data: bytes, base: TypeInfo | None = None) -> None:
        self.data, self.base = data, base
        _, _, _, header, type_offset, type_bytes, names_offset, self.names_bytes = struct.unpack_from("<HBBIIIII", data)
        self.names_at = header + names_offset
        self.first_id: int = base.next_id if base else 1
        self.first_name = base.names_bytes if base else 0
        self.positions = array("Q")
        self.by_name: dict[int, list[int]] = {}
        unpack = struct.Struct("<II").unpack_from
        position, end = header + type_offset, header + type_offset + type_bytes
        while position < end:
            name, info = unpack(data, position)
            self.positions.append(position)
            kind = info >> 24 & 0x1F
            if kind in (KIND_STRUCT, KIND_TYPEDEF, KIND_FUNC) and name >= self.first_name:
                self.by_name.setdefault(name, []).append(self.first_id + len(self.positions) - 1)
            position += 12 + FIXED_BYTES.get(kind, 0) + MEMBER_BYTES.get(kind, 0) * (info & 0xFFFF)
        self.next_id: int = self.first_id + len(self.positions)

    def find(self, name: str, kind: int) -> int | None:
        """Return the id of a structure, typedef or function of that name that this BTF itself holds."""
        at = find_name(self.data, name, self.names_at, self.names_bytes)
        for number in self.by_name.get(at - self.names_at + self.first_name, []) if at >= 0 else ():
            if self._head(number)[1] == kind:
                return number
        return None

    def arguments(self, tracepoint: str) -> dict[str, Argument] | None:
        """Return name -> argument of a tracepoint, None if this BTF does not know it."""
        function = self.find(f"__traceiter_{tracepoint}", KIND_FUNC)
        if function is None:
            return None
        _, _, _, prototype, _ = self._head(function)
        owner, position, n_parameters = self._members_of(prototype)
        found = {}
        for slot in range(1, n_parameters):  # the first is the probe's own data
            name, number = struct.unpack_from("<II", owner.data, position + 8 * slot)
            size, is_number, _ = self._shape(number)
            found[owner.text(name)] = Argument(slot - 1, size, is_number)
        return found

    def member(self, structure: str | int, name: str) -> Member | None:
        """Return a member of a structure by name, also one within nameless members; None if there is none."""
        number = self.find(structure, KIND_STRUCT) if isinstance(structure, str) else structure
        return None if number is None else self._member(number, name)

    def text(self, offset: int) -> str:
        """Return the name at that offset."""
        if offset < self.first_name and self.base:
            return self.base.text(offset)
        start = self.names_at + offset - self.first_name
        return self.data[start : self.data.find(b"\0", start)].decode("ascii", "replace")

    def _member(self, number: int, wanted: str) -> Member | None:
        owner, position, n_members = self._members_of(number)
        packed = owner._head(number)[4]  # noqa: SLF001 (the same class)
        for i in range(n_members):
            name, of, offset = struct.unpack_from("<III", owner.data, position + 12 * i)
            bits = offset & 0xFFFFFF if packed else offset
            if (packed and offset >> 24) or bits % 8:
                continue  # a bit field
            size, _, target = self._shape(of)
            if owner.text(name) == wanted:
                return Member(bits // 8, size, target)
            inner = self._member(target, wanted) if not name and target else None
            if inner is not None:
                return Member(bits // 8 + inner.offset, inner.size, inner.target)
        return None

    def _members_of(self, number: int) -> tuple[TypeInfo, int, int]:
        owner = self._owner(number)
        position = owner.positions[number - owner.first_id]
        return owner, position + 12, owner._head(number)[2]  # noqa: SLF001 (the same class)

    def _owner(self, number: int) -> TypeInfo:
        return self.base if self.base and number < self.first_id else self

    def _head(self, number: int) -> tuple[int, int, int, int, bool]:
        """Return (name, kind, members, size or type, bit fields possible) of a type."""
        owner = self._owner(number)
        name, info, size = struct.unpack_from("<III", owner.data, owner.positions[number - owner.first_id])
        return name, info >> 24 & 0x1F, info & 0xFFFF, size, bool(info >> 31)

    def _shape(self, number: int) -> tuple[int, bool, int]:
        """Return (size, is a number, structure it is or points to) of a type; size 0 for what has none."""
        pointed = False
        for _ in range(32):
            if not number:  # void
                return (8, False, 0) if pointed else (0, False, 0)
            _, kind, _, size, _ = self._head(number)
            if kind in MODIFIERS or (kind == KIND_PTR and not pointed):
                pointed = pointed or kind == KIND_PTR
                number = size
                continue
            if kind in (KIND_STRUCT, KIND_UNION):
                return (8 if pointed else size), False, number
            is_number = kind in (KIND_INT, KIND_ENUM, KIND_ENUM64) and not pointed
            return (8 if pointed else size if is_number else 0), is_number, 0
        return 0, False, 0


class KernelTypes:
    """The types of the kernel and its KVM modules; empty where the kernel has no BTF."""

    def __init__(self, folder: Path = BTF_FOLDER) -> None:
        self.infos: dict[str, TypeInfo] = {}
        try:
            base = TypeInfo((folder / "vmlinux").read_bytes())
            self.infos["vmlinux"] = base
            for name in VENDOR_MODULES:
                if (folder / name).exists():
                    self.infos[name] = TypeInfo((folder / name).read_bytes(), base)
        except (OSError, struct.error, IndexError):
            return

    def arguments(self, tracepoint: str) -> dict[str, Argument] | None:
        """Return name -> argument of a tracepoint, None if nothing is known of it."""
        return next((found for info in self.infos.values() if (found := info.arguments(tracepoint)) is not None), None)

    def tracepoint_type(self, tracepoint: str) -> tuple[str, int] | None:
        """Return (BTF's name, id) of what a BTF tracepoint's program is loaded for, None if there is none."""
        for name, info in self.infos.items():
            number = info.find(f"btf_trace_{tracepoint}", KIND_TYPEDEF)
            if number is not None:
                return name, number
        return None

    def offset(self, structure: str, *path: str) -> tuple[int, int] | None:
        """Follow members that lie within one structure.

        Returns
        -------
        (offset, size) of the last one, or None if one of them is missing
        """
        for info in self.infos.values():
            at: str | int = structure
            total, member = 0, None
            for name in path:
                member = info.member(at, name)
                if member is None:
                    break
                total, at = total + member.offset, member.target
            if member is not None:
                return total, member.size
        return None


@cache
def kernel_types() -> KernelTypes:
    """Return the running kernel's types; reading them takes a tenth of a second, once."""
    return KernelTypes()
