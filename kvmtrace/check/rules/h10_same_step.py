"""H10: the same instruction is stepped over by the same length each time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.excerpt import is_port_access
from kvmtrace.check.exit_conditions import holds, needs_of
from kvmtrace.check.rip_continuity import MAX_INSTRUCTION, advance, plain_resumes
from kvmtrace.check.rule import SUSPICION, RowPart, Rule
from kvmtrace.isa.base import RipClass
from kvmtrace.model.nesting import TELLS_L2
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

RULE = Rule(
    "H10",
    "same instruction, same step",
    SUSPICION,
    (
        "kvm_exit.exit_reason",
        "kvm_exit.isa",
        "kvm_exit.guest_rip",
        "kvm_entry.rip",
        "kvm_userspace_exit|kvm_fpu.load",
    ),
    "A vCPU that leaves guest mode at the same RIP of the same guest for the same reason is resumed as far behind it "
    "as the last time.",
    "skip_emulated_instruction (vmx/vmx.c), svm_skip_emulated_instruction (svm/svm.c)",
    "a step that is wrong each time; and code that was changed, or other code at the same address, looks like a fault",
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x81000000
kvm_exit: exit_reason=10 guest_rip=0x81000000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x81000002
kvm_exit: exit_reason=10 guest_rip=0x81000000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x81000002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x81000000
kvm_exit: exit_reason=10 guest_rip=0x81000000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x81000002
kvm_exit: exit_reason=10 guest_rip=0x81000000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x81000003
""",
)
_U = np.uint64
_REAL_MODE_END = _U(1 << 16)  # below it, segments decide what is at a RIP
_MIX = _U(0x9E3779B97F4A7C15)  # odd: mixes the thread's key into a key of 60 bits
MAX_REMEMBERED = 1 << 16  # instructions per exit reason


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if row.rip is RipClass.ADVANCE:
        yield RowPart("", needs_of(("string",)) if is_port_access(row) else (), partial(_check, row=row))


def _check(excerpt: Excerpt, group: NDArray[np.intp], found: Found, *, row: ExitRow) -> None:
    exits = excerpt.exits
    group = group[(exits.next_kind[group] == ENTRY) & ~exits.has("FPU unload")[group]]
    group = plain_resumes(excerpt, group[exits.get("guest_rip")[group] >= _REAL_MODE_END])
    if is_port_access(row):
        group = group[~holds("string", excerpt, group)]
    moved = advance(excerpt, group, exits.resume_rip[group])
    stepped = (moved > 0) & (moved <= MAX_INSTRUCTION)
    group, moved = group[stepped], moved[stepped].astype(np.uint64)
    found.check(len(group))
    if not len(group):
        return
    known: dict[int, int] = excerpt.remember(f"steps {row.code:#x}", dict)
    pair = (_keys(excerpt, group) << _U(4)) | moved
    for one in distinct(pair).tolist():
        usual = known.setdefault(one >> 4, one & 15) if len(known) < MAX_REMEMBERED else known.get(one >> 4, one & 15)
        if usual != one & 15:
            _report(excerpt, group[pair == one], (one & 15, usual), found)


def _keys(excerpt: Excerpt, group: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Return a key of vCPU, its guest or a guest of that, and RIP; others have the same by chance once in 2^60."""
    sequence = excerpt.sequence
    vcpu = np.array([sequence.key_of(thread) & 0xFFFFFFFF for thread in range(len(sequence.tids))], np.uint64)
    owner = vcpu[excerpt.thread[group]] << _U(1) | excerpt.exits.has(TELLS_L2)[group].astype(np.uint64)
    keys: NDArray[np.uint64] = excerpt.exits.get("guest_rip")[group] * _U(3) + owner * _MIX
    return keys


def _report(excerpt: Excerpt, bad: NDArray[np.intp], steps: tuple[int, int], found: Found) -> None:
    exits = excerpt.exits
    moved, usual = steps

    def describe(i: int) -> tuple[str, str]:
        where = f"{excerpt.exit_name(bad[i])} at rip {int(exits.get('guest_rip')[bad[i]]):#x}"
        return f"{usual} bytes on, as after {where} before", f"{moved} bytes"

    found.violate(excerpt.segments.start[exits.seg[bad] + 1], describe)
