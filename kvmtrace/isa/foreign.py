"""Architectures whose KVM has an ISA of no file here: how their events give themselves away.

Sources: arch/arm64/kvm/trace_arm.h, arch/riscv/kvm/trace.h, arch/s390/kvm/trace-s390.h, arch/powerpc/kvm/trace_pr.h
and trace_booke.h, arch/mips/kvm/trace.h, arch/loongarch/kvm/trace.h
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvmtrace.isa.arm64_text import STALE
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


@dataclass(frozen=True)
class Foreign:
    """How an architecture is recognised.

    Parameters
    ----------
    name : str
    fields : of kvm_exit; all of them are there
    events : how the names of its own events begin
    text : what the text of kvm_entry or kvm_exit looks like
    """

    name: str
    fields: frozenset[str] = frozenset()
    events: str = ""
    text: str = ""


# fmt: off
FOREIGN: tuple[Foreign, ...] = (
    Foreign("riscv", frozenset({"sepc", "scause"}), "", r"(?:SEPC|SCAUSE|STVAL|HTVAL|HTINST): ?0x"),
    Foreign("arm, or arm64 before Linux 5.1", frozenset({"vcpu_pc"}), "", rf"(?:HSR_EC: |PC: 0x|{STALE})"),
    Foreign("s390", frozenset(), "kvm_s390_"),
    Foreign("powerpc", frozenset({"exit_nr", "dar"}), "kvm_book3s_", r"exit=\S+ \| pc=0x"),
    Foreign("powerpc", frozenset({"exit", "pc"})),
    Foreign("mips or loongarch", frozenset({"reason", "pc"}), "", r"\[[^\]]{1,60}\] ?PC: 0x"),
)
# fmt: on


def foreign_architecture(events: Collection[str], exit_fields: Collection[str], texts: Mapping[str, str]) -> str | None:
    """Return the architecture that a recording's events are of, None if it is one that has an Isa, or is not told.

    Parameters
    ----------
    events : names of all events
    exit_fields : of kvm_exit
    texts : event -> a text of it that was not understood
    """
    seen = [texts[event] for event in ("kvm_exit", "kvm_entry") if event in texts]
    for one in FOREIGN:
        if one.fields and one.fields <= set(exit_fields):
            return one.name
        if one.events and any(event.startswith(one.events) for event in events):
            return one.name
        if one.text and any(re.match(one.text, text) for text in seen):
            return one.name
    return None
