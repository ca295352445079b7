"""The folder of the flight recorder: names by time and VM, a quota, and how often anything may be saved."""

from __future__ import annotations

import re
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.watch.triggers import Fired

NAME = re.compile(r"kvmtrace-\d{8}T\d{6}Z-[\w.+-]*\.dat(\.recovered-[0-9a-f]+)?\Z")
LONGEST = 60  # of a VM's name in a file's
PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def name_of(fired: Fired, folder: Path, at: datetime | None = None) -> str:
    """Return a new name: time, VM, trigger."""
    stamp = (at or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    vm = re.sub(r"[^A-Za-z0-9._+-]", "_", fired.vm or "")[:LONGEST]
    base = "-".join(part for part in ("kvmtrace", stamp, vm, fired.trigger.kind) if part)
    name, number = f"{base}.dat", 2
    while (folder / name).exists():
        name, number = f"{base}-{number}.dat", number + 1
    return name


def name_before(name: str) -> str:
    """Return the name of what was recorded right before a recording."""
    return f"{name.removesuffix('.dat')}-before.dat"


def keep_quota(folder: Path, quota_bytes: int) -> list[str]:
    """Remove the oldest recordings of ours until the rest takes no more than the quota; the newest stays in any case.

    Returns
    -------
    names of those removed
    """
    found = []
    for path in folder.iterdir():
        if NAME.match(path.name) and path.is_file() and not path.is_symlink():
            status = path.stat()
            found.append((status.st_mtime_ns, path.name, status.st_size))
    found.sort()
    total = sum(size for _, _, size in found)
    removed = []
    for _, name, size in found[:-1]:
        if total <= quota_bytes:
            break
        (folder / name).unlink(missing_ok=True)
        total -= size
        removed.append(name)
    return removed


def parse_at_most(text: str) -> tuple[int, float]:
    """Return (how many, in how many seconds) of "5/h".

    Raises
    ------
    UsageError
        It is not written so.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{0,5})([smhd])", text.strip())
    if match is None or not int(match[1]) or match[2] == "0":
        raise UsageError(f"--at-most {text!r}: write 5/h, 1/10m or 20/d")
    return int(match[1]), int(match[2] or 1) * PERIODS[match[3]]


class RateLimit:
    """Allows so many in any stretch of so many seconds."""

    def __init__(self, most: int, period_s: float) -> None:
        self._most, self._period_s = most, period_s
        self._times: deque[float] = deque()
        self.suppressed = 0

    def allows(self, now: float | None = None) -> bool:
        """Say whether one more is allowed; counts those that are not."""
        now = time.monotonic() if now is None else now
        while self._times and self._times[0] <= now - self._period_s:
            self._times.popleft()
        if len(self._times) >= self._most:
            self.suppressed += 1
            return False
        return True

    def is_free(self) -> bool:
        """Say whether one more is allowed, of what would not be missed: nothing is counted."""
        suppressed, free = self.suppressed, self.allows()
        self.suppressed = suppressed
        return free

    def note(self, now: float | None = None) -> int:
        """Count one that happened; return how many were suppressed before it."""
        self._times.append(time.monotonic() if now is None else now)
        suppressed, self.suppressed = self.suppressed, 0
        return suppressed
