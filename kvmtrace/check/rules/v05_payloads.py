"""V5: a follow-up says the same as the exit that caused it, and events that belong together agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT
from kvmtrace.check.findings import constant
from kvmtrace.check.rule import VIOLATION, RowPart, Rule
from kvmtrace.check.syndrome_comparisons import COMPARISONS
from kvmtrace.check.vcpu_identity import vcpu_ids
from kvmtrace.isa.words import INTR_TYPE_EXT_INTR, decode_intr_info
from kvmtrace.kvm.apic import X2APIC_MSR_BASE
from kvmtrace.kvm.msrs import MSR_X2APIC_ICR
from kvmtrace.kvm.vectors import EXCEPTIONS_WITH_ERROR_CODE, GP_VECTOR
from kvmtrace.model.predicates import CHECKS
from kvmtrace.model.thresholds import threshold
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

RULE = Rule(
    "V5",
    "payloads agree",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa"),
    "A follow-up event carries the same port, size, direction, RIP, address, error code, MSR direction or control "
    "register as the exit that caused it.",
    "handle_io, handle_cr, handle_ept_violation (vmx/vmx.c); io_interception, npf_interception (svm/svm.c)",
    "values that only the guest's registers hold, such as the data written",
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_entry: vcpu_id=0 rip=0x1001
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x2f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1001
""",
)
_U = np.uint64
_MILLISECOND = 1_000_000  # ns
X2APIC_EOI = 0x80B  # write-only: any access that raises no #GP is an EOI


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    for name in row.checks:
        if CHECKS[name].rule == RULE.id:
            compared = CHECKS[name]
            yield RowPart(compared.sentence, compared.needs, COMPARISONS[name], source=compared.source)


def _check_vcpu(excerpt: Excerpt, found: Found, kind: str, name: str) -> None:
    """Check that follow-ups name the vCPU that left the guest last."""
    sequence, segments = excerpt.sequence, excerpt.segments
    positions = segments.positions(kind)
    if not len(positions):
        return
    owner = excerpt.once("the latest entry or exit", _latest_told)[segments.of[positions]]
    known = (owner >= 0) & (sequence.thread[segments.start[owner]] == sequence.thread[positions])
    positions, owner = positions[known], owner[known]
    named = sequence.values(kind, name, positions).astype(np.int64)
    expected = vcpu_ids(excerpt)[owner]
    at = np.flatnonzero(named != expected)
    found.check(len(positions))
    found.violate(
        positions[at],
        lambda i: (
            f"{kind}.{name} {int(expected[at[i]])}, the vCPU that this thread runs",
            f"{int(named[at[i]])}",
        ),
    )


