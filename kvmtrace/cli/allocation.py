"""Memory that was freed stays with the process: each piece of a recording needs as much as the one before it."""

from __future__ import annotations

import ctypes
import os

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_KEPT = 32 << 20  # bytes, the most that glibc allows; larger arrays are mapped and unmapped as ever
TRIMMED_ABOVE = 1 << 30  # bytes free at the heap's end
THREADS = 2  # each with memory of its own: what one frees is in its core's cache


def keep_freed_memory() -> None:
    """Let arrays be made from memory that was freed before; with another C library than glibc, nothing happens.

    By default glibc maps and unmaps every large array. The kernel then clears each page again, and on several cores
    every unmapping interrupts the other ones.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # glibc's, not one that returns memory itself
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that nobody needs; they take time and memory to start
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, TRIMMED_ABOVE), (M_ARENA_MAX, THREADS)):
        mallopt(option, value)
