"""The files of `record --summary` and `--monitor`: told from others here, read by the modules beside this one."""

from __future__ import annotations

from pathlib import Path

MAGIC = b'{"schema":"kvmtrace.summary/1"'
MONITOR_MAGIC = b'{"schema":"kvmtrace.monitor/1"'


def is_summary(head: bytes) -> bool:
    """Say whether a file that begins so is a summary."""
    return head.startswith(MAGIC)


def is_monitored(head: bytes) -> bool:
    """Say whether a file that begins so is a monitor's."""
    return head.startswith(MONITOR_MAGIC)


def is_summary_file(path: str) -> bool:
    """Say whether there is a file of this name that is a summary."""
    return is_summary(_head(path))


def is_monitored_file(path: str) -> bool:
    """Say whether there is a file of this name that is a monitor's."""
    return is_monitored(_head(path))


def _head(path: str) -> bytes:
    if path == "-" or not Path(path).is_file():
        return b""
    with Path(path).open("rb") as file:
        return file.read(max(len(MAGIC), len(MONITOR_MAGIC)))
