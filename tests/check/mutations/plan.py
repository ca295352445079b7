"""Every mutation of a recording: one per event, edit and alteration, labelled so that they can be counted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.isa.registry import describe_exit_reason, isa_name
from kvmtrace.model.interrupts import SENDERS
from kvmtrace.model.nesting import LEVEL_EVENTS, SAYS_WHY, WITH_ENTRY
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS, STEPS
from mutations import edits
from mutations.catalogue import ALTERATIONS, INSERTED, change_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

# interrupts on their way, of whatever thread
ON_THEIR_WAY = frozenset(SENDERS) | {"kvm_set_irq", "kvm_pic_set_irq", "kvm_apic_accept_irq", "kvm_ack_irq"}
TRACKED = frozenset({event.kind for event in STEPS.values()}) | frozenset(FOLLOW_UPS) | frozenset(BYSTANDERS)
TRACKED |= ON_THEIR_WAY
# the model looks at these only as permission for others (legal causes), never as duties
NESTED = {*(row.event for row in LEVEL_EVENTS), WITH_ENTRY, *SAYS_WHY}
CONTEXT_ONLY = frozenset(BYSTANDERS) - {"kvm_eoi", "kvm_apic", "kvm_apic_accept_irq", "sched_switch"} - NESTED


@dataclass(frozen=True)
class Mutation:
    """One edit of one event.

    Parameters
    ----------
    operation : "drop" "duplicate" "swap" "alter" "insert"
    event : kind of the event that is edited or inserted
    variant : which alteration; for swap the other event's kind, for insert where
    exit_name : the VM-exit in whose wake the event stands, "" before the first
    isa : name of an ISA, or ""
    row : row of the event in the table
    field, value : of an alteration
    other : row of the event to swap with
    """

    operation: str
    event: str
    variant: str
    exit_name: str
    isa: str
    row: int
    field: str = ""
    value: int = 0
    other: int = -1

    @property
    def key(self) -> tuple[str, str, str]:
        """What is counted together, whatever the VM-exit."""
        return self.operation, self.event, self.variant

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What is sampled together."""
        return (*self.key, self.exit_name)

    def apply(self, table: EventTable) -> EventTable:
        """Return the edited table."""
        if self.operation == "drop":
            return edits.drop(table, self.row)
        if self.operation == "duplicate":
            return edits.duplicate(table, self.row)
        if self.operation == "swap":
            return edits.swap(table, self.row, self.other)
        if self.operation == "insert":
            return edits.insert(table, self.row, self.event, INSERTED[self.event])
        return edits.alter(table, self.row, self.field, self.value)

    def __str__(self) -> str:
        after = f" after {self.exit_name}" if self.exit_name else ""
        return f"{self.operation} {self.event} {self.variant}{after} (row {self.row})"


@dataclass(frozen=True)
class Place:
    """A tracked event of a vCPU thread: its row, the next one of its thread (-1), and the last VM-exit."""

    row: int
    event: str
    following: int
    exit_name: str
    isa: int
    in_guest: bool


def vcpu_threads(table: EventTable) -> NDArray[np.int32]:
    """Return the threads that ran KVM_RUN."""
    rows = [table.rows(name) for name in ("kvm_entry", "kvm_userspace_exit", "kvm_fpu")]
    return np.unique(table.tid[np.concatenate(rows)])


def places(table: EventTable) -> Iterator[Place]:
    """Yield the events that the model steps through, interrupt context left out, in recorded order."""
    names = [kind.name for kind in table.kinds]
    tracked = np.array([name in TRACKED for name in names])
    chosen = tracked[table.kind] & np.isin(table.tid, vcpu_threads(table)) & (table.irq_flags & 0x58 == 0)
    following = _following(table, np.flatnonzero(chosen))
    last_exit: dict[int, tuple[str, int]] = defaultdict(lambda: ("", 0))
    in_guest: dict[int, bool] = defaultdict(bool)
    for row in np.flatnonzero(chosen):
        name, tid = names[table.kind[row]], int(table.tid[row])
        if name == "kvm_exit":
            isa = edits.value_of(table, row, "isa")
            last_exit[tid] = (describe_exit_reason(isa, edits.value_of(table, row, "exit_reason")), isa)
        in_guest[tid] = name == "kvm_entry" or (in_guest[tid] and name != "kvm_exit")
        yield Place(int(row), name, following[int(row)], *last_exit[tid], in_guest[tid])


def _following(table: EventTable, rows: NDArray[np.intp]) -> dict[int, int]:
    """Return, for each row, the next of these rows in the same thread; -1 at a thread's end."""
    result: dict[int, int] = {}
    newest: dict[int, int] = {}
    for row in rows[::-1]:
        tid = int(table.tid[row])
        result[int(row)] = newest.get(tid, -1)
        newest[tid] = int(row)
    return result


def plan(table: EventTable) -> Iterator[Mutation]:
    """Yield every mutation of every tracked event."""
    for place in places(table):
        isa = isa_name(place.isa) or ""
        about = (place.exit_name, isa, place.row)
        if place.event not in CONTEXT_ONLY:
            yield Mutation("drop", place.event, "", *about)
            yield Mutation("duplicate", place.event, "", *about)
            if place.following >= 0:
                other = table.kinds[table.kind[place.following]].name
                if other != place.event and other not in CONTEXT_ONLY:
                    yield Mutation("swap", place.event, f"with {other}", *about, other=place.following)
        yield from _alterations(table, place, about)
        yield from _insertions(table, place, about)


def _alterations(table: EventTable, place: Place, about: tuple[str, str, int]) -> Iterator[Mutation]:
    for alteration in ALTERATIONS:
        if alteration.event != place.event:
            continue
        if alteration.field in {"irq_flags", "cpu"}:
            old = int(getattr(table, alteration.field)[place.row])
        else:
            old = edits.value_of(table, place.row, alteration.field)
            derived = (place.event, alteration.field) in table.derived  # made of others, which are altered instead
            old = None if derived else old
        if old is None:
            continue
        value = change_of(alteration, place.isa)(old)
        if value is not None and value != old:
            yield Mutation("alter", place.event, alteration.name, *about, field=alteration.field, value=value)


def _insertions(table: EventTable, place: Place, about: tuple[str, str, int]) -> Iterator[Mutation]:
    where = {"kvm_exit": "behind kvm_exit", "kvm_entry": "in guest mode"}.get(place.event)
    if where is not None:
        for event in INSERTED:
            if table.has(event) and not (place.event == "kvm_exit" and event == "sched_switch"):
                yield Mutation("insert", event, where, *about)
