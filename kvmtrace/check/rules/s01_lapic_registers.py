"""S1: the page offset or MSR of an access to the LAPIC, its value, and the register that is traced agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.mmio_chain import MMIO_READ, MMIO_WRITE
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.kvm.apic import APIC_DEFAULT_BASE, APIC_EOI, APIC_ICR, X2APIC_MSR_BASE, describe_apic_register
from kvmtrace.model.side_events import ICR_BUSY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

    Positions = NDArray[np.intp]

RULE = Rule(
    "S1",
    "LAPIC registers agree",
    VIOLATION,
    ("kvm_exit", "kvm_apic.reg", "kvm_apic.rw"),
    "An access to the LAPIC's page, or to one of its MSRs, is traced as the register at that offset, in the same "
    "direction and with the same value; a write to the EOI register ends an interrupt.",
    "apic_mmio_read, apic_mmio_write, kvm_lapic_reg_write, kvm_lapic_reg_read, apic_set_eoi (lapic.c)",
    "a LAPIC that the guest moved to another address",
    places="kvm_apic",
    blames_handler=False,
    healthy="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[89, 07] flags=9 failed=0
kvm_mmio: type=2 len=4 gpa=0xfee000b0 val=0x0
kvm_apic: rw=1 reg=0xb0 val=0x0
kvm_eoi: apicid=0 vector=48
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[89, 07] flags=9 failed=0
kvm_mmio: type=2 len=4 gpa=0xfee000f0 val=0x1ff
kvm_apic: rw=1 reg=0xe0 val=0x1ff
kvm_entry: vcpu_id=0 rip=0x1002
""",
)
_U = np.uint64
_LOW = _U(0xFFFFFFFF)
_REGISTER = 16  # bytes from one register to the next


@RULE.part("MSRs", needs=("kvm_msr.ecx", "kvm_msr.write", "kvm_msr.exception"), adds=False)
def _msrs(excerpt: Excerpt, found: Found) -> None:
    msr, apic = _by_msr(excerpt)
    values = excerpt.sequence.values
    offset = (values("kvm_msr", "ecx", msr).astype(np.int64) - X2APIC_MSR_BASE) * _REGISTER
    # another register than the MSR's is V5's
    same = offset // _REGISTER == values("kvm_apic", "reg", apic).astype(np.int64) // _REGISTER
    write = values("kvm_msr", "write", msr) != 0
    _compare(excerpt, (apic[same], offset[same], write[same]), "kvm_msr of", found)


@RULE.part("the page", needs=("kvm_mmio.type", "kvm_mmio.len", "kvm_mmio.gpa"), places="kvm_apic")
def _page(excerpt: Excerpt, found: Found) -> None:
    mmio, apic = _by_page(excerpt)
    values = excerpt.sequence.values
    offset = values("kvm_mmio", "gpa", mmio).astype(np.int64) - APIC_DEFAULT_BASE
    write = values("kvm_mmio", "type", mmio).astype(np.int64) == MMIO_WRITE
    _compare(excerpt, (apic, offset, write), "kvm_mmio at", found)


@RULE.part(
    "values behind the page", needs=("kvm_mmio.type", "kvm_mmio.len", "kvm_mmio.gpa", "kvm_mmio.val", "kvm_apic.val"),
    adds=False,
)  # fmt: skip
def _page_values(excerpt: Excerpt, found: Found) -> None:
    mmio, apic = _by_page(excerpt)
    _compare_values(excerpt, apic, excerpt.sequence.values("kvm_mmio", "val", mmio), "kvm_mmio", found)


@RULE.part(
    "values of MSRs", needs=("kvm_msr.ecx", "kvm_msr.data", "kvm_msr.exception", "kvm_apic.val"),
    adds=False,
)  # fmt: skip
def _msr_values(excerpt: Excerpt, found: Found) -> None:
    msr, apic = _by_msr(excerpt)
    _compare_values(excerpt, apic, excerpt.sequence.values("kvm_msr", "data", msr), "kvm_msr", found)


