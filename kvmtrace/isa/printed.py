"""Exit reasons as people's texts print them: number and ISA by name, and a number for names that no table has.

A name that no ISA has (a KVM of others', a kernel older than the tables) keeps a number of its own, so that it has its
own row in every table; `describe_exit_reason` gives the name back. The number follows from the name alone: the same
name has the same number in two recordings.
"""

from __future__ import annotations

import re
import zlib

from kvmtrace.isa.registry import PRINTED, UNTOLD, find_exit_reason

# kvm_exit of Linux 2.6.31 to 2.6.33 on VMX: some names, in lower case, are another ISA's today, so where one of
# these stands beside them none is taken for that. Source: arch/x86/kvm/vmx.c, vmx_exit_reasons_str
OLD_NAMES = frozenset({
    "apic_access", "cr_access", "dr_access", "ept_misconfig", "ept_violation", "exception", "ext_irq", "halt",
    "interrupt_window", "io_instruction", "nmi_window", "pending_interrupt", "rdmsr", "tpr_below_thres",
    "triple_fault", "wrmsr",
})  # fmt: skip
NOTHING = "?"  # printed where a text does not tell a reason
_NUMBER = re.compile(r"(?:UNKNOWN ?)?\(?(0x[0-9a-f]{1,16}|\d{1,10})\)?$")
_OWN = 0x80000000  # numbers of printed names have this bit
MAX_PRINTED = 1 << 14  # names that get a number of their own
MAX_NAME = 60


def printed_number(name: str) -> int:
    """Return the number of a name that no ISA has; UNTOLD for all beyond MAX_PRINTED names.

    What could steer a terminal is spelt out: the name is printed wherever an exit reason is.
    """
    name = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name[:MAX_NAME])
    number = _OWN | zlib.crc32(name.encode("utf-8", "replace"))
    while PRINTED.get(number, name) != name or number == UNTOLD:
        number = _OWN | (number + 1)
    if number not in PRINTED and len(PRINTED) >= MAX_PRINTED:
        return UNTOLD
    PRINTED[number] = name
    return number


def exit_reason_number(text: str, *, old: bool = False) -> tuple[int, int]:
    """Return (number of the ISA, exit_reason) of a reason as printed; ISA 0 where the text does not tell it.

    Parameters
    ----------
    text : str, "" or "?" where none was printed
    old : bool, the text is of a kernel that prints OLD_NAMES
    """
    found = None if old and text.islower() else find_exit_reason(text)
    if found is not None and found[1] != UNTOLD:
        return found[0].number, found[1]
    number = _NUMBER.match(text)
    if number is not None:
        return 0, int(number[1], 0) & 0xFFFFFFFF
    return 0, printed_number(text or NOTHING)


def remember_printed(names: object) -> None:
    """Take in names that a file of kvmtrace's own carries, a list; anything else is left out."""
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str):
            printed_number(name)
