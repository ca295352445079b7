"""Whether a recording holds any event of KVM: the records are looked at until the first one."""

from __future__ import annotations

import struct

SCAN_BYTES = 32 << 20
LENGTH = struct.Struct("<I")  # bit 31: not finished, bit 30: discarded
KIND = struct.Struct("<H")
KIND_AT = 8 + 20
LENGTH_MASK = (1 << 30) - 1


class KvmPresence:
    """Looks at what is recorded until an event of KVM comes, or for a while.

    Parameters
    ----------
    kinds : set of int, the kinds that are events of KVM

    Attributes
    ----------
    seen : True once one came, None if there was none in so many bytes that nobody looked further
    """

    def __init__(self, kinds: set[int]) -> None:
        self.seen: bool | None = False
        self._kinds = kinds
        self._left = SCAN_BYTES

    def look(self, span: memoryview) -> None:
        """Look at a span of whole records."""
        if self.seen is not False:
            return
        at = 0
        while at + KIND_AT + 2 <= len(span):
            if KIND.unpack_from(span, at + KIND_AT)[0] in self._kinds:
                self.seen = True
                return
            at += 8 + (LENGTH.unpack_from(span, at)[0] & LENGTH_MASK) + 7 & ~7
        self._left -= len(span)
        if self._left <= 0:
            self.seen = None
