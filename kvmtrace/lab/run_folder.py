"""The folder of one run: locked while it is used, so that the next run removes what a killed one left.

What a killed run can leave is its folder and, for an instant, its emulator; both are found by the folder's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.lab.cache import cache_dir, locked

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "lock"
UNLOCKED_KEEP_S = 24 * 3600.0  # a folder without a lock, of another version


@contextlib.contextmanager
def run_folder(kind: str) -> Iterator[Path]:
    """Make a folder for a run, gone at its end; first remove those of runs that were killed.

    Parameters
    ----------
    kind : str, beginning of its name
    """
    runs = cache_dir() / "runs"
    with locked("runs"):
        runs.mkdir(exist_ok=True)
        remove_dead(runs)
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=runs))
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a run's folder, its lock last: what is left of a removal that is killed is known for what it is."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def remove_dead(runs: Path) -> None:
    """Remove the folders of killed runs, and end their emulators if they live."""
    for folder in runs.iterdir():
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()  # nobody makes one now, as this is locked: a kill came between its lock and itself
                continue
            if time.time() - folder.stat().st_mtime > UNLOCKED_KEEP_S:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        except OSError:  # another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            _end_emulators(folder)
            _remove(folder)
        finally:
            os.close(lock)


def _end_emulators(folder: Path) -> None:
    """Kill the processes that work in a dead run's folder: they are that run's."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if (process / "cwd").readlink() == folder:
                    os.kill(int(process.name), signal.SIGKILL)
