"""H11: what a device in the kernel answers does not leave to userspace the next time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, USERSPACE
from kvmtrace.check.exit_conditions import userspace_fields
from kvmtrace.check.mmio_chain import MMIO_READ, MMIO_UNSATISFIED, MMIO_WRITE
from kvmtrace.check.rule import SUSPICION, Rule
from kvmtrace.kvm.apic import APIC_DEFAULT_BASE
from kvmtrace.kvm.userspace_exits import KVM_EXIT_IO, KVM_EXIT_MMIO
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]

RULE = Rule(
    "H11",
    "served in the kernel",
    SUSPICION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", "kvm_userspace_exit.reason", "kvm_userspace_exit.errno", "kvm_entry"),
    "A port or an address that a device in the kernel answers when it is read does not leave to userspace later, read "
    "or written with the same size.",
    "kvm_io_bus_read, kvm_io_bus_write (virt/kvm/kvm_main.c); vcpu_mmio_read, vcpu_mmio_write (x86.c)",
    "a device that is served wrongly each time; one that the VMM takes away meanwhile looks like a fault",
    places="userspace exit",
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x210008 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=0 port=0x21 size=1 count=1 val=0x0
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=30 guest_rip=0x1001 isa=1 info1=0x210000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x21 size=1 count=1 val=0x0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=30 guest_rip=0x1002 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1003
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x210008 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=0 port=0x21 size=1 count=1 val=0x0
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=30 guest_rip=0x1001 isa=1 info1=0x210000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x21 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1002
""",
)
_U = np.uint64
_SIZE_BITS = 8
MAX_REMEMBERED = 1 << 16  # accesses
_MIX = _U(0x9E3779B97F4A7C15)  # odd: mixes the vCPU's key into an access's
_LAPIC_PAGE = _U(APIC_DEFAULT_BASE >> 12)


@RULE.part("ports", needs=("kvm_pio.port", "kvm_pio.size", "kvm_pio.rw", "kvm_pio.count"), places="kvm_pio")
def _ports(excerpt: Excerpt, found: Found) -> None:
    group, first = _single(excerpt, "kvm_pio")
    values = excerpt.sequence.values
    plain = (values("kvm_pio", "count", first) == 1) & ~excerpt.exits.has("kvm_emulate_insn", "kvm_mmio")[group]
    group, first = group[plain], first[plain]
    write = values("kvm_pio", "rw", first) != 0
    address = values("kvm_pio", "port", first).astype(np.uint64)
    served, leaves = _ends(excerpt, group, KVM_EXIT_IO)
    keys = _keys(address, values("kvm_pio", "size", first))
    _compare(excerpt, "port", (group, first, keys), (served & ~write, leaves), found)


@RULE.part("addresses", needs=("kvm_mmio.gpa", "kvm_mmio.len", "kvm_mmio.type"), places="kvm_mmio", adds=False)
def _addresses(excerpt: Excerpt, found: Found) -> None:
    group, first = _single(excerpt, "kvm_mmio")
    values = excerpt.sequence.values
    address = values("kvm_mmio", "gpa", first).astype(np.uint64)
    own = (address >> _U(12)) != _LAPIC_PAGE  # a guest that changes its LAPIC's mode changes who answers there
    group, first, address = group[own], first[own], address[own]
    kind = values("kvm_mmio", "type", first)
    served, leaves = _ends(excerpt, group, KVM_EXIT_MMIO)
    leaves &= (kind == MMIO_UNSATISFIED) | (kind == MMIO_WRITE)
    keys = _keys(address, values("kvm_mmio", "len", first))
    _compare(excerpt, "address", (group, first, keys), (served & (kind == MMIO_READ), leaves), found)


def _single(excerpt: Excerpt, kind: str) -> tuple[Group, NDArray[np.intp]]:
    """Return the exits that trace one access, and its position."""
    exits = excerpt.exits
    group = np.flatnonzero(exits.has(kind) & ~excerpt.nested)
    group = group[excerpt.segment_counts(kind)[exits.seg[group]] == 1]
    return group, excerpt.first_in_exit(kind, group)


def _ends(excerpt: Excerpt, group: Group, reason: int) -> tuple[Mask, Mask]:
    """Say which exits were handled in the kernel, and which left to userspace for a reason."""
    leaves, why, errno = userspace_fields(excerpt, group)
    served = (excerpt.exits.next_kind[group] == ENTRY) & ~excerpt.exits.has("FPU unload")[group]
    return served, leaves & (why == reason) & (errno == 0) & (excerpt.exits.next_kind[group] == USERSPACE)


def _keys(address: NDArray[np.uint64], size: NDArray[np.generic]) -> NDArray[np.uint64]:
    keys: NDArray[np.uint64] = (address << _U(_SIZE_BITS)) | np.minimum(size.astype(np.uint64), _U(255))
    return keys


def _compare(
    excerpt: Excerpt,
    what: str,
    accesses: tuple[Group, NDArray[np.intp], NDArray[np.uint64]],
    ends: tuple[Mask, Mask],
    found: Found,
) -> None:
    """Report accesses that leave to userspace though the kernel answered a read there before.

    Parameters
    ----------
    accesses : exits, position and key of the access of each
    ends : which reads the kernel answered, and which accesses left
    """
    (group, first, keys), (answered, leaves) = accesses, ends
    thread = excerpt.thread[group]
    found.check(np.count_nonzero(answered | leaves))
    sequence = excerpt.sequence
    vcpu = np.array([sequence.key_of(number) & 0xFFFFFFFF for number in range(len(sequence.tids))], np.uint64)
    whose = keys ^ (vcpu[thread] * _MIX if len(vcpu) else keys[:0])
    seen: set[int] = excerpt.remember(f"{what} answered in the kernel", set)
    now = distinct(whose[answered]).tolist()
    bad: list[int] = []
    for one in distinct(whose[leaves]).tolist():
        mine = whose == one
        since = -1 if one in seen else int(np.argmax(mine & answered)) if one in now else len(mine)
        bad += [i for i in np.flatnonzero(mine & leaves).tolist() if i > since]
    if len(seen) < MAX_REMEMBERED:
        seen.update(now)
    bad.sort()
    _report(excerpt, what, (group[bad], first[bad], keys[bad]), found)


def _report(excerpt: Excerpt, what: str, bad: tuple[Group, NDArray[np.intp], NDArray[np.uint64]], found: Found) -> None:
    group, first, keys = bad
    found.violate(
        first,
        lambda i: (
            f"an answer in the kernel: {what} {int(keys[i]) >> _SIZE_BITS:#x} was read there before",
            f"{excerpt.exit_name(group[i])} leaves to userspace for it",
        ),
    )
