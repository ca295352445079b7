"""Ctrl-C while something is imported: a moment later, as libraries turn an interrupt there into errors of their own.

NumPy prints a traceback and raises ImportError, pandas raises another one, and import locks swallow it and tell so.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType, TracebackType

LOOK_AGAIN_S = 0.02
_IMPORTING = "<frozen importlib._bootstrap>"


class CtrlC:
    """Raises KeyboardInterrupt for SIGINT, but not within an import unless pressed twice; a context manager.

    A SIGINT that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self._waits = self._own = False
        self._previous: Any = None
        self._thread = _thread.get_ident()
        self._hook = sys.unraisablehook

    def __enter__(self) -> CtrlC:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread
                self._previous = signal.signal(signal.SIGINT, self._press)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.unraisablehook = self._hook
        waits, self._waits = self._waits, False
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if waits and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def _press(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (signal's signature)
        own, self._own = self._own, False
        if not _is_importing(frame) or (self._waits and not own):
            self._waits = False
            raise KeyboardInterrupt
        self._waits = True
        _thread.start_new_thread(self._press_again, ())

    def _press_again(self) -> None:
        time.sleep(LOOK_AGAIN_S)
        if self._waits:
            self._own = True
            signal.pthread_kill(self._thread, signal.SIGINT)  # a true signal wakes whoever sleeps

    def _swallowed(self, unraisable: Any) -> None:
        """Interrupt once more what ran a finalizer that was interrupted instead."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _thread.interrupt_main()
        else:
            self._hook(unraisable)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False
