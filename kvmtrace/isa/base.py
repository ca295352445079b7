"""What KVM owes after a VM-exit: the shape of a row of the exit tables.

The rows stand in `exits_vmx.py` and `exits_svm.py`, keyed on the exit number. The checker turns them into
look-up arrays; `kvmtrace model` prints them. No expectation hides in code.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class RipClass(enum.Enum):
    """Where the guest continues after an in-kernel resume (kvm-lifecycle: RIP classes)."""

    SAME = "S"  # entry.rip == exit.rip
    ADVANCE = "A"  # entry.rip == exit.rip + length of the instruction
    EMULATED = "E"  # by the emulator, if there is a kvm_emulate_insn; else the same instruction again
    TRAP = "T"  # trap-like: the hardware already advanced, KVM adds nothing
    ANY = "N"  # not predictable
    NEVER = "-"  # never resumes in the kernel


@dataclass(frozen=True)
class Must:
    """One of `events` must follow the VM-exit before the vCPU enters the guest or leaves to userspace.

    Parameters
    ----------
    events : alternatives, kernel tracepoint names
    count : how often ("exactly 1" is (1, 1)); max None is unbounded
    unless : conditions that lift the duty, names of `compare` predicates: "exception" (a kvm_inj_exception
        in the segment), "userspace" (the exit leaves to userspace), "interrupted" (-EINTR), "retry", ...
    """

    events: tuple[str, ...]
    count: tuple[int, int | None] = (1, 1)
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExitExpectation:
    """One row of the exit table.

    Parameters
    ----------
    code : int, basic exit reason (VMX) or exit code (SVM)
    handler : str, KVM's function, with its file: "handle_io (vmx/vmx.c)"
    rip : RipClass of an in-kernel resume
    length : int, nominal (shortest) instruction length for RipClass.ADVANCE, else 0
    in_kernel : bool, the exit can be handled without leaving to userspace
    userspace : frozenset of KVM_EXIT_* numbers that this exit itself may cause (beyond those that may
        follow any exit, see ANY_EXIT_USERSPACE)
    must, may : follow-up events; every tracked follow-up event that is in neither is forbidden (V13)
    checks : names of payload rules that apply (V5), e.g. "pio_matches_qualification"
    rip_when : (predicate, RipClass) pairs; the first predicate that holds replaces `rip`. An emulated
        instruction (kvm_emulate_insn) follows RipClass.EMULATED whatever stands here
    source : str, kernel function and file, or the reference manual's section name
    note : str, one sentence for people who learn
    """

    code: int
    handler: str
    rip: RipClass
    length: int = 0
    in_kernel: bool = True
    userspace: frozenset[int] = frozenset()
    must: tuple[Must, ...] = ()
    may: frozenset[str] = frozenset()
    checks: tuple[str, ...] = ()
    source: str = ""
    note: str = field(default="", compare=False)
    rip_when: tuple[tuple[str, RipClass], ...] = ()
