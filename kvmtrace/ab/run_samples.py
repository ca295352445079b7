"""A recording as one run of a comparison: its samples, time budget and model transitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.ab.samples import collect_samples
from kvmtrace.formats import open_recording
from kvmtrace.report.build import build_report

if TYPE_CHECKING:
    from kvmtrace.ab.recordings import RunSamples
    from kvmtrace.report.document import Report
    from kvmtrace.table.recording import Recording


def load_run(path: str) -> RunSamples:
    """Read a recording and collect what a comparison needs of it."""
    recording = open_recording(path)
    return run_of(recording, build_report(recording))


def run_of(recording: Recording, report: Report) -> RunSamples:
    """Collect what a comparison needs of a recording and its report (made with the model)."""
    budget: dict[str, int] = {}
    for vcpu in report.vcpus:
        for part, value in vars(vcpu.budget).items():
            budget[part] = budget.get(part, 0) + (value or 0)
    model = report.model
    assert model is not None, "made with the model"
    edges = {(t.from_state, t.event, t.to_state): t.count for t in model.transitions}
    return collect_samples(
        recording.capture.path, recording.events(), budget_ns=budget, transitions=edges, violations=model.n_violations
    )
