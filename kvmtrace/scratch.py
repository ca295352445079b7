"""Files and folders for a while: gone with the process, and with the next command if it was killed.

A folder stands in the system's temporary folder as `kvmtrace-KIND.RANDOM` and is locked (flock) while it is used. The
lock goes with the process, so a folder of ours that nobody has locked is a dead one's. It is made before it is locked:
its maker looks again whether it is still there, as somebody may have taken it for a dead one's in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import BinaryIO

PREFIX = "kvmtrace-"
STALE_S = 60.0  # a file has a name for an instant only, and only where there are none without
_FOLDER = re.compile(r"kvmtrace-[a-z]+\.\w+\Z")
_FILE = re.compile(r"kvmtrace-file\.\w+\Z")
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class ScratchFolder:
    """A folder of this process, removed by `close()`, at the end of a `with`, or by a later command.

    Parameters
    ----------
    kind : str, small letters; part of its name
    """

    def __init__(self, kind: str) -> None:
        import tempfile

        lock = None
        while lock is None:
            self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}."))
            lock = _lock_new(str(self.path))
        self._lock = lock

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder and what is in it."""
        if self._lock >= 0:
            _remove_tree(str(self.path))
            os.close(self._lock)
            self._lock = -1


def scratch_file() -> BinaryIO:
    """Return an open file that has no name."""
    import tempfile

    return tempfile.TemporaryFile(prefix=f"{PREFIX}file.")


def remove_dead() -> None:
    """Remove what killed processes of this user left in the temporary folder; what cannot be removed stays."""
    with contextlib.suppress(OSError), os.scandir(_temporary_folder()) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError):
                    _remove_if_dead(entry)


def _temporary_folder() -> str:
    """Return what tempfile.gettempdir() most likely would; every command looks, few need the module."""
    if "tempfile" in sys.modules:
        return str(sys.modules["tempfile"].gettempdir())
    return os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 (looked at, not written to)


def _remove_if_dead(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if status.st_uid != os.geteuid():
        return
    if _FILE.match(entry.name) and entry.is_file(follow_symlinks=False):
        if time.time() - status.st_mtime > STALE_S:
            Path(entry.path).unlink()
    elif _FOLDER.match(entry.name) and entry.is_dir(follow_symlinks=False):
        fd = os.open(entry.path, _FOLDER_FLAGS)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(fd, entry.path):
                _remove_tree(entry.path)
        finally:
            os.close(fd)


def _lock_new(path: str) -> int | None:
    """Lock a folder that has just been made; None if somebody has removed it since."""
    try:
        fd = os.open(path, _FOLDER_FLAGS)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # no locks on this file system: then nobody else gets one either
        fcntl.flock(fd, fcntl.LOCK_EX)
    if _is_there(fd, path):
        return fd
    os.close(fd)
    return None


def _is_there(fd: int, path: str) -> bool:
    """Say whether an open folder of ours still has its name."""
    here = os.fstat(fd)
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) and here.st_uid == os.geteuid()


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)  # follows no links
