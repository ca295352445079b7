"""Injections of an excerpt by position, and how they repeat what a VM-exit interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.findings import constant
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.injection import INJECTED_BY

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

_VIRQ, _EXCEPTION = CLASS["inject interrupt"], CLASS["inject exception"]
REQUEUED_BY = "__vmx_complete_interrupts (vmx/vmx.c), svm_complete_interrupts (svm/svm.c)"
VIRQ_VECTOR = "kvm_inj_virq.vector|kvm_inj_virq.irq"  # called irq before 6.1


@dataclass(frozen=True)
class Injection:
    """A kvm_inj_virq or kvm_inj_exception at a sequence position."""

    position: int
    is_interrupt: bool
    vector: int
    repeated: bool

    def describe(self) -> str:
        """Return it in words."""
        kind = "kvm_inj_virq" if self.is_interrupt else "kvm_inj_exception"
        return f"{kind} {self.vector:#x}" + (" [reinjected]" if self.repeated else "")


class InjectionTable:
    """All injections of an excerpt, by position."""

    def __init__(self, excerpt: Excerpt) -> None:
        cls = excerpt.sequence.cls
        self.position = np.flatnonzero((cls == _VIRQ) | (cls == _EXCEPTION))
        self.is_interrupt = cls[self.position] == _VIRQ
        self.vector = np.full(len(self.position), -1, np.int64)
        self.repeated = np.zeros(len(self.position), bool)
        irq = "vector" if excerpt.has_field("kvm_inj_virq", "vector") else "irq"
        for kind, name, mine in (
            ("kvm_inj_virq", irq, self.is_interrupt),
            ("kvm_inj_exception", "exception", ~self.is_interrupt),
        ):
            at = self.position[mine]
            self.vector[mine] = excerpt.values_or(kind, name, at, -1)
            self.repeated[mine] = excerpt.values_or(kind, "reinjected", at, 0) != 0

    def between(self, first: int, last: int) -> list[Injection]:
        """Return the injections at sequence positions first..last, exclusive."""
        low, high = np.searchsorted(self.position, (first, last))
        return [
            Injection(int(self.position[i]), bool(self.is_interrupt[i]), int(self.vector[i]), bool(self.repeated[i]))
            for i in range(low, high)
        ]


def injections_of(excerpt: Excerpt) -> InjectionTable:
    """Return the injections of an excerpt (made once)."""
    return excerpt.once("injections", InjectionTable)


def check_causes(excerpt: Excerpt, found: Found, *, interrupts: bool) -> None:
    """Check that [reinjected] has a cause: an interrupted delivery, a cancelled entry, or userspace (V10, J4)."""
    segments, exits, sequence = excerpt.segments, excerpt.exits, excerpt.sequence
    injections = injections_of(excerpt)
    for i in np.flatnonzero(injections.repeated & (injections.is_interrupt == interrupts)) if len(exits) else ():
        position = int(injections.position[i])
        number = int(np.searchsorted(exits.start, position)) - 1
        same_thread = number >= 0 and sequence.thread[exits.start[number]] == sequence.thread[position]
        direct = same_thread and segments.of[position] == exits.seg[number]
        broken = sequence.broken[exits.start[number] + 1 : position + 1].any() or excerpt.nested[number]
        if not direct or broken or not excerpt.tells_vectoring[number]:
            found.check(0, 1)  # userspace between, or the recording begins here
            continue
        found.check(1)
        vector, info = int(injections.vector[i]), int(exits.vectoring[number])
        if _has_cause(excerpt, injections, number, position, (vector, interrupts)):
            continue
        expected = (
            f"no repetition of vector {vector:#x}: {excerpt.exit_name(number)} "
            + (f"interrupted {info:#x}" if info else "interrupted no delivery")
            + ", and no entry was cancelled"
        )
        observed = f"injection of {vector:#x} [reinjected]"
        if info:  # the delivery of another vector was to be repeated
            found.violate([position], lambda _, words=(expected, observed, REQUEUED_BY): words)  # type: ignore[misc]
        else:
            found.violate([position], constant(expected, observed))


def _has_cause(
    excerpt: Excerpt, injections: InjectionTable, number: int, position: int, what: tuple[int, bool]
) -> bool:
    """Say whether the exit interrupted this delivery, or an entry with it was cancelled since."""
    vector, interrupt = what
    exits, info = excerpt.exits, int(excerpt.exits.vectoring[number])
    kinds = INJECTED_BY["kvm_inj_virq" if interrupt else "kvm_inj_exception"]
    if info != 0 and info >> 8 & 7 in kinds and info & 0xFF == vector:
        return True
    earlier = injections.between(int(exits.start[number]), position)
    if any(one.is_interrupt == interrupt and one.vector == vector for one in earlier):
        return True
    # an injected exception that meets another becomes #DF, injected anew by the next pass
    return not interrupt and bool(exits.has("kvm_smm_transition")[number])
