"""V7: the userspace exit is one that this VM-exit, or a request between, can cause."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT, USERSPACE
from kvmtrace.check.excerpt import is_port_access
from kvmtrace.check.exit_conditions import holds, needs_of, userspace_fields
from kvmtrace.check.findings import constant
from kvmtrace.check.rule import VIOLATION, RowPart, Rule
from kvmtrace.isa.base import RipClass
from kvmtrace.kvm.apic import APIC_TASKPRI
from kvmtrace.kvm.userspace_exits import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_MMIO,
    KVM_EXIT_TPR_ACCESS,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
    describe_userspace_exit,
)
from kvmtrace.model.nesting import LEVEL_CHANGES
from kvmtrace.model.states import LAPIC_EVENTS
from kvmtrace.model.userspace_actions import CONTINUED, CONTINUED_EVENTS
from kvmtrace.table.distinct import among, distinct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

    Group = NDArray[np.intp]

RULE = Rule(
    "V7",
    "allowed userspace exit",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", "kvm_userspace_exit.reason", "kvm_userspace_exit.errno"),
    "The userspace exit reason is one that this VM-exit, or a request between, can cause.",
    "kvm_arch_vcpu_ioctl_run, vcpu_enter_guest (x86.c) and the exit's handler",
    "whether the reason is right where errno is negative: it is that of an earlier exit then",
    places="userspace exit",
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=30 guest_rip=0x1001 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=2 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80000 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_pio: rw=1 port=0x3f8 size=1 count=1 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=6 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1001
""",
)
_U = np.uint64


def _bits(numbers: Iterable[int]) -> np.uint64:
    return _U(sum(1 << number for number in numbers))


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    needs = needs_of(("string",)) if is_port_access(row) else ()
    yield RowPart("the reason", needs, partial(_check_reason, row=row), _count_leaving)
    if "msr" in row.kinds:
        yield RowPart("the direction of MSRs", ("kvm_exit.info1",), _check_msr_direction)
    if row.rip is RipClass.NEVER:
        yield RowPart("that it leaves", (), partial(_check_never_resumes, row=row))


def _count_leaving(excerpt: Excerpt, group: Group) -> int:
    return int(np.count_nonzero(excerpt.exits.next_kind[group] == USERSPACE))


def _check_reason(excerpt: Excerpt, whole: Group, found: Found, *, row: ExitRow) -> None:
    leaves, reason, errno = userspace_fields(excerpt, whole)
    group, reason, errno = whole[leaves], reason[leaves], errno[leaves]
    isa = excerpt.isa_of(whole)
    allowed = np.full(len(group), _bits(isa.any_exit_causes.keys() - {KVM_EXIT_INTR}) | _bits(row.userspace))
    if is_port_access(row):  # only string I/O touches memory
        allowed &= np.where(holds("string", excerpt, group), ~_U(0), ~_U(1 << KVM_EXIT_MMIO))
    allowed |= np.where(excerpt.exits.bus_lock[group], _bits(isa.bus_lock_userspace), _U(0))
    if not excerpt.recorded("kvm_entry") or excerpt.capability.filtered:  # the entry that failed was not seen
        allowed |= _U(1 << KVM_EXIT_FAIL_ENTRY)
    vectoring = (excerpt.exits.vectoring[group] != 0) | ~excerpt.tells_vectoring[group]
    allowed |= np.where(vectoring, _U(1 << KVM_EXIT_INTERNAL_ERROR), _U(0))
    fits = (allowed >> np.clip(reason, 0, 63).astype(np.uint64)) & _U(1) == 1
    fits |= reason > 63
    fits |= (reason == KVM_EXIT_INTR) & (not excerpt.capability.exact_errno)
    fits |= errno < 0  # the reason is stale then
    at = np.flatnonzero(~fits)
    found.check(len(group))
    _report(excerpt, row, group[at], (reason[at], errno[at]), found)


def _report(
    excerpt: Excerpt,
    row: ExitRow,
    bad: Group,
    outcome: tuple[NDArray[np.int64], NDArray[np.int64]],
    found: Found,
) -> None:
    reason, errno = outcome
    causes = excerpt.isa_of(bad).any_exit_causes if len(bad) else {}
    names = ", ".join(describe_userspace_exit(n, 0) for n in sorted(row.userspace | causes.keys()))
    found.violate(
        excerpt.segments.start[excerpt.exits.seg[bad] + 1],
        lambda i: (
            f"after {excerpt.exit_name(bad[i])}: an in-kernel resume, -EINTR, or {names}",
            describe_userspace_exit(int(reason[i]), int(errno[i])),
        ),
    )


