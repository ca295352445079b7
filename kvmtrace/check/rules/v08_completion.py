"""V8: pending I/O is completed before the guest goes on: port reads, and MMIO piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT, USERSPACE
from kvmtrace.check.mmio_chain import MMIO_READ, MMIO_UNSATISFIED, MMIO_WRITE, MmioChain
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.kvm.userspace_exits import KVM_EXIT_IO, KVM_EXIT_MMIO
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V8",
    "pending I/O is completed",
    VIOLATION,
    ("kvm_userspace_exit.reason", "kvm_userspace_exit.errno"),
    "Port and MMIO accesses that left to userspace are completed in the next KVM_RUN before anything else, piece by "
    "piece, before the vCPU enters the guest.",
    "complete_emulated_pio, complete_emulated_mmio, complete_fast_pio_in (x86.c)",
    "the completion of a write, which leaves no event",
    places="userspace exit",
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[8b, 07] flags=9 failed=0
kvm_mmio: type=0 len=4 gpa=0xfe001000 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=6 errno=0
kvm_fpu: load=1
kvm_mmio: type=1 len=4 gpa=0xfe001000 val=0x0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[8b, 07] flags=9 failed=0
kvm_mmio: type=0 len=4 gpa=0xfe001000 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=6 errno=0
kvm_fpu: load=1
kvm_mmio: type=1 len=4 gpa=0xfe001000 val=0x0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=49 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1002 csbase=0 len=2 insn=ARRAY[8b, 07] flags=9 failed=0
kvm_mmio: type=0 len=4 gpa=0xfe001000 val=0x0
kvm_fpu: load=0
kvm_userspace_exit: reason=6 errno=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1004
""",
)
_U = np.uint64
_PORT_READS = (
    "kvm_pio.rw",
    "kvm_exit.exit_reason",
    "kvm_exit.isa",
    "kvm_exit.info1",
    "kvm_exit.guest_rip",
    "kvm_entry.rip",
)
PIO_OUT = 1
COMPLETE_PIO = "complete_fast_pio_in, complete_emulated_pio, complete_emulator_pio_in (x86.c)"
COMPLETE_MMIO = "complete_emulated_mmio, emulator_read_write, read_prepare (x86.c); kvm_handle_mmio_return (mmio.c)"
_MMIO = ("kvm_mmio.type", "kvm_mmio.len", "kvm_mmio.gpa", "kvm_exit", "kvm_entry")


def _count(chosen: int) -> Callable[[Excerpt], int]:
    """Return a function that counts the userspace exits of a reason."""
    return lambda excerpt: int(np.count_nonzero(excerpt.once("userspace outcomes", _userspace)[0] == chosen))


def _userspace(excerpt: Excerpt) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return reason and errno of every userspace segment; -1 and 0 elsewhere."""
    segments = excerpt.segments
    reason = np.full(len(segments), -1, np.int64)
    errno = np.zeros(len(segments), np.int64)
    mine = segments.kind == USERSPACE
    start = segments.start[mine]
    reason[mine] = excerpt.sequence.values("kvm_userspace_exit", "reason", start)
    errno[mine] = excerpt.sequence.values("kvm_userspace_exit", "errno", start)
    return reason, errno


@RULE.part("port reads", needs=_PORT_READS, places=_count(KVM_EXIT_IO), source=COMPLETE_PIO, local=True)
def _port_reads(excerpt: Excerpt, found: Found) -> None:
    """Check that a port read that left to userspace traces its kvm_pio in the next KVM_RUN."""
    left = _pending_reads(excerpt)
    found.check(len(left))
    _report_reads(excerpt, left[excerpt.segment_counts("kvm_pio")[left] == 0], found)


@RULE.part(
    "port reads, once each", needs=(*_PORT_READS, "kvm_emulate_insn"), adds=False, source=COMPLETE_PIO, local=True
)
def _port_reads_once(excerpt: Excerpt, found: Found) -> None:
    """Check that it is traced once; only the emulator may go on with further elements."""
    left, segments = _pending_reads(excerpt), excerpt.segments
    one = ~segments.has("kvm_emulate_insn")[left - 1] & (segments.kind[left - 1] == EXIT)
    _report_reads(excerpt, left[one & (excerpt.segment_counts("kvm_pio")[left] > 1)], found)


def _pending_reads(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the userspace segments that must complete a port read."""
    segments = excerpt.segments
    reason, errno = excerpt.once("userspace outcomes", _userspace)
    left = np.flatnonzero((reason == KVM_EXIT_IO) & (errno == 0))
    left = left[left > 0]
    left = left[segments.linked[left - 1] & segments.linked[left] & (segments.kind[left - 1] != 0)]
    left = left[~_wrote(excerpt, left - 1)]
    # an early error (waiting for SIPI) precedes completion; userspace may have moved RIP, which cancels it
    excused = (segments.next_kind[left] == USERSPACE) & (errno[np.minimum(left + 1, len(segments) - 1)] < 0)
    excused |= _rip_changed(excerpt, left)
    pending: NDArray[np.intp] = left[~excused]
    return pending


