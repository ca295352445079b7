"""A second, slow decoder of ring-buffer pages, one record at a time, to hold the fast one against."""

from __future__ import annotations

import struct


def decode_page(data: bytes) -> list[tuple[int, int]]:
    """Return (time stamp, offset of the record's data) of a sound page."""
    ts, commit = struct.unpack_from("<QQ", data)
    page_ts, at, end, out = ts, 16, 16 + (commit & (1 << 27) - 1), []
    while at < end:
        (head,) = struct.unpack_from("<I", data, at)
        kind, delta = head & 31, head >> 5
        word = struct.unpack_from("<I", data, at + 4)[0] if at + 8 <= len(data) else 0
        if kind == 30:
            ts, at = ts + delta + (word << 27), at + 8
        elif kind == 31:
            ts, at = delta + (word << 27) | page_ts & 0xF8 << 56, at + 8
        elif kind == 29:
            ts += delta
            at = end if delta == 0 else at + 4 + -(-word // 4) * 4
        else:
            ts += delta
            out.append((ts % (1 << 64), at + (8 if kind == 0 else 4)))
            at += 4 + (-(-word // 4) * 4 if kind == 0 else kind * 4)
    return out
