"""A file that appears under its name when it is complete: whenever the process dies, the old or the new one is there.

It is written without a name. Only where a file system has no such files, or in the instant in which the new one takes
the old one's place, it has another, `.NAME.kvmtrace-out-PID`; what a killed process left of that goes with the next.

The folder and what is in it are opened once: nobody who may write to the folder can lead us elsewhere by a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
WRITE_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_whole(path: Path, write: Callable[[IO[bytes]], None], finish: Callable[[int], None] | None = None) -> None:
    """Write a file readable by its owner only; devices and pipes that are there are written to as they are.

    Parameters
    ----------
    path : where; a link there is replaced, not followed
    write : gets the open file
    finish : gets the descriptor of a new file when all is in it

    Raises
    ------
    OSError
        It cannot be written; its file name is `path` unless `write` raised it.
    """
    with _naming(path):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _naming(path):
            special = _open_special(folder, path.name)
        if special is not None:
            with _naming(path, theirs_too=False), os.fdopen(special, "wb") as out:
                write(out)
            return
        _write_new(folder, path, write, finish)
    finally:
        os.close(folder)


def _open_special(folder: int, name: str) -> int | None:
    """Open what is there if it is no file, as a FIFO or device; None for files, links and what is not there."""
    try:
        if not _is_special(os.stat(name, dir_fd=folder, follow_symlinks=False)):
            return None
        fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=folder)
    except FileNotFoundError:
        return None
    if _is_special(os.fstat(fd)):
        return fd
    os.close(fd)  # somebody has changed it in between: a file, which is replaced
    return None


def _is_special(status: os.stat_result) -> bool:
    return not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode)


def _write_new(
    folder: int, path: Path, write: Callable[[IO[bytes]], None], finish: Callable[[int], None] | None
) -> None:
    temporary = f".{path.name}.kvmtrace-out-{os.getpid()}"
    with _naming(path):
        _remove_left(folder, path.name)
        fd, named = _open_new(folder, temporary)
    try:
        with _naming(path, theirs_too=False), os.fdopen(fd, "wb") as out:
            write(out)
            out.flush()
            with _naming(path):
                if finish is not None:
                    finish(fd)
                if not named:
                    os.link(
                        f"/proc/self/fd/{fd}", temporary, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True
                    )
                    named = True
                os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                named = False
    finally:
        if named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)


def _open_new(folder: int, temporary: str) -> tuple[int, bool]:
    """Return a new file's descriptor, and whether it has a name."""
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder), False
    except OSError as error:
        if error.errno not in NO_TMPFILE:
            raise
    return os.open(temporary, WRITE_NEW, 0o600, dir_fd=folder), True


def _remove_left(folder: int, name: str) -> None:
    """Remove what killed processes left of this file."""
    prefix = f".{name}.kvmtrace-out-"
    for other in os.listdir(folder):
        pid = other.removeprefix(prefix)
        if other.startswith(prefix) and pid.isdigit() and (int(pid) == os.getpid() or not Path("/proc", pid).exists()):
            with contextlib.suppress(OSError):
                os.unlink(other, dir_fd=folder)


@contextlib.contextmanager
def _naming(path: Path, *, theirs_too: bool = True) -> Iterator[None]:
    """Let errors name the file that the user asked for; with `theirs_too` also those that name another."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None and not theirs_too:  # of what is read meanwhile
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
