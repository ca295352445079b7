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
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_dead(runs: Path) -> None:
    """Remove the folders of killed runs, and end their emulators if they live."""
    for folder in runs.iterdir():
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
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
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _end_emulators(folder: Path) -> None:
    """Kill the processes that work in a dead run's folder: they are that run's."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if (process / "cwd").readlink() == folder:
                    os.kill(int(process.name), signal.SIGKILL)
