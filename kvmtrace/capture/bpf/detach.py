"""Detaching without anybody waiting for it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def closing_elsewhere() -> Iterator[None]:
    """Let a process that dies afterwards be the last to hold the descriptors that are closed within.

    The kernel takes some 80 ms to detach a program from a tracepoint, one after the other: seconds in all. The
    programs are switched off by now, so a dying process may wait for that; nobody waits for it.
    """
    until, closed = os.pipe()
    child = os.fork()
    if child == 0:
        _outlive(until, closed)
    os.close(until)
    os.waitpid(child, 0)
    try:
        yield
    finally:
        os.close(closed)


def _outlive(until: int, closed: int) -> None:
    """In the child: leave a grandchild, which init awaits, and die; it dies once the other end is closed."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):  # whoever reads our output must not wait
            os.dup2(null, fd)
        os.setsid()
        if os.fork() == 0:
            os.close(closed)
            os.read(until, 1)
    finally:
        os._exit(0)
