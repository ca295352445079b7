"""Memory for commands that read recordings: what was freed stays, as each piece needs as much as the one before it."""

from __future__ import annotations

import ctypes
import gc
import os

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_KEPT = 32 << 20  # bytes, the most that glibc allows; larger arrays are mapped and unmapped as ever
TRIMMED_ABOVE = 1 << 30  # bytes free at the heap's end
THREADS = 2  # each with memory of its own: what one frees is in its core's cache
MANY_OBJECTS = 150_000  # made before Python looks for cycles: a small report makes as many, and leaves none


def prepare_memory() -> None:
    """Let arrays be made from memory that was freed before, and Python look for cycles seldom.

    By default glibc maps and unmaps every large array. The kernel then clears each page again, and on several cores
    every unmapping interrupts the other ones. With another C library nothing of this happens.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # glibc's, not one that returns memory itself
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that nobody needs; they take time and memory to start
    gc.set_threshold(MANY_OBJECTS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, TRIMMED_ABOVE), (M_ARENA_MAX, THREADS)):
        mallopt(option, value)
