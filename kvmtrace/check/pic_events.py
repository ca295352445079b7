"""What concerns the PICs among a recording's events: writes, ends of interrupts, lines, injections, by row.

Source: picdev_write, pic_ioport_write, kvm_pic_set_irq, kvm_pic_read_irq (i8259.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmtrace.check.interrupt_log import NONE, interrupt_log
from kvmtrace.check.routing_changes import ioctl_rows
from kvmtrace.check.userspace_changes import setter_rows
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.pic import BASE_MASK, MASTER_PORT, N_PINS, PIC_PORTS
from kvmtrace.model.userspace_actions import PIC_RESETTERS, PIC_SETTERS
from kvmtrace.table.distinct import among, distinct, run_starts, within
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.interrupt_log import InterruptLog

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]
    _Columns = tuple[Rows, Numbers, Numbers, Numbers]  # row, what, about, value

# of the same row, what is forgotten comes first
FORGET, COMMAND, DATA, ODD, ACK, LINE, TAKEN, ELSEWHERE, CLOSED, LEFT = range(10)
MASTER_ACK, SLAVE_ACK = 0, 1  # kvm_ack_irq.irqchip (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE)
# bits of a line's change; behind them the chip's mask, and who drives the line
UP, TOLD, LEVEL_TRIGGERED, MASKED, COALESCED, MASK, SOURCE = 1, 2, 4, 8, 16, 8, 16
_OUT_OF_RANGE = 1 << 8


class PicEvent(NamedTuple):
    """An event of a thread: `about` a pin or a chip, with a value."""

    row: int
    what: int
    about: int
    value: int
    tid: int


@dataclass
class OpenLines:
    """Changes of lines whose pins' changes stand in the next table.

    Parameters
    ----------
    of_lane : lane of the interrupt log -> (CPU, bits) of the kvm_set_irq at its end
    """

    of_lane: dict[int, tuple[int, int]] = field(default_factory=dict)


def pic_events(excerpt: Excerpt, bases: list[int], writer: int | None, lines: OpenLines) -> list[PicEvent]:
    """Return what concerns the PICs among an excerpt's new rows, by row.

    Parameters
    ----------
    bases : vectors of first pins that are known
    writer : tid of the thread whose write to a PIC is not over; None if there is none
    lines : of the tables before; those of this one are put there
    """
    log, table = interrupt_log(excerpt), excerpt.whole.table
    writes, acks = _port_writes(excerpt), _acks(log)
    values = _values(excerpt, "val", writes) & BASE_MASK
    parts = [_forgets(excerpt), _writes(excerpt, writes), _ends_of_writes(excerpt, writes, writer)]
    parts.append((log.row[acks], np.full(len(acks), ACK), _ack_pins(log, acks), np.zeros(len(acks), np.int64)))
    if bases or len(writes):
        parts.append(_lines(log, lines))
        marks = np.sort(np.concatenate([part[0] for part in parts]))
        parts.append(_injections(excerpt, marks, distinct(np.append(values, bases).astype(np.int64))))
    _keep_lines(log, lines)
    row, what, about, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(row):
        return []
    tid = table.tid[row].tolist()
    return sorted(map(PicEvent, row.tolist(), what.tolist(), about.tolist(), value.tolist(), tid))


def _forgets(excerpt: Excerpt) -> _Columns:
    """Return where what is known of PICs ends: userspace may have set them, another VM begins, something was lost."""
    table = excerpt.whole.table
    rows = [ioctl_rows(excerpt, PIC_SETTERS), setter_rows(excerpt, PIC_RESETTERS), table.rows(LOST_EVENTS)]
    row = np.concatenate([*rows, np.array(vcpu_owners(excerpt).changes, np.intp)])
    row = row[row >= excerpt.whole.n_parked]
    nothing = np.zeros(len(row), np.int64)
    return row, nothing + FORGET, nothing, nothing


def _port_writes(excerpt: Excerpt) -> Rows:
    """Return the new rows at which a guest writes to a PIC."""
    table = excerpt.whole.table
    rows = table.rows("kvm_pio")
    port, way = (table.field("kvm_pio", name) for name in ("port", "rw"))
    found: Rows = rows[among(port, PIC_PORTS) & (way == 1)]
    return found[found >= excerpt.whole.n_parked]


def _values(excerpt: Excerpt, name: str, rows: Rows) -> Numbers:
    table = excerpt.whole.table
    column: Numbers = table.field("kvm_pio", name).take(table.position_in_kind[rows]).astype(np.int64)
    return column


def _writes(excerpt: Excerpt, rows: Rows) -> _Columns:
    """Return the writes; what is not one byte counts as odd."""
    port, value = _values(excerpt, "port", rows), _values(excerpt, "val", rows) & 0xFF
    what = np.where(port & 1, DATA, COMMAND)
    what[(_values(excerpt, "size", rows) != 1) | (_values(excerpt, "count", rows) != 1)] = ODD
    return rows, what, (port & ~1 != MASTER_PORT).astype(np.int64), value


def _ends_of_writes(excerpt: Excerpt, writes: Rows, writer: int | None) -> _Columns:
    """Return where each write is over: its thread enters the guest, or leaves to userspace."""
    table, first = excerpt.whole.table, excerpt.whole.n_parked
    entries, left = table.rows("kvm_entry"), table.rows("kvm_userspace_exit")
    found = [np.empty(0, np.intp)]
    tids = table.tid[writes]
    for tid in distinct(tids).tolist() + ([writer] if writer is not None and writer not in tids else []):
        own = np.sort(np.concatenate([rows[table.tid[rows] == tid] for rows in (entries, left)]))
        begun = writes[tids == tid]
        if tid == writer:
            begun = np.append(first - 1, begun)
        at = np.searchsorted(own, begun, "right")
        found.append(own[at[at < len(own)]])
    row = distinct(np.concatenate(found).astype(np.intp))
    what = np.where(within(row, left), LEFT, CLOSED)
    return row, what, np.zeros(len(row), np.int64), np.zeros(len(row), np.int64)


def _acks(log: InterruptLog) -> Rows:
    acks = log.of_kind("kvm_ack_irq")
    return acks[among(log.values("kvm_ack_irq", "irqchip", acks), (MASTER_ACK, SLAVE_ACK))]


def _ack_pins(log: InterruptLog, acks: Rows) -> Numbers:
    pins: Numbers = log.values("kvm_ack_irq", "pin", acks) & (2 * N_PINS - 1)
    return pins


def _injections(excerpt: Excerpt, marks: Rows, bases: Numbers) -> _Columns:
    """Return fresh injections, of each thread the first of each vector between two of the other events (`marks`)."""
    table = excerpt.whole.table
    fresh = (table.field("kvm_inj_virq", "reinjected") == 0) & (table.field("kvm_inj_virq", "soft") == 0)
    rows = table.rows("kvm_inj_virq")
    fresh &= rows >= excerpt.whole.n_parked
    rows, vector = rows[fresh], table.field("kvm_inj_virq", "vector")[fresh].astype(np.int64) & 0xFF
    vector = np.where(within(vector & BASE_MASK, bases), vector, _OUT_OF_RANGE)
    tid = table.tid[rows].astype(np.int64)
    interval = np.searchsorted(marks, rows)
    order = np.lexsort((rows, vector, tid, interval))
    rows, vector = rows[order], vector[order]
    first = run_starts(interval[order], tid[order], vector)
    rows, vector = rows[first], vector[first]
    what = np.where(vector == _OUT_OF_RANGE, ELSEWHERE, TAKEN)
    return rows, what, np.zeros(len(rows), np.int64), vector


def _lines(log: InterruptLog, open_lines: OpenLines) -> _Columns:
    """Return the changes of the PICs' lines; of masked ones that go on alike, the first and the last."""
    lines = log.of_kind("kvm_pic_set_irq")
    pin, chip, elcr, imr, coalesced = (
        log.values("kvm_pic_set_irq", name, lines) for name in ("pin", "chip", "elcr", "imr", "coalesced")
    )
    pin, number = pin & (N_PINS - 1), (chip & 1) * N_PINS + (pin & (N_PINS - 1))
    value = _told(log, lines, open_lines)
    value |= np.where(elcr >> pin & 1, LEVEL_TRIGGERED, 0) | np.where(imr >> pin & 1, MASKED, 0)
    value |= np.where(coalesced != 0, COALESCED, 0) | (imr & 0xFF) << MASK
    if not len(lines):
        return lines, number, number, value
    order = np.lexsort((log.row[lines], number))
    row, number, value = log.row[lines[order]], number[order], value[order]
    # what tells nothing new: masked, as the one before and the one behind, whatever the level
    follows = (number[1:] == number[:-1]) & (value[1:] | UP == value[:-1] | UP) & (value[1:] & MASKED != 0)
    inner = np.append(False, follows) & np.append(follows, False)
    row, number, value = row[~inner], number[~inner], value[~inner]
    return row, np.full(len(row), LINE), number, value


