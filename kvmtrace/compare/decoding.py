"""Instructions that the emulator decoded, per segment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.compare.batch import Batch


def failed_segments(batch: Batch) -> NDArray[np.bool_]:
    """Say which segments hold a decode that failed; it is traced a second time, with `failed` set."""
    marked = np.zeros(len(batch.segments), bool)
    if batch.has_field("kvm_emulate_insn", "failed"):
        positions = batch.segments.positions("kvm_emulate_insn")
        bad = batch.sequence.values("kvm_emulate_insn", "failed", positions) != 0
        marked[batch.segments.of[positions[bad]]] = True
    return marked


def decodes(batch: Batch) -> NDArray[np.intp]:
    """Return how many instructions each segment decodes, second traces of failed ones not counted."""
    count: NDArray[np.intp] = batch.segment_counts("kvm_emulate_insn") - failed_segments(batch)
    return count
