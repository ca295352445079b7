"""Who is recording: one small locked file per recorder, so that a later command finds what a dead one left.

    /run/kvmtrace/PID-TOKEN.json     {"output": ..., "spool": ...}

PID-TOKEN also is in the names of the recorder's spool, trace instance and probe group.

The directory belongs to root alone; what stands in it is trusted. The lock (flock) goes with the process. An entry gets
its name only when it is locked and written, so that a recorder that is killed before leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

RUN_DIR = Path("/run/kvmtrace")
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
STALE_S = 60.0  # a name that another way of writing an entry left


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
        path = RUN_DIR / f"{os.getpid()}-{token}.json"
        while _private_directory():
            try:
                return cls(path, _write_entry(path, json.dumps(values).encode()))
            except FileNotFoundError:  # the last recorder that ended has just removed the directory
                continue
        return None

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
        with contextlib.suppress(OSError):  # others are recording
            RUN_DIR.rmdir()

    def close(self) -> None:
        """Unlock the entry and leave it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _write_entry(path: Path, text: bytes) -> int:
    """Make a locked entry appear under its name, complete; return its descriptor."""
    temporary: Path | None = None
    try:
        fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in NO_TMPFILE:
            raise
        temporary = path.with_suffix(".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, text)
        if temporary is None:
            _link(fd, path)
        else:
            temporary.rename(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


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


def _link(fd: int, path: Path) -> None:
    """Give an open file without a name its name."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # without a descriptor Python calls link(2), which does not follow the link in /proc
        os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def registered() -> set[str]:
    """Name (PID-TOKEN) the recorders that have an entry, dead or alive."""
    try:
        return {path.stem for path in RUN_DIR.glob("*.json")}
    except OSError:
        return set()


def dead_recorders() -> list[Registration]:
    """Return the entries whose recorder is gone, each locked by us now."""
    try:
        paths = sorted(RUN_DIR.iterdir())
    except OSError:
        return []
    found = []
    for path in paths:
        if path.suffix == ".new":
            _remove_stale(path)
        elif path.suffix == ".json" and (entry := lock_entry(path.stem)) is not None:
            found.append(entry)
    return found


def lock_entry(name: str) -> Registration | None:
    """Take over the entry of a dead recorder (PID-TOKEN); None if there is none or somebody holds it."""
    path = RUN_DIR / f"{name}.json"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # else another command has just done what there was to do
            return Registration(path, fd)
    except OSError:
        pass
    os.close(fd)
    return None


def _remove_stale(path: Path) -> None:
    """Remove a name without an entry whose recorder was killed before it had one."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > STALE_S:
            path.unlink()