def _told(log: InterruptLog, lines: Rows, open_lines: OpenLines) -> Numbers:
    """Return what the line that drives each pin told: its level and source; 0 where none stands before it."""
    before = log.before[lines]
    known = log.is_kind(before, "kvm_set_irq") & log.whole(before, lines)
    value = np.zeros(len(lines), np.int64)
    value[known] = _bits(log, before[known])
    for i in np.flatnonzero(before == NONE).tolist() if open_lines.of_lane else ():
        cpu, bits = open_lines.of_lane.get(int(log.lane[lines[i]]), (NONE, 0))
        if cpu == log.table.cpu[log.row[lines[i]]]:
            value[i] = bits
    return value


def _bits(log: InterruptLog, entries: Rows) -> Numbers:
    up = np.where(log.values("kvm_set_irq", "level", entries) != 0, UP, 0)
    bits: Numbers = TOLD | up | (log.values("kvm_set_irq", "irq_source_id", entries) & 0xFFFF) << SOURCE
    return bits


def _keep_lines(log: InterruptLog, open_lines: OpenLines) -> None:
    """Keep the lines' changes at the ends of the lanes, until these go on."""
    for lane in distinct(log.lane).tolist() if open_lines.of_lane else ():
        open_lines.of_lane.pop(lane, None)
    entries = log.of_kind("kvm_set_irq")
    entries = entries[log.behind[entries] == NONE]
    for entry, bits in zip(entries.tolist(), _bits(log, entries).tolist(), strict=True):
        open_lines.of_lane[int(log.lane[entry])] = int(log.table.cpu[log.row[entry]]), bits
