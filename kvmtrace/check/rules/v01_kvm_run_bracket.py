"""V1: what brackets a KVM_RUN: system call, probe, FPU, the result, the returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, N_CLASSES
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.wrong_steps import check_steps, joined
from kvmtrace.model.ordering import CALL_STEPS, NEVER_NEXT, NEVER_NEXT_IF_PAIRED
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V1",
    "KVM_RUN bracket",
    VIOLATION,
    ("kvm_userspace_exit|kvm_fpu.load|kvm_vcpu_ioctl.cmd|sys_enter_ioctl.cmd",),
    "Each KVM_RUN loads the guest FPU once, unloads it once, and ends with one kvm_userspace_exit; the ioctl and the "
    "functions around it nest: ioctl, kvm_fpu load, entries and exits, kvm_fpu unload, kvm_userspace_exit, return.",
    "kvm_arch_vcpu_ioctl_run (x86.c), kvm_vcpu_ioctl (virt/kvm/kvm_main.c)",
    "a KVM_RUN that fails before vcpu_load, which leaves no KVM event",
    places="userspace exit",
    blames_handler=False,
    healthy="""
sys_enter_ioctl: fd=12 cmd=0xae80 arg=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
sys_exit_ioctl: ret=0
sys_enter_ioctl: fd=12 cmd=0xae80 arg=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_fpu: load=0
kvm_userspace_exit: reason=5 errno=0
sys_exit_ioctl: ret=0
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_fpu: load=0
kvm_userspace_exit: reason=5 errno=0
""",
)
_NUMBER = np.full(N_CLASSES, -1, np.int8)
_NUMBER[[CLASS[name] for name in CALL_STEPS]] = np.arange(len(CALL_STEPS))


def _legal(*tables: Mapping[str, frozenset[str]]) -> NDArray[np.bool_]:
    """Return which of CALL_STEPS may follow which: rows before, columns after."""
    legal = np.ones((len(CALL_STEPS), len(CALL_STEPS)), bool)
    for table in tables:
        for before, never in table.items():
            legal[CALL_STEPS.index(before), [CALL_STEPS.index(after) for after in sorted(never)]] = False
    return legal


_LEGAL, _LEGAL_IF_PAIRED = _legal(NEVER_NEXT), _legal(NEVER_NEXT, NEVER_NEXT_IF_PAIRED)


@RULE.part("steps", local=True)
def _steps(excerpt: Excerpt, found: Found) -> None:
    check_steps(excerpt, found, of_guest_mode=False)


@RULE.part("the steps of a call", needs=("sys_enter_ioctl.cmd", "sys_exit_ioctl"), adds=False)
def _calls(excerpt: Excerpt, found: Found) -> None:
    """Check that system call, probe, kvm_userspace_exit, probe and return come in turn, KVM_RUN named alike.

    A probe may miss a hit (kretprobes have a limit), so its absence proves nothing; system calls are all recorded,
    unless a filter by file descriptor dropped the calls but not the returns.
    """
    sequence = excerpt.sequence
    position = np.sort(np.concatenate([excerpt.segments.positions(step) for step in CALL_STEPS]))
    kind = _NUMBER[sequence.cls[position]]
    if excerpt.capability.filtered:
        found.check(0, len(position))
        return
    before, after = kind[:-1], kind[1:]
    told = _both_ways(excerpt)[sequence.thread[position[1:]]] & joined(excerpt, position)
    legal = _LEGAL_IF_PAIRED if _paired(excerpt) else _LEGAL
    wrong = np.flatnonzero(told & ~legal[before, after]) + 1
    found.check(np.count_nonzero(told), np.count_nonzero(~told))
    found.violate(
        position[wrong],
        lambda i: (
            f"after {CALL_STEPS[before[wrong[i] - 1]]}: the next step of the call",
            CALL_STEPS[after[wrong[i] - 1]],
        ),
    )


def _both_ways(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say of which threads calls and returns were recorded; a recorder may trace those of its target only."""
    sequence = excerpt.sequence
    n_threads = len(sequence.tids)
    positions = excerpt.segments.positions
    calls = np.concatenate([positions("call KVM_RUN"), positions("call ioctl")])
    n_calls = np.bincount(sequence.thread[calls], minlength=n_threads)
    n_returns = np.bincount(sequence.thread[positions("return to VMM")], minlength=n_threads)
    found: NDArray[np.bool_] = (n_calls > 0) & (n_returns > 0) & (np.abs(n_calls - n_returns) <= 2)
    return found


def _paired(excerpt: Excerpt) -> bool:
    """Say whether calls and returns were recorded alike: a filter by file descriptor can drop calls only."""
    positions = excerpt.segments.positions
    calls = len(positions("call KVM_RUN")) + len(positions("call ioctl"))
    return abs(calls - len(positions("return to VMM"))) <= 2 + len(distinct(excerpt.sequence.thread))
