"""One VM-exit told as the story of one lifecycle: the recorded events, and the model's steps between them."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alike_exits import place_among_alike
from kvmtrace.errors import MissingEventError, UsageError
from kvmtrace.isa.registry import BY_NUMBER, ISAS
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.nesting import ENTERS_L2, REFLECTS
from kvmtrace.model.states import STAND_INS
from kvmtrace.model.world_switch import STEPS_BY_ISA, UNSEEN_BY_ISA
from kvmtrace.table.event_table import TRACE_FLAG_HARDIRQ
from kvmtrace.table.vcpu_ids import listed, vcpus_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.model.world_switch import SwitchStep
    from kvmtrace.table.event_table import EventTable

MAX_EVENTS = 400  # a REP INS to MMIO leaves to userspace 120 times in one lifecycle
MAX_BYTES = 16  # of a field's array shown


@dataclass(frozen=True)
class StoryEvent:
    """A recorded event of the vCPU's thread; `fields` as recorded."""

    event_index: int
    ts_ns: int
    cpu: int
    event: str
    fields: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoryStep:
    """A step of the world switch and its evidence.

    Parameters
    ----------
    step : SwitchStep of the model
    after, before : index into Story.events of the events that bracket it; None if no recorded event does
    dur_ns : int or None, time between the two: an upper bound for the step
    """

    step: SwitchStep
    after: int | None
    before: int | None
    dur_ns: int | None


@dataclass(frozen=True)
class Story:
    """VM-exit `number` (from 1) of a thread; `exit_at` indexes `events`; `alike`: see place_among_alike()."""

    number: int
    n_exits: int
    tid: int
    vcpu_id: int | None
    isa: str
    reason: str
    exit_at: int
    events: tuple[StoryEvent, ...]
    steps: tuple[StoryStep, ...]
    left_out: int = 0
    unseen: tuple[str, ...] = ()
    vm: str | None = None  # its name
    alike: tuple[int, int] = (1, 1)
    ran: tuple[tuple[str, int], ...] = ()  # who ran while the vCPU was preempted in this lifecycle, ns


def exits_of(events: EventTable, tid: int | None, vcpu: int | None) -> NDArray[np.intp]:
    """Return the VM-exits of the thread asked for, or of the first thread that has any."""
    rows = events.rows("kvm_exit")
    if vcpu is not None and events.has("kvm_exit", "vcpu_id"):
        rows = rows[events.field("kvm_exit", "vcpu_id") == vcpu]
    if len(rows):
        rows = rows[events.tid[rows] == (events.tid[rows[0]] if tid is None else tid)]
    return rows


def describe_missing(events: EventTable, number: int, tid: int | None, vcpu: int | None) -> str:
    """Say why there is no such VM-exit, and which there are."""
    known = vcpus_of(events)
    ids = sorted({vcpu_id for vcpu_id, _ in known})
    threads = sorted(set(np.unique(events.tid[events.rows("kvm_exit")]).tolist()))
    if vcpu is not None and vcpu not in ids:
        return f"there is no VM-exit of vCPU {vcpu}: the recording has {listed('vCPU', ids)}"
    if tid is not None and tid not in threads:
        return f"there is no VM-exit of thread {tid}: vCPUs ran on {listed('thread', threads)}"
    if tid is not None and vcpu is not None and (vcpu, tid) not in known:
        return f"there is no VM-exit of vCPU {vcpu} in thread {tid}"
    return f"there is no VM-exit {number}: the recording has {len(exits_of(events, tid, vcpu))} of that vCPU"