def _check_msr_direction(excerpt: Excerpt, whole: Group, found: Found) -> None:
    """Check that the VMM is asked for an MSR's value by a read, and given one by a write."""
    leaves, reason, errno = userspace_fields(excerpt, whole)
    group = whole[leaves & among(reason, (KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR)) & (errno >= 0)]
    decode = excerpt.isa_of(whole).decode_msr_write
    if decode is None or not len(group):
        return
    write = np.asarray(decode(excerpt.exits.code[group], excerpt.exits.get("info1")[group])).astype(bool)
    told = reason[np.searchsorted(whole, group)] == KVM_EXIT_X86_WRMSR
    at = np.flatnonzero(write != told)
    found.violate(
        excerpt.segments.start[excerpt.exits.seg[group[at]] + 1],
        lambda i: (
            describe_userspace_exit(KVM_EXIT_X86_WRMSR if write[at[i]] else KVM_EXIT_X86_RDMSR, 0),
            describe_userspace_exit(KVM_EXIT_X86_WRMSR if told[at[i]] else KVM_EXIT_X86_RDMSR, 0),
        ),
    )


def _check_never_resumes(excerpt: Excerpt, group: Group, found: Found, *, row: ExitRow) -> None:
    """Check that an exit which KVM cannot handle is not followed by a VM-entry."""
    following = excerpt.exits.next_kind[group]
    bad = group[following == ENTRY]
    found.check(np.count_nonzero((following != 0) & (following != USERSPACE)))
    names = ", ".join(describe_userspace_exit(n, 0) for n in sorted(row.userspace))
    found.violate(
        excerpt.segments.start[excerpt.exits.seg[bad] + 1],
        lambda i: (f"{excerpt.exit_name(bad[i])} leaves to userspace: {names}", "VM-entry"),
    )


@RULE.part("KVM_EXIT_TPR_ACCESS", needs=("kvm_apic.reg",), adds=False, local=True)
def _tpr_access(excerpt: Excerpt, found: Found) -> None:
    """Check that an exit that reports an access to the LAPIC's TPR had one."""
    group = np.flatnonzero(~excerpt.nested & (excerpt.row_number > 0))
    leaves, reason, errno = userspace_fields(excerpt, group)
    group = group[leaves & (reason == KVM_EXIT_TPR_ACCESS) & (errno >= 0)]
    positions = excerpt.segments.positions("kvm_apic")
    tpr = excerpt.sequence.values("kvm_apic", "reg", positions) == APIC_TASKPRI
    marked = np.zeros(len(excerpt.segments), bool)
    marked[excerpt.segments.of[positions[tpr]]] = True
    bad = group[~marked[excerpt.exits.seg[group]]]
    found.violate(
        excerpt.segments.start[excerpt.exits.seg[bad] + 1],
        lambda i: (
            f"an access to the TPR (kvm_apic, register 0x80) after {excerpt.exit_name(bad[i])}",
            describe_userspace_exit(KVM_EXIT_TPR_ACCESS, 0),
        ),
    )


@RULE.part("KVM_EXIT_HLT", needs=("kvm_apic|kvm_eoi",), adds=False)
def _halt_with_lapic(excerpt: Excerpt, found: Found) -> None:
    """Check that a vCPU whose LAPIC is in the kernel halts there (__kvm_emulate_halt)."""
    sequence = excerpt.sequence
    seen: set[int] = excerpt.remember("vCPUs with a LAPIC in the kernel", set)
    for name in LAPIC_EVENTS:
        threads = distinct(sequence.thread[excerpt.segments.positions(name)]).tolist()
        seen.update(sequence.key_of(thread) for thread in threads)
    group = np.flatnonzero(excerpt.of_kind("halt") & ~excerpt.nested)
    leaves, reason, errno = userspace_fields(excerpt, group)
    has_lapic = np.array([sequence.key_of(int(thread)) in seen for thread in excerpt.thread[group]], bool)
    bad = group[leaves & (reason == KVM_EXIT_HLT) & (errno == 0) & has_lapic]
    found.check(np.count_nonzero(has_lapic))
    found.violate(
        excerpt.segments.start[excerpt.exits.seg[bad] + 1],
        constant("a halt in the kernel: this vCPU's LAPIC is there", "KVM_EXIT_HLT"),
    )


def _behind_good(excerpt: Excerpt, entries: Group) -> NDArray[np.bool_]:
    """Say which of these segments begin with a VM-entry right behind the segment of a VM-exit that did not fail."""
    segments, exits = excerpt.segments, excerpt.exits
    before = np.maximum(entries - 1, 0)
    good: NDArray[np.bool_] = (entries > 0) & segments.linked[before] & (segments.kind[before] == EXIT)
    good &= segments.kind[entries] == ENTRY
    good[good] = ~exits.failed_entry[np.searchsorted(exits.seg, before[good])]
    return good


