"""The second thread: order, errors, and that one core takes the same way without it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from kvmtrace.events.beside import Beside

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("cores", [{0}, {0, 1}])
def test_items_are_taken_in_order(cores: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    taken: list[int] = []
    threads: set[int] = set()

    def take(item: int) -> None:
        taken.append(item)
        threads.add(threading.get_ident())

    with Beside(take) as beside:
        for item in range(100):
            beside.give(item)
    assert taken == list(range(100))
    assert (threads == {threading.get_ident()}) == (len(cores) == 1)


def give_all(take: Callable[[int], None]) -> None:
    with Beside(take) as beside:
        for item in range(100):
            beside.give(item)


def fails_at(limit: int) -> Callable[[int], None]:
    def take(item: int) -> None:
        if item == limit:
            raise ValueError(item)

    return take


@pytest.mark.parametrize("cores", [{0}, {0, 1}])
@pytest.mark.parametrize("limit", [0, 99])
def test_what_goes_wrong_is_raised_in_the_first_thread(
        cores: set[int], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    with pytest.raises(ValueError, match=str(limit)):
        give_all(fails_at(limit))


def give_and_fail() -> None:
    with Beside(lambda _: None) as beside:
        beside.give(1)
        raise KeyError


def test_an_error_of_the_first_thread_ends_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    before = threading.active_count()
    with pytest.raises(KeyError):
        give_and_fail()
    assert threading.active_count() == before
