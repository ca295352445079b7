"""Counts of events and exit reasons as trace-cmd sees them: the independent measure of recordings."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# "  qemu-system-x86-311   [000]  5.783727787: kvm_exit:  exit_reason=0x4e ..." (--raw)
_LINE = re.compile(r"\]\s+[\d.]+:\s+(\w+):(.*)")
_REASON = re.compile(r"\bexit_reason=(0x[0-9a-f]+|\d+)")
# arm64's kvm_exit has two fields in place of a reason, see isa/arm64.py
_TRAP = re.compile(r"\bret=(0x[0-9a-f]+|\d+) esr_ec=(0x[0-9a-f]+|\d+)")


def count_with_trace_cmd(path: Path) -> tuple[Counter[str], Counter[int]]:
    """Return events by name, and kvm_exit events by exit reason, of a trace.dat."""
    done = subprocess.run(["trace-cmd", "report", "-R", "-i", str(path)], capture_output=True, text=True, check=True)
    events: Counter[str] = Counter()
    reasons: Counter[int] = Counter()
    for line in done.stdout.splitlines():
        found = _LINE.search(line)
        if found is None:
            continue
        events[found[1]] += 1
        if found[1] != "kvm_exit":
            continue
        if reason := _REASON.search(found[2]):
            reasons[int(reason[1], 0)] += 1
        elif trap := _TRAP.search(found[2]):
            reasons[(int(trap[1], 0) & 0x1F) << 6 | int(trap[2], 0)] += 1
    return events, reasons
