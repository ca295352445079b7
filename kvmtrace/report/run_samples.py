"""A recording as one run of a comparison: its samples, time budget and model transitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.compare.checker import check_recording
from kvmtrace.compare.samples import collect_samples
from kvmtrace.events import open_recording

if TYPE_CHECKING:
    from kvmtrace.compare.recordings import RunSamples


def load_run(path: str) -> RunSamples:
    """Read a recording and collect what a comparison needs of it."""
    recording = open_recording(path)
    model = check_recording(recording)
    edges = {(t.from_state, t.event, t.to_state): t.count for t in model.transitions}
    return collect_samples(path, recording.events(), transitions=edges, violations=model.n_violations)
