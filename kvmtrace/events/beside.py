"""A second thread that takes in what the first one hands it: NumPy lets both run at the same time."""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

T = TypeVar("T")
WAITING = 1  # items that may wait: memory is bounded by them


class Beside(Generic[T]):
    """Calls `take` with every item given, in order, in a thread of its own; on one core at once.

    What `take` raises is raised by the next give(), or when the with block ends.

    Parameters
    ----------
    take : called with one item after the other
    apart : in a thread of its own, where there are cores for it
    """

    def __init__(self, take: Callable[[T], object], *, apart: bool = True) -> None:
        self._take = take
        self._apart = apart and len(os.sched_getaffinity(0)) > 1
        self._items: queue.Queue[T | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Beside[T]:
        """Start the thread."""
        if self._apart:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def give(self, item: T) -> None:
        """Hand over an item; waits while too many are waiting."""
        if self._thread is None:
            self._take(item)
        else:
            self._raise()
            self._items.put(item)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Wait until everything has been taken in."""
        if self._thread is not None:
            self._items.put(None)
            self._thread.join()
            if error is None:
                self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._take(item)
                except BaseException as error:  # noqa: BLE001 - it is raised again in the first thread
                    self._error = error
            del item  # the table is let go before the next one is waited for
