"""Who is recording: one small locked file per recorder, so that a later command finds what a dead one left.

    /run/kvmtrace/PID-TOKEN.json     {"output": ..., "spool": ...}

PID-TOKEN also is in the names of the recorder's spool, trace instance and probe group.

The directory belongs to root alone; what stands in it is trusted. The lock (flock) goes with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

RUN_DIR = Path("/run/kvmtrace")


class Registration:
    """The entry of one recorder, locked while this object is open.

    Parameters
    ----------
    path : Path of the entry
    fd : int, its locked descriptor
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def create(cls, token: str, values: dict[str, Any]) -> Registration | None:
        """Register this process; None where that is not possible (then only the names tell)."""
        if not _private_directory():
            return None
        path = RUN_DIR / f"{os.getpid()}-{token}.json"
        temporary = path.with_suffix(".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)  # before it gets the name under which others look for it
        os.write(fd, json.dumps(values).encode())
        temporary.rename(path)
        return cls(path, fd)

    def read(self) -> dict[str, Any]:
        """Return the entry's values; {} if it was never written."""
        try:
            values = json.loads(os.pread(self.fd, os.fstat(self.fd).st_size, 0))
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    def remove(self) -> None:
        """Forget the recorder: nothing of it is left."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Unlock the entry and leave it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _private_directory() -> bool:
    """Make sure that RUN_DIR exists and is root's alone."""
    if os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError):
        RUN_DIR.mkdir(mode=0o700)
    try:
        status = RUN_DIR.lstat()
    except OSError:
        return False
    return status.st_uid == 0 and not status.st_mode & 0o077


def dead_recorders() -> list[Registration]:
    """Return the entries whose recorder is gone, each locked by us now."""
    try:
        paths = sorted(RUN_DIR.glob("*.json"))
    except OSError:
        return []
    found = []
    for path in paths:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            continue
        found.append(Registration(path, fd))
    return found
