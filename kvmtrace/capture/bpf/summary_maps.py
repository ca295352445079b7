"""--summary and top: counts, times and histograms that grow in BPF maps; no event leaves the kernel.

The maps' layout is struct thread and struct cell of tracers/summary.h.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.bpf import arguments as bpf_arguments
from kvmtrace.capture.bpf import event_programs as bpf_events
from kvmtrace.capture.bpf.attach import Attachments
from kvmtrace.capture.bpf.bpf_syscall import MAP_TYPE_ARRAY, MAP_TYPE_HASH, MAP_TYPE_QUEUE, BpfMap, create_map
from kvmtrace.capture.bpf.btf_types import kernel_types
from kvmtrace.capture.bpf.compiler import compile_cached, relocate
from kvmtrace.capture.bpf.program import PLACEHOLDERS
from kvmtrace.capture.capabilities import require_bpf
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.errors import CapabilityError
from kvmtrace.isa.registry import isa_name, untraced
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.capture.bpf.event_programs import TracedEvent

MAX_THREADS = 256
MAX_OTHERS = 4096
PHASES = ("unknown", "guest", "kernel", "userspace", "blocked", "preempted")
N_PHASES, N_BUCKETS, N_EXITS, N_USERSPACE = 8, 32, 256, 64
FIRST_NPF, SVM_NPF = 0xB0, 0x400
CELL_INTERRUPTED, CELL_ERROR = 62, 63
CELL = struct.Struct(f"<4Q{N_BUCKETS}I")
HEAD = struct.Struct(f"<5Q{N_PHASES}QQ10I16s")
THREAD_BYTES = HEAD.size + CELL.size * (1 + N_EXITS + N_USERSPACE)
NEVER = bytes(16)  # count and samples of a cell
NO_SLOT = struct.pack("<I", 0xFFFFFFFF)  # of MAP_HERE: who runs there has no entry
EVENTS = (
    ("sched", "sched_switch"),
    ("kvm", "kvm_exit"),
    ("kvm", "kvm_entry"),
    ("kvm", "kvm_userspace_exit"),
    ("kvm", "kvm_fpu"),
)  # attached in this order
# macro -> (event, field)
OFFSETS = {
    "EXIT_VCPU_OFFSET": ("kvm_exit", "vcpu_id"),
    "USERSPACE_REASON_OFFSET": ("kvm_userspace_exit", "reason"),
    "USERSPACE_ERRNO_OFFSET": ("kvm_userspace_exit", "errno"),
    "FPU_LOAD_OFFSET": ("kvm_fpu", "load"),
    "NEXT_PID_OFFSET": ("sched_switch", "next_pid"),
    "PREV_STATE_OFFSET": ("sched_switch", "prev_state"),
    "WAKEUP_PID_OFFSET": ("sched_wakeup", "pid"),
}


WAKEUP = ("sched", "sched_wakeup")
MAX_ALARMS = 1024
WAITED_BYTES = 16  # of struct thread, where there are alarms
ALARM = struct.Struct("<3Q6I")
ALARM_EXIT, ALARM_USERSPACE, ALARM_RUN_DELAY = 1, 2, 3


@dataclass(frozen=True)
class AlarmLimits:
    """Told at once: exits that take so long, waits and preemptions left out; vCPUs waiting so long for a CPU."""

    slow_ns: int | None = None
    run_delay_ns: int | None = None


@dataclass(frozen=True)
class Alarm:
    """A limit was exceeded; struct alarm of tracers/summary.h."""

    ts_ns: int
    ns: int
    waited_ns: int
    tid: int
    pid: int
    vcpu: int
    kind: int
    code: int
    isa: int

    @property
    def vcpu_id(self) -> int | None:
        """Number of the vCPU, None where no VM-exit has told it."""
        return None if self.vcpu == 0xFFFFFFFF else self.vcpu

    @property
    def began_ns(self) -> int:
        """When what took so long began."""
        return self.ts_ns - self.ns - self.waited_ns


class SummaryPrograms:
    """The attached programs of summary.c and their maps.

    Parameters
    ----------
    tgid : int or None, the target's process; None is the whole machine
    raw : bool, use raw and BTF tracepoints where the kernel allows them
    max_threads : vCPU threads that can be counted at once, 50 KB of kernel memory each
    limits : what is told at once when it is exceeded, None for nothing

    Raises
    ------
    CapabilityError
        bcc, privileges or KVM's tracepoints are missing.
    """

    def __init__(
        self, tgid: int | None, *, raw: bool = True, max_threads: int = MAX_THREADS, limits: AlarmLimits | None = None
    ) -> None:
        require_bpf()
        tracefs = find_tracefs(write=False)
        self.raw = raw
        self.limits = limits
        wanted = EVENTS if limits is None or limits.run_delay_ns is None else (*EVENTS, WAKEUP)
        found = [bpf_events.read_tracepoint(tracefs, system, name) for system, name in wanted]
        self.events = [event for event in found if event is not None]
        if not any(event.name == "kvm_userspace_exit" for event in self.events):
            raise CapabilityError("this kernel has no KVM tracepoints", "modprobe kvm_intel or kvm_amd")
        self.max_threads = max_threads
        entry_bytes = THREAD_BYTES + (WAITED_BYTES if limits else 0)
        self.alarms = create_map("kvmtrace_alarms", MAP_TYPE_QUEUE, 0, ALARM.size, MAX_ALARMS if limits else 1)
        self.threads = create_map("kvmtrace_thread", MAP_TYPE_ARRAY, 4, entry_bytes, max_threads)
        self.slots = create_map("kvmtrace_slots", MAP_TYPE_HASH, 4, 4, max_threads)
        self.free = create_map("kvmtrace_free", MAP_TYPE_QUEUE, 0, 4, max_threads)
        self.here = create_map("kvmtrace_here", MAP_TYPE_ARRAY, 4, 4, os.sysconf("SC_NPROCESSORS_CONF"))
        self.others = create_map("kvmtrace_others", MAP_TYPE_HASH, 8, CELL.size, MAX_OTHERS)
        self.tids = create_map("kvmtrace_tids", MAP_TYPE_HASH, 4, 4, 16384)
        self.follow = {
            f: e
            for f, e in (
                (f, bpf_events.read_tracepoint(tracefs, "sched", name))
                for f, name in (("follow_fork", "sched_process_fork"), ("follow_free", "sched_process_free"))
            )
            if e is not None and tgid is not None
        }
        self.attached = Attachments()
        self.tgid = tgid
        self.code = self._compile(raw_switch=True)

    def attach(self, tids: Iterable[int] = ()) -> None:
        """Attach all programs; `tids` are threads of the target."""
        for function, event in self.follow.items():
            self.attached.tracepoint(event, self.code[function], function)
        self.add_tids(tids)
        for cpu in range(os.sysconf("SC_NPROCESSORS_CONF")):
            self.here.update(struct.pack("<I", cpu), NO_SLOT)
        for event in self.events:
            if f"on_{event.name}" not in self.code or self._attach_raw(event):
                continue
            if event.name == "sched_switch":
                self.code = self._compile(raw_switch=False)
            self.attached.tracepoint(event, self.code[f"on_{event.name}"])
        for slot in range(self.max_threads):  # from now on threads get their entries
            self.free.push(struct.pack("<I", slot))

    def _attach_raw(self, event: TracedEvent) -> bool:
        """Hang the event's program on the tracepoint's arguments; False if that needs the plain tracepoint."""
        code = self.code.get(f"raw_{event.name}")
        if code is None or not self.raw:
            return False
        if event.name in ("sched_switch", "sched_wakeup"):
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

    def forget(self, tid: int) -> None:
        """Free the entry of a thread that has ended: what it counted is gone, and another thread can be counted."""
        key = struct.pack("<I", tid)
        slot = self.slots.lookup(key)
        if slot is None:
            return
        self.slots.delete(key)
        for other in self.others.keys():  # noqa: SIM118 (a map, not a dict)
            if other[:4] == key:
                self.others.delete(other)
        self.threads.update(slot, bytes(self.threads.value_bytes))
        self.free.push(slot)

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

    def take_alarms(self) -> list[Alarm]:
        """Return what has exceeded the limits since the last call, at most MAX_ALARMS."""
        found: list[Alarm] = []
        while len(found) < MAX_ALARMS and (value := self.alarms.pop()) is not None:
            found.append(Alarm(*ALARM.unpack(value)))
        return found

    def _maps(self) -> dict[str, BpfMap]:
        return {
            "MAP_THREADS": self.threads,
            "MAP_SLOTS": self.slots,
            "MAP_FREE": self.free,
            "MAP_HERE": self.here,
            "MAP_OTHERS": self.others,
            "MAP_TIDS": self.tids,
            "MAP_ALARMS": self.alarms,
        }

    def _compile(self, *, raw_switch: bool) -> dict[str, bytes]:
        """Return the programs; without a raw sched_switch, which is never missed, they check whose entry they use."""
        macros = bpf_arguments.summary_macros(kernel_types()) if self.raw else {}
        if not raw_switch or "SWITCH_NEXT_ARG" not in macros:
            macros = {name: value for name, value in macros.items() if not name.startswith("SWITCH_")}
            macros["CHECK_TID"] = "1"
        values = {PLACEHOLDERS[name]: table.fd for name, table in self._maps().items()}
        values[PLACEHOLDERS["TARGET_TGID"]] = self.tgid or 0
        return relocate(compile_cached(self._source(macros, targeted=self.tgid is not None)), values)

    def _source(self, macros: dict[str, str], *, targeted: bool) -> str:
        defines = {name: str(PLACEHOLDERS[name]) for name in self._maps() if name != "MAP_ALARMS"}
        if self.limits is not None:
            defines["MAP_ALARMS"] = str(PLACEHOLDERS["MAP_ALARMS"])
            defines["SLOW_NS"] = f"{self.limits.slow_ns if self.limits.slow_ns is not None else (1 << 63) - 1}ULL"
            if self.limits.run_delay_ns is not None:
                defines["RUN_DELAY_NS"] = f"{self.limits.run_delay_ns}ULL"
        if targeted:
            defines |= {"TARGETED": "1", "TARGET_TGID": str(PLACEHOLDERS["TARGET_TGID"])}
        fields = {event.name: event.fields for event in self.events}
        for leaving in (event for event in self.events if event.name == "kvm_exit"):
            defines |= bpf_events.exit_macros(leaving)
        if "kvm_fpu" in untraced(fields.get("kvm_exit")):
            defines["KVM_RUN_UNSEEN"] = "1"
        for macro, (kind, name) in OFFSETS.items():
            if name in fields.get(kind, {}):
                defines[macro] = str(fields[kind][name][0])
        defines |= macros
        files = ["target.h", "summary.h", "summary.c"]
        if self.follow:
            files.append("follow.c")
            defines["CHILD_PID_OFFSET"] = str(self.follow["follow_fork"].fields["child_pid"][0])
            defines["FREED_PID_OFFSET"] = str(self.follow["follow_free"].fields["pid"][0])
        return bpf_events.build_source(defines, files, [])


def decode_cell(value: bytes, offset: int = 0) -> dict[str, Any] | None:
    """Return a cell as a row, None if it never happened."""
    if value[offset : offset + len(NEVER)] == NEVER:  # most of them: not worth unpacking
        return None
    numbers = CELL.unpack_from(value, offset)
    return {
        "count": numbers[0],
        "samples": numbers[1],
        "total_ns": numbers[2],
        "max_ns": numbers[3],
        "buckets": list(numbers[4:]),
    }


def decode_thread(tid: int, value: bytes, others: list[tuple[int, bytes]], now_ns: int) -> dict[str, Any]:
    """Return a struct thread as a row; the phase under way counts up to `now_ns`."""
    since_ns, first_ns, _, _, _, *rest = HEAD.unpack_from(value)
    phase_ns, rest = rest[:N_PHASES], rest[N_PHASES:]
    n_switches, pid, vcpu_id, isa, phase, *_, comm = rest
    if now_ns > since_ns and phase < len(PHASES):
        phase_ns[phase] += now_ns - since_ns
    phase_ns = phase_ns[: len(PHASES)]  # what follows is the time since a thread ended
    exits = [
        {"exit_reason": _exit_reason(i), **cell}
        for i in range(N_EXITS)
        if (cell := decode_cell(value, HEAD.size + CELL.size * (1 + i)))
    ]
    exits += [{"exit_reason": code, **cell} for code, data in others if (cell := decode_cell(data))]
    base = HEAD.size + CELL.size * (1 + N_EXITS)
    userspace = [
        {
            "reason": i if i < CELL_INTERRUPTED else None,
            "error": {CELL_INTERRUPTED: "EINTR", CELL_ERROR: "other"}.get(i),
            **cell,
        }
        for i in range(N_USERSPACE)
        if (cell := decode_cell(value, base + CELL.size * i))
    ]
    name = comm.partition(b"\0")[0].decode("utf-8", "replace")
    return {
        "tid": tid,
        "pid": pid,
        "comm": name,
        "vcpu_id": None if vcpu_id == 0xFFFFFFFF else vcpu_id,
        "isa": isa_name(isa),
        "first_ns": first_ns,
        "wall_ns": sum(phase_ns),
        "time_ns": dict(zip(PHASES, phase_ns, strict=True)),
        "n_switches": n_switches,
        "guest": decode_cell(value, HEAD.size),
        "exits": exits,
        "userspace_exits": userspace,
    }


def _exit_reason(cell: int) -> int:
    return cell if cell < FIRST_NPF else cell - FIRST_NPF + SVM_NPF


def count_by_kind(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many VM-entries, VM-exits and userspace exits a summary counted."""
    return {
        "kvm_entry": sum(row["guest"]["count"] for row in rows if row["guest"]),
        "kvm_exit": sum(cell["count"] for row in rows for cell in row["exits"]),
        "kvm_userspace_exit": sum(cell["count"] for row in rows for cell in row["userspace_exits"]),
    }


def summary_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Say what this summary cannot show."""
    notes = []
    if rows and not any(row["exits"] for row in rows):
        notes.append(
            "no VM-exit was seen (this KVM has no kvm_entry/kvm_exit): time in KVM_RUN is guest and kernel together"
        )
    if len(rows) >= MAX_THREADS:
        notes.append(f"only the first {MAX_THREADS} vCPU threads were counted")
    return notes
