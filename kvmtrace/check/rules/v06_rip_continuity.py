"""V6: where the guest goes on after an exit that KVM handled, by the exit's RIP class."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, USERSPACE
from kvmtrace.check.exit_conditions import next_rip, port_access
from kvmtrace.check.rip_continuity import (
    describe_continuation,
    fits,
    plain_resumes,
    portions_of,
    stepped_and_raised,
)
from kvmtrace.check.rule import VIOLATION, RowPart, Rule
from kvmtrace.isa.base import RipClass
from kvmtrace.model.predicates import CHECKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rip_continuity import Portion
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

    Group = NDArray[np.intp]

RULE = Rule(
    "V6",
    "RIP continuity",
    VIOLATION,
    (
        "kvm_exit.exit_reason",
        "kvm_exit.isa",
        "kvm_exit.guest_rip",
        "kvm_entry.rip",
        "kvm_userspace_exit|kvm_fpu.load",  # else the VMM may have run between
    ),
    "The guest continues where the exit's class says: at the same instruction, behind it, or as the emulator left it.",
    "kvm_skip_emulated_instruction, x86_emulate_instruction (x86.c); skip_emulated_instruction (vmx/vmx.c), "
    "svm_skip_emulated_instruction (svm/svm.c)",
    "a skip that is off by a few bytes, where the instruction's length is not traced",
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x900
kvm_exit: exit_reason=32 guest_rip=0x900 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=1 ecx=10 data=0x0 exception=1
kvm_inj_exception: exception=13 has_error=1 error_code=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x900
kvm_exit: exit_reason=1 guest_rip=0x1010 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1010
kvm_exit: exit_reason=10 guest_rip=0x1010 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1010
""",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if row.rip is RipClass.NEVER:
        return  # V7 reports that it resumed at all
    for portion in portions_of(row):
        yield RowPart(
            portion.about,
            portion.needs,
            partial(_check, row=row, portion=portion),
            lambda excerpt, group, portion=portion: len(_chosen(excerpt, group, portion)),  # type: ignore[misc]
        )
    yield RowPart("", (), _count_unknown)
    if "io_next_rip" in row.checks:
        yield RowPart("the next RIP of port accesses", CHECKS["io_next_rip"].needs, _check_next_rip)


def _resumed(excerpt: Excerpt, group: Group) -> Group:
    """Return the exits that resumed in the kernel; between them and the entry, the VMM did not run."""
    exits = excerpt.exits
    resumed: Group = group[(exits.next_kind[group] == ENTRY) & ~exits.has("FPU unload")[group]]
    return resumed


def _chosen(excerpt: Excerpt, group: Group, portion: Portion) -> Group:
    """Return the exits of a portion that resumed in the kernel."""
    group = excerpt.once(f"resumed {id(group)}", lambda own: _resumed(own, group))
    chosen: Group = group[portion.select(excerpt, group, excerpt.exits.resume_rip[group])]
    return chosen


def _count_unknown(excerpt: Excerpt, group: Group, found: Found) -> None:
    """Count exits whose continuation is not seen; those that left to userspace are H5's."""
    seen = excerpt.exits.next_kind[group] == USERSPACE
    found.check(0, len(group) - len(_resumed(excerpt, group)) - np.count_nonzero(seen))


def _check(excerpt: Excerpt, whole: Group, found: Found, *, row: ExitRow, portion: Portion) -> None:
    group = _chosen(excerpt, whole, portion)
    found.check(len(group))
    if len(group):
        new = excerpt.exits.resume_rip[group]
        raised = stepped_and_raised(excerpt, group, row, new)
        good = fits(excerpt, group, row, new) | raised  # reported in other words
        _report_raised(excerpt, group[raised], found)
        _report(excerpt, row, group[~good], found)


def _report(excerpt: Excerpt, row: ExitRow, bad: Group, found: Found) -> None:
    """Report resumes at the wrong RIP, at the kvm_entry."""

    def describe(i: int) -> tuple[str, str]:
        rip, new = int(excerpt.exits.get("guest_rip")[bad[i]]), int(excerpt.exits.resume_rip[bad[i]])
        where = describe_continuation(excerpt, row, bad[i : i + 1])
        return f"after {excerpt.exit_name(bad[i])} at rip {rip:#x}: {where}", f"rip {new:#x} ({new - rip:+d})"

    found.violate(excerpt.segments.start[excerpt.segments.resume[excerpt.exits.seg[bad]]], describe)


def _report_raised(excerpt: Excerpt, bad: Group, found: Found) -> None:
    """Report instructions that were stepped over although they raised a fault, at the kvm_entry."""
    rip = excerpt.exits.get("guest_rip")[bad]
    found.violate(
        excerpt.segments.start[excerpt.segments.resume[excerpt.exits.seg[bad]]],
        lambda i: (
            f"after {excerpt.exit_name(bad[i])} the same rip {int(rip[i]):#x}: a fault was raised in its place",
            f"rip {int(excerpt.exits.resume_rip[bad[i]]):#x}, behind the instruction",
        ),
    )


def _check_next_rip(excerpt: Excerpt, group: Group, found: Found) -> None:
    """Check that a port access goes on at the RIP that the exit told, if it moves at all."""
    group = plain_resumes(excerpt, _resumed(excerpt, group))
    moved = excerpt.exits.resume_rip[group] != excerpt.exits.get("guest_rip")[group]
    group = group[moved & ~port_access(excerpt, group).string]
    expected, rip = next_rip(excerpt, group), excerpt.exits.resume_rip[group]
    at = np.flatnonzero(expected != rip)
    found.check(len(group))
    found.violate(
        excerpt.segments.start[excerpt.exits.seg[group[at]] + 1],
        lambda i: (
            f"rip {int(expected[at[i]]):#x}, which {excerpt.exit_name(group[at[i]])} told as the next",
            f"rip {int(rip[at[i]]):#x}",
        ),
    )
