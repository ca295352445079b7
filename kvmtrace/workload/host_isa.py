"""Which KVM this host has."""

from __future__ import annotations

from pathlib import Path

# module that drives the hardware -> instruction set of its VM-exits
_VENDOR_MODULES = {"kvm_intel": "vmx", "kvm_amd": "svm", "kvm_pvm": "pvm"}


def guess_isa() -> str | None:
    """Return "vmx", "svm" or "pvm" by the loaded vendor module; None if there is none or more than one."""
    loaded = [isa for module, isa in _VENDOR_MODULES.items() if Path("/sys/module", module).exists()]
    return loaded[0] if len(loaded) == 1 else None
