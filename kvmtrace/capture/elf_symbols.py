"""Where the functions of a program stand in its file, for uprobes.

Functions are found by the binary's symbol tables; the dynamic one is there even in stripped programs.
Source: the ELF-64 object file format (elf.h)
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHT_SYMTAB, SHT_DYNSYM = 2, 11
PT_LOAD = 1
STT_FUNC, STT_GNU_IFUNC = 2, 10
SYMBOL = struct.Struct("<IBBHQQ")
SECTION = struct.Struct("<IIQQQQIIQQ")
SEGMENT = struct.Struct("<IIQQQQQQ")


def find_functions(binary: str | Path, names: Iterable[str]) -> dict[str, int]:
    """Find functions in a binary.

    Parameters
    ----------
    binary : an ELF executable or shared library for x86-64
    names : symbols wanted

    Returns
    -------
    symbol -> offset in the file, for those that are there

    Raises
    ------
    UsageError
        It is no such file.
    """
    try:
        with Path(binary).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _find(data, set(names), str(binary))
    except (OSError, ValueError, struct.error) as error:
        raise UsageError(f"{binary}: cannot read its symbols: {error}") from None


def _find(data: mmap.mmap, names: set[str], binary: str) -> dict[str, int]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise UsageError(f"{binary}: no 64-bit little-endian ELF file")
    addresses = {name: value for name, value in _functions(data) if name in names}
    segments = list(_segments(data))
    found = {}
    for name, address in addresses.items():
        for start, size, offset in segments:
            if start <= address < start + size:
                found[name] = address - start + offset
    return found


def _segments(data: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Yield (address, size, file offset) of what is loaded."""
    table, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    for i in range(count):
        kind, _, offset, address, _, file_bytes, _, _ = SEGMENT.unpack_from(data, table + i * size)
        if kind == PT_LOAD:
            yield address, file_bytes, offset


def _functions(data: mmap.mmap) -> Iterator[tuple[str, int]]:
    """Yield (name, address) of the functions in all symbol tables."""
    table, size, count = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58)
    sections = [SECTION.unpack_from(data, table + i * size) for i in range(count)]
    for _, kind, _, _, offset, n_bytes, link, _, _, _ in sections:
        if kind not in (SHT_SYMTAB, SHT_DYNSYM) or link >= count:
            continue
        names = sections[link][4]
        for at in range(offset, offset + n_bytes - SYMBOL.size + 1, SYMBOL.size):
            name, info, _, section, value, _ = SYMBOL.unpack_from(data, at)
            if info & 0xF in (STT_FUNC, STT_GNU_IFUNC) and section and value:
                end = data.find(b"\0", names + name, names + name + 4096)
                yield data[names + name : end].decode("utf-8", "replace"), value
