"""S3: an emulated access to MMIO is as long as the instruction's operand, and reads or writes as it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.decoding import failed_segments
from kvmtrace.check.instruction_bytes import OPERAND_BYTES, READS, WRITES, memory_operands
from kvmtrace.check.mmio_chain import MMIO_WRITE
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "S3",
    "MMIO operand",
    VIOLATION,
    (
        "kvm_exit",
        "kvm_emulate_insn.insn",
        "kvm_emulate_insn.len",
        "kvm_emulate_insn.flags",
        "kvm_mmio.type",
        "kvm_mmio.len",
        "kvm_mmio.gpa",
    ),
    "An access to MMIO by an instruction with one operand in memory has the length of that operand, and reads or "
    "writes as the instruction does.",
    "emulator_read_write, read_prepare, write_mmio (x86.c); x86_decode_insn (emulate.c)",
    "accesses that cross a page, and those of string instructions",
    places="kvm_mmio",
    healthy="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[89, 07] flags=9 failed=0
kvm_mmio: type=2 len=4 gpa=0xfe001010 val=0x0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[89, 07] flags=9 failed=0
kvm_mmio: type=2 len=8 gpa=0xfe001010 val=0x0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)
_PAGE = np.uint64(4096)


@RULE.part()
def _accesses(excerpt: Excerpt, found: Found) -> None:
    sequence = excerpt.sequence
    positions, decode = _decoded_accesses(excerpt)
    if not len(positions):
        return
    insn, length, flags = (sequence.values("kvm_emulate_insn", name, decode) for name in ("insn", "len", "flags"))
    operand = memory_operands(insn, length.astype(np.int64), flags.astype(np.uint8))
    size = (operand & (2 * OPERAND_BYTES - 1)).astype(np.uint64)
    kind, told, gpa = (
        sequence.values("kvm_mmio", name, positions).astype(np.uint64) for name in ("type", "len", "gpa")
    )
    within = gpa % _PAGE
    plain = size > 0
    whole = plain & (within != 0) & (within + size <= _PAGE)  # what begins a page may be the rest of an access
    does = np.where(kind == MMIO_WRITE, operand & WRITES, operand & READS) != 0
    at = np.flatnonzero(plain & ~does | whole & (told != size))
    found.check(np.count_nonzero(plain), np.count_nonzero(~plain))
    found.violate(
        positions[at],
        lambda i: (
            _words(int(operand[at[i]]), bytes(insn[at[i]])[: int(length[at[i]])]),
            f"kvm_mmio {'write' if kind[at[i]] == MMIO_WRITE else 'read'} of {int(told[at[i]])} bytes",
        ),
    )


def _decoded_accesses(excerpt: Excerpt) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the accesses of exits that decoded one instruction, up to the next VM-entry, and the decode of each."""
    segments = excerpt.segments
    positions, decodes = segments.positions("kvm_mmio"), segments.positions("kvm_emulate_insn")
    if not len(positions) or not len(decodes):
        return positions[:0], positions[:0]
    n_chains = int(segments.chain[-1]) + 1
    decoded_in = segments.chain[segments.of[decodes]]
    number = np.bincount(decoded_in, minlength=n_chains)
    failed = np.bincount(segments.chain[np.flatnonzero(failed_segments(excerpt))], minlength=n_chains) > 0
    first = np.full(n_chains, -1, np.intp)
    first[decoded_in[::-1]] = decodes[::-1]
    chain = segments.chain[segments.of[positions]]
    usable = (number[chain] == 1) & ~failed[chain] & segments.chain_known[segments.of[positions]]
    usable &= first[chain] < positions
    nested = np.zeros(n_chains, bool)
    nested[segments.chain[excerpt.exits.seg[excerpt.nested]]] = True
    usable &= ~nested[chain]
    return positions[usable], first[chain[usable]]


def _words(operand: int, code: bytes) -> str:
    kinds = [word for word, bit in (("a read", READS), ("a write", WRITES)) if operand & bit]
    size = operand & (2 * OPERAND_BYTES - 1)
    return f"{' or '.join(kinds)} of {size} byte{'' if size == 1 else 's'}, as {code.hex(' ')} does"
