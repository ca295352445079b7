"""Events that only a fast path traces inside the run function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.alphabet import mask_of
from kvmtrace.model.ordering import FAST_PATH_MSRS, NOT_ON_FAST_PATH
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

OFF_FAST_PATH = mask_of(*sorted(NOT_ON_FAST_PATH))


def slow_msrs(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the positions of kvm_msr events that no fast path traces."""
    positions = excerpt.segments.positions("kvm_msr")
    fast = among(excerpt.sequence.values("kvm_msr", "ecx", positions), FAST_PATH_MSRS)
    slow: NDArray[np.intp] = positions[~fast | (excerpt.sequence.values("kvm_msr", "write", positions) == 0)]
    return slow
