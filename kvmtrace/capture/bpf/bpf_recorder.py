"""The bpf back end: programs of tracers/ fill a ring buffer per CPU, whose bytes are moved to the file unread.

A span is written only when every program that was running when its end was noted has ended (one RCU grace
period), so it holds finished records. Everything the kernel runs for us hangs on descriptors of this process.
"""

from __future__ import annotations

import os
import select
import time
from collections import Counter
from dataclasses import field
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.bpf.bpf_disk_full import Unkept
from kvmtrace.capture.bpf.bpf_syscall import synchronize_rcu
from kvmtrace.capture.bpf.bpf_writer import CaptureWriter, encode_header
from kvmtrace.capture.bpf.detach import closing_elsewhere
from kvmtrace.capture.bpf.event_programs import FILTERS, describe_filters
from kvmtrace.capture.bpf.kvm_presence import KvmPresence
from kvmtrace.capture.bpf.program import Plan, Programs, make_plan
from kvmtrace.capture.bpf.ring import Rings, round_ring_size
from kvmtrace.capture.buffer_size import buffer_bytes, say_smaller
from kvmtrace.capture.capabilities import require_bpf
from kvmtrace.capture.ending import Ending
from kvmtrace.capture.first_metadata import first_metadata
from kvmtrace.capture.nothing_of_kvm import BEGINNING, is_of_kvm, say_nothing, vcpus_of
from kvmtrace.capture.settings import RecordResult, RecordSettings
from kvmtrace.capture.spool import Spool, is_full
from kvmtrace.capture.target import Target
from kvmtrace.capture.threads import Threads
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.errors import UsageError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from kvmtrace.capture.bpf.uprobes import UserProbe

CLOCK = "mono"
MOST_RING_BYTES = 1 << 30
BUSY_S = 0.005  # between looks while events come fast: a span then holds some thousand events
IDLE_S = 0.1
BUSY_BYTES = 64 << 10  # moved at one look: events come fast
DISK_WAS_FULL = "events at the end were lost because the disk was full"
COUNTERS_S = 1.0  # so often the counters go into the file, for the case that we are killed


def record(settings: RecordSettings, user_probes: tuple[UserProbe, ...] = ()) -> RecordResult:
    """Record with BPF programs until the target or the time ends, a signal comes or the disk is full.

    Parameters
    ----------
    settings : RecordSettings
    user_probes : functions of the VMM to record too

    Raises
    ------
    CapabilityError, UsageError
        Nothing was recorded, and why.
    """
    if settings.summary and settings.monitor is None:
        from kvmtrace.capture.bpf.summary_recorder import record_summary

        return record_summary(settings)
    if settings.monitor is not None:
        from kvmtrace.capture.bpf.monitor_recorder import record_monitor

        return record_monitor(settings)
    if settings.clock not in (None, CLOCK):
        raise UsageError(f"--clock {settings.clock} needs --backend ftrace; bpf records with {CLOCK}")
    if settings.max_bytes is not None:
        raise UsageError("--max-size needs --backend ftrace")
    with Ending(settings.duration_s) as ending, Target(settings.target) as target:
        session = Session.create(settings, target, user_probes)
        try:
            return session.run(ending)
        except BaseException:
            session.spool.discard()
            raise
        finally:
            session.close()


