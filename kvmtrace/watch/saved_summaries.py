"""What `watch --summaries DEST` adds: each recording that was saved is summarised for `kvmtrace fleet`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from kvmtrace.watch.service import WARNING, say

if TYPE_CHECKING:
    from pathlib import Path

MOST_S = 300.0  # for one recording
LAST_S = 60.0  # for all that are left when the watch ends
COMMAND = (sys.executable, "-m", "kvmtrace", "fleet", "summarize", "--workers", "1", "--strict")


class SavedSummaries:
    """Summarises recordings one after the other, in processes of their own.

    Parameters
    ----------
    dest : folder or fsspec URL, as of `kvmtrace fleet summarize -o`
    """

    def __init__(self, dest: str) -> None:
        self._dest = dest
        self._waiting: deque[Path] = deque()
        self._path: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self._until = 0.0

    def add(self, path: Path) -> None:
        """Summarise a recording, when those before it are done."""
        self._waiting.append(path)
        self.look()

    def look(self) -> None:
        """Say what failed, and begin with the next one."""
        process = self._process
        if process is not None:
            if process.poll() is None and time.monotonic() < self._until:
                return
            self._tell(process)
            self._process = None
        if self._waiting:
            self._path = self._waiting.popleft()
            argv = [*COMMAND, str(self._path), "-o", self._dest]
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C ends the watch, which waits for the last one
            )
            self._until = time.monotonic() + MOST_S

    def _tell(self, process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its worker, too
        _, errors = process.communicate()
        if process.returncode:
            told = errors.strip().splitlines()
            why = told[-1] if told else "it took too long" if process.returncode < 0 else f"why is in {self._dest}"
            say(f"{self._path} was not summarised: {why}", WARNING)

    def close(self) -> None:
        """Finish what waits, for a while; say what is left."""
        until = time.monotonic() + LAST_S
        while self._process is not None and time.monotonic() < until:
            time.sleep(0.05)
            self.look()
        if self._process is not None:
            self._waiting.clear()
            self._until = 0.0
            self.look()
