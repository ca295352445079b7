"""Payload equality (V5): a follow-up says the same as the exit that caused it (model.rules.CHECKS)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, USERSPACE
from kvmtrace.check.batch import EXPECTATIONS
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.check.instruction_bytes import is_string
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch

    Group = NDArray[np.intp]
    # (exits, positions of their follow-ups, field, expected values)
    Claim = tuple[Group, NDArray[np.intp], str, NDArray[np.uint64]]

_U = np.uint64
EXCEPTION_NMI = 0


def _with(batch: Batch, group: Group, name: str) -> tuple[Group, NDArray[np.intp]]:
    """Return the exits whose segment holds the class, and the position of its first event."""
    first = batch.first_in_exit(name, group)
    return group[first >= 0], first[first >= 0]


def _pio(batch: Batch, group: Group) -> tuple[Group, NDArray[np.intp]]:
    """Return exits with their kvm_pio: in the exit's segment, or after userspace completed the read."""
    own, first = _with(batch, group, "kvm_pio")
    rest = group[batch.first_in_exit("kvm_pio", group) < 0]
    rest = rest[batch.exits.next_kind[rest] == USERSPACE]
    later = batch.segments.first_in("kvm_pio")[batch.exits.seg[rest] + 1] if len(rest) else rest
    return np.append(own, rest[later >= 0]), np.append(first, later[later >= 0])


def _pio_claims(
    batch: Batch, group: Group, size: Callable[[NDArray[np.uint64]], NDArray[np.uint64]], in_bit: int
) -> list[Claim]:
    exits, positions = _pio(batch, group)
    info1 = batch.exits.get("info1")[exits]
    write = ((info1 & _U(in_bit)) == 0).astype(np.uint64)
    return [
        (exits, positions, "port", (info1 >> _U(16)) & _U(0xFFFF)),
        (exits, positions, "size", size(info1)),
        (exits, positions, "rw", write),
    ]


def _pio_qualification(batch: Batch, group: Group) -> list[Claim]:
    return _pio_claims(batch, group, lambda info1: (info1 & _U(7)) + _U(1), 8)


def _pio_exitinfo(batch: Batch, group: Group) -> list[Claim]:
    return _pio_claims(batch, group, lambda info1: (info1 >> _U(4)) & _U(7), 1)


def _page_fault(batch: Batch, group: Group) -> list[Claim]:
    exits, positions = _with(batch, group, "kvm_page_fault")
    claims: list[Claim] = []
    if batch.has_field("kvm_page_fault", "guest_rip"):
        claims.append((exits, positions, "guest_rip", batch.exits.get("guest_rip")[exits]))
    claims.append((exits, positions, "error_code", batch.exits.get("info1")[exits]))
    if len(exits) and batch.exits.isa[exits[0]] == ISA_SVM:
        claims.append((exits, positions, "fault_address", batch.exits.get("info2")[exits]))
    return claims


def _msr(batch: Batch, group: Group) -> list[Claim]:
    exits, positions = _with(batch, group, "kvm_msr")
    write = np.where(
        batch.exits.isa[exits] == ISA_VMX, batch.exits.code[exits] == 32, batch.exits.get("info1")[exits] == 1
    )
    return [(exits, positions, "write", write.astype(np.uint64))]


def _cr_qualification(batch: Batch, group: Group) -> list[Claim]:
    exits, positions = _with(batch, group, "kvm_cr")
    info1 = batch.exits.get("info1")[exits]
    kind = (info1 >> _U(4)) & _U(3)  # 0 write, 1 read, 2 clts, 3 lmsw: the last two trace a write of CR0
    return [
        (exits, positions, "cr", np.where(kind >= 2, _U(0), info1 & _U(15))),
        (exits, positions, "rw", (kind != 1).astype(np.uint64)),
    ]


def _cr_exit_code(batch: Batch, group: Group) -> list[Claim]:
    exits, positions = _with(batch, group, "kvm_cr")
    code = batch.exits.code[exits]
    selective = code == 0x65  # cr0_sel_write
    cr = np.where(selective, 0, code & 15).astype(np.uint64)
    return [(exits, positions, "cr", cr), (exits, positions, "rw", ((code >= 0x10) | selective).astype(np.uint64))]


def _emulated_rip(batch: Batch, group: Group) -> list[Claim]:
    exits, positions = _with(batch, group, "kvm_emulate_insn")
    return [(exits, positions, "rip", batch.exits.get("guest_rip")[exits])]


CLAIMS: dict[str, tuple[str, Callable[[Batch, Group], list[Claim]]]] = {
    "pio_matches_qualification": ("kvm_pio", _pio_qualification),
    "pio_matches_exitinfo": ("kvm_pio", _pio_exitinfo),
    "page_fault_matches_exit": ("kvm_page_fault", _page_fault),
    "msr_direction": ("kvm_msr", _msr),
    "cr_matches_qualification": ("kvm_cr", _cr_qualification),
    "cr_matches_exit_code": ("kvm_cr", _cr_exit_code),
    "emulated_rip": ("kvm_emulate_insn", _emulated_rip),
}


