"""The file of `kvmtrace record --summary`: told from others here, read in summary_file.py."""

from __future__ import annotations

from pathlib import Path

MAGIC = b'{"schema":"kvmtrace.summary/1"'


def is_summary(head: bytes) -> bool:
    """Say whether a file that begins so is a summary."""
    return head.startswith(MAGIC)


def is_summary_file(path: str) -> bool:
    """Say whether there is a file of this name that is a summary."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return is_summary(file.read(len(MAGIC)))