def _window(events: EventTable, row: int) -> tuple[NDArray[np.intp], int]:
    """Return the thread's rows of the lifecycle around a VM-exit, and how many were left out.

    From the VM-exit before (or the beginning) to the next VM-entry (or the end); of an exit of a nested guest that its
    hypervisor handles, to the VM-entry at which the nested guest goes on.
    """
    mine = (events.tid == events.tid[row]) & ((events.irq_flags & TRACE_FLAG_HARDIRQ) == 0)
    mine[row] = True
    own = np.flatnonzero(mine)
    exits = np.intersect1d(own, events.rows("kvm_exit"), assume_unique=True)
    entries = np.intersect1d(own, events.rows("kvm_entry"), assume_unique=True)
    before = exits[exits < row]
    after = entries[entries > _handled_until(events, own, row, entries)]
    first = before[-1] if len(before) else own[0]
    last = after[0] if len(after) else own[-1]
    rows = own[(own >= first) & (own <= last)]
    at = int(np.searchsorted(rows, row))
    start = max(0, at - MAX_EVENTS // 2)
    kept = rows[start : start + MAX_EVENTS]
    return kept, len(rows) - len(kept)


def _handled_until(events: EventTable, own: NDArray[np.intp], row: int, entries: NDArray[np.intp]) -> int:
    """Return the row behind which the VM-entry stands that ends a VM-exit: the exit, or a nested entry for L1's."""

    def first(*kinds: str) -> int:
        rows = np.concatenate([events.rows(kind) for kind in kinds if events.has(kind)] or [own[:0]])
        rows = np.intersect1d(own, rows[rows > row], assume_unique=True)
        return int(rows[0]) if len(rows) else len(events)

    end = entries[entries > row]
    passed_on = first(REFLECTS) < (int(end[0]) if len(end) else len(events))
    return first(*ENTERS_L2) if passed_on else row


def read_event(events: EventTable, row: int) -> StoryEvent:
    """Return one row with its fields, numbers as int, bytes as hexadecimal, text as text."""
    kind = events.kinds[events.kind[row]]
    position = int(np.searchsorted(events.rows(kind.name), row))
    fields: dict[str, int | str] = {}
    derived = [name for event, name in events.derived if event == kind.name and name not in kind.fields]
    for name in (*kind.fields, *derived):
        value = events.field(kind.name, name)[position]
        if isinstance(value, np.ndarray):
            fields[name] = bytes(value[:MAX_BYTES]).hex(" ")
        elif isinstance(value, (bytes, np.bytes_)):
            fields[name] = bytes(value).split(b"\0")[0].decode("utf-8", "replace")
        else:
            fields[name] = int(value) if isinstance(value, (int, np.integer, np.bool_)) else str(value)
    return StoryEvent(row, int(events.ts_ns[row]), int(events.cpu[row]), kind.name, fields)


def _names(tokens: str, recorded: set[str]) -> set[str]:
    """Return the event names of a bracket; a probe that was not recorded gives way to its stand-in."""
    return {name if name in recorded else STAND_INS.get(name, name) for name in tokens.split("|")}


def _bracket(step: SwitchStep, names: list[str], exit_at: int) -> tuple[int, int] | None:
    """Find the closest pair of events that brackets a step on its side of the VM-exit."""
    recorded = set(names)
    after, before = _names(step.after, recorded), _names(step.before, recorded)
    behind = step.phase == "unbind" or (step.phase == "record the exit reason" and "kvm_exit" not in before)
    low, high = (exit_at, len(names)) if behind else (0, exit_at + 1)
    begins = [i for i in range(low, high - 1) if names[i] in after]
    for i in begins if behind else begins[::-1]:
        for j in range(i + 1, high):
            if names[j] in before:
                return i, j
    return None


def _place(step: SwitchStep, story: list[StoryEvent], exit_at: int) -> StoryStep:
    found = _bracket(step, [event.event for event in story], exit_at)
    if found is None:
        return StoryStep(step, None, None, None)
    return StoryStep(step, *found, story[found[1]].ts_ns - story[found[0]].ts_ns)


def explain_exit(events: EventTable, number: int, *, tid: int | None = None, vcpu: int | None = None) -> Story:
    """Tell the story of one VM-exit.

    Parameters
    ----------
    events : EventTable
    number : which VM-exit of the thread, from 1
    tid, vcpu : the vCPU's thread or id; by default the first that exits

    Raises
    ------
    UsageError
        There is no such VM-exit.
    MissingEventError
        VM-exits were recorded without their reason.
    """
    exits = exits_of(events, tid, vcpu)
    if not 1 <= number <= len(exits):
        raise UsageError(describe_missing(events, number, tid, vcpu))
    if not events.has("kvm_exit", "exit_reason"):
        raise MissingEventError("the recording has no field exit_reason of event kvm_exit")
    row = int(exits[number - 1])
    rows, left_out = _window(events, row)
    story = [read_event(events, int(one)) for one in rows]
    exit_at = int(np.searchsorted(rows, row))
    fields = story[exit_at].fields
    isa = BY_NUMBER.get(int(fields.get("isa", 0)), ISAS[0])
    vcpu_id = fields.get("vcpu_id")
    return Story(
        number,
        len(exits),
        int(events.tid[row]),
        int(vcpu_id) if vcpu_id is not None else None,
        isa.name,
        isa.describe(int(fields["exit_reason"])),
        exit_at,
        tuple(story),
        tuple(_place(step, story, exit_at) for step in STEPS_BY_ISA[isa.name]),
        left_out,
        UNSEEN_BY_ISA[isa.name],
        alike=place_among_alike(events, exits, number),
    )
