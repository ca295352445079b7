"""J10: an injected exception carries an error code exactly where that exception, or its first delivery, has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.injected_events import injections_of
from kvmtrace.check.observability import VECTORING
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.isa.words import decode_intr_info
from kvmtrace.kvm.vectors import EXCEPTIONS_WITH_ERROR_CODE, GP_VECTOR, PF_VECTOR, describe_exception
from kvmtrace.model.injection import INJECTED_BY
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "J10",
    "error codes of exceptions",
    VIOLATION,
    ("kvm_inj_exception.has_error", "kvm_inj_exception.exception"),
    "An exception is injected with an error code exactly where it has one: a page fault always, the others outside "
    "real mode; repeated, it carries what its interrupted delivery carried; that of a refused MSR access is 0.",
    "kvm_multiple_exception, kvm_inject_exception (x86.c); __vmx_complete_interrupts, svm_complete_interrupts",
    "a missing error code where the guest may be in real mode: below 4 GiB only page faults are certain",
    places="inject exception",
    blames_handler=False,
    healthy="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x80000b0e intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
kvm_inj_exception: exception=14 has_error=1 error_code=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x80000b0e intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
kvm_inj_exception: exception=14 has_error=0 error_code=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
)
DELIVERS_ERROR_CODE = np.uint64(1 << 11)  # of interruption information


@RULE.part("those that have one")
def _vectors(excerpt: Excerpt, found: Found) -> None:
    injections = injections_of(excerpt)
    mine = np.flatnonzero(~injections.is_interrupt)
    positions, vector = injections.position[mine], injections.vector[mine]
    has_error = excerpt.sequence.values("kvm_inj_exception", "has_error", positions) != 0
    may = among(vector, EXCEPTIONS_WITH_ERROR_CODE)
    must = (vector == PF_VECTOR) | (may & _above_4_gib(excerpt, positions))
    at = np.flatnonzero(~has_error & must)  # one too many is V5's
    found.check(np.count_nonzero(must), np.count_nonzero(may & ~must))
    found.violate(positions[at], lambda i: (f"{describe_exception(int(vector[at[i]]))} with an error code", "none"))


def _above_4_gib(excerpt: Excerpt, positions: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say at which injections the last VM-exit was at a RIP that no real mode has."""
    exits, sequence = excerpt.exits, excerpt.sequence
    number = np.searchsorted(exits.start, positions) - 1
    known = number >= 0
    number = np.maximum(number, 0)
    if not len(exits):
        return known
    known &= sequence.thread[exits.start[number]] == sequence.thread[positions]
    above: NDArray[np.bool_] = known & (exits.get("guest_rip")[number] >> np.uint64(32) != 0)
    return above


@RULE.part(
    "of repeated exceptions",
    needs=("kvm_exit.exit_reason", "kvm_exit.isa", VECTORING, "kvm_inj_exception.reinjected"),
    adds=False,
)
def _repeated(excerpt: Excerpt, found: Found) -> None:
    """Check that a repeated exception has an error code exactly if its interrupted delivery had one, and the same."""
    positions, number = _repetitions(excerpt)
    if not len(positions):
        return
    exits, values = excerpt.exits, excerpt.sequence.values
    expected = (exits.vectoring[number] & DELIVERS_ERROR_CODE) != 0
    has_error = values("kvm_inj_exception", "has_error", positions) != 0
    wrong = expected != has_error
    # where intr_info tells the interrupted delivery, the exit's error_code is that delivery's
    told = excerpt.of_isa(lambda isa: isa.vectoring_field == "intr_info")[number] & expected & has_error
    if excerpt.has_field("kvm_exit", "error_code") and excerpt.has_field("kvm_inj_exception", "error_code"):
        code = exits.get("error_code")[number] & np.uint64(0xFFFFFFFF)
        again = values("kvm_inj_exception", "error_code", positions).astype(np.uint64) & np.uint64(0xFFFFFFFF)
        wrong |= told & (code != again)
    at = np.flatnonzero(wrong)
    found.check(len(positions))
    found.violate(
        positions[at],
        lambda i: (
            f"{'the' if expected[at[i]] else 'no'} error code of the delivery {int(exits.vectoring[number[at[i]]]):#x}",
            "another" if has_error[at[i]] else "none",
        ),
    )


@RULE.part(
    "of refused MSR accesses",
    needs=("kvm_exit", "kvm_msr.exception", "kvm_inj_exception.error_code", "kvm_inj_exception.reinjected"),
    places="kvm_msr",
    adds=False,
    source="kvm_complete_insn_gp, kvm_inject_gp (x86.c)",
)
def _refused(excerpt: Excerpt, found: Found) -> None:
    exits, values = excerpt.exits, excerpt.sequence.values
    group = np.flatnonzero(exits.has("kvm_msr") & exits.has("inject exception") & (exits.next_kind == ENTRY))
    group = group[~excerpt.nested[group] & ~exits.has("kvm_emulate_insn")[group] & (exits.vectoring[group] == 0)]
    access, injected = excerpt.first_in_exit("kvm_msr", group), excerpt.first_in_exit("inject exception", group)
    mine = (values("kvm_msr", "exception", access) != 0) & (values("kvm_inj_exception", "reinjected", injected) == 0)
    mine &= values("kvm_inj_exception", "exception", injected) == GP_VECTOR
    mine &= values("kvm_inj_exception", "has_error", injected) != 0
    injected = injected[mine]
    code = values("kvm_inj_exception", "error_code", injected)
    at = np.flatnonzero(code != 0)
    found.check(len(injected))
    found.violate(injected[at], lambda i: ("error code 0: an MSR access was refused", f"{int(code[at[i]]):#x}"))


def _repetitions(excerpt: Excerpt) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first repeated exception behind each exit that interrupted its delivery, and the exit."""
    exits, injections = excerpt.exits, injections_of(excerpt)
    mine = np.flatnonzero(injections.repeated & ~injections.is_interrupt)
    if not len(mine) or not len(exits):
        return mine[:0], mine[:0]
    positions = injections.position[mine]
    number = np.maximum(np.searchsorted(exits.start, positions) - 1, 0)
    info = decode_intr_info(exits.vectoring[number])
    same = excerpt.segments.of[positions] == exits.seg[number]
    same &= info.valid & (info.vector == injections.vector[mine]) & ~excerpt.nested[number]
    same &= among(info.type, INJECTED_BY["kvm_inj_exception"])
    first = np.append(True, number[1:] != number[:-1]) if len(number) else same
    return positions[same & first], number[same & first]
