"""S4: a decoded instruction is as long as its bytes say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.instruction_bytes import decoded_lengths
from kvmtrace.check.rule import VIOLATION, Rule

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "S4",
    "decoded length",
    VIOLATION,
    ("kvm_emulate_insn.insn", "kvm_emulate_insn.len", "kvm_emulate_insn.flags", "kvm_emulate_insn.failed"),
    "The length of an instruction that KVM decoded is the one that its bytes have.",
    "x86_decode_insn (emulate.c), x86_decode_emulated_instruction (x86.c)",
    "instructions that KVM could not decode, or that no decoder knows",
    places="kvm_emulate_insn",
    blames_handler=False,
    healthy="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=3 insn=ARRAY[89, 47, 10] flags=9 failed=0
kvm_mmio: type=2 len=4 gpa=0xfe001010 val=0x0
kvm_entry: vcpu_id=0 rip=0x1003
""",
    broken="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=49 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[89, 47] flags=9 failed=0
kvm_mmio: type=2 len=4 gpa=0xfe001010 val=0x0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


@RULE.part()
def _lengths(excerpt: Excerpt, found: Found) -> None:
    sequence, positions = excerpt.sequence, excerpt.segments.positions("kvm_emulate_insn")
    positions = positions[sequence.values("kvm_emulate_insn", "failed", positions) == 0]
    if not len(positions):
        return
    insn, length, flags = (sequence.values("kvm_emulate_insn", name, positions) for name in ("insn", "len", "flags"))
    length = length.astype(np.int64)
    decoded = decoded_lengths(insn, length, flags.astype(np.uint8))
    known = decoded > 0
    at = np.flatnonzero(known & (decoded != length))
    found.check(np.count_nonzero(known), np.count_nonzero(~known))
    found.violate(
        positions[at],
        lambda i: (
            f"{int(decoded[at[i]])} bytes: {bytes(insn[at[i]])[: int(decoded[at[i]])].hex(' ')}",
            f"{int(length[at[i]])} bytes",
        ),
    )