def _failures(excerpt: Excerpt) -> tuple[Group, NDArray[np.bool_]]:
    """Return the segments of VM-entries that failed, and which of them the processor refused outright (VMfail)."""
    exits, segments = excerpt.exits, excerpt.segments
    failed = exits.seg[exits.failed_entry & (exits.seg > 0)] - 1
    failed = failed[segments.linked[failed] & (segments.kind[failed] == ENTRY)]
    refused = np.empty(0, np.intp)
    if excerpt.recorded("kvm_exit") and excerpt.recorded("kvm_userspace_exit") and not excerpt.capability.filtered:
        refused = np.flatnonzero((segments.kind == ENTRY) & (segments.next_kind == USERSPACE))
        refused = refused[segments.linked[refused]]
        at = segments.start[refused + 1]
        reason = excerpt.sequence.values("kvm_userspace_exit", "reason", at).astype(np.int64)
        errno = excerpt.sequence.values("kvm_userspace_exit", "errno", at).astype(np.int64)
        refused = refused[(reason == KVM_EXIT_FAIL_ENTRY) & (errno == 0)]
    entries = np.concatenate((failed, refused))
    outright = np.repeat([False, True], [len(failed), len(refused)])
    order = np.argsort(entries, kind="stable")
    return entries[order], outright[order]


@RULE.part("failed entries", needs=("kvm_entry",), places="VM-entry", adds=False)
def _failed_entry(excerpt: Excerpt, found: Found) -> None:
    """Check that a VM-entry does not fail behind a good exit: nobody but KVM has touched the state between."""
    exits, segments, sequence = excerpt.exits, excerpt.segments, excerpt.sequence
    if excerpt.of_kind("nested_entry").any() or exits.has(*LEVEL_CHANGES).any():
        return
    threads = sequence.thread[segments.start]
    ends = np.flatnonzero(np.append(threads[1:] != threads[:-1], True)) if len(threads) else np.empty(0, np.intp)
    failed, outright = _failures(excerpt)
    # an excerpt begins with the entry that the one before ended with
    last: dict[int, bool] = excerpt.remember("last entry is behind a good exit", dict)
    before, behind_good = dict(last), _behind_good(excerpt, np.append(failed, ends))
    repeated = sequence.repeated[segments.start]
    for number, entry in enumerate(np.append(failed, ends).tolist()):
        if repeated[entry] and segments.kind[entry] == ENTRY:
            behind_good[number] = before.get(sequence.key_of(int(threads[entry])), False)
    last.update(
        (sequence.key_of(int(threads[end])), bool(good))
        for end, good in zip(ends.tolist(), behind_good[len(failed) :], strict=True)
    )
    bad, outright = failed[behind_good[: len(failed)]], outright[behind_good[: len(failed)]]
    found.check(len(failed))
    found.violate(
        segments.start[bad + 1],
        lambda i: (
            "a VM-entry that succeeds: the exit before was good, and userspace did not run",
            "KVM_EXIT_FAIL_ENTRY without a VM-exit: the processor refused it outright"
            if outright[i]
            else excerpt.exit_name(int(np.searchsorted(exits.seg, bad[i] + 1))),
        ),
    )


@RULE.part("a second userspace exit without a VM-exit", needs=("kvm_exit",), local=True)
def _without_exit(excerpt: Excerpt, found: Found) -> None:
    """Check second userspace exits without a VM-exit between: only I/O that goes on gives IO or MMIO."""
    segments = excerpt.segments
    pair = np.flatnonzero((segments.kind == USERSPACE) & (segments.next_kind == USERSPACE))
    reasons = excerpt.sequence.values("kvm_userspace_exit", "reason", segments.start[pair]).astype(np.int64)
    following = segments.start[pair + 1]
    later = excerpt.sequence.values("kvm_userspace_exit", "reason", following).astype(np.int64)
    errno = excerpt.sequence.values("kvm_userspace_exit", "errno", following).astype(np.int64)
    bad = (errno == 0) & among(later, CONTINUED) & ~among(reasons, CONTINUED)
    bad &= ~segments.has(*CONTINUED_EVENTS)[pair]
    at = np.flatnonzero(bad)
    found.check(len(pair))
    found.violate(
        following[at],
        lambda i: ("no further I/O without a VM-exit: none was pending", describe_userspace_exit(int(later[at[i]]), 0)),
    )
