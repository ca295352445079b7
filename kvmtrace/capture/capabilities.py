"""Which capabilities this process has, and which of them BPF programs need."""

from __future__ import annotations

from pathlib import Path

from kvmtrace.errors import CapabilityError

CAPABILITIES = {21: "CAP_SYS_ADMIN", 38: "CAP_PERFMON", 39: "CAP_BPF"}  # include/uapi/linux/capability.h
FOR_BPF = ("CAP_BPF", "CAP_PERFMON")


def capabilities() -> set[str]:
    """Return those of CAPABILITIES that are effective."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        text = ""
    line = next((line for line in text.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    mask = int(line.split()[1], 16)
    return {name for bit, name in CAPABILITIES.items() if mask >> bit & 1}


def missing_for_bpf() -> list[str]:
    """Name the capabilities that loading and attaching our programs takes and that are not effective."""
    held = capabilities()
    return [] if "CAP_SYS_ADMIN" in held else [name for name in FOR_BPF if name not in held]


def require_bpf() -> None:
    """Refuse to go on without the capabilities for BPF programs.

    Raises
    ------
    CapabilityError
        Which are missing.
    """
    missing = missing_for_bpf()
    if missing:
        raise CapabilityError(
            f"BPF programs need {' and '.join(missing)}",
            "run it as root (sudo kvmtrace ...), or with CAP_BPF and CAP_PERFMON",
        )
