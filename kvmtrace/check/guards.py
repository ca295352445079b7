"""Conditions on single steps (model.transitions.GUARDS), looked at one by one: they are rare."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT, USERSPACE
from kvmtrace.isa.exit_reasons import ISA_VMX
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.check.thread_events import Sequence

KVM_EXIT_FAIL_ENTRY = 9
VMX_FAST_PATH = frozenset({32, 52})  # MSR_WRITE, PREEMPTION_TIMER (vmx_exit_handlers_fastpath)
APIC_DM_INIT = 0x500  # kvm_apic_accept_irq traces mode << 8
LOOK_AHEAD = 4096
_RUNS = (CLASS["call KVM_RUN"], CLASS["KVM_RUN"])
_CALLS = (*_RUNS, CLASS["call ioctl"], CLASS["vCPU ioctl"])
INIT_SERVED_NS = 10_000_000


def _value(sequence: Sequence, kind: str, field: str, position: int) -> int | None:
    if not sequence.table.has(kind, field):
        return None
    return int(sequence.values(kind, field, np.array([position]))[0])


def _entry_failed(sequence: Sequence, position: int) -> bool:
    """Look for the thread's next userspace exit; a vCPU that enters the guest again has not failed."""
    stop = min(position + LOOK_AHEAD, len(sequence))
    ahead = sequence.thread[position:stop] == sequence.thread[position]
    hits = np.flatnonzero(ahead & among(sequence.cls[position:stop], (ENTRY, EXIT, USERSPACE)))
    if not len(hits):  # the recording ends first
        return True
    first = position + int(hits[0])
    if sequence.cls[first] != USERSPACE:
        return False
    reason = _value(sequence, "kvm_userspace_exit", "reason", first)
    return reason is None or reason == KVM_EXIT_FAIL_ENTRY


def _early_error(sequence: Sequence, position: int) -> bool:
    errno = _value(sequence, "kvm_userspace_exit", "errno", position)
    return errno is None or errno < 0


def _init_reset(sequence: Sequence, position: int) -> bool:
    """MPX is Intel's, and the INIT was accepted shortly before."""
    table = sequence.table
    isa = table.field("kvm_exit", "isa") if table.has("kvm_exit", "isa") else np.empty(0)
    if len(isa) and isa[0] != ISA_VMX:
        return False
    if not table.has("kvm_apic_accept_irq", "dm"):
        return True
    rows = table.rows("kvm_apic_accept_irq")
    init = table.field("kvm_apic_accept_irq", "dm") == APIC_DM_INIT
    age_ns = sequence.ts_ns[position] - table.ts_ns[rows[init]]
    return bool(np.any((age_ns >= 0) & (age_ns < INIT_SERVED_NS)))


def _other_ioctl(sequence: Sequence, position: int) -> bool:
    """Look for the thread's last call."""
    begin = max(position - LOOK_AHEAD, 0)
    mine = sequence.thread[begin:position] == sequence.thread[position]
    calls = np.flatnonzero(mine & among(sequence.cls[begin:position], _CALLS))
    return not len(calls) or sequence.cls[begin + calls[-1]] not in _RUNS


def _fastpath_exit(sequence: Sequence, position: int) -> bool:
    before = np.flatnonzero(sequence.cls[max(position - 64, 0) : position] == EXIT)
    if not len(before):
        return False
    reason = _value(sequence, "kvm_exit", "exit_reason", max(position - 64, 0) + int(before[-1]))
    return reason is None or reason in VMX_FAST_PATH


_GUARDS: dict[str, Callable[[Sequence, int], bool]] = {
    "entry_failed": _entry_failed,
    "early_error": _early_error,
    "init_reset": _init_reset,
    "other_ioctl": _other_ioctl,
    "fastpath_exit": _fastpath_exit,
}


def guard_holds(name: str, sequence: Sequence, position: int) -> bool:
    """Say whether a guard of the transition table holds at a step of the sequence."""
    return _GUARDS[name](sequence, position)
