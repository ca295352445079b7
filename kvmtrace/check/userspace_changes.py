"""What userspace may have changed between two KVM_RUNs: registers, pending events, the LAPIC."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.kvm.ioctls import IOCTL_NUMBERS
from kvmtrace.model.userspace_actions import SETTER_TRACES, STATE_SETTERS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt


@lru_cache
def _numbers(names: tuple[str, ...]) -> NDArray[np.int64]:
    return np.array([IOCTL_NUMBERS[name] for name in names], np.int64)


def ioctl_kind(excerpt: Excerpt) -> str | None:
    """Return the event kind that shows the VMM's ioctls, None if none was recorded."""
    for kind in ("sys_enter_ioctl", "kvm_vcpu_ioctl"):
        if excerpt.has_field(kind, "cmd"):
            return kind
    return None


def setter_rows(excerpt: Excerpt, setters: tuple[str, ...] = STATE_SETTERS) -> NDArray[np.intp]:
    """Return the table rows, of any thread, at which one of these ioctls changes a vCPU's state."""
    kind = ioctl_kind(excerpt)
    table = excerpt.sequence.table
    if kind is None:
        return np.empty(0, np.intp)
    cmd = table.field(kind, "cmd").astype(np.int64) & 0xFFFFFFFF
    rows: NDArray[np.intp] = table.rows(kind)[among(cmd, _numbers(setters))]
    return rows


def may_have_changed(
    excerpt: Excerpt, first: NDArray[np.intp], last: NDArray[np.intp], setters: tuple[str, ...] = STATE_SETTERS
) -> NDArray[np.bool_]:
    """Say whether a vCPU's state may have been set between two sequence positions each.

    Parameters
    ----------
    first, last : intp, sequence positions of one thread, first <= last
    setters : ioctls that set what is asked for
    """
    sequence, segments = excerpt.sequence, excerpt.segments
    if ioctl_kind(excerpt) is None:
        marks = np.zeros(len(sequence) + 1, np.int64)
        for name in SETTER_TRACES:
            marks[segments.positions(name)] = 1
        count = np.cumsum(marks)
        changed: NDArray[np.bool_] = count[last] != count[first]
        return changed
    rows = setter_rows(excerpt, setters)
    between = np.searchsorted(rows, sequence.row[last]) - np.searchsorted(rows, sequence.row[first])
    found: NDArray[np.bool_] = between != 0
    return found
