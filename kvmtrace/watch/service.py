"""What a long-running command owes the machine: signals become events, lines go to the journal, systemd is told.

Sources: sd_notify(3), the datagram of NOTIFY_SOCKET; sd-daemon(3), <N> before a line; systemd.exec(5), JOURNAL_STREAM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

STOPS = (signal.SIGINT, signal.SIGTERM)
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6  # of syslog(3)


def say(text: str, level: int = INFO) -> None:
    """Print one line for people on standard error, with its level where the journal reads it."""
    prefix = f"<{level}>" if os.environ.get("JOURNAL_STREAM") else ""
    line = "".join(char if char.isprintable() else "?" for char in text)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{prefix}kvmtrace: {line}\n")
        sys.stderr.flush()


def notify(state: str) -> None:
    """Tell systemd, if it has started us: READY=1, STOPPING=1, STATUS=..."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.connect("\0" + address[1:] if address[0] == "@" else address)
        connection.send(state.encode())


def notify_reload() -> None:
    """Tell systemd that a reload begins; READY=1 ends it."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


class Signals:
    """Takes signals as they come, instead of being ended by them; used as a context manager.

    Parameters
    ----------
    more : signals beside SIGINT and SIGTERM

    Attributes
    ----------
    fd : int, readable once a signal has come
    """

    def __init__(self, *more: signal.Signals) -> None:
        self._numbers = (*STOPS, *more)
        self._came: list[int] = []
        self._previous: list[Any] = []
        self._previous_fd = -1
        self.fd = self._write = -1

    def __enter__(self) -> Signals:
        self.fd, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous = [signal.signal(number, self._note) for number in self._numbers]
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in zip(self._numbers, self._previous, strict=True):
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._write)

    def _note(self, number: int, frame: object) -> None:  # noqa: ARG002 (signal's signature)
        self._came.append(number)

    def take(self) -> list[int]:
        """Return what has come since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        came, self._came = self._came, []
        return came
