"""How a hypervisor that is a guest itself (L1) enters its own guest (L2): what predictions of bundled guests need."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class NestedEntry:
    """An ISA's instructions for hypervisors, and where they say what they want.

    What they want are fields with these names: "event" (injected at the entry); "ip", "sp", "flags", "ax" of L2, "idt"
    and "gdt" (its tables); "host_ip", "host_sp" (where L1 goes on); "length" (of the instruction that left L2); those
    that `asked` names. One that is in neither mapping is no field of this ISA.

    Parameters
    ----------
    instructions : mnemonic -> code of the exit that L1 takes for it
    enters : the mnemonics that enter L2
    refuses : (field, its legal values): any other makes KVM refuse the entry
    asked : code -> (field, bit): whether L1 asked for that exit of L2
    structure : field -> (offset, bytes) in the structure whose address L1 has in its accumulator
    numbers : field -> number by which `reads` and `writes` name it
    reads, writes : mnemonics that read and write a field, "" without any
    shadowed : numbers of fields that the processor may read without an exit -> whether it may write them as well
    """

    instructions: Mapping[str, int]
    enters: frozenset[str]
    refuses: tuple[str, range]
    asked: Mapping[int, tuple[str, int]]
    structure: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    reads: str = ""
    writes: str = ""
    shadowed: Mapping[int, bool] = field(default_factory=dict)
