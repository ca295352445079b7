"""RIP continuity across userspace exits: V6 where the VMM's ioctls tell that it set nothing, else H5."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import USERSPACE
from kvmtrace.check.batch import EXPECTATIONS
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.check.predicates import userspace_fields
from kvmtrace.check.rip import fits, overridden
from kvmtrace.check.userspace_changes import may_have_changed, sets_registers
from kvmtrace.kvm.userspace_exits import KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_MMIO, describe_userspace_exit
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch

    Group = NDArray[np.intp]

# reasons after which the guest goes on behind the instruction, once userspace has done its part
_COMPLETED = (KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_HLT)


def check_rip_after_userspace(batch: Batch) -> None:
    """Check the RIP of the first kvm_entry behind a userspace exit."""
    if not (batch.has_field("kvm_exit", "guest_rip") and batch.has_field("kvm_entry", "rip")):
        return
    rule = "V6" if batch.findings.saw_setters(sets_registers(batch)) else "H5"
    for number, whole in batch.groups.items():
        row = EXPECTATIONS[number]
        assert row is not None
        group = _resumed(batch, whole)
        if not len(group):
            continue
        new = batch.exits.later_rip[group]
        good, told = fits(batch, group, row, new)
        _, reason, errno = userspace_fields(batch, group)
        completed = among(reason, _COMPLETED) & (errno >= 0)
        told &= completed | (errno < 0)
        if "io_next_rip" in row.checks and batch.has_field("kvm_exit", "info2"):
            plain = completed & (reason == KVM_EXIT_IO) & ((batch.exits.get("info1")[group] & np.uint64(4)) == 0)
            good &= ~plain | (new == batch.exits.get("info2")[group]) | overridden(batch, group, new)
        batch.findings.check(rule, np.count_nonzero(told), np.count_nonzero(~told))
        _report(batch, rule, group, np.flatnonzero(~good & told), (reason, errno))


def _resumed(batch: Batch, whole: Group) -> Group:
    """Return the exits of a group that left to userspace and resumed, their state untouched."""
    entry = batch.segments.resume[batch.exits.seg[whole]]
    group = whole[(batch.exits.next_kind[whole] == USERSPACE) & (entry >= 0)]
    entry = batch.segments.resume[batch.exits.seg[group]]
    changed = may_have_changed(batch, batch.exits.start[group], batch.segments.start[entry])
    batch.findings.check("H5", 0, np.count_nonzero(changed))
    untouched: Group = group[~changed]
    return untouched


def _report(
    batch: Batch, rule: str, group: Group, at: NDArray[np.intp], outcome: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> None:
    bad = group[at]
    reason, errno = outcome

    def describe(i: int) -> tuple[str, str]:
        number = int(bad[i])
        rip, new = int(batch.exits.get("guest_rip")[number]), int(batch.exits.later_rip[number])
        words = describe_userspace_exit(int(reason[at[i]]), int(errno[at[i]]))
        expected = (
            f"after {exit_name(batch, number)} at rip {rip:#x} and {words}: behind the instruction, "
            "as userspace set no registers"
        )
        return expected, f"rip {new:#x} ({new - rip:+d})"

    batch.findings.violate(rule, batch.segments.start[batch.segments.resume[batch.exits.seg[bad]]], describe)
