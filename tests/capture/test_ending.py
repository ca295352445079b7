"""What ends a recording."""

from __future__ import annotations

import os
import select
import signal

import pytest

from kvmtrace.capture.ending import Ending
from kvmtrace.capture.settings import TargetSpec
from kvmtrace.capture.target import Target


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_noted_and_wake_up(number: int) -> None:
    before = signal.getsignal(number)
    with Ending() as ending, Target(TargetSpec("all")) as target:
        assert ending.reason(target) is None
        os.kill(os.getpid(), number)
        assert select.select([ending.fd], [], [], 5)[0]
        assert ending.reason(target) == "interrupt"
    assert signal.getsignal(number) is before


def test_duration_counts_from_start() -> None:
    with Ending(0.05) as ending, Target(TargetSpec("all")) as target:
        assert ending.remaining_s() is None
        ending.start()
        remaining = ending.remaining_s()
        assert remaining is not None
        assert 0 < remaining <= 0.05
        select.select([], [], [], 0.06)
        assert ending.reason(target) == "time"


def test_target_ends() -> None:
    with Ending() as ending, Target(TargetSpec("command", command=("true",))) as target:
        target.release()
        select.select([target.pidfd], [], [], 5)
        assert ending.reason(target) == "target"
