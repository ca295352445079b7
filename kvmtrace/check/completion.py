"""Pending I/O is completed before the guest goes on (V8): port reads and MMIO, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT, USERSPACE
from kvmtrace.check.mmio_chain import MMIO_READ, MMIO_UNSATISFIED, MMIO_WRITE, MmioChain
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.kvm.userspace_exits import KVM_EXIT_IO, KVM_EXIT_MMIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch

_U = np.uint64
PIO_OUT = 1
_MMIO = CLASS["kvm_mmio"]


def check_completion(batch: Batch) -> None:
    """Check V8."""
    if not (batch.has_field("kvm_userspace_exit", "reason") and batch.has_field("kvm_userspace_exit", "errno")):
        return
    reason, errno = _userspace(batch)
    _check_port_reads(batch, reason, errno)
    if batch.recorded("kvm_mmio") and all(batch.has_field("kvm_mmio", f) for f in ("type", "len", "gpa")):
        _check_mmio(batch, reason, errno)


def _userspace(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return reason and errno of every userspace segment; -1 and 0 elsewhere."""
    segments = batch.segments
    reason = np.full(len(segments), -1, np.int64)
    errno = np.zeros(len(segments), np.int64)
    mine = segments.kind == USERSPACE
    start = segments.start[mine]
    reason[mine] = batch.sequence.values("kvm_userspace_exit", "reason", start)
    errno[mine] = batch.sequence.values("kvm_userspace_exit", "errno", start)
    return reason, errno


def _check_port_reads(batch: Batch, reason: NDArray[np.int64], errno: NDArray[np.int64]) -> None:
    """Check that a port read that left to userspace traces its kvm_pio in the next KVM_RUN."""
    segments = batch.segments
    if not batch.recorded("kvm_pio") or not batch.has_field("kvm_pio", "rw"):
        return
    left = np.flatnonzero((reason == KVM_EXIT_IO) & (errno == 0))
    left = left[left > 0]
    left = left[segments.linked[left - 1] & segments.linked[left] & (segments.kind[left - 1] != 0)]
    left = left[~_wrote(batch, left - 1)]
    found = batch.segment_counts("kvm_pio")[left]
    # the emulator may go on with further elements
    one = ~segments.has("kvm_emulate_insn")[left - 1] & (segments.kind[left - 1] == EXIT)
    one &= batch.recorded("kvm_emulate_insn")
    done = (found == 1) | ((found > 1) & ~one)
    # an early error (waiting for SIPI) precedes completion; userspace may have moved RIP, which cancels it
    excused = (segments.next_kind[left] == USERSPACE) & (errno[np.minimum(left + 1, len(segments) - 1)] < 0)
    excused |= _rip_changed(batch, left)
    bad = left[~done & ~excused]
    batch.findings.check("V8", len(left))
    batch.findings.violate(
        "V8",
        segments.start[bad + 1],
        lambda i: (
            "one kvm_pio read before the guest or userspace goes on: a port read was pending",
            f"{_what(segments.kind[bad[i] + 1])} after {batch.segment_counts('kvm_pio')[bad[i]]}",
        ),
    )


def _what(kind: int) -> str:
    return {ENTRY: "VM-entry", EXIT: "VM-exit", USERSPACE: "userspace exit"}.get(int(kind), "end")


