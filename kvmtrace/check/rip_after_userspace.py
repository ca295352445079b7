"""RIP continuity across userspace exits: H5's, as KVM_CAP_SYNC_REGS sets registers without an ioctl."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import USERSPACE
from kvmtrace.check.exit_conditions import next_rip, port_access, userspace_fields
from kvmtrace.check.rip_continuity import fits, overridden, portions_of
from kvmtrace.check.rule import RowPart
from kvmtrace.check.userspace_changes import may_have_changed
from kvmtrace.isa.base import RipClass
from kvmtrace.kvm.userspace_exits import KVM_EXIT_IO, describe_userspace_exit
from kvmtrace.model.predicates import CHECKS
from kvmtrace.model.userspace_actions import COMPLETED, COMPLETED_BY, RIP_SETTERS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rip_continuity import Portion
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

    Group = NDArray[np.intp]

NEEDS = (
    "kvm_exit.exit_reason",
    "kvm_exit.isa",
    "kvm_exit.guest_rip",
    "kvm_entry.rip",
    "kvm_userspace_exit.reason",
    "kvm_userspace_exit.errno",
)


def parts_behind_userspace(row: ExitRow) -> Iterator[RowPart]:
    """Yield what is to be checked of a row's exits that left to userspace and resumed."""
    if row.rip is RipClass.NEVER:
        return
    told = NEEDS + (CHECKS["io_next_rip"].needs if "io_next_rip" in row.checks else ())
    for portion in portions_of(row):

        def check(excerpt: Excerpt, group: Group, found: Found, portion: Portion = portion) -> None:
            _check(excerpt, _chosen(excerpt, group, portion), row, found)

        def count(excerpt: Excerpt, group: Group, portion: Portion = portion) -> int:
            return len(_chosen(excerpt, group, portion))

        yield RowPart(f"behind userspace, {portion.about}", told + portion.needs, check, count)


def _resumed(excerpt: Excerpt, whole: Group) -> Group:
    group = whole[(excerpt.exits.next_kind[whole] == USERSPACE)]
    resumed: Group = group[excerpt.segments.resume[excerpt.exits.seg[group]] >= 0]
    return resumed


def _chosen(excerpt: Excerpt, whole: Group, portion: Portion) -> Group:
    """Return the exits of a portion that left to userspace and resumed."""
    group = excerpt.once(f"behind userspace {id(whole)}", lambda own: _resumed(own, whole))
    if not len(group):
        return group
    chosen: Group = group[portion.select(excerpt, group, excerpt.exits.later_rip[group])]
    return chosen


def _check(excerpt: Excerpt, group: Group, row: ExitRow, found: Found) -> None:
    """Check the RIP of the first kvm_entry behind a userspace exit."""
    group = _untouched(excerpt, group, found)
    if not len(group):
        return
    new = excerpt.exits.later_rip[group]
    good = fits(excerpt, group, row, new)
    _, reason, errno = userspace_fields(excerpt, group)
    completed = among(reason, COMPLETED) & (errno >= 0)
    told = completed | (errno < 0)
    if "io_next_rip" in row.checks:
        plain = completed & (reason == KVM_EXIT_IO) & ~port_access(excerpt, group).string
        good &= ~plain | (new == next_rip(excerpt, group)) | overridden(excerpt, group, new)
    found.check(np.count_nonzero(told), np.count_nonzero(~told))
    at = np.flatnonzero(~good & told)
    _report(excerpt, group[at], (reason[at], errno[at]), found)


def _untouched(excerpt: Excerpt, group: Group, found: Found) -> Group:
    """Return the exits whose state userspace did not set."""
    entry = excerpt.segments.resume[excerpt.exits.seg[group]]
    changed = may_have_changed(excerpt, excerpt.exits.start[group], excerpt.segments.start[entry], RIP_SETTERS)
    found.check(0, np.count_nonzero(changed))
    untouched: Group = group[~changed]
    return untouched


def completed_by(reason: int, errno: int) -> str:
    """Return the functions that go on with the guest behind a userspace exit."""
    own = COMPLETED_BY.get(reason, "") if errno >= 0 else ""
    return "; ".join(name for name in (own, "kvm_skip_emulated_instruction (x86.c)") if name)


def _report(excerpt: Excerpt, bad: Group, outcome: tuple[NDArray[np.int64], NDArray[np.int64]], found: Found) -> None:
    reason, errno = outcome

    def describe(i: int) -> tuple[str, str, str]:
        number = int(bad[i])
        rip, new = int(excerpt.exits.get("guest_rip")[number]), int(excerpt.exits.later_rip[number])
        words = describe_userspace_exit(int(reason[i]), int(errno[i]))
        expected = (
            f"after {excerpt.exit_name(number)} at rip {rip:#x} and {words}: behind the instruction, "
            "as userspace set no registers"
        )
        return expected, f"rip {new:#x} ({new - rip:+d})", completed_by(int(reason[i]), int(errno[i]))

    found.violate(excerpt.segments.start[excerpt.segments.resume[excerpt.exits.seg[bad]]], describe)