def _report_reads(excerpt: Excerpt, bad: NDArray[np.intp], found: Found) -> None:
    segments = excerpt.segments
    found.violate(
        segments.start[bad + 1],
        lambda i: (
            "one kvm_pio read before the guest or userspace goes on: a port read was pending",
            f"{_what(segments.kind[bad[i] + 1])} after {excerpt.segment_counts('kvm_pio')[bad[i]]}",
        ),
    )


def _what(kind: int) -> str:
    return {ENTRY: "VM-entry", EXIT: "VM-exit", USERSPACE: "userspace exit"}.get(int(kind), "end")


def _wrote(excerpt: Excerpt, before: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say whether the last kvm_pio of these segments is a write, or the exit was one (V4 then asks for it)."""
    segments = excerpt.segments
    positions = segments.positions("kvm_pio")
    out = np.zeros(len(segments), bool)
    rw = excerpt.sequence.values("kvm_pio", "rw", positions)
    out[segments.of[positions]] = rw == PIO_OUT  # the last one of a segment wins
    exits = np.flatnonzero(excerpt.of_kind("port_io"))
    for isa, mine in excerpt.exits.by_isa:
        if isa.decode_io is not None:
            own = exits[mine[exits]]
            access = isa.decode_io(excerpt.exits.code[own], excerpt.exits.get("info1")[own])
            out[excerpt.exits.seg[own[access.write]]] = True
    written: NDArray[np.bool_] = out[before]
    return written


def _rip_changed(excerpt: Excerpt, left: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say where the guest resumes somewhere else than at or right behind the access."""
    changed = np.zeros(len(left), bool)
    segments = excerpt.segments
    number = np.searchsorted(excerpt.exits.seg, left) - 1
    mine = (number >= 0) & (excerpt.exits.seg[np.maximum(number, 0)] == left - 1)
    number = number[mine]
    entry = segments.resume[excerpt.exits.seg[number]]
    rip = excerpt.exits.get("guest_rip")[number]
    moved = (excerpt.exits.later_rip[number] - rip) & _U(0xFFFF)
    changed[mine] = (entry >= 0) & (moved > threshold("longest_instruction"))
    return changed


@RULE.part("MMIO", needs=_MMIO, places=_count(KVM_EXIT_MMIO), source=COMPLETE_MMIO, local=True)
def _mmio(excerpt: Excerpt, found: Found) -> None:
    """Check chains of kvm_mmio and KVM_EXIT_MMIO: the common forms by columns, the rest one by one."""
    reason, errno = excerpt.once("userspace outcomes", _userspace)
    segments = excerpt.segments
    leaves = (reason == KVM_EXIT_MMIO) & (errno == 0)
    positions = segments.positions("kvm_mmio")
    waiting = positions[excerpt.sequence.values("kvm_mmio", "type", positions) == MMIO_UNSATISFIED]
    if not len(waiting) and not leaves.any():
        return
    chain = segments.chain
    n_chains = int(chain[-1]) + 1
    concerned = np.zeros(n_chains, bool)
    concerned[chain[leaves]] = True
    concerned[chain[segments.of[waiting]]] = True
    simple = _simple_chains(excerpt, chain, leaves, concerned)
    found.check(int(np.count_nonzero(simple)))
    for number in np.flatnonzero(concerned & ~simple):
        _walk(excerpt, _members(chain, int(number)), (reason, errno), found)


def _members(chain: NDArray[np.intp], number: int) -> NDArray[np.intp]:
    return np.arange(np.searchsorted(chain, number), np.searchsorted(chain, number, "right"))


def _simple_chains(
    excerpt: Excerpt, chain: NDArray[np.intp], leaves: NDArray[np.bool_], concerned: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return the chains of one access of at most 8 bytes, left once, completed, and the guest entered."""
    segments, sequence = excerpt.segments, excerpt.sequence
    n_chains = len(concerned)
    first = np.searchsorted(chain, np.arange(n_chains))
    size = np.bincount(chain, minlength=n_chains)
    two = concerned & (size == 2) & (segments.kind[first] == EXIT)
    second = np.minimum(first + 1, len(segments) - 1)
    two &= leaves[second] & (segments.next_kind[second] == ENTRY)
    counts = excerpt.segment_counts("kvm_mmio")
    two &= counts[first] == 1
    start = segments.first_in("kvm_mmio")
    good = np.zeros(n_chains, bool)
    at = np.flatnonzero(two)
    access = start[first[at]]
    kind = sequence.values("kvm_mmio", "type", access)
    length = sequence.values("kvm_mmio", "len", access)
    good[at] = (kind == MMIO_WRITE) & (length <= 8) & (counts[second[at]] == 0)
    reads = at[(kind == MMIO_UNSATISFIED) & (length <= 8) & (counts[second[at]] == 1)]
    before, after = start[first[reads]], start[second[reads]]
    same = np.ones(len(reads), bool)
    for field in ("gpa", "len"):
        same &= sequence.values("kvm_mmio", field, before) == sequence.values("kvm_mmio", field, after)
    good[reads] = same & (sequence.values("kvm_mmio", "type", after) == MMIO_READ)
    return good


def _walk(
    excerpt: Excerpt,
    members: NDArray[np.intp],
    outcomes: tuple[NDArray[np.int64], NDArray[np.int64]],
    found: Found,
) -> None:
    """Step one chain through MmioChain."""
    reason, errno = outcomes
    segments, sequence = excerpt.segments, excerpt.sequence
    announced = excerpt.once("reads are announced", lambda own: bool(own.of_isa(lambda isa: isa.announces_reads).any()))
    chain = MmioChain(known=bool(segments.kind[members[0]] == EXIT), announced=announced)
    for segment in members:
        start, stop = int(segments.start[segment]), int(segments.stop[segment])
        if segments.kind[segment] == USERSPACE:
            chain.leave(start, int(reason[segment]), int(errno[segment]))
        accesses = start + np.flatnonzero(sequence.cls[start:stop] == CLASS["kvm_mmio"])
        fields = [sequence.values("kvm_mmio", name, accesses) for name in ("type", "len", "gpa")]
        for position, kind, length, gpa in zip(accesses, *fields, strict=True):
            chain.access(int(position), int(kind), int(length), int(gpa))
    last = int(members[-1])
    if segments.next_kind[last] == ENTRY:
        chain.enter(int(segments.start[last + 1]))
    found.check(chain.checked)
    wrong = chain.wrong
    found.violate([position for position, _, _ in wrong], lambda i: wrong[i][1:])
