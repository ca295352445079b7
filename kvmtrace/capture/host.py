"""What a recording says about the machine it was made on."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_model() -> str | None:
    """Return the CPU's name as /proc/cpuinfo has it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def host_facts() -> dict[str, str | None]:
    """Return `host`, `kernel` and `cpu_model` of the capture metadata."""
    return {"host": platform.node(), "kernel": platform.release(), "cpu_model": cpu_model()}


def kvm_modules() -> list[str]:
    """Name the loaded KVM modules ("kvm_intel", "kvm_amd", ...); [] also where KVM is built in."""
    known = ("kvm", "kvm_intel", "kvm_amd", "kvm_pvm")
    return [name for name in known if Path("/sys/module", name).is_dir()]
