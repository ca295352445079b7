"""Names for guest addresses, from the guest's System.map or /proc/kallsyms."""

from __future__ import annotations

import bisect
import re
from pathlib import Path

from kvmtrace.errors import FormatError, UsageError

_LINE = re.compile(r"([0-9a-fA-F]{8,16}) ([A-Za-z?]) (\S+)(?:\s+\[(\S+)\])?\s*")
_MAX_DISTANCE = 1 << 20  # further behind the last symbol than any function is long


class GuestSymbols:
    """Sorted symbols; `name` finds the one at or before an address."""

    def __init__(self, symbols: list[tuple[int, str]]) -> None:
        symbols.sort(key=lambda pair: pair[0])
        self._addresses = [address for address, _ in symbols]
        self._names = [name for _, name in symbols]

    def name(self, address: int) -> str | None:
        """Return "symbol+0x1f", "symbol" at its start, None if no symbol is near."""
        at = bisect.bisect_right(self._addresses, address) - 1
        if at < 0 or address - self._addresses[at] > _MAX_DISTANCE:
            return None
        offset = address - self._addresses[at]
        return f"{self._names[at]}+{offset:#x}" if offset else self._names[at]


def read_guest_symbols(path: str) -> GuestSymbols:
    """Read a System.map or kallsyms file.

    Raises
    ------
    UsageError
        It cannot be read.
    FormatError
        A line is no symbol, or all addresses are 0 (kallsyms read without privilege).
    """
    try:
        text = Path(path).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    symbols = []
    offset = 0
    for line in text.splitlines(keepends=True):
        match = _LINE.fullmatch(line)
        if match is None:
            raise FormatError(path, offset, "an address, a type and a symbol", repr(line[:40]))
        symbols.append((int(match[1], 16), match[3] + (f" [{match[4]}]" if match[4] else "")))
        offset += len(line)
    if not any(address for address, _ in symbols):
        raise FormatError(path, None, "symbols with addresses", "addresses that are all 0 (read it as root)")
    return GuestSymbols(symbols)
