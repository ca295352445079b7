"""What the kernel prints of interrupts on their way, put back into the fields that it was printed from.

The print formats take registers and redirection entries apart (TRACE_EVENT of kvm_apic_ipi in arch/x86/kvm/trace.h, the
others in include/trace/events/kvm.h); everything else in them is not printed, and 0 here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvmtrace.kvm.apic import DELIVERY_MODES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Groups = Mapping[str, str | None]

_SENT = r"dst (?P<dst>[0-9a-f]+) vec (?P<vec>\d+) \((?P<mode>\w+)\|(?P<to>logical|physical)\|"
_MODES = {name: number for number, name in DELIVERY_MODES.items()}
_SHORTHANDS = {"dst": 0, "self": 1, "all": 2, "all-but-self": 3}

# fmt: off
INTERRUPT_PATTERNS: dict[str, tuple[re.Pattern[str], ...]] = {event: (re.compile(text),) for event, text in {
    "kvm_apic_ipi": rf"{_SENT}(?P<assert>assert|de-assert)\|(?P<trigger>level|edge)\|(?P<shorthand>[\w-]+)\)",
    "kvm_msi_set_irq": rf"{_SENT}(?P<trigger>level|edge)(?P<hint>\|rh)?\)",
    "kvm_ioapic_set_irq": r"pin (?P<pin>\d+) " + _SENT + r"(?P<trigger>level|edge)(?P<masked>\|masked)?\)"
                          r"(?P<coalesced> \(coalesced\))?",
    "kvm_pic_set_irq": r"chip (?P<chip>\d+) pin (?P<pin>\d+) \((?P<trigger>level|edge)(?P<masked>\|masked)?\)"
                       r"(?P<coalesced> \(coalesced\))?",
}.items()}
# fmt: on


def _low(row: Groups) -> int:
    """Return what an ICR, an entry and a message have in common: vector, modes and trigger."""
    logical, level = row["to"] == "logical", row["trigger"] == "level"
    return int(row["vec"] or 0) & 0xFF | _MODES.get(row["mode"] or "", 0) << 8 | logical << 11 | level << 15


def _ipi(row: Groups) -> dict[str, int]:
    shorthand = _SHORTHANDS.get(row["shorthand"] or "", 0) << 18
    low = _low(row) | (row["assert"] == "assert") << 14 | shorthand
    return {"icr_low": low, "dest_id": int(row["dst"] or "0", 16)}


def _message(row: Groups) -> dict[str, int]:
    to = int(row["dst"] or "0", 16)
    address = (to & 0xFF) << 12 | (to & 0xFFFFFF00) << 32 | (row["hint"] is not None) << 3
    return {"address": address | (row["to"] == "logical") << 2, "data": _low(row) & ~(1 << 11)}


def _entry(row: Groups) -> dict[str, int]:
    entry = _low(row) | (row["masked"] is not None) << 16 | (int(row["dst"] or "0", 16) & 0xFF) << 56
    return {"e": entry, "pin": int(row["pin"] or 0), "coalesced": row["coalesced"] is not None}


def _pic(row: Groups) -> dict[str, int]:
    pin = int(row["pin"] or 0) & 7
    level, masked = row["trigger"] == "level", row["masked"] is not None
    chip = {"chip": int(row["chip"] or 0), "pin": pin, "elcr": level << pin, "imr": masked << pin}
    return chip | {"coalesced": row["coalesced"] is not None}


# event -> (a group that only the printed form has, the fields, how they are put together)
COMPOSED: dict[str, tuple[str, tuple[str, ...], Callable[[Groups], dict[str, int]]]] = {
    "kvm_apic_ipi": ("dst", ("icr_low", "dest_id"), _ipi),
    "kvm_msi_set_irq": ("dst", ("address", "data"), _message),
    "kvm_ioapic_set_irq": ("dst", ("e", "pin", "coalesced"), _entry),
    "kvm_pic_set_irq": ("trigger", ("chip", "pin", "elcr", "imr", "coalesced"), _pic),
}
