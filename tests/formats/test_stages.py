"""Stages shared by threads: order, values, errors, bounded memory, and one core without threads."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.table.pipeline import IN_FLIGHT, run_stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

N = 60


@pytest.fixture(params=[{0}, {0, 1}], ids=["one core", "two cores"])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: request.param)
    return request.param


class Recorder:
    """A stage that notes what it got, and fails if it runs twice at a time."""

    def __init__(self, change: Callable[[int], int] = lambda item: item) -> None:
        self.change = change
        self.got: list[int] = []
        self.threads: set[int] = set()
        self.running = False

    def __call__(self, item: int) -> int:
        assert not self.running
        self.running = True
        self.threads.add(threading.get_ident())
        time.sleep(0.0005 * (item % 3))
        self.got.append(item)
        self.running = False
        return self.change(item)


def test_every_stage_gets_every_item_in_order(cores: set[int]) -> None:
    double, add, other = Recorder(lambda n: 2 * n), Recorder(lambda n: n + 1), Recorder()
    run_stages(iter(range(N)), (double, add), (other,))
    assert double.got == other.got == list(range(N))
    assert add.got == [2 * n for n in range(N)]
    threads = double.threads | add.threads | other.threads
    assert len(threads) == len(cores)
    assert threading.get_ident() in threads


def test_stages_of_different_items_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    together = threading.Barrier(2, timeout=300)  # each stage waits for the other one

    def first(item: int) -> int:
        if item == 1:
            together.wait()
        return item

    def second(item: int) -> None:
        if item == 0:
            together.wait()

    run_stages(range(2), (first, second))


def test_items_are_not_read_far_ahead(cores: set[int]) -> None:
    n_read = n_done = most = 0

    def items() -> Iterator[int]:
        nonlocal n_read, most
        for item in range(N):
            most = max(most, n_read - n_done)
            n_read += 1
            yield item

    def done(_: int) -> None:
        nonlocal n_done
        time.sleep(0.001)
        n_done += 1

    run_stages(items(), (done,))
    assert n_read == n_done == N
    assert most < IN_FLIGHT


def fails_at(limit: int) -> Callable[[int], int]:
    def stage(item: int) -> int:
        if item == limit:
            raise ValueError(item)
        return item

    return stage


@pytest.mark.parametrize("limit", [0, N - 1])
def test_what_a_stage_raises_is_raised_and_ends_the_work(cores: set[int], limit: int) -> None:
    before = threading.active_count()
    behind = Recorder()
    with pytest.raises(ValueError, match=str(limit)):
        run_stages(range(N), (fails_at(limit), behind), (Recorder(),))
    assert behind.got == list(range(limit))[: len(behind.got)]
    assert threading.active_count() == before


def broken_items() -> Iterator[int]:
    yield 1
    raise KeyError("items")


def test_what_the_items_raise_is_raised(cores: set[int]) -> None:
    before = threading.active_count()
    with pytest.raises(KeyError, match="items"):
        run_stages(broken_items(), (Recorder(),))
    assert threading.active_count() == before


def test_an_interrupt_of_the_waiting_first_thread_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    before, first = threading.active_count(), threading.get_ident()
    wait, stage = threading.Condition.wait, Recorder()

    def interrupted(self: threading.Condition, timeout: float | None = None) -> Any:
        if threading.get_ident() == first and stage.got:
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(threading.Condition, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stages(range(N), (stage,))
    monkeypatch.undo()
    assert threading.active_count() == before


@pytest.mark.parametrize("chains", [(), ((Recorder(),),)])
def test_no_items_and_no_chains(cores: set[int], chains: tuple[Any, ...]) -> None:
    run_stages([], *chains)
    run_stages([1, 2], *chains)
