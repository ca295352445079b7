"""Which vCPU the entries and exits of a thread name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt


def vcpu_ids(excerpt: Excerpt) -> NDArray[np.int64]:
    """Return the vCPU that each segment's kvm_entry or kvm_exit names, -1 for other segments."""
    return excerpt.once("vCPU ids", _vcpu_ids)


def _vcpu_ids(excerpt: Excerpt) -> NDArray[np.int64]:
    segments = excerpt.segments
    ids = np.full(len(segments), -1, np.int64)
    for kind, code in (("kvm_entry", ENTRY), ("kvm_exit", EXIT)):
        mine = np.flatnonzero(segments.kind == code)
        ids[mine] = excerpt.values_or(kind, "vcpu_id", segments.start[mine], -1)
    return ids
