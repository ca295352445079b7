"""SVM: EXITINFO words, and exit codes that are information in themselves.

Every decoder takes (exit code, info1) as ints or as columns (ndarray of uint64) and returns the same.
Sources: APM "IOIO Intercept", "Nested Paging", "SVM Intercept Codes"; arch/x86/kvm/svm/svm.c (io_interception,
cr_interception, msr_interception, npf_interception).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmtrace.isa.words import (
    PFERR_FETCH,
    PFERR_GUEST_FINAL,
    PFERR_GUEST_PAGE,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_USER,
    PFERR_WRITE,
    CrAccess,
    DrAccess,
    IoAccess,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

SVM_EXIT_ERR = 0xFFFFFFFF  # is -1; kvm_exit records it as u32 (and the kernel then prints 0xffffffff)
SVM_EXIT_CR0_SEL_WRITE = 0x65

# fmt: off
SVM_EVENT_TYPES: Mapping[int, str] = MappingProxyType({
    0: "external interrupt", 2: "NMI", 3: "exception", 4: "software interrupt",
})
# fmt: on
_ACCESS_BITS = {"read": 0, "write": PFERR_WRITE, "fetch": PFERR_FETCH}


def decode_svm_io(code: Any, exitinfo1: Any) -> IoAccess:  # noqa: ARG001
    """Decode EXITINFO1 of `io`; bits 6:4 are the one-hot size, EXITINFO2 is the next RIP."""
    return IoAccess(
        port=(exitinfo1 >> 16) & 0xFFFF,
        size=(exitinfo1 >> 4) & 7,
        write=(exitinfo1 & 1) == 0,
        string=(exitinfo1 & 4) != 0,
        rep=(exitinfo1 & 8) != 0,
    )


def encode_svm_io(access: IoAccess) -> tuple[int, int]:
    """Return (EXITINFO1, bits that are known); bits 9:7 are the address size."""
    flags = access.rep << 3 | access.string << 2 | (not access.write)
    return access.port << 16 | access.size << 4 | flags, 0xFFFF007D


def decode_svm_cr(code: Any, exitinfo1: Any) -> CrAccess:
    """Decode a read_crN, write_crN or cr0_sel_write exit; with decode assists EXITINFO1 names the register."""
    selective = code == SVM_EXIT_CR0_SEL_WRITE
    return CrAccess((code & 15) * (1 - selective), 1 - ((code >= 0x10) | selective), exitinfo1 & 15)


def decode_svm_dr(code: Any, exitinfo1: Any) -> DrAccess:
    """Decode a read_drN or write_drN exit."""
    return DrAccess(code & 15, code >= 0x30, exitinfo1 & 15)


def decode_svm_msr_write(code: Any, exitinfo1: Any) -> Any:  # noqa: ARG001
    """Say whether an MSR access is a write: EXITINFO1 is 1 then."""
    return exitinfo1 == 1


def encode_svm_msr(write: bool) -> int:
    """Return EXITINFO1 of an MSR access."""
    return int(write)


def classify_nested_page_fault(error_code: int) -> str:
    """Say whether the page was mapped; with reserved bits set, KVM has marked it as MMIO."""
    if error_code & PFERR_RSVD:
        return "device"
    return "refused" if error_code & PFERR_PRESENT else "unmapped"


def encode_svm_fault(access: str) -> tuple[int, int]:
    """Return (EXITINFO1, bits that are known) of a nested page fault by "read", "write", "fetch", or a table "walk".

    Whether bits 0 and 3 are set for known MMIO depends on how KVM could mark it.
    """
    if access == "walk":  # of the guest's own page tables: it marks them as accessed
        known = PFERR_GUEST_PAGE | PFERR_USER | PFERR_WRITE
        return known, known | PFERR_GUEST_FINAL
    value = _ACCESS_BITS.get(access, 0) | PFERR_USER | PFERR_GUEST_FINAL
    return value, PFERR_GUEST_FINAL | PFERR_USER | PFERR_FETCH | (PFERR_WRITE if access in _ACCESS_BITS else 0)
