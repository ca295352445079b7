"""How many VM-exits in a row repeat each other: the same at the same instruction, and the guest no further."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.runs_of_exits import run_lengths
from kvmtrace.isa.base import RipClass
from kvmtrace.isa.registry import BY_NUMBER, ISAS
from kvmtrace.model.states import PROGRESS_EVENTS

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

COMPARED = ("exit_reason", "guest_rip", "info1", "info2")
NEEDED = (*(("kvm_exit", name) for name in COMPARED), ("kvm_entry", "rip"))


def place_among_alike(events: EventTable, exits: NDArray[np.intp], number: int) -> tuple[int, int]:
    """Return the place of a VM-exit among those in a row that repeat each other, and how many they are.

    Those are alike as H3 means it: reason, RIP, exit information and faulting address are the same, the guest goes on
    at the same RIP, and nothing in between shows that something was done.

    Parameters
    ----------
    events : EventTable
    exits : ndarray[intp], shape (n,), the rows of the VM-exits of one thread
    number : which of them, from 1

    Returns
    -------
    (int, int); (1, 1) where it stands alone, or where the recording does not tell
    """
    if not all(events.has(*one) for one in NEEDED) or not _can_repeat(events, int(exits[number - 1])):
        return 1, 1
    at = np.searchsorted(events.rows("kvm_exit"), exits)
    same = np.zeros(len(exits), bool)
    same[1:] = _stays(events, exits, at)[:-1]
    for name in COMPARED:
        column = events.field("kvm_exit", name)[at]
        same[1:] &= column[1:] == column[:-1]
    address = _fault_addresses(events, exits)
    same[1:] &= address[1:] == address[:-1]
    place = int(run_lengths(same)[number - 1]) + 1
    others = np.flatnonzero(~same[number:])
    behind = int(others[0]) if len(others) else len(exits) - number
    return place, place + behind


def _can_repeat(events: EventTable, row: int) -> bool:
    """Say whether being back at the same RIP means that nothing was done."""
    at = int(np.searchsorted(events.rows("kvm_exit"), row))
    number = int(events.field("kvm_exit", "isa")[at]) if events.has("kvm_exit", "isa") else ISAS[0].number
    isa = BY_NUMBER.get(number, ISAS[0])
    known = isa.exits.get(isa.code(int(events.field("kvm_exit", "exit_reason")[at])))
    if known is None or "asynchronous" in known.kinds:
        return False
    return "memory_fault" in known.kinds or known.rip not in {RipClass.SAME, RipClass.PENDING}


def _stays(events: EventTable, exits: NDArray[np.intp], at: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say behind which VM-exits the guest goes on at the same RIP, without a sign that something was done."""
    thread = events.tid[exits[0]]
    entries = events.rows("kvm_entry")
    mine = np.flatnonzero(events.tid[entries] == thread)
    entries, rips = entries[mine], events.field("kvm_entry", "rip")[mine]
    following = np.searchsorted(entries, exits)
    entered = following < len(entries)
    stays = np.zeros(len(exits), bool)
    stays[entered] = events.field("kvm_exit", "guest_rip")[at[entered]] == rips[following[entered]]
    for rows in (*map(events.rows, PROGRESS_EVENTS), _fresh_injections(events)):
        own = rows[events.tid[rows] == thread]
        before = np.searchsorted(exits, own) - 1
        stays[before[before >= 0]] = False
    return stays


def _fresh_injections(events: EventTable) -> NDArray[np.intp]:
    rows = [events.rows(kind)[events.field(kind, "reinjected") == 0]
            for kind in ("kvm_inj_virq", "kvm_inj_exception") if events.has(kind, "reinjected")]  # fmt: skip
    return np.concatenate(rows) if rows else np.empty(0, np.intp)


def _fault_addresses(events: EventTable, exits: NDArray[np.intp]) -> NDArray[Any]:
    """Return the faulting address of each VM-exit, 0 where none was traced."""
    found = np.zeros(len(exits), np.uint64)
    for kind in ("kvm_page_fault", "kvm_guest_fault"):
        if events.has(kind, "fault_address"):
            rows = events.rows(kind)
            own = np.flatnonzero(events.tid[rows] == events.tid[exits[0]])
            before = np.searchsorted(exits, rows[own]) - 1
            inside = before >= 0
            found[before[inside]] = events.field(kind, "fault_address")[own[inside]]
    return found
