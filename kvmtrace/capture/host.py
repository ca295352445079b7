"""What a recording says about the machine it was made on."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_model() -> str | None:
    """Return the CPU's name as /proc/cpuinfo has it; arm64's has numbers, which lscpu knows by name."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return None
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    if "CPU part" in values:
        return f"Arm CPU of implementer {values.get('CPU implementer', '?')}, part {values['CPU part']}"
    return values.get("model name")


def host_facts() -> dict[str, str | None]:
    """Return `host`, `kernel` and `cpu_model` of the capture metadata."""
    return {"host": platform.node(), "kernel": platform.release(), "cpu_model": cpu_model()}


def kvm_modules() -> list[str]:
    """Name the loaded KVM modules ("kvm_intel", "kvm_amd", ...); [] also where KVM is built in."""
    known = ("kvm", "kvm_intel", "kvm_amd", "kvm_pvm")
    return [name for name in known if Path("/sys/module", name).is_dir()]
