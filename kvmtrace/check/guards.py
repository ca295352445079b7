"""Conditions on single steps (model.transitions.GUARDS), looked at one by one: they are rare.

A guard that cannot be told from the recording holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT, USERSPACE
from kvmtrace.isa.registry import BY_NUMBER
from kvmtrace.kvm.userspace_exits import KVM_EXIT_FAIL_ENTRY
from kvmtrace.model.injection import INIT_DELIVERY_MODE
from kvmtrace.model.thresholds import threshold
from kvmtrace.model.transitions import GUARDS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.isa.base import Isa

LOOK_AHEAD = threshold("look_ahead")
LOOK_BACK = threshold("look_back")
NESTED_FAILURE = CLASS["kvm_nested_vmenter_failed"]
_RUNS = (CLASS["call KVM_RUN"], CLASS["KVM_RUN"])
_CALLS = (*_RUNS, CLASS["call ioctl"], CLASS["vCPU ioctl"])
INIT_SERVED_NS = threshold("init_served_within")


REGISTERED: dict[str, Callable[[Sequence, int], bool]] = {}


def _guard(name: str) -> Callable[[Callable[[Sequence, int], bool]], Callable[[Sequence, int], bool]]:
    """Register the function that evaluates a guard of the transition table."""
    assert name in GUARDS, name

    def register(holds: Callable[[Sequence, int], bool]) -> Callable[[Sequence, int], bool]:
        REGISTERED[name] = holds
        return holds

    return register


def _value(sequence: Sequence, kind: str, field: str, position: int) -> int | None:
    if not sequence.table.has(kind, field):
        return None
    return int(sequence.values(kind, field, np.array([position]))[0])


def _isa(sequence: Sequence) -> Isa | None:
    """Return the ISA of the recording's first VM-exit."""
    if not sequence.table.has("kvm_exit", "isa") or not sequence.table.count("kvm_exit"):
        return None
    return BY_NUMBER.get(int(sequence.table.field("kvm_exit", "isa")[0]))


@_guard("entry_failed")
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


@_guard("nested_entry_failed")
def _nested_entry_failed(sequence: Sequence, position: int) -> bool:
    """Look for the failure from the thread's kvm_entry before up to the step, or to the next kvm_entry behind it.

    The processor's own has a number; without one KVM refused before it tried.
    """
    begin, stop = max(position - LOOK_BACK, 0), min(position + LOOK_BACK, len(sequence))
    mine = sequence.thread[begin:stop] == sequence.thread[position]
    entries = begin + np.flatnonzero(mine & (sequence.cls[begin:stop] == ENTRY))
    before, after = entries[entries < position], entries[entries >= position]
    first, last = int(before[-1]) if len(before) else begin, int(after[0]) if len(after) else stop
    failed = mine[first - begin : last - begin] & (sequence.cls[first:last] == NESTED_FAILURE)
    at = (first + np.flatnonzero(failed)).tolist()
    return any(_value(sequence, "kvm_nested_vmenter_failed", "err", one) != 0 for one in at)


@_guard("early_error")
def _early_error(sequence: Sequence, position: int) -> bool:
    errno = _value(sequence, "kvm_userspace_exit", "errno", position)
    return errno is None or errno < 0


@_guard("init_reset")
def _init_reset(sequence: Sequence, position: int) -> bool:
    """INIT puts and loads the FPU on this ISA, and one was accepted shortly before."""
    table = sequence.table
    isa = _isa(sequence)
    if isa is not None and not isa.resets_fpu:
        return False
    if not table.has("kvm_apic_accept_irq", "dm"):
        return True
    rows = table.rows("kvm_apic_accept_irq")
    init = table.field("kvm_apic_accept_irq", "dm") == INIT_DELIVERY_MODE
    age_ns = sequence.ts_ns[position] - table.ts_ns[rows[init]]
    return bool(np.any((age_ns >= 0) & (age_ns < INIT_SERVED_NS)))


@_guard("other_ioctl")
def _other_ioctl(sequence: Sequence, position: int) -> bool:
    """Look for the thread's last call."""
    begin = max(position - LOOK_AHEAD, 0)
    mine = sequence.thread[begin:position] == sequence.thread[position]
    calls = np.flatnonzero(mine & among(sequence.cls[begin:position], _CALLS))
    return not len(calls) or sequence.cls[begin + calls[-1]] not in _RUNS


@_guard("fastpath_exit")
def _fastpath_exit(sequence: Sequence, position: int) -> bool:
    before = np.flatnonzero(sequence.cls[max(position - LOOK_BACK, 0) : position] == EXIT)
    if not len(before):
        return False
    reason = _value(sequence, "kvm_exit", "exit_reason", max(position - LOOK_BACK, 0) + int(before[-1]))
    isa = _isa(sequence)
    return reason is None or isa is None or isa.code(reason) in isa.codes("fast_path")


def guard_holds(name: str, sequence: Sequence, position: int) -> bool:
    """Say whether a guard of the transition table holds at a step of the sequence."""
    return REGISTERED[name](sequence, position)