def _wrote(batch: Batch, before: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say whether the last kvm_pio of these segments is a write, or the exit was one (V4 then asks for it)."""
    segments = batch.segments
    positions = segments.positions("kvm_pio")
    out = np.zeros(len(segments), bool)
    rw = batch.sequence.values("kvm_pio", "rw", positions)
    out[segments.of[positions]] = rw == PIO_OUT  # the last one of a segment wins
    number = np.searchsorted(batch.exits.seg, before)
    number = np.minimum(number, max(len(batch.exits) - 1, 0))
    if len(batch.exits):
        is_exit = segments.kind[before] == EXIT
        isa, code = batch.exits.isa[number], batch.exits.code[number]
        info1 = batch.exits.get("info1")[number]
        vmx_out = (isa == ISA_VMX) & (code == 30) & ((info1 & _U(8)) == 0)
        svm_out = (isa == ISA_SVM) & (code == 0x7B) & ((info1 & _U(1)) == 0)
        written: NDArray[np.bool_] = out[before] | (is_exit & (vmx_out | svm_out))
        return written
    plain: NDArray[np.bool_] = out[before]
    return plain


def _rip_changed(batch: Batch, left: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say where the guest resumes somewhere else than at or right behind the access."""
    changed = np.zeros(len(left), bool)
    segments = batch.segments
    if not len(batch.exits) or not batch.has_field("kvm_entry", "rip"):
        return changed
    number = np.searchsorted(batch.exits.seg, left) - 1
    mine = (number >= 0) & (batch.exits.seg[np.maximum(number, 0)] == left - 1)
    number = number[mine]
    entry = segments.resume[batch.exits.seg[number]]
    rip = batch.exits.get("guest_rip")[number]
    moved = (batch.exits.later_rip[number] - rip) & _U(0xFFFF)
    changed[mine] = (entry >= 0) & (moved > 15)
    return changed


def _check_mmio(batch: Batch, reason: NDArray[np.int64], errno: NDArray[np.int64]) -> None:
    """Check chains of kvm_mmio and KVM_EXIT_MMIO: the common forms by columns, the rest one by one."""
    segments = batch.segments
    leaves = (reason == KVM_EXIT_MMIO) & (errno == 0)
    positions = segments.positions("kvm_mmio")
    waiting = positions[batch.sequence.values("kvm_mmio", "type", positions) == MMIO_UNSATISFIED]
    if not len(waiting) and not leaves.any():
        return
    chain = segments.chain
    n_chains = int(chain[-1]) + 1
    concerned = np.zeros(n_chains, bool)
    concerned[chain[leaves]] = True
    concerned[chain[segments.of[waiting]]] = True
    simple = _simple_chains(batch, chain, leaves, concerned)
    batch.findings.check("V8", int(np.count_nonzero(simple)))
    for number in np.flatnonzero(concerned & ~simple):
        _walk(batch, np.flatnonzero(chain == number) if n_chains < 64 else _members(chain, int(number)), reason, errno)


def _members(chain: NDArray[np.intp], number: int) -> NDArray[np.intp]:
    return np.arange(np.searchsorted(chain, number), np.searchsorted(chain, number, "right"))


def _simple_chains(
    batch: Batch, chain: NDArray[np.intp], leaves: NDArray[np.bool_], concerned: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return the chains of one access of at most 8 bytes, left once, completed, and the guest entered."""
    segments, sequence = batch.segments, batch.sequence
    n_chains = len(concerned)
    first = np.searchsorted(chain, np.arange(n_chains))
    size = np.bincount(chain, minlength=n_chains)
    two = concerned & (size == 2) & (segments.kind[first] == EXIT)
    second = np.minimum(first + 1, len(segments) - 1)
    two &= leaves[second] & (segments.next_kind[second] == ENTRY)
    counts = batch.segment_counts("kvm_mmio")
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


def _walk(batch: Batch, members: NDArray[np.intp], reason: NDArray[np.int64], errno: NDArray[np.int64]) -> None:
    """Step one chain through MmioChain."""
    segments, sequence = batch.segments, batch.sequence
    chain = MmioChain(known=bool(segments.kind[members[0]] == EXIT))
    for segment in members:
        start, stop = int(segments.start[segment]), int(segments.stop[segment])
        if segments.kind[segment] == USERSPACE:
            chain.leave(start, int(reason[segment]), int(errno[segment]))
        accesses = start + np.flatnonzero(sequence.cls[start:stop] == _MMIO)
        fields = [sequence.values("kvm_mmio", name, accesses) for name in ("type", "len", "gpa")]
        for position, kind, length, gpa in zip(accesses, *fields, strict=True):
            chain.access(int(position), int(kind), int(length), int(gpa))
    last = int(members[-1])
    if segments.next_kind[last] == ENTRY:
        chain.enter(int(segments.start[last + 1]))
    batch.findings.check("V8", chain.checked)
    wrong = chain.wrong
    batch.findings.violate("V8", [position for position, _, _ in wrong], lambda i: wrong[i][1:])
