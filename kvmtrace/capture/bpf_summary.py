"""--summary and top: counts, times and histograms that grow in BPF maps; no event leaves the kernel.

The maps' layout is struct thread and struct cell of tracers/summary.c. The file is one JSON object,
"kvmtrace.summary/1"; kvmtrace/decode/summary.py reads it and describes it.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.capture import bpf_arguments, bpf_events
from kvmtrace.capture.bpf_attach import Attachments
from kvmtrace.capture.bpf_compile import compile_cached, relocate
from kvmtrace.capture.bpf_detach import closing_elsewhere
from kvmtrace.capture.bpf_program import PLACEHOLDERS
from kvmtrace.capture.bpf_syscall import MAP_TYPE_ARRAY, MAP_TYPE_HASH, MAP_TYPE_QUEUE, BpfMap, create_map
from kvmtrace.capture.bpf_types import kernel_types
from kvmtrace.capture.ending import Ending
from kvmtrace.capture.host import host_facts
from kvmtrace.capture.settings import META_SCHEMA, RecordResult, RecordSettings
from kvmtrace.capture.spool import Spool
from kvmtrace.capture.target import Target, invoking_user
from kvmtrace.capture.threads import Threads
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.errors import CapabilityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.capture.bpf_events import TracedEvent

SCHEMA = "kvmtrace.summary/1"
MAX_THREADS = 256
MAX_OTHERS = 4096
PHASES = ("unknown", "guest", "kernel", "userspace", "blocked", "preempted")
N_PHASES, N_BUCKETS, N_EXITS, N_USERSPACE = 8, 32, 256, 64
FIRST_NPF, SVM_NPF = 0xb0, 0x400
CELL_INTERRUPTED, CELL_ERROR = 62, 63
CELL = struct.Struct(f"<4Q{N_BUCKETS}I")
HEAD = struct.Struct(f"<5Q{N_PHASES}QQ8I16s")
THREAD_BYTES = HEAD.size + CELL.size * (1 + N_EXITS + N_USERSPACE)
NO_SLOT = struct.pack("<I", 0xffffffff)  # of MAP_HERE: who runs there has no entry
EVENTS = (("sched", "sched_switch"), ("kvm", "kvm_exit"), ("kvm", "kvm_entry"), ("kvm", "kvm_userspace_exit"),
          ("kvm", "kvm_fpu"))  # attached in this order
# macro -> (event, field)
OFFSETS = {"EXIT_REASON_OFFSET": ("kvm_exit", "exit_reason"), "EXIT_ISA_OFFSET": ("kvm_exit", "isa"),
           "EXIT_VCPU_OFFSET": ("kvm_exit", "vcpu_id"), "USERSPACE_REASON_OFFSET": ("kvm_userspace_exit", "reason"),
           "USERSPACE_ERRNO_OFFSET": ("kvm_userspace_exit", "errno"), "FPU_LOAD_OFFSET": ("kvm_fpu", "load"),
           "NEXT_PID_OFFSET": ("sched_switch", "next_pid"), "PREV_STATE_OFFSET": ("sched_switch", "prev_state")}


class SummaryPrograms:
    """The attached programs of summary.c and their maps.

    Parameters
    ----------
    tgid : int or None, the target's process; None is the whole machine
    raw : bool, use raw and BTF tracepoints where the kernel allows them

    Raises
    ------
    CapabilityError
        bcc, privileges or KVM's tracepoints are missing.
    """

    def __init__(self, tgid: int | None, *, raw: bool = True) -> None:
        tracefs = find_tracefs()
        self.raw = raw
        found = [bpf_events.read_tracepoint(tracefs, system, name) for system, name in EVENTS]
        self.events = [event for event in found if event is not None]
        if not any(event.name == "kvm_userspace_exit" for event in self.events):
            raise CapabilityError("this kernel has no KVM tracepoints", "modprobe kvm_intel or kvm_amd")
        self.threads = create_map("kvmtrace_thread", MAP_TYPE_ARRAY, 4, THREAD_BYTES, MAX_THREADS)
        self.slots = create_map("kvmtrace_slots", MAP_TYPE_HASH, 4, 4, MAX_THREADS)
        self.free = create_map("kvmtrace_free", MAP_TYPE_QUEUE, 0, 4, MAX_THREADS)
        self.here = create_map("kvmtrace_here", MAP_TYPE_ARRAY, 4, 4, os.sysconf("SC_NPROCESSORS_CONF"))
        self.others = create_map("kvmtrace_others", MAP_TYPE_HASH, 8, CELL.size, MAX_OTHERS)
        self.tids = create_map("kvmtrace_tids", MAP_TYPE_HASH, 4, 4, 16384)
        self.follow = {f: e for f, e in ((f, bpf_events.read_tracepoint(tracefs, "sched", name)) for f, name in (
            ("follow_fork", "sched_process_fork"), ("follow_free", "sched_process_free")))
            if e is not None and tgid is not None}
        self.attached = Attachments()
        values = {PLACEHOLDERS[name]: table.fd for name, table in self._maps().items()}
        values[PLACEHOLDERS["TARGET_TGID"]] = tgid or 0
        self.code = relocate(compile_cached(self._source(targeted=tgid is not None)), values)

    def attach(self, tids: Iterable[int] = ()) -> None:
        """Attach all programs; `tids` are threads of the target."""
        for function, event in self.follow.items():
            self.attached.tracepoint(event, self.code[function], function)
        self.add_tids(tids)
        for cpu in range(os.sysconf("SC_NPROCESSORS_CONF")):
            self.here.update(struct.pack("<I", cpu), NO_SLOT)
        for event in self.events:
            if f"on_{event.name}" in self.code and not self._attach_raw(event):
                self.attached.tracepoint(event, self.code[f"on_{event.name}"])
        for slot in range(MAX_THREADS):  # from now on threads get their entries
            self.free.push(struct.pack("<I", slot))

    def _attach_raw(self, event: TracedEvent) -> bool:
        """Hang the event's program on the tracepoint's arguments; False if that needs the plain tracepoint."""
        code = self.code.get(f"raw_{event.name}")
        if code is None or not self.raw:
            return False
        if event.name == "sched_switch":
            place = kernel_types().tracepoint_type(event.name)
            return place is not None and self.attached.btf_tracepoint(event, code, place)
        return self.attached.raw_tracepoint(event, code)

    def add_tids(self, tids: Iterable[int]) -> None:
        """Count threads among the target's."""
        for tid in tids:
            self.tids.update(struct.pack("<I", tid), struct.pack("<I", 1))

    def snapshot(self, now: int) -> list[dict[str, Any]]:
        """Return what the maps hold at `now` (monotonic ns): one row per vCPU thread, see decode/summary.py."""
        others = self._others()
        rows = []
        for key in self.slots.keys():  # noqa: SIM118 (a map, not a dict)
            slot = self.slots.lookup(key)
            value = slot and self.threads.lookup(slot)
            if value:
                tid = struct.unpack("<I", key)[0]
                rows.append(decode_thread(tid, value, others.get(tid, []), now))
        return sorted(rows, key=lambda row: (row["pid"], row["tid"]))

    def close(self) -> None:
        """Detach and free everything."""
        self.attached.close()
        for table in self._maps().values():
            table.close()

    def _others(self) -> dict[int, list[tuple[int, bytes]]]:
        found: dict[int, list[tuple[int, bytes]]] = {}
        for key in self.others.keys():  # noqa: SIM118 (a map, not a dict)
            tid, code = struct.unpack("<II", key)
            value = self.others.lookup(key)
            if value is not None:
                found.setdefault(tid, []).append((code, value))
        return found

    def _maps(self) -> dict[str, BpfMap]:
        return {"MAP_THREADS": self.threads, "MAP_SLOTS": self.slots, "MAP_FREE": self.free, "MAP_HERE": self.here,
                "MAP_OTHERS": self.others, "MAP_TIDS": self.tids}

    def _source(self, *, targeted: bool) -> str:
        defines = {name: str(PLACEHOLDERS[name]) for name in self._maps()}
        if targeted:
            defines |= {"TARGETED": "1", "TARGET_TGID": str(PLACEHOLDERS["TARGET_TGID"])}
        fields = {event.name: event.fields for event in self.events}
        for macro, (event, name) in OFFSETS.items():
            if name in fields.get(event, {}):
                defines[macro] = str(fields[event][name][0])
        if self.raw:
            defines |= bpf_arguments.summary_macros(kernel_types())
        files = ["target.h", "summary.c"]
        if self.follow:
            files.append("follow.c")
            defines["CHILD_PID_OFFSET"] = str(self.follow["follow_fork"].fields["child_pid"][0])
            defines["FREED_PID_OFFSET"] = str(self.follow["follow_free"].fields["pid"][0])
        return bpf_events.build_source(defines, files, [])


