"""What concerns the PICs among a recording's events: commands, lines, injections, ends of interrupts, by row.

Source: picdev_write, pic_ioport_write, kvm_pic_set_irq, kvm_pic_read_irq (i8259.c)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.interrupt_log import NONE, interrupt_log
from kvmtrace.check.routing_changes import ioctl_rows
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.pic import (
    BASE_MASK,
    INITIALIZE,
    MASTER_PORT,
    N_PINS,
    NON_SPECIFIC_EOIS,
    OTHER_COMMAND,
    PIC_PORTS,
)
from kvmtrace.table.distinct import among, run_starts, within
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.interrupt_log import InterruptLog

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]
    _Columns = tuple[Rows, Numbers, Numbers, Numbers]  # row, what, about, value

FORGET, COMMAND, DATA, TAKEN, LINE, ACK = range(6)
MASTER_ACK, SLAVE_ACK = 0, 1  # kvm_ack_irq.irqchip (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE)
# bits of a line's change
UP, TOLD, LEVEL_TRIGGERED, MASKED, COALESCED, SOURCE = 1, 2, 4, 8, 16, 8
NON_SPECIFIC = 1  # value of an ACK
ENDED = 1 << 8  # in the value of a COMMAND: some pin was told that its interrupt ended
_SETTERS = ("KVM_SET_IRQCHIP",)


class PicEvent(NamedTuple):
    """An event: `about` a pin or a chip, with a value; `tid` of the thread that traced it."""

    row: int
    what: int
    about: int
    value: int
    tid: int


def ends_some_pin(value: int) -> bool:
    """Say whether a command ends the interrupt of a pin that it does not name."""
    return not value & (INITIALIZE | OTHER_COMMAND) and (value & 0xFF) >> 5 in NON_SPECIFIC_EOIS


def pic_events(excerpt: Excerpt, bases: list[int | None]) -> list[PicEvent]:
    """Return what concerns the PICs among an excerpt's new rows, by row; `bases`: vectors of the chips' first pins."""
    log, table = interrupt_log(excerpt), excerpt.whole.table
    lines, acks = log.of_kind("kvm_pic_set_irq"), log.of_kind("kvm_ack_irq")
    chip = log.values("kvm_ack_irq", "irqchip", acks)
    acks = acks[(chip == MASTER_ACK) | (chip == SLAVE_ACK)]
    writes = _port_writes(excerpt)
    forget = np.append(ioctl_rows(excerpt, _SETTERS), np.array(vcpu_owners(excerpt).changes, np.intp))
    if LOST_EVENTS in table.kind_index:
        forget = np.append(forget, table.rows(LOST_EVENTS))
    forget = forget[forget >= excerpt.whole.n_parked]
    nothing = np.zeros(len(forget), np.int64)
    causes = _causes(log, acks)
    numbers = log.values("kvm_ack_irq", "pin", acks) & (2 * N_PINS - 1)
    parts = [
        (forget, nothing + FORGET, nothing, nothing),
        _writes(excerpt, writes, causes),
        _lines(log, lines),
        (log.row[acks], np.full(len(acks), ACK), numbers, _by_non_specific(log, acks, causes, writes, excerpt)),
    ]
    marks = np.sort(np.concatenate([part[0] for part in parts]))
    parts.append(_injections(excerpt, marks, _vectors(excerpt, writes, bases)))
    row, what, about, value = (np.concatenate(column).tolist() for column in zip(*parts, strict=True))
    tid = table.tid[row].tolist() if row else []
    return sorted(map(PicEvent, row, what, about, value, tid))


def _vectors(excerpt: Excerpt, writes: Rows, bases: list[int | None]) -> Numbers | None:
    """Return the bases that an injection may be of, None if any injection tells something."""
    known = [base for base in bases if base is not None]
    if len(known) < len(bases):
        return None
    return np.append(np.array(known, np.int64), _values(excerpt, "val", writes) & BASE_MASK)


def _port_writes(excerpt: Excerpt) -> Rows:
    """Return the new rows at which a guest writes one byte to a PIC."""
    table = excerpt.whole.table
    rows = table.rows("kvm_pio")
    port, size, way, count = (table.field("kvm_pio", name).astype(np.int64) for name in ("port", "size", "rw", "count"))
    found: Rows = rows[among(port, PIC_PORTS) & (size == 1) & (way == 1) & (count == 1)]
    return found[found >= excerpt.whole.n_parked]


def _values(excerpt: Excerpt, name: str, rows: Rows) -> Numbers:
    table = excerpt.whole.table
    column: Numbers = table.field("kvm_pio", name).take(table.position_in_kind[rows]).astype(np.int64)
    return column


def _writes(excerpt: Excerpt, rows: Rows, causes: Rows) -> _Columns:
    port, value = _values(excerpt, "port", rows), _values(excerpt, "val", rows) & 0xFF
    value |= np.where(within(rows, causes[causes >= 0]), ENDED, 0)
    return rows, np.where(port & 1, DATA, COMMAND), (port & ~1 != MASTER_PORT).astype(np.int64), value


def _injections(excerpt: Excerpt, marks: Rows, bases: Numbers | None) -> _Columns:
    """Return fresh injections of any vCPU, the first of each vector between two of the other events (`marks`)."""
    whole = excerpt.whole
    at = np.flatnonzero(whole.cls == CLASS["inject interrupt"])
    at = at[whole.row[at] >= whole.n_parked]
    fresh = (whole.values("kvm_inj_virq", "reinjected", at) == 0) & (whole.values("kvm_inj_virq", "soft", at) == 0)
    at = at[fresh]
    vector = whole.values("kvm_inj_virq", "vector", at).astype(np.int64) & 0xFF
    if bases is not None:
        mine = within(vector & BASE_MASK, bases)
        at, vector = at[mine], vector[mine]
    key = np.searchsorted(marks, whole.row[at]) << 8 | vector
    order = np.lexsort((whole.row[at], key))
    first = order[run_starts(key[order])]
    return whole.row[at[first]], np.full(len(first), TAKEN), np.zeros(len(first), np.int64), vector[first]


def _lines(log: InterruptLog, lines: Rows) -> _Columns:
    """Return the changes of the PICs' lines; of masked ones that go on alike, the first and the last."""
    pin = log.values("kvm_pic_set_irq", "pin", lines) & (N_PINS - 1)
    number = (log.values("kvm_pic_set_irq", "chip", lines) & 1) * N_PINS + pin
    before = log.before[lines]
    told = log.is_kind(before, "kvm_set_irq") & log.whole(before, lines)
    value = np.where(told, TOLD, 0)
    cause = before[told]
    value[told] |= np.where(log.values("kvm_set_irq", "level", cause) != 0, UP, 0)
    value[told] |= (log.values("kvm_set_irq", "irq_source_id", cause) & 0xFFFF) << SOURCE
    value |= np.where(log.values("kvm_pic_set_irq", "elcr", lines) >> pin & 1, LEVEL_TRIGGERED, 0)
    value |= np.where(log.values("kvm_pic_set_irq", "imr", lines) >> pin & 1, MASKED, 0)
    value |= np.where(log.values("kvm_pic_set_irq", "coalesced", lines) != 0, COALESCED, 0)
    if not len(lines):
        return lines, number, number, value
    order = np.lexsort((log.row[lines], number))
    row, number, value = log.row[lines[order]], number[order], value[order]
    # what tells nothing new: masked, as the one before and the one behind, whatever the level
    follows = (number[1:] == number[:-1]) & (value[1:] | UP == value[:-1] | UP) & (value[1:] & MASKED != 0)
    inner = np.append(False, follows) & np.append(follows, False)
    row, number, value = row[~inner], number[~inner], value[~inner]
    return row, np.full(len(row), LINE), number, value


def _causes(log: InterruptLog, acks: Rows) -> Rows:
    """Return the rows of the guest's writes by which pins are told of ends, NONE of others."""
    before = log.before[acks]
    return np.where(log.is_kind(before, "kvm_pio"), log.row[before] if len(log.row) else before, NONE)


def _by_non_specific(log: InterruptLog, acks: Rows, causes: Rows, writes: Rows, excerpt: Excerpt) -> Numbers:
    """Say which pins are told of an end that the guest wrote to their chip without naming them."""
    found = np.zeros(len(acks), np.int64)
    if not len(writes):
        return found
    at = np.minimum(np.searchsorted(writes, causes), len(writes) - 1)
    port, value = _values(excerpt, "port", writes)[at], _values(excerpt, "val", writes)[at] & 0xFF
    own = (port == MASTER_PORT) == (log.values("kvm_ack_irq", "irqchip", acks) == MASTER_ACK)
    ends = among(value >> 5, NON_SPECIFIC_EOIS) & (value & (INITIALIZE | OTHER_COMMAND) == 0) & (port & 1 == 0)
    found[(causes >= 0) & (writes[at] == causes) & own & ends] = NON_SPECIFIC
    return found
