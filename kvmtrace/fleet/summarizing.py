"""Summarising many recordings: one task each; what fails becomes a row, never the end of the job."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from kvmtrace.errors import KvmtraceError, is_of_object_store
from kvmtrace.fleet.executors import Failed, run_tasks
from kvmtrace.fleet.sources import at_hand
from kvmtrace.fleet.store import Store
from kvmtrace.fleet.summarize import checksum_of, summarize
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmtrace.fleet.executors import Engine

ATTEMPTS = 3  # of reading a source or writing its summary
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # trying again does not help
MADE, PRESENT, FAILED = "made", "present", "failed"


@dataclass(frozen=True)
class Outcome:
    """What came of one source.

    Parameters
    ----------
    status : MADE, PRESENT (a summary of the same content was there), FAILED
    kind : class of the error: "FormatError", "FileNotFoundError", "worker died"
    seconds : of the worker
    """

    status: str
    n_events: int = 0
    error: str = ""
    kind: str = ""
    attempts: int = 1
    seconds: float = 0.0


@dataclass
class Progress:
    """How far a job is.

    Parameters
    ----------
    total : sources
    counts : status -> sources
    """

    total: int
    counts: Counter[str] = field(default_factory=Counter)
    n_events: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Return how many sources are done with."""
        return sum(self.counts.values())

    def rate(self) -> float:
        """Return sources per second so far."""
        return self.done / max(time.monotonic() - self.began, 1e-9)

    def remaining_s(self) -> float | None:
        """Return the estimated time to the end; None before anything is done."""
        return (self.total - self.done) / self.rate() if self.done else None


@lru_cache(maxsize=4)
def _known(dest: str, job: float) -> set[str]:
    """Return the checksums in DEST as a worker finds them when it begins to work for a job."""
    del job
    return Store(dest).checksums()


def _is_passing(error: BaseException) -> bool:
    return (isinstance(error, OSError) and not isinstance(error, LASTING)) or is_of_object_store(error)


def summarize_source(source: str, *, dest: str, job: float) -> Outcome:
    """Summarise one source into DEST (in a worker).

    Parameters
    ----------
    job : number of the job: what lies in DEST is listed once per job and worker
    """
    began = time.monotonic()
    attempt = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        retry=retry_if_exception(_is_passing),
        reraise=True,
    )
    try:
        status, n_events = attempt(_summarize_once, source, dest, job)
    except (KvmtraceError, OSError, MemoryError) as error:
        return _failed(error, attempt, began)
    except Exception as error:
        if not is_of_object_store(error):
            raise
        return _failed(error, attempt, began)
    return Outcome(status, n_events, seconds=time.monotonic() - began)


def _failed(error: Exception, attempt: Retrying, began: float) -> Outcome:
    attempts = int(attempt.statistics.get("attempt_number", 1))
    return Outcome(FAILED, 0, _one_line(error), type(error).__name__, attempts, time.monotonic() - began)


def _summarize_once(source: str, dest: str, job: float) -> tuple[str, int]:
    with at_hand(source) as path:
        checksum = checksum_of(path)
        if checksum in _known(dest, job):
            return PRESENT, 0
        row = summarize(path, source, checksum)
    Store(dest).write_summary(row)
    return MADE, row["n_events"]


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def summarize_all(
    engine: Engine, sources: Sequence[str], dest: str, show: Callable[[Progress], None] = lambda _: None
) -> Progress:
    """Summarise sources into DEST; those that fail get a row in its failures.

    Parameters
    ----------
    show : called with the progress whenever a source is done with
    """
    store = Store(dest)
    progress = Progress(len(sources))
    failed_before = set(store.objects("failures"))

    def done(source: str, result: Any) -> None:
        if isinstance(result, Failed):
            result = Outcome(FAILED, 0, result.error, "worker died", result.attempts)
        progress.counts[result.status] += 1
        progress.n_events += result.n_events
        if result.status == FAILED:
            store.write_failure(source, result.error, result.kind, result.attempts)
        elif failed_before:
            store.forget_failure(source)
        show(progress)

    run_tasks(engine, partial(summarize_source, dest=dest, job=time.time()), sources, done)
    return progress
