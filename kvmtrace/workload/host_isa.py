"""Which KVM this host has."""

from __future__ import annotations

import os
from pathlib import Path

# module that drives the hardware -> instruction set of its VM-exits
_VENDOR_MODULES = {"kvm_intel": "vmx", "kvm_amd": "svm", "kvm_pvm": "pvm"}


ARM64_MACHINE = "aarch64"  # as uname names it


def guess_isa() -> str | None:
    """Return "vmx", "svm" or "pvm" by the loaded vendor module, "arm64" by the machine; None if that does not tell."""
    if os.uname().machine == ARM64_MACHINE:  # KVM is built into its kernels
        return "arm64"
    loaded = [isa for module, isa in _VENDOR_MODULES.items() if Path("/sys/module", module).exists()]
    return loaded[0] if len(loaded) == 1 else None
