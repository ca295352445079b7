"""The monitor: each vCPU thread's automaton is stepped in the kernel; counts and what was forbidden are read from maps.

    monitor = Monitor(monitor_table(), tgid)      # check.monitor_table; tgid None: the whole machine
    monitor.start(tids)
    ...
    monitor.transitions()                         # (state, step) -> how often, so far
    monitor.take_forbidden()                      # what was forbidden since the last call, with the steps before
    monitor.close()

Nothing leaves the kernel but what is asked for. The layout of the maps is tracers/monitor.h.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Protocol

from kvmtrace.capture.bpf import event_programs as bpf_events
from kvmtrace.capture.bpf.attach import Attachments
from kvmtrace.capture.bpf.bpf_syscall import MAP_TYPE_ARRAY, MAP_TYPE_HASH, MAP_TYPE_QUEUE, create_map
from kvmtrace.capture.bpf.compiler import compile_cached, relocate
from kvmtrace.capture.bpf.program import PLACEHOLDERS
from kvmtrace.capture.capabilities import require_bpf
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.errors import CapabilityError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmtrace.capture.bpf.event_programs import TracedEvent

MAX_TIDS = 16384
MAX_THREADS = 4096
MAX_WAITING = 64  # forbidden steps that wait to be taken; later ones are only counted
N_STATES, N_STEPS, N_LAST, FORBIDDEN = 16, 32, 32, 0xFF
HEAD = struct.Struct("<2Q4I")
PAST = struct.Struct("<Q2I")
TRAIL_BYTES = HEAD.size + N_LAST * PAST.size
COUNTS = struct.Struct(f"<{N_STATES * N_STEPS}Q")
ZERO = struct.pack("<I", 0)


class Step(Protocol):
    """One letter of the automaton; kvmtrace.check.monitor_table.MonitorStep."""

    @property
    def number(self) -> int:
        """Column in the table."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def kind(self) -> str:
        """The tracepoint."""

    @property
    def field(self) -> str:
        """What selects among the tracepoint's events, "" for all of them."""

    @property
    def value(self) -> int:
        """The field's value."""


class Table(Protocol):
    """An automaton; kvmtrace.check.monitor_table.MonitorTable."""

    @property
    def states(self) -> tuple[str, ...]:
        """Names, by number."""

    @property
    def steps(self) -> Sequence[Step]:
        """The letters."""

    @property
    def next_states(self) -> bytes:
        """The table, see tracers/monitor.h."""


@dataclass(frozen=True)
class PastStep:
    """A step that a thread took, and the state that it found."""

    ts_ns: int
    step: str
    state: str


@dataclass(frozen=True)
class ForbiddenStep:
    """A step that the model does not allow.

    Parameters
    ----------
    tid, pid : of the vCPU thread
    ts_ns : monotonic
    state, step : the step, and the state that forbids it
    n_steps, n_forbidden : of this thread, so far
    last : PastStep, at most 32, oldest first; the forbidden one is the last
    """

    tid: int
    pid: int
    ts_ns: int
    state: str
    step: str
    n_steps: int
    n_forbidden: int
    last: tuple[PastStep, ...]


