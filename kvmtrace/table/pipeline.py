"""Work on a stream of items that threads share: chains of stages, each in order; NumPy lets threads run at once."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import field
from typing import TYPE_CHECKING, Any, TypeVar

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Chain = tuple[Callable[[Any], Any], ...]

T = TypeVar("T")
MAX_THREADS = 2  # the chains of a report keep two busy
IN_FLIGHT = 3  # items begun and not finished: memory is bounded by them; more of them are not faster


def run_stages(items: Iterable[T], *chains: Chain) -> None:
    """Take every item through each chain of stages; on one core, one item after the other.

    A stage gets what the stage before it returned, item by item in their order, and never runs twice at a time.
    Stages of different items or chains run at the same time, in whichever thread is free. What a stage or the
    iterator raises ends the work, and is raised here.

    Parameters
    ----------
    items : iterable, advanced in one thread at a time
    chains : functions of one argument, the first of each chain takes the item
    """
    if len(os.sched_getaffinity(0)) < 2:
        for item in items:
            for chain in chains:
                value: Any = item
                for stage in chain:
                    value = stage(value)
        return
    _Workers(iter(items), chains).run()


@dataclass(eq=False)
class _Stage:
    """One stage: what waits for it, by number of the item, and whether it is running."""

    call: Callable[[Any], Any]
    then: _Stage | None
    waiting: deque[tuple[int, Any]] = field(default_factory=deque)
    busy: bool = False


class _Workers:
    """The threads that share the stages."""

    def __init__(self, items: Iterator[Any], chains: tuple[Chain, ...]) -> None:
        self._items = items
        self._first: list[_Stage] = []
        self._stages: list[_Stage] = []  # of equal items, the earlier in this list go first
        for chain in chains:
            then: _Stage | None = None
            for call in reversed(chain):
                then = _Stage(call, then)
                self._stages.append(then)
            if then is not None:
                self._first.append(then)
        self._changed = threading.Condition()
        self._reading = False
        self._ended = False
        self._n_read = 0
        self._left: dict[int, int] = {}  # chains that each item in flight has still to go through
        self._error: BaseException | None = None

    def run(self) -> None:
        """Work in this thread and in others until everything is done."""
        others = [threading.Thread(target=self._work, daemon=True) for _ in range(MAX_THREADS - 1)]
        try:
            for thread in others:
                thread.start()
            self._work()
        except BaseException as error:  # an interrupt while this thread waited: the others have to end
            self._fail(error)
            raise
        finally:
            for thread in others:
                if thread.is_alive():
                    thread.join()
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def _work(self) -> None:
        """Do what can be done, until there is nothing left or something failed."""
        while True:
            with self._changed:
                while (stage := self._next()) is None and not self._reading_is_due():
                    if self._error is not None or self._is_done():
                        return
                    self._changed.wait()
                if self._error is not None:
                    return
                if stage is None:
                    self._reading = True
                else:
                    stage.busy = True
            try:
                if stage is None:
                    self._read()
                else:
                    self._run(stage)
            except BaseException as error:  # noqa: BLE001 - it is raised again in the first thread
                self._fail(error)
                return

    def _is_done(self) -> bool:
        return self._ended and not self._left

    def _reading_is_due(self) -> bool:
        return not self._reading and not self._ended and len(self._left) < IN_FLIGHT

    def _next(self) -> _Stage | None:
        """Return the stage whose turn it is: that of the oldest item."""
        ready = [stage for stage in self._stages if stage.waiting and not stage.busy]
        return min(ready, key=lambda stage: stage.waiting[0][0], default=None)

    def _read(self) -> None:
        ended = False
        item = None
        try:
            item = next(self._items)
        except StopIteration:
            ended = True
        with self._changed:
            self._reading = False
            self._ended = ended
            if not ended and self._first:
                self._left[self._n_read] = len(self._first)
                for stage in self._first:
                    stage.waiting.append((self._n_read, item))
                self._n_read += 1
            self._changed.notify_all()

    def _run(self, stage: _Stage) -> None:
        number, value = stage.waiting.popleft()
        value = stage.call(value)
        with self._changed:
            stage.busy = False
            if stage.then is not None:
                stage.then.waiting.append((number, value))
            else:
                self._left[number] -= 1
                if not self._left[number]:
                    del self._left[number]
            self._changed.notify_all()
