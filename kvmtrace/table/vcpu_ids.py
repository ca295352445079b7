"""Which vCPUs ran on which threads, as VM-entries and VM-exits tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvmtrace.table.event_table import EventTable

MAX_LISTED = 8


def vcpus_of(table: EventTable) -> set[tuple[int, int]]:
    """Return (vCPU id, thread) of all VM-entries and VM-exits."""
    found: set[tuple[int, int]] = set()
    for event in ("kvm_entry", "kvm_exit"):
        if table.count(event) and table.has(event, "vcpu_id"):
            ids, tids = table.field(event, "vcpu_id"), table.tid[table.rows(event)]
            pairs = np.unique(ids.astype(np.int64) << 32 | tids.astype(np.int64) & 0xFFFFFFFF)
            found |= {(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs}
    return found


def listed(noun: str, numbers: list[int]) -> str:
    """Return "threads 7, 9": some numbers of a thing, for a message about one that is not there."""
    if not numbers:
        return f"no {noun} that is known"
    more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:MAX_LISTED]))}{more}"
