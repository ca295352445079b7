"""How large the kernel's buffers may be: what was asked for, bounded by the memory there is, before any is taken."""

from __future__ import annotations

from pathlib import Path

DEFAULT_BYTES = 16 << 20  # per CPU: half a second of 500,000 events/s
LEAST_DEFAULT_BYTES = 1 << 20
DEFAULT_SHARE = 8  # all CPUs' buffers together take at most this part of the available memory
ASKED_SHARE = 4  # and this part where a size was asked for
MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """Return how much memory can be had without pushing others out; a cautious guess where nobody tells."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        lines = []
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    kib = fields.get("MemAvailable") or fields.get("MemFree") or ["262144"]
    return int(kib[0]) << 10


def buffer_bytes(asked: int | None, n_cpus: int) -> int:
    """Return the size of each CPU's buffer.

    Parameters
    ----------
    asked : int or None, bytes per CPU that the user wants; None for what suits this machine
    n_cpus : int
    """
    available = available_bytes()
    if asked is None:
        return max(LEAST_DEFAULT_BYTES, min(DEFAULT_BYTES, available // DEFAULT_SHARE // n_cpus))
    return min(asked, max(LEAST_DEFAULT_BYTES, available // ASKED_SHARE // n_cpus))


def say_smaller(asked: int | None, used: int, n_cpus: int) -> str | None:
    """Return the note that the buffers are smaller than asked for; None if they are not."""
    if asked is None or used >= asked:
        return None
    return (
        f"the buffers have {used >> 10:,} KiB per CPU instead of {asked >> 10:,}: {n_cpus} of them may take a "
        "quarter of the memory that is available"
    )
