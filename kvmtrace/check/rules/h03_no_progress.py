"""H3: the same exit at the same instruction, again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.excerpt import owed_events
from kvmtrace.check.injected_events import injections_of
from kvmtrace.check.routing_changes import ioctl_rows
from kvmtrace.check.rule import SUSPICION, RowPart, Rule
from kvmtrace.check.runs_of_exits import report_runs
from kvmtrace.model.states import PROGRESS_EVENTS, REMAPPING_EVENTS, REMAPPING_IOCTLS
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

    Group = NDArray[np.intp]

RULE = Rule(
    "H3",
    "no progress",
    SUSPICION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", "kvm_exit.guest_rip", "kvm_entry.rip"),
    "The same exit at the same instruction is not repeated without end.",
    "each handler resumes, advances or leaves to userspace",
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_fpu: load=1
261 times:
  kvm_entry: vcpu_id=0 rip=0x1000
  kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x0 intr_info=0x0 vcpu_id=0
  kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
""",
)

FAULT = "kvm_guest_fault"
_NEVER = np.iinfo(np.int64).min // 2


@dataclass
class _Remaps:
    """When the VM's memory was changed: times of this excerpt, behind the latest one before.

    Source: mmu_invalidate_retry_gfn (kvm_host.h), is_page_fault_stale (mmu.c), user_mem_abort (arch/arm64/kvm/mmu.c)
    """

    times: NDArray[np.int64] = field(default_factory=lambda: np.array([_NEVER]))

    def add(self, excerpt: Excerpt) -> bool:
        """Take in the new rows of an excerpt's table."""
        table = excerpt.whole.table
        rows = [table.rows(kind) for kind in REMAPPING_EVENTS if kind in table.kind_index]
        times = np.sort(table.ts_ns[np.concatenate([*rows, ioctl_rows(excerpt, REMAPPING_IOCTLS)])])
        self.times = np.append(self.times[-1:], times)
        return True


def _not_retried(excerpt: Excerpt, same: NDArray[np.bool_], group: Group) -> NDArray[np.bool_]:
    """Return which of a group's exits that come again do so although the VM's memory is not being changed."""
    remaps: _Remaps = excerpt.remember("remaps", _Remaps)
    excerpt.once("remaps", remaps.add)
    if np.count_nonzero(same) < threshold("no_progress"):  # nothing to report
        return same
    sequence = excerpt.sequence
    at = sequence.table.ts_ns[sequence.row[excerpt.exits.start[group]]]
    latest = remaps.times[np.maximum(np.searchsorted(remaps.times, at, "right") - 1, 0)]
    return same & (at - latest >= threshold("remap_takes"))


# REP instructions fault page after page at one RIP
@RULE.part(needs=("kvm_exit.info1", "kvm_exit.info2", "kvm_page_fault.fault_address"))
def _stuck(excerpt: Excerpt, found: Found) -> None:
    if len(excerpt.exits):
        report_runs(excerpt, found, _repeats(excerpt), threshold("no_progress"))


def _repeats(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say which exits equal the one before, which resumed at the same RIP without doing anything."""
    exits = excerpt.exits
    same = np.zeros(len(exits), bool)
    rip = exits.get("guest_rip")
    stays = (exits.next_kind == ENTRY) & (exits.resume_rip == rip)
    again, fresh = _injections(excerpt)
    stays = (stays | again) & ~fresh & ~exits.has(*PROGRESS_EVENTS)
    if not stays.any():
        return same
    same[1:] = stays[:-1]
    for column in (exits.raw, rip, exits.get("info1"), exits.get("info2"), _fault_addresses(excerpt)):
        same[1:] &= column[1:] == column[:-1]
    same &= ~excerpt.of_kind("asynchronous") & ~excerpt.nested
    # what KVM emulates it does not retry
    return np.where(exits.has("kvm_emulate_insn"), same, _not_retried(excerpt, same, np.arange(len(exits))))


def _fault_addresses(excerpt: Excerpt) -> NDArray[np.uint64]:
    """Return the faulting address of each exit, else 0."""
    address = np.zeros(len(excerpt.exits), np.uint64)
    position = excerpt.first_in_exit("kvm_page_fault", np.arange(len(excerpt.exits)))
    there = position >= 0
    address[there] = excerpt.sequence.values("kvm_page_fault", "fault_address", position[there])
    return address


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if FAULT in owed_events(row):
        needs = tuple(f"{FAULT}.{name}" for name in ("fault_address", "hsr", "hxfar"))
        yield RowPart("faults of the second stage", needs, _refaults)


def _refaults(excerpt: Excerpt, group: Group, found: Found) -> None:
    """Report the same fault again and again: the page is neither mapped, nor is the guest told, nor userspace asked.

    An interrupt of the host that comes between, at the same instruction, is no progress.
    """
    exits, rip = excerpt.exits, excerpt.exits.get("guest_rip")
    if len(group) < threshold("no_progress"):
        found.check(len(group))
        return
    number = np.full(len(exits), -1, np.intp)
    number[group] = np.arange(len(group))
    latest = np.maximum.accumulate(number)
    waits = excerpt.of_kind("asynchronous") & (exits.next_kind == ENTRY) & (rip == rip[group[np.maximum(latest, 0)]])
    others = np.cumsum((number < 0) & ~waits)
    position = excerpt.first_in_exit(FAULT, group)
    stays = (exits.next_kind[group] == ENTRY) & ~exits.has(*PROGRESS_EVENTS)[group] & (position >= 0)
    same = np.zeros(len(group), bool)
    same[1:] = stays[:-1] & (others[group[1:]] == others[group[:-1]])
    for name in ("fault_address", "hsr", "hxfar"):
        told = excerpt.sequence.values(FAULT, name, position)
        same[1:] &= told[1:] == told[:-1]
    same[1:] &= rip[group[1:]] == rip[group[:-1]]
    report_runs(excerpt, found, _not_retried(excerpt, same, group), threshold("no_progress"), group)


def _injections(excerpt: Excerpt) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Say which exits' interrupted delivery is injected again, and which have another event injected.

    Who tries the same delivery again and again gets nowhere, wherever RIP stands meanwhile.
    """
    exits, injections = excerpt.exits, injections_of(excerpt)
    again, fresh = np.zeros(len(exits), bool), np.zeros(len(exits), bool)
    if not len(injections.position):
        return again, fresh
    owner = np.full(len(excerpt.segments), -1, np.intp)
    owner[exits.seg] = np.arange(len(exits))
    of_exit = owner[excerpt.segments.of[injections.position]]
    mine = of_exit >= 0
    of_exit, vector, repeated = of_exit[mine], injections.vector[mine], injections.repeated[mine]
    interrupted = exits.vectoring[of_exit]
    same = (interrupted != 0) & ((interrupted & np.uint64(0xFF)).astype(np.int64) == vector)
    again[of_exit[same]] = True
    fresh[of_exit[~same & ~repeated]] = True
    return again & (exits.next_kind == ENTRY), fresh
