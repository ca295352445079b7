"""`record --monitor`: waits while threads are watched in the kernel, tells what is forbidden, and writes the counts.

The file is one JSON object, "kvmtrace.monitor/1":

    schema, meta ("kvmtrace.capture/1"), states, threads (that took a step and have not ended),
    transitions: [{"from", "event", "to", "count", "allowed"}], most frequent first
    n_forbidden: all; forbidden: the first MOST_KEPT, each with tid, pid, ts_ns, state, step and the `last` steps

A draft of it is renewed every second: it is what remains if the recorder is killed.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, field
from datetime import UTC, datetime
from typing import Any

from kvmtrace.capture.bpf.detach import closing_elsewhere
from kvmtrace.capture.bpf.monitor import FORBIDDEN, N_STEPS, ForbiddenStep, Monitor, describe_forbidden
from kvmtrace.capture.bpf.summary_recorder import wait
from kvmtrace.capture.ending import Ending
from kvmtrace.capture.first_metadata import first_metadata
from kvmtrace.capture.nothing_of_kvm import say_nothing, vcpus_of
from kvmtrace.capture.settings import RecordResult, RecordSettings
from kvmtrace.capture.spool import Spool, is_full
from kvmtrace.capture.target import Target
from kvmtrace.capture.threads import Threads
from kvmtrace.errors import UsageError
from kvmtrace.lazy_dataclass import dataclass

SCHEMA = "kvmtrace.monitor/1"
MOST_KEPT = 256
KILLED = "the recorder was killed: what was counted in its last second is missing"
BEGINS = "a thread's first step, and the first after the monitor began, is never forbidden"


def record_monitor(settings: RecordSettings) -> RecordResult:
    """Monitor until the target or the time ends or a signal comes; write the file.

    Raises
    ------
    CapabilityError, UsageError
        Nothing was monitored, and why.
    """
    if settings.filters or settings.summary:
        raise UsageError("--monitor looks at every step; leave --summary and the filters out")
    assert settings.monitor is not None
    with Ending(settings.duration_s) as ending, Target(settings.target) as target:
        monitor = Monitor(settings.monitor, target.pid)
        spool = Spool.create(settings.output)
        try:
            return _Session(settings, monitor, spool, target).run(ending)
        except BaseException:
            spool.discard()
            raise
        finally:
            with closing_elsewhere():
                monitor.close()


@dataclass
class _Session:
    """One monitored target, and what is to be said about it."""

    settings: RecordSettings
    monitor: Monitor
    spool: Spool
    target: Target
    kept: list[ForbiddenStep] = field(default_factory=list)
    started: str = ""
    started_ns: int = 0

    def run(self, ending: Ending) -> RecordResult:
        """Attach, wait until it ends, write the file."""
        target = self.target
        threads = Threads(target.pid)
        self.started, self.started_ns = datetime.now(UTC).isoformat(), time.monotonic_ns()
        self.monitor.start(target.tids())
        self.monitor.add_tids(target.tids())
        self.keep_draft()
        self.spool.save({"state": "complete", "backend": "bpf"})
        cpu_before = time.process_time()
        ending.start()
        target.release()
        ended_by = wait(ending, target, threads, self.keep_draft)
        self.monitor.stop()
        n_vcpus = vcpus_of(target.pid)
        target.close()
        document = self.document(ended_by)
        meta = document["meta"]
        meta["kvm_seen"] = bool(document["transitions"])
        if not meta["kvm_seen"]:
            meta["notes"].append(say_nothing(self.settings, meta, n_vcpus))
        text = _encode(document)
        self.spool.release_reserve()
        self.spool.replace_file("out", text)
        try:
            path = self.spool.publish("out", self.settings.output.name)
        except OSError as error:
            raise self.spool.why_unpublished(error) from error
        self.spool.discard()
        by_kind: dict[str, int] = {}
        for row in document["transitions"]:
            by_kind[row["event"]] = by_kind.get(row["event"], 0) + row["count"]
        return RecordResult(
            path=path,
            meta=meta | {"n_forbidden": document["n_forbidden"]},
            by_kind=by_kind,
            file_bytes=len(text),
            recorder_cpu_s=time.process_time() - cpu_before,
        )

    def keep_draft(self) -> None:
        """Tell what was forbidden, and write the file as it has to be if the recorder is killed now."""
        document = self.document("killed")
        document["meta"]["notes"].append(KILLED)
        try:
            self.spool.replace_file("out", _encode(document))
        except OSError as error:
            if not is_full(error):
                raise

    def document(self, ended_by: str) -> dict[str, Any]:
        """Return the file's object; what was forbidden since the last time is told."""
        for one in self.monitor.take_forbidden():
            if len(self.kept) < MOST_KEPT:
                self.kept.append(one)
                self.settings.tell(describe_forbidden(one))
        rows = transition_rows(self.monitor)
        return {
            "schema": SCHEMA,
            "meta": self.metadata(ended_by),
            "states": list(self.monitor.table.states),
            "threads": self.monitor.n_threads(),
            "transitions": rows,
            "n_forbidden": sum(row["count"] for row in rows if not row["allowed"]),
            "forbidden": [asdict(one) for one in self.kept],
        }

    def metadata(self, ended_by: str) -> dict[str, Any]:
        """Return the metadata object."""
        missing = [f"kvm:{kind}" for kind in self.monitor.missing]
        return first_metadata(
            self.settings,
            self.target,
            backend="bpf",
            clock="mono",
            event_set="monitor",
            events=[f"{e.system}:{e.name}" for e in self.monitor.events],
            missing_events=missing,
            guest_run=self.target.guest_run,
            loss={"by_cpu": {}, "events": 0},
            started=self.started,
            duration_ns=time.monotonic_ns() - self.started_ns,
            notes=[BEGINS],
            ended_by=ended_by,
            target_status=self.target.status,
            n_events=None,
            attached=self.monitor.attached.by_mechanism(),
        )


def transition_rows(monitor: Monitor) -> list[dict[str, Any]]:
    """Return the transitions as rows, most frequent first."""
    table = monitor.table
    numbers = {state: number for number, state in enumerate(table.states)}
    steps = {step.name: step.number for step in table.steps}
    rows = []
    for (state, step), count in monitor.transitions().items():
        after = table.next_states[numbers[state] * N_STEPS + steps[step]]
        allowed = after != FORBIDDEN
        after = after if allowed else table.next_states[steps[step]]
        rows.append({"from": state, "event": step, "to": table.states[after - 1], "count": count, "allowed": allowed})
    return sorted(rows, key=lambda row: -row["count"])


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