@RULE.part("EOI", needs=("kvm_eoi", "kvm_mmio.type", "kvm_mmio.len", "kvm_mmio.gpa"), adds=False)
def _eoi(excerpt: Excerpt, found: Found) -> None:
    """Check that a write to the EOI register by way of the page ends an interrupt."""
    _, apic = _by_page(excerpt)
    values = excerpt.sequence.values
    ends = (values("kvm_apic", "reg", apic) == APIC_EOI) & (values("kvm_apic", "rw", apic) != 0)
    apic = apic[ends]
    bad = apic[excerpt.segment_counts("kvm_eoi")[excerpt.segments.of[apic]] == 0]
    found.check(len(apic))
    found.violate(bad, lambda _: ("kvm_eoi for a write to the EOI register", "none"))


def _compare(excerpt: Excerpt, told: tuple[Positions, Positions, Positions], how: str, found: Found) -> None:
    apic, offset, write = told
    register = excerpt.sequence.values("kvm_apic", "reg", apic).astype(np.int64)
    wrote = excerpt.sequence.values("kvm_apic", "rw", apic) != 0
    at = np.flatnonzero((register // _REGISTER != offset // _REGISTER) | (wrote != write))
    found.check(len(apic))

    def words(offset: int, *, write: bool) -> str:
        return f"a {'write' if write else 'read'} of {describe_apic_register(offset)}"

    found.violate(
        apic[at],
        lambda i: (
            f"{words(int(offset[at[i]]), write=bool(write[at[i]]))}, as {how} offset {int(offset[at[i]]):#x}",
            words(int(register[at[i]]), write=bool(wrote[at[i]])),
        ),
    )


def _compare_values(excerpt: Excerpt, apic: Positions, other: NDArray[np.generic], kind: str, found: Found) -> None:
    value = excerpt.sequence.values("kvm_apic", "val", apic).astype(np.uint64) & _LOW
    told = other.astype(np.uint64) & _LOW
    icr = excerpt.sequence.values("kvm_apic", "reg", apic) == APIC_ICR
    at = np.flatnonzero(((value ^ told) & np.where(icr, _U(~ICR_BUSY & 0xFFFFFFFF), _LOW)) != 0)
    found.check(len(apic))
    found.violate(
        apic[at], lambda i: (f"the value of {kind}, {int(told[at[i]]):#x}", f"kvm_apic {int(value[at[i]]):#x}")
    )


def _by_page(excerpt: Excerpt) -> tuple[Positions, Positions]:
    """Return the accesses by way of the page whose exit traces one access and one register, and both positions."""
    return excerpt.once("LAPIC accesses by page", _find_by_page)


def _find_by_page(excerpt: Excerpt) -> tuple[Positions, Positions]:
    segments, values = excerpt.segments, excerpt.sequence.values
    mmio, apic = _single(excerpt, "kvm_mmio")
    gpa = values("kvm_mmio", "gpa", mmio).astype(np.uint64)
    kind = values("kvm_mmio", "type", mmio)
    own = (gpa >> _U(12) == _U(APIC_DEFAULT_BASE >> 12)) & (values("kvm_mmio", "len", mmio) == 4)
    own &= (gpa % _U(_REGISTER) == 0) & ((kind == MMIO_READ) | (kind == MMIO_WRITE))
    own &= segments.next_kind[segments.of[mmio]] == ENTRY  # the kernel's LAPIC answered it
    return mmio[own], apic[own]


def _by_msr(excerpt: Excerpt) -> tuple[Positions, Positions]:
    """Return the accesses by way of an MSR whose exit traces one MSR and one register, and both positions."""
    return excerpt.once("LAPIC accesses by MSR", _find_by_msr)


def _find_by_msr(excerpt: Excerpt) -> tuple[Positions, Positions]:
    values = excerpt.sequence.values
    msr, apic = _single(excerpt, "kvm_msr")
    ecx = values("kvm_msr", "ecx", msr).astype(np.int64)
    own = (ecx >> 8 == X2APIC_MSR_BASE >> 8) & (values("kvm_msr", "exception", msr) == 0)
    return msr[own], apic[own]


def _single(excerpt: Excerpt, kind: str) -> tuple[Positions, Positions]:
    """Return the events of a kind, and the kvm_apic, of exits that trace one of each."""
    exits = excerpt.exits
    group = np.flatnonzero(exits.has(kind) & exits.has("kvm_apic") & ~excerpt.nested)
    seg = exits.seg[group]
    group = group[(excerpt.segment_counts(kind)[seg] == 1) & (excerpt.segment_counts("kvm_apic")[seg] == 1)]
    return excerpt.first_in_exit(kind, group), excerpt.first_in_exit("kvm_apic", group)
