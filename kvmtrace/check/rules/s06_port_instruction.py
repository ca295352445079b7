"""S6: an access to a port has the direction and size of the instruction that makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.excerpt import is_port_access
from kvmtrace.check.exit_conditions import port_access
from kvmtrace.check.instruction_bytes import (
    PORT_REP,
    PORT_REPNE,
    PORT_SIZE,
    PORT_STRING,
    PORT_WRITE,
    ports_accessed,
)
from kvmtrace.check.payload_comparisons import with_follow_up
from kvmtrace.check.rule import VIOLATION, RowPart, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

RULE = Rule(
    "S6",
    "port instruction",
    VIOLATION,
    (
        "kvm_exit.exit_reason",
        "kvm_exit.isa",
        "kvm_exit.guest_rip",
        "kvm_exit.info1",
        "kvm_emulate_insn.rip",
        "kvm_emulate_insn.insn",
        "kvm_emulate_insn.len",
        "kvm_emulate_insn.flags",
    ),
    "A VM-exit for a port tells the direction and size, and whether it is a string instruction with REP, that the "
    "bytes of the instruction have.",
    "handle_io (vmx/vmx.c), io_interception (svm/svm.c); x86_decode_insn (emulate.c)",
    "instructions that were not decoded, and those with a REX prefix",
    places="kvm_emulate_insn",
    local_rows=True,
    healthy="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80030 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[f3, 6e] flags=9 failed=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=30 guest_rip=0x1000 isa=1 info1=0x3f80038 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_emulate_insn: rip=1000 csbase=0 len=2 insn=ARRAY[f3, 6e] flags=9 failed=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if is_port_access(row):
        yield RowPart("", (), _check)


def _check(excerpt: Excerpt, group: NDArray[np.intp], found: Found) -> None:
    values = excerpt.sequence.values
    exits, positions = with_follow_up(excerpt, group, "kvm_emulate_insn")
    same = values("kvm_emulate_insn", "rip", positions).astype(np.uint64) == excerpt.exits.get("guest_rip")[exits]
    exits, positions = exits[same], positions[same]
    insn, length, flags = (values("kvm_emulate_insn", name, positions) for name in ("insn", "len", "flags"))
    does = ports_accessed(insn, length.astype(np.int64), flags.astype(np.uint8))
    told = _told(excerpt, exits)
    # what REPNE means is not written down
    compared = np.where(
        does & PORT_REPNE, PORT_SIZE | PORT_WRITE | PORT_STRING, PORT_SIZE | PORT_WRITE | PORT_STRING | PORT_REP
    )
    plain = does != 0
    at = np.flatnonzero(plain & ((does ^ told) & compared != 0))
    found.check(np.count_nonzero(plain), np.count_nonzero(~plain))
    found.violate(
        excerpt.exits.start[exits[at]],
        lambda i: (
            f"{_words(int(does[at[i]]))}, as {bytes(insn[at[i]])[: int(length[at[i]])].hex(' ')} is",
            _words(int(told[at[i]])),
        ),
    )


def _told(excerpt: Excerpt, exits: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return what the exits say, in the bits of port_bits(); a REP prefix means something to strings alone."""
    access = port_access(excerpt, exits)
    string = np.asarray(access.string) != 0
    found = np.asarray(access.size).astype(np.int64) & PORT_SIZE
    found |= np.where(np.asarray(access.write) != 0, PORT_WRITE, 0) | np.where(string, PORT_STRING, 0)
    found |= np.where(string & (np.asarray(access.rep) != 0), PORT_REP, 0)
    return found


def _words(bits: int) -> str:
    name = ("OUTS" if bits & PORT_STRING else "OUT") if bits & PORT_WRITE else "INS" if bits & PORT_STRING else "IN"
    size = bits & PORT_SIZE
    return f"{'REP ' if bits & PORT_REP else ''}{name} of {size} byte{'' if size == 1 else 's'}"
