"""What a VM-exit was about, in words: a port with its device, an MSR by name, an address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import describe_register
from kvmtrace.kvm.hypercalls import describe_hypercall
from kvmtrace.kvm.msrs import describe_msr
from kvmtrace.kvm.ports import describe_port
from kvmtrace.kvm.psci import describe_psci

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.stats.rows import HypercallRow


def describe_access(access: str | None, key: int | None, write: bool | None) -> str:
    """Return "out 0x518 (fw_cfg DMA)", "wrmsr X2APIC_ICR", "page fault 0x4a08000"; "" for no access.

    Parameters
    ----------
    access, key, write : as in the report document's `slowest`
    """
    if access is None or key is None:
        return ""
    return _WORDS[access](key, bool(write)) if access in _WORDS else f"{'write' if write else 'read'} {key:#x}"


# what is accessed -> (its number, whether it is written) -> words
_WORDS: dict[str, Callable[[int, bool], str]] = {
    "port": lambda key, write: f"{'out' if write else 'in'} {named(key, describe_port(key))}",
    "msr": lambda key, write: f"{'wrmsr' if write else 'rdmsr'} {named(key, describe_msr(key))}",
    "cr": lambda key, write: f"{'write' if write else 'read'} cr{key}",
    "sysreg": lambda key, write: f"{'write' if write else 'read'} {describe_register(key)}",
    "smccc": lambda key, _write: describe_psci(key) or f"function {key:#x}",
    "hypercall": lambda key, _write: describe_hypercall(key) or f"hypercall {key}",
    "page": lambda key, _write: f"page fault {key:#x}",
}


def call_number(row: HypercallRow) -> str:
    """Return a hypercall's number as its interface writes it."""
    return f"{row.nr:#x}" if row.interface == "smccc" else str(row.nr)


def named(number: int, name: str) -> str:
    """Return a number with its name, if it has one."""
    return f"{number:#x} ({name})" if name and not name.startswith("UNKNOWN(") else f"{number:#x}"
