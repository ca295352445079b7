"""What a VM-exit was about, in words: a port with its device, an MSR by name, an address."""

from __future__ import annotations

from kvmtrace.kvm.hypercalls import describe_hypercall
from kvmtrace.kvm.msrs import describe_msr
from kvmtrace.kvm.ports import describe_port


def describe_access(access: str | None, key: int | None, write: bool | None) -> str:
    """Return "out 0x518 (fw_cfg DMA)", "wrmsr X2APIC_ICR", "page fault 0x4a08000"; "" for no access.

    Parameters
    ----------
    access, key, write : as in the report document's `slowest`
    """
    if access is None or key is None:
        return ""
    if access == "port":
        return f"{'out' if write else 'in'} {named(key, describe_port(key))}"
    if access == "msr":
        return f"{'wrmsr' if write else 'rdmsr'} {named(key, describe_msr(key))}"
    if access == "cr":
        return f"{'write' if write else 'read'} cr{key}"
    if access == "hypercall":
        return describe_hypercall(key) or f"hypercall {key}"
    return f"{'page fault' if access == 'page' else 'write' if write else 'read'} {key:#x}"


def named(number: int, name: str) -> str:
    """Return a number with its name, if it has one."""
    return f"{number:#x} ({name})" if name and not name.startswith("UNKNOWN(") else f"{number:#x}"
