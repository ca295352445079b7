"""What ends a recording: the target, the time, a signal. Shared by both back ends."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from kvmtrace.capture.target import Target

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ending:
    """Notes SIGINT, SIGTERM and SIGHUP instead of dying of them, and says when and why to stop.

    Used as a context manager around everything that must be undone, from the first change in tracefs to
    the finished file: until it is left, these signals cannot interrupt.

    Attributes
    ----------
    fd : int, readable once a signal has come: wake up and ask `reason()`
    """

    def __init__(self, duration_s: float | None = None) -> None:
        self.duration_s = duration_s
        self.deadline: float | None = None  # time.monotonic()
        self.signal: int | None = None
        self.fd = -1
        self._write = -1
        self._previous: list[Any] = []
        self._previous_fd = -1

    def __enter__(self) -> Ending:
        self.fd, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous = [signal.signal(number, self._note) for number in SIGNALS]
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in zip(SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._write)

    def _note(self, number: int, frame: object) -> None:  # noqa: ARG002 (signal's signature)
        self.signal = number

    def start(self) -> None:
        """Start the clock of the duration."""
        if self.duration_s is not None:
            self.deadline = time.monotonic() + self.duration_s

    def remaining_s(self) -> float | None:
        """Return the time left; None without a limit."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def reason(self, target: Target) -> str | None:
        """Return why the recording ends now ("interrupt" "target" "time"), or None."""
        if self.signal is not None:
            return "interrupt"
        if target.ended():
            return "target"
        return "time" if self.remaining_s() == 0.0 else None
