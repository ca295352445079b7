"""The ISAs that kvmtrace knows: the list, and look-ups by number, by name and by an exit reason's printed name.

A new ISA is a file with its `Isa` value and one line in ISAS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.arm64 import ARM64
from kvmtrace.isa.svm import SVM
from kvmtrace.isa.vmx import VMX

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from kvmtrace.isa.base import Isa

ISAS: tuple[Isa, ...] = (VMX, SVM, ARM64)

NAMES: tuple[str, ...] = tuple(isa.name for isa in ISAS)
BY_NUMBER: dict[int, Isa] = {isa.number: isa for isa in ISAS}
BY_NAME: dict[str, Isa] = {isa.name: isa for isa in ISAS}
UNTOLD = 0xFFFFFFFF  # number of an exit reason that a text does not tell
PRINTED: dict[int, str] = {}  # numbers of exit reasons that no ISA has, by their printed name (printed.py)


def isa_name(number: int) -> str | None:
    """Return the name that belongs to kvm_exit's field `isa`, None if there is no such ISA."""
    isa = BY_NUMBER.get(number)
    return isa.name if isa is not None else None


def describe_exit_reason(number: int, exit_reason: int) -> str:
    """Name a VM-exit as the kernel prints it.

    Parameters
    ----------
    number : kvm_exit's field `isa`
    exit_reason : int, the raw u32 (a sign-extended -1 is accepted)

    Returns
    -------
    str, e.g. "CPUID", "INVALID_STATE FAILED_VMENTRY", "hlt"; "UNKNOWN(0x4d)" for a code that has no name; of ISA 0
    (the recording does not tell it) a name as a text printed it, or "?"
    """
    isa = BY_NUMBER.get(number)
    if isa is not None:
        return isa.describe(exit_reason)
    number = exit_reason & 0xFFFFFFFF
    return PRINTED.get(number) or ("?" if number == UNTOLD else f"UNKNOWN({number:#x})")


def find_exit_reason(text: str) -> tuple[Isa, int] | None:
    """Return the ISA and the number, flags included, of an exit reason as printed; None if no ISA has it."""
    for isa in ISAS:
        number = isa.number_of(text)
        if number is not None:
            return isa, number
    for isa in ISAS:
        if isa.prefix and text.startswith(isa.prefix):
            return isa, UNTOLD
    return None


def describe_syndrome(syndrome: int) -> str:
    """Say what an exit's syndrome tells."""
    return next(isa.describe_syndrome(syndrome) for isa in ISAS if isa.describe_syndrome is not None)


def describe_register(number: int) -> str:
    """Name a system register by its number (kvm_handle_sys_reg's derived field `register`)."""
    return next(isa.describe_register(number) for isa in ISAS if isa.describe_register is not None)


def recognise(fields: Collection[str]) -> Isa | None:
    """Return the ISA whose kvm_exit has these fields, where a field `isa` does not tell; None if none has."""
    for isa in ISAS:
        if isa.signature and isa.signature <= set(fields):
            return isa
    return None


def untraced(exit_fields: Collection[str] | None) -> frozenset[str]:
    """Return the events that a recording's KVM never traces although it describes them, by its kvm_exit's fields."""
    isa = None if exit_fields is None else recognise(exit_fields)
    return frozenset() if isa is None else isa.untraced


def has_never(numbers: Collection[int], name: str) -> bool:
    """Say whether no kernel of these ISAs has an event, or a field ("event.field")."""
    known = [BY_NUMBER[number] for number in numbers if number in BY_NUMBER]
    return bool(known) and all({name, name.partition(".")[0]} & isa.absent for isa in known)


def run_functions(suffix: str = "") -> tuple[str, ...]:
    """Return the probe event of each ISA's run function; with suffix "_return" that of its return."""
    return tuple(isa.run_function + suffix for isa in ISAS if isa.run_function)


def union(make: Callable[[Isa], Collection[str]]) -> tuple[str, ...]:
    """Return the words that any ISA has, each once, in the order of the list."""
    return tuple(dict.fromkeys(word for isa in ISAS for word in make(isa)))


def codes(*kinds: str) -> Iterator[tuple[int, frozenset[int]]]:
    """Give (number of the ISA, its exit codes of these EXIT_KINDS) for every ISA."""
    for isa in ISAS:
        yield isa.number, isa.codes(*kinds)
