"""What concerns system-management interrupts among a recording's events, by row.

Source: __apic_accept_irq (lapic.c), kvm_vcpu_ioctl_smi, kvm_inject_smi, enter_smm (x86.c, smm.c)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmtrace.check.interrupt_log import acceptances, interrupt_log
from kvmtrace.check.routing_changes import ioctl_rows
from kvmtrace.check.userspace_changes import setter_rows
from kvmtrace.model.injection import SMI_DELIVERY_MODE
from kvmtrace.model.userspace_actions import SMI_REQUESTS, SMI_SETTERS
from kvmtrace.table.distinct import distinct
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]

# of the same row, what is forgotten comes first
FORGET, CREATED, SET, REQUESTED, RETURNED, ACCEPTED, BEGINS, ENDS, DELAYED, ENTERED = range(10)
# steps of a thread that may go before the mode: what was injected keeps an SMI back until the next VM-entry
_DELAYS = ("kvm_inj_virq", "kvm_inj_exception")


class SmiEvent(NamedTuple):
    """An event of a thread, about a vCPU where that is told, or what an ioctl returned."""

    row: int
    what: int
    tid: int
    about: int


def smi_events(excerpt: Excerpt, owed: Iterable[int]) -> list[SmiEvent]:
    """Return what concerns SMIs among an excerpt's new rows; `owed`: threads that had an SMI before."""
    log, table, first = interrupt_log(excerpt), excerpt.whole.table, excerpt.whole.n_parked
    accepted = acceptances(excerpt)
    mine = accepted.mode == SMI_DELIVERY_MODE >> 8
    parts = [(log.row[accepted.entry[mine]], np.full(int(mine.sum()), ACCEPTED), accepted.vcpu[mine])]
    if log.own().size:
        kept = log.own()[accepted.entry[mine]]
        parts = [(parts[0][0], np.where(kept, ACCEPTED, SET), parts[0][2])]
    transitions = table.rows("kvm_smm_transition")
    begins = table.field("kvm_smm_transition", "entering") != 0
    about = table.field("kvm_smm_transition", "vcpu_id").astype(np.int64)
    parts.append((transitions, np.where(begins, BEGINS, ENDS), about))
    requests = setter_rows(excerpt, SMI_REQUESTS)
    parts += [_plain(requests, REQUESTED), _plain(setter_rows(excerpt, SMI_SETTERS), SET)]
    parts += [_plain(ioctl_rows(excerpt, ("KVM_CREATE_VCPU",)), CREATED), _plain(table.rows(LOST_EVENTS), FORGET)]
    begun = np.concatenate([parts[0][0], requests]).astype(np.intp)
    parts += _steps(excerpt, np.sort(begun[begun >= first]), owed)
    row, what, about = (np.concatenate(column) for column in zip(*parts, strict=True))
    new = row >= first
    row, what, about = row[new], what[new], about[new]
    if not len(row):
        return []
    return sorted(map(SmiEvent, row.tolist(), what.tolist(), table.tid[row].tolist(), about.tolist()))


def _plain(rows: Rows, what: int) -> tuple[Rows, NDArray[np.int64], NDArray[np.int64]]:
    nothing = np.zeros(len(rows), np.int64)
    return rows, nothing + what, nothing


def _steps(
    excerpt: Excerpt, begun: Rows, owed: Iterable[int]
) -> list[tuple[Rows, NDArray[np.int64], NDArray[np.int64]]]:
    """Return what each thread that has an SMI traces next: a VM-entry, what may go before it, what its ioctl returned.

    Parameters
    ----------
    begun : new rows, ascending, at which an SMI is sent
    owed : threads that had one before
    """
    table, before = excerpt.whole.table, excerpt.whole.n_parked - 1
    kinds = [(DELAYED, kind) for kind in _DELAYS] + [(ENTERED, "kvm_entry")]
    kinds += [(RETURNED, "sys_exit_ioctl")] if excerpt.has_field("sys_exit_ioctl", "ret") else []
    found = []
    for tid in {*owed, *table.tid[begun].tolist()}:
        marks = np.append(before, begun[table.tid[begun] == tid])
        for what, kind in kinds:
            rows = table.rows(kind)
            rows = rows[table.tid[rows] == tid]
            at = np.searchsorted(rows, marks, "right")
            rows = distinct(rows[at[at < len(rows)]])
            about = np.zeros(len(rows), np.int64)
            if what == RETURNED:
                about = table.field(kind, "ret").take(table.position_in_kind[rows]).astype(np.int64)
            found.append((rows, np.full(len(rows), what), about))
    return found
