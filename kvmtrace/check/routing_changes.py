"""When what is known of interrupt routing ends: registers, ioctls and other VMs that may change it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.interrupt_log import NONE, interrupt_log
from kvmtrace.check.userspace_changes import ioctl_kind, setter_rows
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.ioctls import IOCTL_NUMBERS
from kvmtrace.model.injection import INIT_DELIVERY_MODE
from kvmtrace.model.interrupts import (
    FOREIGN_LINES,
    OTHER_INTERFACES,
    OTHER_INTERFACES_BY,
    ROUTING_IOCTLS,
    ROUTING_MSRS,
    ROUTING_REGISTERS,
)
from kvmtrace.table.distinct import among
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Changes:
    """Rows of an excerpt's table at which knowledge ends, ascending.

    Parameters
    ----------
    begin : what comes behind this row may go another way
    settled : ... and behind this one all of it does: the thread that changes it has gone on
    """

    begin: Rows
    settled: Rows

    def epoch(self, rows: Rows) -> Rows:
        """Return how many changes have begun before each row."""
        return np.searchsorted(self.begin, rows, "right")

    def is_settled(self, rows: Rows) -> NDArray[np.bool_]:
        """Say at which rows no change is under way."""
        ended: NDArray[np.bool_] = np.searchsorted(np.sort(self.settled), rows, "right") == self.epoch(rows)
        return ended


def routing_changes(excerpt: Excerpt) -> Changes:
    """Return where destinations may begin to name other vCPUs (made once)."""
    return excerpt.once("routing changes", _routing_changes)


def _routing_changes(excerpt: Excerpt) -> Changes:
    log, table = interrupt_log(excerpt), excerpt.whole.table
    changing = [_writes(excerpt, "kvm_apic", ("rw", "reg"), ROUTING_REGISTERS)]
    changing.append(_writes(excerpt, "kvm_msr", ("write", "ecx"), ROUTING_MSRS))
    accepted = log.of_kind("kvm_apic_accept_irq")
    if len(accepted):
        changing.append(accepted[log.values("kvm_apic_accept_irq", "dm", accepted) == INIT_DELIVERY_MODE])
    entries = np.concatenate(changing).astype(np.intp)
    begin = log.row[entries]
    # until the thread traces something else the change may be under way
    following = log.behind[entries]
    settled = np.where(following == NONE, len(table), log.row[following] if len(log.row) else 0)
    others = np.concatenate(
        [
            setter_rows(excerpt),
            ioctl_rows(excerpt, ROUTING_IOCTLS),
            np.array(vcpu_owners(excerpt).changes, np.intp),
            # what userspace does there is not recorded
            table.rows("kvm_userspace_exit") if ioctl_kind(excerpt) is None else np.empty(0, np.intp),
        ]
    )
    begin, settled = np.append(begin, others), np.append(settled, others)
    new = begin >= excerpt.whole.n_parked
    order = np.argsort(begin[new], kind="stable")
    return Changes(begin[new][order], settled[new][order])


def _writes(excerpt: Excerpt, kind: str, fields: tuple[str, str], registers: Iterable[int]) -> Rows:
    """Return the log's entries that write one of these registers."""
    log = interrupt_log(excerpt)
    entries = log.of_kind(kind)
    if not len(entries):
        return entries
    written = log.values(kind, fields[0], entries) != 0
    found: Rows = entries[written & among(log.values(kind, fields[1], entries), registers)]
    return found


def ioctl_rows(excerpt: Excerpt, names: tuple[str, ...]) -> Rows:
    """Return the rows at which some thread begins one of these ioctls; only system calls show those of a VM."""
    table = excerpt.whole.table
    if not excerpt.has_field("sys_enter_ioctl", "cmd"):
        return np.empty(0, np.intp)
    cmd = table.field("sys_enter_ioctl", "cmd").astype(np.int64) & 0xFFFFFFFF
    found: Rows = table.rows("sys_enter_ioctl")[among(cmd, [IOCTL_NUMBERS[name] for name in names])]
    return found


@dataclass
class Senders:
    """Who may send interrupts in a recording, as far as it has been read.

    Parameters
    ----------
    created : the VM was created here, before any vCPU entered the guest
    foreign : threads other than the VM's may raise lines
    others : interfaces are in use whose interrupts have no sender among the events
    makers : threads that made a vCPU, since events were lost last
    began_ns : time of the recording's first event, -1 if there was none yet
    number : of the latest excerpt, from 1
    """

    created: bool = False
    entered: bool = False
    foreign: bool = False
    others: bool = False
    makers: set[int] = field(default_factory=set)
    began_ns: int = -1
    number: int = 0

    def add(self, excerpt: Excerpt) -> bool:
        """Take note of the new rows of an excerpt's table."""
        table = excerpt.whole.table
        self.number += 1
        if self.began_ns < 0 and len(table):
            self.began_ns = int(table.ts_ns[0])
        self._note_makers(excerpt)
        made = ioctl_rows(excerpt, ("KVM_CREATE_VM",))
        entries = table.rows("kvm_entry") if "kvm_entry" in table.kind_index else made[:0]
        if len(made) and not self.entered and not (len(entries) and entries[0] < made[0]):
            self.created = True
        self.entered |= len(entries) > 0
        self.foreign |= len(ioctl_rows(excerpt, FOREIGN_LINES)) > 0
        self.others |= any(name.startswith(OTHER_INTERFACES) for name in excerpt.capability.seen)
        self.others |= len(ioctl_rows(excerpt, OTHER_INTERFACES_BY)) > 0
        return True

    def _note_makers(self, excerpt: Excerpt) -> None:
        table, first = excerpt.whole.table, excerpt.whole.n_parked
        lost = table.rows(LOST_EVENTS)
        if len(lost) and lost[-1] >= first:
            self.makers.clear()
            first = int(lost[-1])
        rows = ioctl_rows(excerpt, ("KVM_CREATE_VCPU",))
        self.makers.update(table.tid[rows[rows >= first]].tolist())


def known_senders(excerpt: Excerpt) -> Senders:
    """Return what is known of those who may send interrupts, up to the end of this excerpt."""
    memory = excerpt.remember("senders", Senders)
    excerpt.once("senders", memory.add)
    return memory


@dataclass
class Follower:
    """Says whether what follows a recording was asked in each excerpt: it is not where a field is missing.

    Parameters
    ----------
    latest : number of the excerpt in which it was asked last, 0 for never
    """

    latest: int = 0

    def missed_some(self, excerpt: Excerpt) -> bool:
        """Say whether there were excerpts since the last one that it was asked in, and take note of this one."""
        number, latest = known_senders(excerpt).number, self.latest
        self.latest = number
        return latest > 0 and number > latest + 1


def all_are_recorded(excerpt: Excerpt) -> bool:
    """Say whether whatever thread sends an interrupt is recorded: the whole machine is, or the VM has no others."""
    known = known_senders(excerpt)
    return not known.others and (excerpt.capability.whole_machine or (known.created and not known.foreign))