# fields of kvm_exit that a check reads
NEEDED: dict[str, tuple[str, ...]] = {
    "pio_matches_qualification": ("info1",),
    "pio_matches_exitinfo": ("info1",),
    "page_fault_matches_exit": ("guest_rip", "info1", "info2"),
    "msr_direction": ("info1",),
    "cr_matches_qualification": ("info1",),
    "emulated_rip": ("guest_rip",),
    "io_next_rip": ("guest_rip", "info1", "info2"),
}


def check_payloads(batch: Batch) -> None:
    """Check V5 for every exit whose table row asks for it, and the exact next RIP of port accesses."""
    for number, group in batch.groups.items():
        row = EXPECTATIONS[number]
        assert row is not None
        for name in row.checks:
            if not all(batch.has_field("kvm_exit", field) for field in NEEDED.get(name, ())):
                continue
            if name in CLAIMS:
                kind, claims = CLAIMS[name]
                for claim in claims(batch, group):
                    _check_claim(batch, kind, claim)
            elif name == "io_next_rip":
                _check_next_rip(batch, group)
            elif name == "mmio_matches_page_fault":
                _check_mmio_page(batch, group)


def _check_claim(batch: Batch, kind: str, claim: Claim) -> None:
    exits, positions, field, expected = claim
    if not batch.has_field(kind, field):
        return
    found = batch.sequence.values(kind, field, positions).astype(np.uint64)
    if batch.sequence.table.field(kind, field).dtype.itemsize <= 4:
        expected = expected & _U(0xFFFFFFFF)
    at = np.flatnonzero(found != expected)
    batch.findings.check("V5", len(exits))

    def describe(i: int) -> tuple[str, str]:
        j = at[i]
        return (
            f"{kind}.{field} {int(expected[j]):#x}, as {exit_name(batch, int(exits[j]))} says",
            f"{int(found[j]):#x}",
        )

    batch.findings.violate("V5", positions[at], describe)


def _plain_resumes(batch: Batch, group: Group) -> Group:
    """Return the exits that resumed directly, with nothing that moves RIP between."""
    exits = batch.exits
    usable = (exits.next_kind[group] == ENTRY) & batch.has_field("kvm_entry", "rip")
    usable &= ~exits.has("inject exception", "kvm_smm_transition")[group]
    group = group[usable]
    from kvmtrace.check.rip import overridden

    return group[~overridden(batch, group, exits.resume_rip[group])]


def _check_next_rip(batch: Batch, group: Group) -> None:
    """SVM tells the RIP behind a port access in EXITINFO2."""
    group = _plain_resumes(batch, group)
    group = group[(batch.exits.get("info1")[group] & _U(4)) == 0]
    expected, found = batch.exits.get("info2")[group], batch.exits.resume_rip[group]
    at = np.flatnonzero(expected != found)
    batch.findings.check("V6", len(group))
    entries = batch.segments.start[batch.exits.seg[group[at]] + 1]
    batch.findings.violate(
        "V6",
        entries,
        lambda i: (
            f"rip {int(expected[at[i]]):#x}: EXITINFO2 of {exit_name(batch, int(group[at[i]]))} is the next RIP",
            f"rip {int(found[at[i]]):#x}",
        ),
    )


def _check_mmio_page(batch: Batch, group: Group) -> None:
    """Check that the first kvm_mmio lies at the faulting address, or near it if it crosses pages."""
    if not batch.recorded("kvm_mmio", "kvm_page_fault", "kvm_emulate_insn"):
        return
    exits, positions = _with(batch, group, "kvm_mmio")
    fault = batch.first_in_exit("kvm_page_fault", exits)
    insn = batch.first_in_exit("kvm_emulate_insn", exits)
    one = (fault >= 0) & (insn >= 0) & (batch.segment_counts("kvm_emulate_insn")[batch.exits.seg[exits]] == 1)
    exits, positions, fault, insn = exits[one], positions[one], fault[one], insn[one]
    code = batch.sequence.values("kvm_emulate_insn", "insn", insn)
    unique, inverse = np.unique(code, axis=0, return_inverse=True)
    string = np.array([is_string(bytes(row))[1] for row in unique], bool)
    address = batch.sequence.values("kvm_page_fault", "fault_address", fault).astype(np.uint64)
    gpa = batch.sequence.values("kvm_mmio", "gpa", positions).astype(np.uint64)
    apart = np.abs((gpa >> _U(12)).astype(np.int64) - (address >> _U(12)).astype(np.int64))
    length = batch.sequence.values("kvm_mmio", "len", positions).astype(np.uint64)
    single = batch.segment_counts("kvm_mmio")[batch.exits.seg[exits]] == 1
    # within a page the address is exact; shadow paging traces a virtual one
    crosses = ((gpa & _U(0xFFF)) + length >= 0x1000) | ((address & _U(0xFFF)) == 0)
    exact = single & ~crosses & (batch.exits.code[exits] != EXCEPTION_NMI)
    ok = np.where(exact, gpa == address, apart <= 1) | (string[inverse.ravel()] if len(string) else False)
    at = np.flatnonzero(~ok)
    batch.findings.check("V5", len(exits))
    batch.findings.violate(
        "V5",
        positions[at],
        lambda i: (f"kvm_mmio at the faulting address {int(address[at[i]]):#x}", f"gpa {int(gpa[at[i]]):#x}"),
    )
