"""What a test's end says: passed, failed, skipped, crashed, or ended by us because it hung."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from kvmtrace.report.outcome import OwnResult

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

    from kvmtrace.report.outcome import Status

# kselftest.h: KSFT_SKIP; automake and kvm-unit-tests: 77
SKIP_CODES = (4, 77)
TIMED_OUT = 124  # what timeout(1) ends with, and so kvm-unit-tests
BY_SIGNAL = 128  # a shell adds the signal's number
LAST_LINES = 20
LAST_BYTES = 8192


def own_result(
    status: int | None, *, hung_after_s: float | None, seconds: float, log: Path, skip_codes: Container[int]
) -> OwnResult:
    """Judge how a test ended.

    Parameters
    ----------
    status : exit code, -N if signal N killed it, None if unknown
    hung_after_s : the limit after which we ended it; None if it ended by itself
    """
    verdict, words = _judge(status, hung_after_s, skip_codes)
    return OwnResult(verdict, words, seconds, str(log), last_words(log))


def _judge(status: int | None, hung_after_s: float | None, skip_codes: Container[int]) -> tuple[Status, str]:
    """Return the verdict and the words for it."""
    if hung_after_s is not None:
        return "hang", f"did not end within {hung_after_s:g} s"
    if status is None:
        return "fail", "nobody knows how it ended"
    if status < 0:
        return "crash", f"killed by {_signal(-status)}"
    return _judge_code(status, skip_codes)


def _judge_code(code: int, skip_codes: Container[int]) -> tuple[Status, str]:
    """Judge an exit code."""
    if code == 0:
        return "pass", "exit code 0"
    if code in skip_codes:
        return "skip", f"skipped (exit code {code})"
    if code == TIMED_OUT:
        return "hang", f"exit code {code}: its own time limit"
    if BY_SIGNAL < code < BY_SIGNAL + signal.NSIG:
        return "crash", f"exit code {code}: killed by {_signal(code - BY_SIGNAL)}"
    return "fail", f"exit code {code}"


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def last_words(log: Path) -> str:
    """Return the last lines of what a test printed."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - LAST_BYTES, 0))
            text = file.read(LAST_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LAST_LINES:])
