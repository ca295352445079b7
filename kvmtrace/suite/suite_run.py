"""Runs the tests of a suite one after the other, each recorded and checked; whatever one does, the next one runs."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from kvmtrace.capture.invoking_user import invoking_user
from kvmtrace.capture.settings import RecordSettings, TargetSpec
from kvmtrace.errors import CapabilityError, FormatError, UsageError
from kvmtrace.report.outcome import Outcome, OwnResult
from kvmtrace.suite.own_result import SKIP_CODES, own_result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kvmtrace.capture.settings import RecordResult
    from kvmtrace.report.document import Report
    from kvmtrace.suite.listed_test import SuiteTest

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
LONGEST_NAME = 80


@dataclass(frozen=True)
class SuiteSettings:
    """How a suite is run.

    Parameters
    ----------
    folder : Path that recordings and logs are written to
    timeout_s : limit for a test that has none of its own
    keep_all : keep what was recorded of tests in which nothing is wrong, too
    skip_codes : exit codes by which a test says that it cannot run here
    limit : violations described per rule
    backend, event_set, max_bytes, buffer_bytes, as_root : as of RecordSettings
    """

    folder: Path
    timeout_s: float = 120.0
    keep_all: bool = False
    skip_codes: tuple[int, ...] = SKIP_CODES
    limit: int = 20
    backend: str = "auto"
    event_set: str = "lifecycle"
    max_bytes: int | None = None
    buffer_bytes: int | None = None
    as_root: bool = False


@dataclass(frozen=True)
class Recorded:
    """What the recorder says of one test.

    Parameters
    ----------
    path : Path of the recording
    status : the test's exit code, -N if signal N killed it; None if unknown
    ended_by : "target" "time" "interrupt" "disk full"
    """

    path: Path
    status: int | None
    ended_by: str


def run_suite(
    tests: Sequence[SuiteTest],
    settings: SuiteSettings,
    record: Callable[[SuiteTest, SuiteSettings, Path, Path], Recorded] | None = None,
) -> Iterator[Outcome]:
    """Yield the outcome of each test when it is known.

    Parameters
    ----------
    record : runs a test under a recorder; gets the test, the settings, where the recording goes and where to print

    Raises
    ------
    CapabilityError
        Nothing can be recorded here; told at the first test.
    KeyboardInterrupt
        Somebody interrupted a test; its outcome was not judged.
    """
    _make_folder(settings.folder)
    names: set[str] = set()
    for number, test in enumerate(tests, 1):
        if test.skip:
            yield Outcome(test.name, own=OwnResult("skip", test.skip, 0.0))
            continue
        base = settings.folder / _file_name(test.name, number, names)
        yield _run_one(test, settings, base, record or record_test)


def _make_folder(folder: Path) -> None:
    """Make the folder for what is kept; one that is made under sudo belongs to the user who called it."""
    if folder.is_dir():
        return
    folder.mkdir()
    user = invoking_user()
    if user is not None:
        os.chown(folder, *user)


def _file_name(name: str, number: int, taken: set[str]) -> str:
    """Return a name for files that no other test of the suite has."""
    short = _UNSAFE.sub("_", name).strip("_.")[:LONGEST_NAME] or "test"
    if short in taken:
        short = f"{short}-{number}"
    taken.add(short)
    return short


def _run_one(
    test: SuiteTest,
    settings: SuiteSettings,
    base: Path,
    record: Callable[[SuiteTest, SuiteSettings, Path, Path], Recorded],
) -> Outcome:
    path, log = base.with_name(f"{base.name}.dat"), base.with_name(f"{base.name}.log")
    limit_s = test.timeout_s or settings.timeout_s
    started = time.monotonic()
    try:
        recorded = record(replace(test, timeout_s=limit_s), settings, path, log)
    except UsageError as error:  # it cannot be executed
        return _settled(Outcome(test.name, error=str(error), error_code=error.exit_code), None, log)
    seconds = time.monotonic() - started
    if recorded.ended_by == "interrupt":
        raise KeyboardInterrupt
    own = own_result(
        recorded.status,
        hung_after_s=limit_s if recorded.ended_by == "time" else None,
        seconds=seconds,
        log=log,
        skip_codes=settings.skip_codes,
    )
    outcome = Outcome(test.name, own=own, recording=str(recorded.path))
    try:
        outcome = replace(outcome, report=_checked(recorded.path, settings.limit))
    except (FormatError, OSError) as error:
        outcome = replace(outcome, error=" ".join(str(error).split()), error_code=FormatError.exit_code)
    keep = settings.keep_all or outcome.failed or outcome.n_suspicions
    return outcome if keep else _settled(outcome, recorded.path, log)


def _checked(path: Path, limit: int) -> Report:
    from kvmtrace.formats import open_recording
    from kvmtrace.report.build import check_report

    return check_report(open_recording(str(path)), limit=limit)


def _settled(outcome: Outcome, recording: Path | None, log: Path) -> Outcome:
    """Remove the files of a test that nobody needs to look at."""
    for path in (recording, log):
        if path is not None:
            path.unlink(missing_ok=True)
    own = None if outcome.own is None else replace(outcome.own, log=None)
    return replace(outcome, own=own, recording=None)


def record_test(test: SuiteTest, settings: SuiteSettings, path: Path, log: Path) -> Recorded:
    """Run a test under the recorder that suits this host."""
    from kvmtrace.capture.backend import choose_backend

    user = invoking_user()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if user is not None:
            os.fchown(fd, *user)
        wanted = RecordSettings(
            output=path,
            target=TargetSpec("command", command=test.argv, as_root=settings.as_root, output=fd),
            backend=settings.backend,
            event_set=settings.event_set,
            duration_s=test.timeout_s,
            max_bytes=settings.max_bytes,
            buffer_bytes=settings.buffer_bytes,
            argv=("kvmtrace", *sys.argv[1:]),
        )
        name, _ = choose_backend(wanted)
        module = "kvmtrace.capture.bpf.bpf_recorder" if name == "bpf" else "kvmtrace.capture.ftrace.ftrace_recorder"
        result: RecordResult = import_module(module).record(wanted)
    finally:
        os.close(fd)
    if result.ended_by == "disk full":
        raise CapabilityError(f"{path.parent}: the disk is full", "make room, or choose another place with --keep")
    return Recorded(result.path, result.target_status, result.ended_by)
