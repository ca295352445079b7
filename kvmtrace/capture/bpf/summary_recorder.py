"""`record --summary`: waits while the maps grow, and writes what they hold.

The file is one JSON object, "kvmtrace.summary/1"; kvmtrace/formats/summary/summary_file.py reads it and describes it.
A draft of it is renewed every second: it is what remains if the recorder is killed.
"""

from __future__ import annotations

import json
import select
import time
from dataclasses import field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.bpf.detach import closing_elsewhere
from kvmtrace.capture.bpf.summary_maps import SummaryPrograms, count_by_kind, summary_notes
from kvmtrace.capture.ending import Ending
from kvmtrace.capture.first_metadata import first_metadata
from kvmtrace.capture.nothing_of_kvm import say_nothing, vcpus_of
from kvmtrace.capture.settings import RecordResult, RecordSettings
from kvmtrace.capture.spool import Spool, is_full
from kvmtrace.capture.target import Target
from kvmtrace.capture.threads import Threads
from kvmtrace.errors import UsageError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA = "kvmtrace.summary/1"
DRAFT_S = 1.0
LOOK_S = 0.25  # for new threads' names
KILLED = "the recorder was killed: what was counted in its last second is missing"


def record_summary(settings: RecordSettings) -> RecordResult:
    """Aggregate in the kernel until the target or the time ends or a signal comes; write the summary file.

    Raises
    ------
    CapabilityError, UsageError
        Nothing was recorded, and why.
    """
    if settings.filters:
        raise UsageError("--summary counts everything; leave the filters out")
    with Ending(settings.duration_s) as ending, Target(settings.target) as target:
        programs = SummaryPrograms(target.pid)
        spool = Spool.create(settings.output)
        try:
            return SummarySession(settings, programs, spool, target).run(ending)
        except BaseException:
            spool.discard()
            raise
        finally:
            with closing_elsewhere():
                programs.close()


@dataclass
class SummarySession:
    """One summary: programs, target and what is to be said about it."""

    settings: RecordSettings
    programs: SummaryPrograms
    spool: Spool
    target: Target
    threads: Threads = field(init=False)
    started: str = ""
    started_ns: int = 0

    def run(self, ending: Ending) -> RecordResult:
        """Attach, wait until it ends, write the file."""
        target, settings = self.target, self.settings
        self.threads = Threads(target.pid, argv=settings.target.command)
        self.threads.look(force=True)
        self.programs.attach(target.tids())
        self.programs.add_tids(target.tids())
        self.started, self.started_ns = datetime.now(UTC).isoformat(), time.monotonic_ns()
        self.keep_draft()
        self.spool.save({"state": "complete", "backend": "bpf"})
        cpu_before = time.process_time()
        ending.start()
        target.release()
        ended_by = wait(ending, target, self.threads, self.keep_draft)
        self.threads.look(force=True)
        now = time.monotonic_ns()
        rows = self.rows(now)
        n_vcpus = vcpus_of(target.pid)
        target.close()
        meta = self.metadata(rows, now, ended_by)
        meta["kvm_seen"] = any(count_by_kind(rows).values())
        if not meta["kvm_seen"]:
            meta["notes"].append(say_nothing(settings, meta, n_vcpus))
        text = encode(rows, meta)
        self.spool.release_reserve()
        self.spool.replace_file("out", text)
        try:
            path = self.spool.publish("out", settings.output.name)
        except OSError as error:
            raise self.spool.why_unpublished(error) from error
        self.spool.discard()
        cpu_s = time.process_time() - cpu_before
        return RecordResult(
            path=path,
            meta=meta,
            by_kind=count_by_kind(rows),
            file_bytes=len(text),
            recorder_cpu_s=cpu_s,
        )

    def keep_draft(self) -> None:
        """Write the file as it has to be if the recorder is killed now."""
        now = time.monotonic_ns()
        rows = self.rows(now)
        meta = self.metadata(rows, now, "killed")
        meta["notes"].append(KILLED)
        try:
            self.spool.replace_file("out", encode(rows, meta))
        except OSError as error:
            if not is_full(error):
                raise

    def rows(self, now: int) -> list[dict[str, Any]]:
        """Return what the maps hold; threads often get their name after their first event."""
        rows = self.programs.snapshot(now)
        for row in rows:
            row["comm"] = self.threads.known.get(row["tid"], (-1, row["comm"]))[1]
        return rows

    def metadata(self, rows: list[dict[str, Any]], now: int, ended_by: str) -> dict[str, Any]:
        """Return the metadata object."""
        return first_metadata(
            self.settings,
            self.target,
            backend="bpf",
            clock="mono",
            event_set="summary",
            events=[f"{e.system}:{e.name}" for e in self.programs.events],
            guest_run=self.target.guest_run,
            vms=self.threads.vms.as_meta(),
            loss={"by_cpu": {}, "events": 0},
            started=self.started,
            duration_ns=now - self.started_ns,
            notes=summary_notes(rows),
            ended_by=ended_by,
            target_status=self.target.status,
            n_events=None,
            attached=self.programs.attached.by_mechanism(),
        )


def encode(rows: list[dict[str, Any]], meta: dict[str, Any]) -> bytes:
    """Return the file."""
    return json.dumps({"schema": SCHEMA, "meta": meta, "vcpus": rows}, separators=(",", ":")).encode() + b"\n"


def wait(ending: Ending, target: Target, threads: Threads, keep_draft: Callable[[], None]) -> str:
    """Wait until the recording ends, renewing the draft; return why it ended."""
    poll = select.poll()
    for fd in (ending.fd, target.pidfd):
        if fd is not None:
            poll.register(fd, select.POLLIN)
    next_draft = time.monotonic() + DRAFT_S
    while True:
        ended_by = ending.reason(target)
        if ended_by is not None:
            return ended_by
        threads.look()
        if time.monotonic() > next_draft:
            keep_draft()
            next_draft = time.monotonic() + DRAFT_S
        remaining = ending.remaining_s()
        poll.poll(1000 * (LOOK_S if remaining is None else min(LOOK_S, remaining)))
