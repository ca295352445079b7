"""One file through all that reads it: it ends in a result or a FormatError, in bounded time and memory."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.capture.qmp import converse
from kvmtrace.cli.main import cli
from kvmtrace.errors import KvmtraceError, UsageError
from kvmtrace.fleet.store import Store
from kvmtrace.fleet.summarize import summarize
from kvmtrace.formats import open_recording
from kvmtrace.formats.summary import is_summary
from kvmtrace.formats.summary.summary_file import read_summary
from kvmtrace.render.html import render_html
from kvmtrace.render.text.report_text import render_text
from kvmtrace.render.text.summary_text import render_summary
from kvmtrace.report.anonymize import anonymized
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.json_document import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.table.recording import Loss, Recording

CPU_SECONDS = 5.0
FOR_ALL = 5  # times as long: eleven commands, and the coverage tracer
SANITIZED = "ASAN_OPTIONS" in os.environ  # the address sanitizer takes terabytes of addresses, and time
MEMORY_BASE = 384 << 20  # what NumPy, pandas and the report take for the smallest file
MEMORY_PER_BYTE = 100
# how much is done with a file
EVENTS, REPORT, ALL = range(3)
QMP = b'{"QMP"'
EXPORTS = (".parquet", ".arrow", ".csv", ".perfetto.json", ".pftrace")


class Hang(BaseException):
    """A case took longer than its CPU time."""


class WrongAnswerError(AssertionError):
    """A file was read without an error, and the result contradicts itself."""


@dataclass(frozen=True)
class Outcome:
    """What became of a file; `n_events` is None where `error` says why."""

    n_events: int | None
    loss: Loss | None = None
    error: str = ""

    @property
    def stated(self) -> bool:
        """Is it said that something is missing?"""
        return self.loss is None or self.loss.truncated or bool(self.loss.damage) or self.loss.events != 0


def _alarm(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def limits(size: int, seconds: float) -> Iterator[None]:
    """Bound CPU time, and memory by the file's size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGPROF, _alarm)
    if not SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BASE + MEMORY_PER_BYTE * size, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds * (3 if SANITIZED else 1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, old)


def _read(recording: Recording) -> int:
    """Read every field of every event, at once and in pieces."""
    table = recording.events()
    for kind in table.kinds:
        for name in kind.fields:
            if len(table.field(kind.name, name)) != table.count(kind.name):
                raise WrongAnswerError(f"{kind.name}.{name} has not one value per event")
    loss = recording.loss
    n_pieces = sum(map(len, recording.iter_events(100)))
    if n_pieces != len(table):
        raise WrongAnswerError(f"{len(table)} events at once and {loss}, {n_pieces} in pieces and {recording.loss}")
    if recording.loss != loss:
        raise WrongAnswerError(f"at once {loss}, in pieces {recording.loss}")
    return len(table) - table.count("lost_events")


def _report(path: str, *, everything: bool) -> None:
    recording = open_recording(path)
    report = build_report(recording, ReportOptions(timeline=everything))
    if report.model is not None and report.loss.events == 0 and report.capture.n_events < 0:
        raise WrongAnswerError("a negative count")
    render_text(report)
    to_json(report)
    if everything:
        hidden = anonymized(report)
        render_text(hidden)
        to_json(hidden)
        render_html(report)


def _commands(path: str) -> None:
    """Run the commands that do more than report: every export, a comparison, one exit's story."""
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder, contextlib.redirect_stdout(io.StringIO()):
        for suffix in EXPORTS:
            cli.main(args=["export", path, "-o", f"{folder}/out{suffix}"], standalone_mode=False)
        cli.main(args=["compare", path, path], standalone_mode=False)
        _check(path)
        Store(folder).write_summary(summarize(Path(path), path))
        with contextlib.suppress(UsageError):  # there is no such exit
            cli.main(args=["report", path, "--explain", "2"], standalone_mode=False)


def _check(path: str) -> None:
    """Run the command; a violation ends with 1, a recording in which nothing was checked with 3."""
    try:
        cli.main(args=["check", path], standalone_mode=False)
    except SystemExit as end:
        if end.code not in (1, 3):
            raise WrongAnswerError(f"check ends with {end.code}") from end
    except KvmtraceError as error:
        if error.exit_code != 3:
            raise


class _Server(io.BytesIO):
    """What a QMP server says; what it is asked goes nowhere."""

    def write(self, _: object) -> int:
        return 0


def _ask(said: bytes) -> Outcome:
    """Read a QMP server's answers as the recorder does."""
    try:
        converse(_Server(said), time.monotonic() + 60)
    except (OSError, ValueError) as error:
        return Outcome(None, error=str(error))
    return Outcome(0)


def run_case(path: str, depth: int = REPORT) -> Outcome:
    """Read the file at `path` as commands do.

    Returns
    -------
    Outcome, where the file was read or refused in the documented way

    Raises
    ------
    anything else is a bug
    """
    data = Path(path).read_bytes()
    with limits(len(data), CPU_SECONDS * (FOR_ALL if depth == ALL else 1)):
        try:
            if data.startswith(QMP):
                return _ask(data)
            if is_summary(data):
                render_summary(read_summary(data, path))
                return Outcome(0)
            recording = open_recording(path)
            n_events = _read(recording)
            if depth >= REPORT:
                _report(path, everything=depth == ALL)
            if depth == ALL:
                _commands(path)
        except KvmtraceError as error:
            message = str(error)
            if error.exit_code != 3 or "\n" in message or len(message) > 1000:
                raise WrongAnswerError(f"exit code {error.exit_code}, message {message[:200]!r}") from error
            return Outcome(None, error=message)
        return Outcome(n_events, recording.loss)