def _latest_told(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return, per segment, the latest one up to it that begins with kvm_entry or kvm_exit; -1 for none."""
    segments = excerpt.segments
    told = (segments.kind == ENTRY) | (segments.kind == EXIT)
    latest: NDArray[np.intp] = np.maximum.accumulate(np.where(told, np.arange(len(segments)), -1))
    return latest


def _register_vcpu_check(kind: str, name: str) -> None:
    needs = (f"{kind}.{name}", "kvm_entry.vcpu_id", "kvm_exit.vcpu_id")

    @RULE.part(f"the vCPU of {kind}", needs=needs, places=kind, local=True)
    def _vcpu(excerpt: Excerpt, found: Found) -> None:
        _check_vcpu(excerpt, found, kind, name)


_register_vcpu_check("kvm_page_fault", "vcpu_id")
_register_vcpu_check("kvm_eoi", "apicid")
_register_vcpu_check("kvm_pv_eoi", "apicid")
_register_vcpu_check("kvm_smm_transition", "vcpu_id")


@RULE.part("one ISA", adds=False)
def _one_isa(excerpt: Excerpt, found: Found) -> None:
    """Check that all exits are of one ISA."""
    isa = excerpt.exits.isa
    if not len(isa) or not excerpt.capability.exact_errno:  # tools may drop what they cannot name
        return
    common = int(np.bincount(isa).argmax())
    bad = np.flatnonzero(isa != common)
    found.violate(excerpt.exits.start[bad], lambda i: (f"isa {common}", f"isa {int(isa[bad[i]])}"))


@RULE.part("the exit reason's own words", adds=False)
def _never_told(excerpt: Excerpt, found: Found) -> None:
    """Check that exit reasons are some that a kernel of their ISA can trace."""
    exits = excerpt.exits
    wrong = np.zeros(len(exits), bool)
    for isa, mine in exits.by_isa:
        if isa.never_told is not None:
            wrong |= mine & isa.never_told(exits.code)
    bad = np.flatnonzero(wrong)
    found.violate(exits.start[bad], lambda i: ("no class: only a trap has one", f"{int(exits.code[bad[i]]):#x}"))


@RULE.part(
    "#GP of an MSR access",
    source="kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_complete_insn_gp (x86.c)",
    needs=("kvm_msr.exception", "kvm_inj_exception.exception", "kvm_exit.guest_rip", "kvm_entry.rip"),
    places="kvm_msr",
    local=True,
)
def _gp(excerpt: Excerpt, found: Found) -> None:
    """Check that where kvm_msr says (#GP), #GP is injected and nothing skipped; else neither."""
    exits = excerpt.exits
    group = np.flatnonzero((exits.next_kind == ENTRY) & ~excerpt.nested & ~exits.has("kvm_smm_transition"))
    first = excerpt.first_in_exit("kvm_msr", group)
    injected = excerpt.first_in_exit("inject exception", group)
    group, first, injected = group[first >= 0], first[first >= 0], injected[first >= 0]
    refused = excerpt.sequence.values("kvm_msr", "exception", first) != 0
    vector = np.full(len(group), -1, np.int64)
    there = injected >= 0
    vector[there] = excerpt.sequence.values("kvm_inj_exception", "exception", injected[there])
    stayed = exits.resume_rip[group] == exits.get("guest_rip")[group]
    at = np.flatnonzero(np.where(refused, (vector != GP_VECTOR) | ~stayed, (vector == GP_VECTOR) & stayed))
    found.check(len(group))
    found.violate(
        first[at],
        lambda i: (
            "kvm_msr (#GP) if and only if #GP is injected at the same rip",
            f"exception {int(refused[at[i]])}, injected {int(vector[at[i]])}",
        ),
    )


@RULE.part(
    "the cause of the VM-exit",
    needs=("kvm_exit.intr_info",),
    source="vmx_get_exit_info (vmx/vmx.c), svm_get_exit_info (svm/svm.c)",
    local=True,
)
def _intr_info(excerpt: Excerpt, found: Found) -> None:
    """Check that exits by exceptions and by interrupts of the host carry information of their own type."""
    exits = excerpt.exits
    external = excerpt.of_kind("external_interrupt")
    caused = (external | excerpt.of_kind("exception")) & excerpt.of_isa(lambda isa: isa.exit_intr_info)
    group = np.flatnonzero(caused & ~exits.failed_entry & ~excerpt.nested)
    info = decode_intr_info(exits.get("intr_info")[group])
    bad = group[~info.valid | ((info.type == INTR_TYPE_EXT_INTR) != external[group])]
    found.check(len(group))
    found.violate(
        exits.start[bad],
        lambda i: (
            f"intr_info valid, of the type of {excerpt.exit_name(bad[i])}",
            f"{int(exits.get('intr_info')[bad[i]]):#x}",
        ),
    )


@RULE.part(
    "error codes of exceptions",
    source="kvm_multiple_exception, kvm_inject_exception (x86.c)",
    needs=("kvm_inj_exception.has_error", "kvm_inj_exception.exception"),
    places="inject exception",
    local=True,
)
def _error_codes(excerpt: Excerpt, found: Found) -> None:
    """Check that only exceptions that have an error code are injected with one."""
    positions = excerpt.segments.positions("inject exception")
    vector = excerpt.sequence.values("kvm_inj_exception", "exception", positions).astype(np.int64)
    has_error = excerpt.sequence.values("kvm_inj_exception", "has_error", positions) != 0
    at = np.flatnonzero(has_error & ~among(vector, EXCEPTIONS_WITH_ERROR_CODE))
    found.check(len(positions))
    found.violate(positions[at], lambda i: (f"no error code: exception {int(vector[at[i]])} has none", "has_error 1"))


@RULE.part(
    "single port accesses",
    needs=("kvm_pio.count", "kvm_emulate_insn"),
    places="kvm_pio",
    adds=False,
    source="kvm_fast_pio, emulator_pio_in_out (x86.c)",
    local=True,
)
def _single_pio(excerpt: Excerpt, found: Found) -> None:
    """Check that a port access has count 1 where no string instruction was decoded."""
    exits, segments = excerpt.exits, excerpt.segments
    positions = segments.positions("kvm_pio")
    owner = segments.of[positions]
    string = segments.chain_mask[owner] & _U(1 << CLASS["kvm_emulate_insn"]) != 0
    plain = ~string & (np.searchsorted(exits.start, positions) > 0) & segments.chain_known[owner]
    count = excerpt.sequence.values("kvm_pio", "count", positions)
    at = np.flatnonzero(plain & (count != 1))
    found.violate(
        positions[at], lambda i: ("kvm_pio.count 1: no string instruction was decoded", f"{int(count[at[i]])}")
    )


@RULE.part(
    "how long a halted vCPU waited",
    needs=("kvm_vcpu_wakeup.ns",),
    places="wake-up",
    adds=False,
    source="kvm_vcpu_halt (virt/kvm/kvm_main.c)",
)
def _waited(excerpt: Excerpt, found: Found) -> None:
    """Check that a vCPU that halted did not wait for longer than its VM-exit lies back."""
    segments, ts_ns = excerpt.segments, excerpt.sequence.ts_ns
    positions = segments.positions("wake-up")
    positions = positions[segments.kind[segments.of[positions]] == EXIT]
    begin = segments.start[segments.of[positions]]
    elapsed = ts_ns[positions] - ts_ns[begin]
    # clocks that count events or jiffies measure no such time
    measured = elapsed > threshold("clock_measures")
    measured &= (ts_ns[positions] % _MILLISECOND != 0) | (ts_ns[begin] % _MILLISECOND != 0)
    positions, elapsed = positions[measured], elapsed[measured]
    waited = excerpt.sequence.values("kvm_vcpu_wakeup", "ns", positions).astype(np.int64)
    at = np.flatnonzero(waited - (waited >> 6) - threshold("clocks_differ") > elapsed)
    found.check(len(positions))
    found.violate(
        positions[at],
        lambda i: (
            f"at most {elapsed[at[i]] / 1e6:.3f} ms, the time since the VM-exit",
            f"kvm_vcpu_wakeup after {waited[at[i]] / 1e6:.3f} ms",
        ),
    )


@RULE.part(
    "polling",
    needs=("kvm_vcpu_wakeup.valid",),
    places="wake-up",
    adds=False,
    source="kvm_vcpu_halt, vcpu_valid_wakeup (virt/kvm/kvm_main.c)",
    local=True,
)
def _valid(excerpt: Excerpt, found: Found) -> None:
    """Check that polling counts as valid: only s390's KVM ever says otherwise."""
    positions = excerpt.segments.positions("wake-up")
    bad = positions[excerpt.sequence.values("kvm_vcpu_wakeup", "valid", positions) == 0]
    found.check(len(positions))
    found.violate(bad, constant("kvm_vcpu_wakeup that says polling valid", "invalid"))


def _apic_msrs(excerpt: Excerpt) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of accesses to x2APIC registers that raised no #GP, and the numbers of the MSRs."""
    segments, sequence = excerpt.segments, excerpt.sequence
    positions = segments.positions("kvm_msr")
    ecx = sequence.values("kvm_msr", "ecx", positions).astype(np.int64)
    owner = segments.of[positions]
    own = among(ecx >> 8, (X2APIC_MSR_BASE >> 8,)) & (sequence.values("kvm_msr", "exception", positions) == 0)
    own &= (segments.kind[owner] == EXIT) & np.isin(owner, excerpt.exits.seg[~excerpt.nested])
    return positions[own], ecx[own]


@RULE.part(
    "x2APIC registers",
    source="kvm_x2apic_msr_write, kvm_x2apic_msr_read, kvm_lapic_msr_write, kvm_lapic_reg_write (lapic.c)",
    needs=("kvm_msr.ecx", "kvm_msr.write", "kvm_msr.exception", "kvm_apic.reg"),
    places="kvm_msr",
    adds=False,
    local=True,
)
def _x2apic(excerpt: Excerpt, found: Found) -> None:
    """Check that an x2APIC register is traced once, by its offset, whenever its MSR is accessed without #GP."""
    segments = excerpt.segments
    positions, ecx = _apic_msrs(excerpt)
    # kvm_lapic_msr_read returns the ICR, the one register of 64 bits, before it traces anything
    untraced = (ecx == MSR_X2APIC_ICR) & (excerpt.sequence.values("kvm_msr", "write", positions) == 0)
    positions, ecx = positions[~untraced], ecx[~untraced]
    owner = segments.of[positions]
    counts = excerpt.segment_counts("kvm_apic")[owner]
    first = segments.first_in("kvm_apic")[owner]
    offset = np.full(len(positions), -1, np.int64)
    offset[first >= 0] = excerpt.sequence.values("kvm_apic", "reg", first[first >= 0])
    bad = np.flatnonzero((counts != 1) | (offset != (ecx - X2APIC_MSR_BASE) << 4))
    found.check(len(positions))
    found.violate(
        positions[bad],
        lambda i: (
            f"one kvm_apic of register {int(ecx[bad[i]]) - X2APIC_MSR_BASE << 4:#x}",
            f"{counts[bad[i]]}, the first of register {offset[bad[i]]:#x}",
        ),
    )


@RULE.part(
    "EOI by MSR",
    source="kvm_lapic_reg_write, apic_set_eoi (lapic.c)",
    needs=("kvm_msr.ecx", "kvm_msr.exception", "kvm_eoi", "kvm_apic"),
    places="kvm_msr",
    adds=False,
    local=True,
)
def _x2apic_eoi(excerpt: Excerpt, found: Found) -> None:
    """Check that a write to the EOI register ends an interrupt."""
    positions, ecx = _apic_msrs(excerpt)
    ends = (ecx == X2APIC_EOI) & (excerpt.segment_counts("kvm_eoi")[excerpt.segments.of[positions]] == 0)
    found.violate(positions[ends], constant("kvm_eoi for a write to the EOI register", "none"))