class Monitor:
    """The attached programs of monitor.c and their maps.

    Parameters
    ----------
    table : Table
    tgid : int or None, the target's process; None is the whole machine

    Raises
    ------
    CapabilityError
        bcc, privileges, KVM's tracepoints or raw tracepoints are missing.
    """

    def __init__(self, table: Table, tgid: int | None) -> None:
        require_bpf()
        tracefs = find_tracefs(write=False)
        self.table = table
        self.tgid = tgid
        kinds = dict.fromkeys(step.kind for step in table.steps)
        found = [bpf_events.read_tracepoint(tracefs, "kvm", kind) for kind in kinds]
        self.events: list[TracedEvent] = [event for event in found if event is not None]
        if not self.events:
            raise CapabilityError("this kernel has no KVM tracepoints", "modprobe kvm_intel or kvm_amd")
        self.missing = [kind for kind in kinds if kind not in {event.name for event in self.events}]
        names = (("follow_fork", "sched_process_fork"), ("follow_free", "sched_process_free"))
        read = {function: bpf_events.read_tracepoint(tracefs, "sched", name) for function, name in names}
        self.follow = {function: event for function, event in read.items() if event is not None and tgid is not None}
        self.free = read["follow_free"]
        n_cpus = os.sysconf("SC_NPROCESSORS_CONF")
        self.maps = {
            "MAP_TRAILS": create_map("kvmtrace_trails", MAP_TYPE_HASH, 4, TRAIL_BYTES, MAX_THREADS),
            "MAP_FRESH": create_map("kvmtrace_fresh", MAP_TYPE_ARRAY, 4, TRAIL_BYTES, 1),
            "MAP_TABLE": create_map("kvmtrace_table", MAP_TYPE_ARRAY, 4, N_STATES * N_STEPS, 1),
            "MAP_COUNTS": create_map("kvmtrace_counts", MAP_TYPE_ARRAY, 4, COUNTS.size, n_cpus),
            "MAP_BROKEN": create_map("kvmtrace_broken", MAP_TYPE_QUEUE, 0, TRAIL_BYTES, MAX_WAITING),
            "MAP_SWITCH": create_map("kvmtrace_switch", MAP_TYPE_ARRAY, 4, 4, 1),
            "MAP_TIDS": create_map("kvmtrace_tids", MAP_TYPE_HASH, 4, 4, MAX_TIDS),
        }
        self.attached = Attachments()
        self.code = self._compile()

    def start(self, tids: Iterable[int] = ()) -> None:
        """Attach all programs and switch them on; `tids` are threads of the target.

        Raises
        ------
        CapabilityError
            This kernel allows no raw tracepoints: others could be skipped, and a thread be accused for it.
        """
        self.maps["MAP_TABLE"].update(ZERO, self.table.next_states)
        if self.free is not None:
            self.attached.tracepoint(self.free, self.code["forget_thread"], "forget_thread")
        for function, event in self.follow.items():
            self.attached.tracepoint(event, self.code[function], function)
        self.add_tids(tids)
        for event in self.events:
            if not self.attached.raw_tracepoint(event, self.code[f"on_{event.name}"]):
                raise CapabilityError(f"no raw tracepoint on kvm:{event.name}", "use kvmtrace record and check instead")
        self._switch(on=True)

    def stop(self) -> None:
        """Take no further step; what was counted stays."""
        self._switch(on=False)

    def add_tids(self, tids: Iterable[int]) -> None:
        """Count threads among the target's."""
        for tid in tids:
            self.maps["MAP_TIDS"].update(struct.pack("<I", tid), struct.pack("<I", 1))

    def transitions(self) -> dict[tuple[str, str], int]:
        """Return (state, step) -> how often so far, forbidden ones included; only what happened."""
        sums = [0] * (N_STATES * N_STEPS)
        for cpu in range(os.sysconf("SC_NPROCESSORS_CONF")):
            value = self.maps["MAP_COUNTS"].lookup(struct.pack("<I", cpu))
            if value is not None:
                sums = [total + more for total, more in zip(sums, COUNTS.unpack(value), strict=True)]
        names = self._step_names()
        states = self.table.states
        return {(states[place // N_STEPS], names[place % N_STEPS]): count for place, count in enumerate(sums) if count}

    def n_forbidden(self) -> int:
        """Return how many forbidden steps were taken so far, those no longer told included."""
        return sum(self.forbidden().values())

    def forbidden(self) -> dict[tuple[str, str], int]:
        """Return (state, step) -> how often so far, of forbidden steps alone."""
        names = {step.name: step.number for step in self.table.steps}
        numbers = {state: number for number, state in enumerate(self.table.states)}
        return {
            (state, step): count
            for (state, step), count in self.transitions().items()
            if self.table.next_states[numbers[state] * N_STEPS + names[step]] == FORBIDDEN
        }

    def n_threads(self) -> int:
        """Return how many threads have taken a step and not ended."""
        return len(self.maps["MAP_TRAILS"].keys())

    def take_forbidden(self) -> list[ForbiddenStep]:
        """Return the forbidden steps since the last call, at most MAX_WAITING, oldest first."""
        taken = []
        while (value := self.maps["MAP_BROKEN"].pop()) is not None:
            taken.append(self._decode(value))
        return taken

    def close(self) -> None:
        """Detach and free everything."""
        self.attached.close()
        for one in self.maps.values():
            one.close()

    def _switch(self, *, on: bool) -> None:
        self.maps["MAP_SWITCH"].update(ZERO, struct.pack("<I", on))

    def _step_names(self) -> dict[int, str]:
        return {step.number: step.name for step in self.table.steps}

    def _decode(self, value: bytes) -> ForbiddenStep:
        """Read a struct trail whose last step is forbidden."""
        n_steps, n_forbidden, tid, pid, _, _ = HEAD.unpack_from(value)
        names = self._step_names()
        last = []
        for i in range(max(n_steps - N_LAST, 0), n_steps):
            ts_ns, step, before = PAST.unpack_from(value, HEAD.size + i % N_LAST * PAST.size)
            last.append(PastStep(ts_ns, names[step], self.table.states[before]))
        return ForbiddenStep(tid, pid, last[-1].ts_ns, last[-1].state, last[-1].step, n_steps, n_forbidden, tuple(last))

    def _compile(self) -> dict[str, bytes]:
        values = {PLACEHOLDERS[name]: one.fd for name, one in self.maps.items()}
        values[PLACEHOLDERS["TARGET_TGID"]] = self.tgid or 0
        return relocate(compile_cached(monitor_source(self)), values)


def describe_forbidden(one: ForbiddenStep) -> str:
    """Say in a line what was forbidden, with the steps that led to it."""
    before = " -> ".join(past.step for past in one.last[-6:])
    return (
        f"thread {one.tid} of process {one.pid}: {one.step} is not allowed in state {one.state} "
        f"(at {one.ts_ns / 1e9:.9f} s; steps: {before})"
    )


def monitor_source(monitor: Monitor) -> str:
    """Return the C source of the programs."""
    defines = {name: str(PLACEHOLDERS[name]) for name in monitor.maps}
    if monitor.tgid is not None:
        defines |= {"TARGETED": "1", "TARGET_TGID": str(PLACEHOLDERS["TARGET_TGID"])}
    files = ["target.h", "monitor.h", "monitor.c"]
    if monitor.free is not None:
        defines["FREED_PID_OFFSET"] = str(monitor.free.fields["pid"][0])
    if monitor.follow:
        files.append("follow.c")
        defines["CHILD_PID_OFFSET"] = str(monitor.follow["follow_fork"].fields["child_pid"][0])
    lines = [f"MONITOR({event.name}, {step_expression(event.name, monitor.table)})" for event in monitor.events]
    return bpf_events.build_source(defines, files, lines)


def step_expression(kind: str, table: Table) -> str:
    """Return a C expression for the number of a tracepoint's step: raw tracepoints are given its arguments."""
    steps = [step for step in table.steps if step.kind == kind]
    text = str(steps[-1].number)
    for step in steps[:-1]:  # all but the last by their value; the argument is the tracepoint's first
        text = f"ARGUMENT(u32, 0) == {step.value} ? {step.number} : {text}"
    return text