def decode_cell(value: bytes, offset: int = 0) -> dict[str, Any] | None:
    """Return a cell as a row, None if it never happened."""
    numbers = CELL.unpack_from(value, offset)
    if not numbers[0] and not numbers[1]:
        return None
    return {"count": numbers[0], "samples": numbers[1], "total_ns": numbers[2], "max_ns": numbers[3],
            "buckets": list(numbers[4:])}


def decode_thread(tid: int, value: bytes, others: list[tuple[int, bytes]], now_ns: int) -> dict[str, Any]:
    """Return a struct thread as a row; the phase under way counts up to `now_ns`."""
    since_ns, first_ns, _, _, _, *rest = HEAD.unpack_from(value)
    phase_ns, rest = rest[:N_PHASES], rest[N_PHASES:]
    n_switches, pid, vcpu_id, isa, phase, _, _, _, _, comm = rest
    if now_ns > since_ns and phase < len(PHASES):
        phase_ns[phase] += now_ns - since_ns
    phase_ns = phase_ns[:len(PHASES)]  # what follows is the time since a thread ended
    exits = [{"exit_reason": _exit_reason(i), **cell} for i in range(N_EXITS)
             if (cell := decode_cell(value, HEAD.size + CELL.size * (1 + i)))]
    exits += [{"exit_reason": code, **cell} for code, data in others if (cell := decode_cell(data))]
    base = HEAD.size + CELL.size * (1 + N_EXITS)
    userspace = [{"reason": i if i < CELL_INTERRUPTED else None,
                  "error": {CELL_INTERRUPTED: "EINTR", CELL_ERROR: "other"}.get(i), **cell}
                 for i in range(N_USERSPACE) if (cell := decode_cell(value, base + CELL.size * i))]
    name = comm.partition(b"\0")[0].decode("utf-8", "replace")
    return {"tid": tid, "pid": pid, "comm": name, "vcpu_id": None if vcpu_id == 0xffffffff else vcpu_id,
            "isa": {1: "vmx", 2: "svm"}.get(isa), "first_ns": first_ns, "wall_ns": sum(phase_ns),
            "time_ns": dict(zip(PHASES, phase_ns, strict=True)), "n_switches": n_switches,
            "guest": decode_cell(value, HEAD.size), "exits": exits, "userspace_exits": userspace}


