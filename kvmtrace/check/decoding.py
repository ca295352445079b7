"""Instructions that the emulator decoded, per segment: kvm_emulate_insn is traced twice for one that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt


def failed_segments(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say which segments hold a decode that failed; it is traced a second time, with `failed` set."""
    return excerpt.once("failed segments", _failed_segments)


def _failed_segments(excerpt: Excerpt) -> NDArray[np.bool_]:
    marked = np.zeros(len(excerpt.segments), bool)
    positions = excerpt.segments.positions("kvm_emulate_insn")
    failed = excerpt.values_or("kvm_emulate_insn", "failed", positions, 0) != 0
    marked[excerpt.segments.of[positions[failed]]] = True
    return marked


def decodes(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return how many instructions each segment decodes, second traces of failed ones not counted."""
    return excerpt.once("decodes", lambda own: own.segment_counts("kvm_emulate_insn") - failed_segments(own))