@dataclass
class Session:
    """One recording: programs, rings, spool and what is to be said about it."""

    settings: RecordSettings
    target: Target
    plan: Plan
    rings: Rings
    programs: Programs
    spool: Spool
    writer: CaptureWriter
    meta: dict[str, Any]
    threads: Threads
    presence: KvmPresence
    n_vcpus: int | None = None
    unkept: Unkept = field(default_factory=Unkept)

    @classmethod
    def create(cls, settings: RecordSettings, target: Target, user_probes: tuple[UserProbe, ...] = ()) -> Session:
        """Compile and load; nothing is attached yet."""
        targeted = settings.target.kind != "all"
        require_bpf()
        plan = make_plan(
            find_tracefs(write=False),
            settings.event_set,
            target.pid,
            targeted=targeted,
            filters=settings.filters,
            user_probes=user_probes,
        )
        n_cpus = os.sysconf("SC_NPROCESSORS_CONF")
        affordable = min(MOST_RING_BYTES, buffer_bytes(settings.buffer_bytes, n_cpus))
        size = round_ring_size(affordable if affordable == settings.buffer_bytes else affordable // 2 + 1)
        smaller = say_smaller(settings.buffer_bytes, size, n_cpus)
        rings = Rings(size, len(plan.events))
        try:
            programs = Programs(plan, rings)
        except BaseException:
            rings.close()
            raise
        spool = Spool.create(settings.output)
        meta = first_metadata(
            settings,
            target,
            backend="bpf",
            clock=CLOCK,
            missing_events=list(plan.missing),
            notes=[*notes(plan), *([smaller] if smaller else [])],
            filters=describe_filters(settings.filters) | plan.conditions,
            buffer_bytes=size,
        )
        return cls(
            settings=settings,
            target=target,
            plan=plan,
            rings=rings,
            programs=programs,
            spool=spool,
            writer=CaptureWriter(spool.open_new("out")),
            meta=meta,
            threads=Threads(target.pid, argv=settings.target.command),
            presence=KvmPresence({i for i, event in enumerate(plan.events) if is_of_kvm(event.system, event.name)}),
        )

    def run(self, ending: Ending) -> RecordResult:
        """Attach, record until it ends, finish the file."""
        self._attach()
        self.threads.look(force=True)
        self.meta["vms"] = self.threads.vms.as_meta()
        self.writer.write_header(encode_header(self.meta, self._kinds(), self.rings.n_cpus))
        self.spool.save({"state": "complete", "backend": "bpf"})
        cpu_before = time.process_time()
        started_ns = time.monotonic_ns()
        ending.start()
        self.rings.switch(on=True)
        self.target.release()
        ended_by = self._pump(ending)
        duration_ns = time.monotonic_ns() - started_ns
        self.rings.switch(on=False)
        self.threads.look(force=True)
        self.n_vcpus = vcpus_of(self.target.pid)
        self.target.close()
        if ended_by != "disk full":
            ended_by = self._move(ended_by)
        cpu_s = time.process_time() - cpu_before
        self._finish(ended_by, duration_ns, cpu_s)
        return self._publish(cpu_s)

    def close(self) -> None:
        """Free what the kernel holds for us."""
        with closing_elsewhere():
            self.programs.close()
            self.rings.close()

    def _attach(self) -> None:
        self.programs.follow()
        self.programs.add_tids(self._tids())
        self.programs.attach()
        self.programs.add_tids(self._tids())
        attached, lacking = self.programs.attached.how, self.programs.unattached
        self.meta["events"] = [f"{e.system}:{e.name}" for e in self.plan.events if e.name in attached]
        self.meta["missing_events"] += [f"kvmtrace:{name}" for name in lacking]
        self.meta["probes"] = [
            {"event": e.name, "function": e.probe[0], "how": attached[e.name]}
            for e in self.plan.events
            if e.probe and e.name in attached
        ]
        self.meta["attached"] = self.programs.attached.by_mechanism()

    def _tids(self) -> list[int]:
        thread = self.settings.filters.get("thread")
        return self.target.tids() if thread is None else [thread]

    def _kinds(self) -> list[tuple[str, str, str]]:
        return [(event.name, event.system, event.format_text) for event in self.plan.events]

    def _pump(self, ending: Ending) -> str:
        """Move spans until the recording ends; return why it ended."""
        control, everything = self._polls(ending)
        next_counters = time.monotonic() + COUNTERS_S
        try:
            while True:
                ended_by = ending.reason(self.target)
                if ended_by is not None:
                    return ended_by
                moved = self._move_once()
                self.threads.look()
                if time.monotonic() > next_counters:
                    self.writer.write_meta({"loss": self._loss(), "n_events": self.rings.counters()["recorded"]})
                    next_counters = time.monotonic() + COUNTERS_S
                remaining = ending.remaining_s()
                if moved > BUSY_BYTES:
                    control.poll(BUSY_S)
                else:
                    everything.poll(IDLE_S if remaining is None else min(IDLE_S, remaining))
        except OSError as error:
            if not is_full(error):
                raise
            return "disk full"

    def _polls(self, ending: Ending) -> tuple[select.epoll, select.epoll]:
        """Return what waits for the end, and what waits for the end or a ring that fills up."""
        polls = select.epoll(), select.epoll()
        for poll in polls:
            for fd in (ending.fd, self.target.pidfd):
                if fd is not None:
                    poll.register(fd, select.EPOLLIN)
        for ring in self.rings.rings:  # edge-triggered: a ring that merely holds something wakes nobody
            polls[1].register(ring.map.fd, select.EPOLLIN | select.EPOLLET)
        return polls

    def _move_once(self) -> int:
        """Move what is finished; return how many bytes."""
        ends = self.rings.produced()
        if all(end == ring.position for end, ring in zip(ends, self.rings.rings, strict=True)):
            return 0
        synchronize_rcu()
        return self.rings.drain(ends, self._write_span)

    def _write_span(self, cpu: int, position: int, span: memoryview) -> None:
        self.writer.write_span(cpu, position, span)
        self.presence.look(span)

    def _move(self, ended_by: str) -> str:
        """Move the rest; return why the recording ended."""
        synchronize_rcu()
        try:
            self._move_once()
        except OSError as error:
            if not is_full(error):
                raise
            return "disk full"
        return ended_by

    def _loss(self) -> dict[str, Any]:
        """Return the metadata's `loss`: per CPU and per event."""
        names = [event.name for event in self.plan.events]
        by_cpu = self.rings.lost_by_cpu()
        by_event = {str(cpu): {names[kind]: count for kind, count in kinds.items()} for cpu, kinds in by_cpu.items()}
        missed = {name: n for name, n in self.programs.attached.misses().items() if name in names}
        for cpu, counts in self.unkept.by_cpu.items():
            by_event[str(cpu)] = dict(
                Counter(by_event.get(str(cpu), {})) + Counter({names[kind]: count for kind, count in counts.items()})
            )
        by_event = {cpu: kinds for cpu, kinds in by_event.items() if kinds}
        total = sum(sum(kinds.values()) for kinds in by_event.values()) + sum(missed.values())
        loss: dict[str, Any] = {
            "by_cpu": {cpu: sum(kinds.values()) for cpu, kinds in by_event.items()},
            "by_cpu_and_event": by_event,
            "events": total,
        }
        if missed:  # in an interrupt, while a program was running on that CPU: the kernel does not say where
            loss["missed_in_interrupts"] = missed
        return loss

    def _finish(self, ended_by: str, duration_ns: int, cpu_s: float) -> None:
        """Write the last metadata."""
        self.meta |= {
            "duration_ns": duration_ns,
            "guest_run": self.target.guest_run,
            "target_status": self.target.status,
            "ended_by": ended_by,
            "recorder_cpu_ns": int(cpu_s * 1e9),
            "threads": self.threads.as_meta(),
            "vms": self.threads.vms.as_meta(),
        }
        if self.settings.filters.keys() & set(FILTERS):
            self.meta["filtered_events"] = self.rings.counters()["filtered"]
        if ended_by == "disk full":
            synchronize_rcu()
            self.spool.release_reserve()
            self.unkept.add_rings(self.rings)
        while True:
            try:
                self.unkept.discard_newer(self.writer)
                self.writer.write_meta(self._last_meta())
            except OSError as error:
                if not is_full(error) or not (self.spool.release_reserve() or self.unkept.cut_frame(self.writer)):
                    raise
                self.meta["ended_by"] = "disk full"
            else:
                return

    def _last_meta(self) -> dict[str, Any]:
        """Return the metadata with all counts."""
        self.meta |= {"loss": self._loss(), "n_events": self.rings.counters()["recorded"] - self.unkept.total}
        self.meta["kvm_seen"] = self.presence.seen
        if self.presence.seen is False and not any(note.startswith(BEGINNING) for note in self.meta["notes"]):
            self.meta["notes"].append(say_nothing(self.settings, self.meta, self.n_vcpus))
        if self.unkept.total:
            others = [note for note in self.meta["notes"] if not note.endswith(DISK_WAS_FULL)]
            self.meta["notes"] = [*others, f"{self.unkept.total} {DISK_WAS_FULL}"]
            self.meta["complete_until_ns"] = self.unkept.from_ns
        return self.meta

    def _publish(self, cpu_s: float) -> RecordResult:
        os.close(self.writer.fd)
        try:
            path = self.spool.publish("out", self.settings.output.name)
        except OSError as error:
            problem = self.spool.why_unpublished(error)
            self.spool.close()
            raise problem from error
        self.spool.discard()
        return RecordResult(
            path=path,
            meta=self.meta,
            n_events=self.meta["n_events"],
            file_bytes=path.stat().st_size,
            recorder_cpu_s=cpu_s,
        )


def notes(plan: Plan) -> list[str]:
    """Say what this kind of recording cannot show."""
    texts = ["whether interrupts were off is not recorded: BPF programs cannot see it"]
    if plan.preempt_count is None:
        texts.append("the preemption depth is not recorded: this kernel does not show it to BPF programs")
    if plan.filters.keys() & set(FILTERS) and not {"kvm_exit", "kvm_entry"} <= {event.name for event in plan.events}:
        texts.append("the filters on VM-exits do nothing: kvm_exit or kvm_entry is not recorded")
    return texts