def _exit_reason(cell: int) -> int:
    return cell if cell < FIRST_NPF else cell - FIRST_NPF + SVM_NPF


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
            return _summarise(settings, programs, spool, ending, target)
        except BaseException:
            spool.discard()
            raise
        finally:
            with closing_elsewhere():
                programs.close()


def _summarise(settings: RecordSettings, programs: SummaryPrograms, spool: Spool, ending: Ending,
               target: Target) -> RecordResult:
    programs.attach(target.tids())
    programs.add_tids(target.tids())
    threads = Threads(target.pid)
    spool.save({"state": "complete", "backend": "bpf", "owner": invoking_user()})
    started, started_ns = datetime.now(UTC).isoformat(), time.monotonic_ns()
    cpu_before = time.process_time()
    ending.start()
    target.release()
    ended_by = _wait(ending, target, threads)
    ended_ns = time.monotonic_ns()
    duration_ns = ended_ns - started_ns
    rows = programs.snapshot(ended_ns)
    target.close()
    spec = settings.target
    meta = {"schema": META_SCHEMA, "kvmtrace": __version__, "command": list(settings.argv), **host_facts(),
            "backend": "bpf", "clock": "mono", "event_set": "summary",
            "events": [f"{e.system}:{e.name}" for e in programs.events], "missing_events": [], "probes": [],
            "target": {"kind": spec.kind, "pids": [] if target.pid is None else [target.pid], "guest": spec.guest,
                       "guest_arguments": list(spec.guest_arguments), "command": list(spec.command)},
            "guest_run": target.guest_run, "loss": {"by_cpu": {}, "events": 0}, "started": started,
            "duration_ns": duration_ns, "filters": {}, "cost_ns_per_event": None, "notes": summary_notes(rows),
            "ended_by": ended_by, "target_status": target.status, "n_events": None,
            "attached": programs.attached.by_mechanism()}
    for row in rows:  # threads often get their name after their first event
        row["comm"] = threads.known.get(row["tid"], (-1, row["comm"]))[1]
    text = json.dumps({"schema": SCHEMA, "meta": meta, "vcpus": rows}, separators=(",", ":")).encode() + b"\n"
    spool.write_file("out", text)
    spool.publish("out", settings.output.name, invoking_user())
    spool.discard()
    cpu_s = time.process_time() - cpu_before
    return RecordResult(settings.output, meta, None, count_by_kind(rows), len(text), ended_by, target.status, cpu_s)


def count_by_kind(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many VM-entries, VM-exits and userspace exits a summary counted."""
    return {"kvm_entry": sum(row["guest"]["count"] for row in rows if row["guest"]),
            "kvm_exit": sum(cell["count"] for row in rows for cell in row["exits"]),
            "kvm_userspace_exit": sum(cell["count"] for row in rows for cell in row["userspace_exits"])}


def summary_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Say what this summary cannot show."""
    notes = []
    if rows and not any(row["exits"] for row in rows):
        notes.append("no VM-exit was seen (this KVM has no kvm_entry/kvm_exit): time in KVM_RUN is guest and kernel "
                     "together")
    if len(rows) >= MAX_THREADS:
        notes.append(f"only the first {MAX_THREADS} vCPU threads were counted")
    return notes


def _wait(ending: Ending, target: Target, threads: Threads) -> str:
    poll = select.poll()
    for fd in (ending.fd, target.pidfd):
        if fd is not None:
            poll.register(fd, select.POLLIN)
    while True:
        ended_by = ending.reason(target)
        if ended_by is not None:
            return ended_by
        threads.look()
        remaining = ending.remaining_s()
        poll.poll(1000 * (0.25 if remaining is None else min(0.25, remaining)))


