"""Make a finding small: leave out ever smaller pieces while it stays the same finding."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def minimised(data: bytes, same: Callable[[bytes], bool], seconds: float) -> bytes:
    """Return the smallest variant found in the given time for which `same` holds."""
    end = time.monotonic() + seconds
    size = len(data) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            shorter = data[:at] + data[at + size :]
            if same(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    return data
