"""Deliveries of events that a VM-exit interrupted: which came again, which were lost, and whether that was legal.

Few exits interrupt a delivery, so they are looked at one by one.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.injected_events import injections_of
from kvmtrace.check.userspace_changes import may_have_changed
from kvmtrace.isa.registry import BY_NUMBER
from kvmtrace.isa.words import INTR_TYPE_SOFT_INTR
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.injection import (
    INJECTED_BY,
    LEGAL_LOSSES,
    RESET_RIPS,
    SMI_RIP,
    SOFT_VECTORS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.injected_events import Injection


@dataclass
class Outcome:
    """What became of the interrupted deliveries of events that one tracepoint injects.

    Parameters
    ----------
    judged, unknown : how many could be judged, and how many could not
    lost : how many of those judged disappeared legally
    vanished : of the others (position of the VM-entry, expected, observed)
    """

    judged: int = 0
    unknown: int = 0
    lost: int = 0
    vanished: list[tuple[int, str, str]] = field(default_factory=list)


def count_interrupted(excerpt: Excerpt) -> int:
    """Count the exits that interrupted a delivery."""
    return int(np.count_nonzero(excerpt.exits.vectoring))


def interrupted_deliveries(excerpt: Excerpt, kind: str) -> Outcome:
    """Return what became of the interrupted deliveries that `kind` (kvm_inj_virq, kvm_inj_exception) repeats."""
    return excerpt.once(f"interrupted deliveries of {kind}", lambda own: _follow(own, kind))


def _follow(excerpt: Excerpt, kind: str) -> Outcome:
    exits, segments, injections = excerpt.exits, excerpt.segments, injections_of(excerpt)
    number = np.flatnonzero(exits.vectoring)
    if not len(number):
        return Outcome()
    number = number[~excerpt.nested[number]]
    types = (exits.vectoring[number] >> np.uint64(8)).astype(np.int64) & 7
    number = number[np.isin(types, INJECTED_BY[kind])]
    entry = segments.resume[exits.seg[number]]
    outcome = Outcome(unknown=int(np.count_nonzero(entry < 0)))
    number, entry = number[entry >= 0], entry[entry >= 0]
    first, last = exits.start[number], segments.start[entry]
    changed = may_have_changed(excerpt, first, last)
    told = excerpt.has_field(kind, "reinjected")
    for i, exit_number in enumerate(number):
        if changed[i]:
            outcome.unknown += 1
            continue
        info = int(exits.vectoring[exit_number])
        seen = injections.between(int(first[i]), int(last[i]))
        outcome.judged += 1
        if _repeats(seen, info, told=told):
            continue
        if any(legal(excerpt, int(exit_number), info, seen) for legal in _LEGAL):
            outcome.lost += 1
            continue
        expected = (
            f"{kind} of vector {info & 0xFF:#x} [reinjected]: {excerpt.exit_name(exit_number)} "
            f"interrupted its delivery ({info:#x})"
        )
        observed = "VM-entry after " + (", ".join(one.describe() for one in seen) or "no injection")
        outcome.vanished.append((int(last[i]), expected, observed))
    return outcome


def _repeats(seen: list[Injection], info: int, *, told: bool) -> bool:
    """Say whether the interrupted event is among the injections."""
    interrupt = info >> 8 & 7 in INJECTED_BY["kvm_inj_virq"]
    return any(
        one.is_interrupt == interrupt and one.vector in (info & 0xFF, -1) and (one.repeated or not told) for one in seen
    )


def _elsewhere(excerpt: Excerpt, number: int, _info: int, _seen: list[Injection]) -> bool:
    """Say whether the vCPU went on somewhere else: task switch, reset, system-management mode."""
    exits = excerpt.exits
    if excerpt.of_kind("task_switch")[number]:
        return True
    return int(exits.later_rip[number]) in (*RESET_RIPS, SMI_RIP)


def _replaced(_excerpt: Excerpt, _number: int, _info: int, seen: list[Injection]) -> bool:
    """Say whether an exception took its place."""
    return any(not injection.is_interrupt for injection in seen)


def _cleared(excerpt: Excerpt, number: int, info: int, _seen: list[Injection]) -> bool:
    """Say whether one of the events was traced that clear the queues."""
    names = (
        set(LEGAL_LOSSES)
        if info >> 8 & 7 in INJECTED_BY["kvm_inj_exception"]
        else set(LEGAL_LOSSES) - {"kvm_emulate_insn"}
    )
    return bool(excerpt.exits.chain_has(*names)[number])


def _soft(excerpt: Excerpt, number: int, info: int, _seen: list[Injection]) -> bool:
    """Say whether it is an instruction's event, on an ISA where KVM may run it again or drop it."""
    soft = info >> 8 & 7 == INTR_TYPE_SOFT_INTR or info & 0xFF in SOFT_VECTORS
    return soft and BY_NUMBER[int(excerpt.exits.isa[number])].soft_events_move_rip


_LEGAL: tuple[Callable[[Excerpt, int, int, list[Injection]], bool], ...] = (_elsewhere, _replaced, _cleared, _soft)
