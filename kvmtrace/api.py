"""Recordings in Python and Jupyter: typed pandas frames, the report, the model's verdict, comparisons, plots."""

from __future__ import annotations

import html
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from kvmtrace.ab.collect_run import run_of
from kvmtrace.ab.recordings import compare_runs
from kvmtrace.formats import open_recording
from kvmtrace.isa.exit_reasons import describe_exit_reason
from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.render.text.compare_text import comparison_document, render_comparison_text
from kvmtrace.render.text.report_text import render_text
from kvmtrace.report.build import build_report
from kvmtrace.report.json_document import to_json
from kvmtrace.spans.slices import PART_NAMES, collect_segments
from kvmtrace.spans.time_parts import Part
from kvmtrace.spans.userspace import collect_userspace_exits
from kvmtrace.spans.vm_exits import collect_vm_exits

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.ab.recordings import RecordingComparison
    from kvmtrace.ab.run import RunSamples
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.report.document import Report
    from kvmtrace.spans.slices import Segments
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

ISA_NAMES = {0: "unknown", 1: "vmx", 2: "svm"}
_NULLABLE = {"dur_ns", "guest_before_ns", "vcpu_id", "entry_ts_ns"}  # -1 means: none


def load(path: str | Path) -> LoadedRecording:
    """Open a recording of any format that `kvmtrace report` reads.

    Raises
    ------
    FormatError
        The file is not a trace.
    """
    return LoadedRecording(open_recording(path))


def _categories(codes: np.ndarray[Any, Any], names: list[str]) -> pd.Categorical:
    """Return a categorical of the distinct names; several codes may have one name."""
    distinct = list(dict.fromkeys(names))
    number = np.array([distinct.index(name) for name in names] or [0], np.int32)
    return pd.Categorical.from_codes(number[codes] if len(codes) else codes.astype(np.int32), distinct)


class LoadedRecording:
    """A recording with everything about it as frames and documents; each is computed once, when asked for.

    Parameters
    ----------
    recording : Recording
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def __repr__(self) -> str:
        capture = self.recording.capture
        return f"<kvmtrace recording {capture.path}: {len(self.table):,} events, {len(self.vm_exits):,} VM-exits>"

    @cached_property
    def table(self) -> EventTable:
        """The event table (NumPy columns), see kvmtrace.table.event_table."""
        return self.recording.events()

    @cached_property
    def events(self) -> pd.DataFrame:
        """All events: ts_ns, cpu, tid, event, irq_flags, preempt_count, and `event.field` columns (nullable)."""
        return self.table.to_pandas()

    @cached_property
    def vm_exits(self) -> pd.DataFrame:
        """One row a VM-exit.

        Columns: ts_ns, name (as the kernel prints it), dur_ns (to the next VM-entry), guest_before_ns, tid,
        vcpu_id, cpu, isa, exit_reason, guest_rip, entry_rip, info1, info2, intr_info, error_code,
        to_userspace, lost (events may have been lost within), row (in `events`). Missing is <NA>.
        """
        if not (self.table.has("kvm_exit", "exit_reason") and self.table.has("kvm_entry")):
            return pd.DataFrame(
                {"ts_ns": pd.Series(dtype="int64"), "name": pd.Categorical([]), "dur_ns": pd.Series(dtype="Int64")}
            )
        exits = collect_vm_exits(self.recording.iter_events())
        codes = exits["isa"].astype(np.int64) << 32 | exits["exit_reason"].astype(np.int64)
        values, inverse = np.unique(codes, return_inverse=True)
        names = [describe_exit_reason(int(value) >> 32, int(value) & 0xFFFFFFFF) for value in values]
        columns: dict[str, Any] = {"ts_ns": exits["ts_ns"], "name": _categories(inverse.reshape(-1), names)}
        for field in (
            "dur_ns",
            "guest_before_ns",
            "tid",
            "vcpu_id",
            "cpu",
            "isa",
            "exit_reason",
            "guest_rip",
            "entry_rip",
            "info1",
            "info2",
            "intr_info",
            "error_code",
            "to_userspace",
            "lost",
            "row",
        ):
            columns[field] = self._column(field, exits[field])
        return pd.DataFrame(columns)

    @staticmethod
    def _column(field: str, values: np.ndarray[Any, Any]) -> Any:
        if field == "isa":
            return pd.Categorical.from_codes(values.astype(np.int32), list(ISA_NAMES.values()))
        if field in _NULLABLE:
            return pd.arrays.IntegerArray(values.astype(np.int64), values < 0)  # type: ignore[attr-defined,unused-ignore]
        return np.ascontiguousarray(values)

    @cached_property
    def userspace_exits(self) -> pd.DataFrame:
        """One row a return of KVM_RUN: ts_ns, name, reason, errno, tid, cpu, dur_ns (to the next KVM_RUN), row."""
        found = collect_userspace_exits(self.recording.iter_events())
        pairs = list(zip(found["reason"].tolist(), found["errno"].tolist(), strict=True))
        distinct = list(dict.fromkeys(pairs))
        number = {pair: i for i, pair in enumerate(distinct)}
        codes = np.array([number[pair] for pair in pairs], np.int64)
        names = [describe_userspace_exit(*pair) for pair in distinct]
        return pd.DataFrame(
            {
                "ts_ns": found["ts_ns"],
                "name": _categories(codes, names),
                "reason": found["reason"],
                "errno": found["errno"],
                "tid": found["tid"],
                "cpu": found["cpu"],
                "dur_ns": self._column("dur_ns", found["dur_ns"]),
                "row": found["row"],
            }
        )

    @cached_property
    def vcpus(self) -> pd.DataFrame:
        """One row a vCPU thread: tid, pid, comm, vcpu_id, wall_ns, the budget's parts (ns), migrations, exits."""
        rows = []
        for vcpu in self.report().document.vcpus:
            row = {name: value for name, value in vars(vcpu).items() if name not in {"budget", "cpus"}}
            rows.append({**row, **vars(vcpu.budget)})
        frame = pd.DataFrame(rows)
        for name in frame.columns:
            if name != "comm":
                frame[name] = frame[name].astype("Int64")
        return frame

    @cached_property
    def segments(self) -> Segments:
        """What each vCPU thread was doing over time, as columns; see kvmtrace.spans.slices."""
        return collect_segments(self.recording.iter_events())

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """The segments as a frame: ts_ns, dur_ns, tid, doing, exit (being handled), cpu, guest_rip."""
        made = self.segments
        return pd.DataFrame(
            {
                "ts_ns": made.ts_ns,
                "dur_ns": made.dur_ns,
                "tid": np.array(made.tids or (0,))[made.thread],
                "doing": pd.Categorical.from_codes(made.part.astype(np.int32), [PART_NAMES[part] for part in Part]),
                "exit": _categories(made.reason + 1, ["", *made.reasons]),
                "cpu": made.cpu,
                "guest_rip": made.guest_rip,
            }
        )

    @cached_property
    def _comparison(self) -> Comparison:
        comparison = self._report.model
        assert comparison is not None, "reports are made with the model"
        return comparison

    def replay(self) -> Replay:
        """Step the reference model through the recording."""
        return Replay(self._comparison)

    @cached_property
    def _report(self) -> Report:
        return build_report(self.recording)

    def report(self) -> ReportView:
        """Return the report; shows itself in Jupyter, `.document` is the report document."""
        return ReportView(self._report)

    def compare(self, other: LoadedRecording, *, min_effect: float | None = None) -> ComparisonView:
        """Compare with another recording (`self` is the base)."""
        return ComparisonView(compare_runs([self._run()], [other._run()], min_effect=min_effect))

    def _run(self) -> RunSamples:
        return run_of(self.recording, self._report)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def _pre(text: str) -> str:
    return f'<pre style="font-size:12px;line-height:1.35">{html.escape(text)}</pre>'


class ReportView:
    """A report that shows itself; `document` is the frozen report document."""

    def __init__(self, document: Report) -> None:
        self.document = document

    def __repr__(self) -> str:
        return render_text(self.document)

    def to_json(self) -> str:
        """Return the document as JSON (kvmtrace.report/1)."""
        return to_json(self.document)

    def _repr_html_(self) -> str:
        return _pre(render_text(self.document))


class Replay:
    """The model's verdict; `comparison` holds it as values, `violations` and `rules` as frames."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    @property
    def conforms(self) -> bool:
        """Say whether nothing contradicts the model."""
        return self.comparison.conforms

    @property
    def violations(self) -> pd.DataFrame:
        """One row a violation or suspicion, without the context events."""
        return pd.DataFrame([vars(violation) for violation in self.comparison.violations]).drop(
            columns="context", errors="ignore"
        )

    @property
    def rules(self) -> pd.DataFrame:
        """One row a rule: checked, held, violated, unknown."""
        return pd.DataFrame({rule: vars(result) for rule, result in self.comparison.rules.items()}).T

    @property
    def transitions(self) -> pd.DataFrame:
        """One row a transition taken: from_state, event, to_state, count, p50_ns, p99_ns."""
        return pd.DataFrame([vars(transition) for transition in self.comparison.transitions])

    def diagram(self) -> Any:
        """Return the lifecycle diagram with this recording's counts, as an IPython SVG."""
        from IPython.display import SVG

        return SVG(self._svg())

    def _svg(self) -> str:
        from kvmtrace.render.model.diagram import render_svg

        counts = {(t.from_state, t.event, t.to_state): t.count for t in self.comparison.transitions}
        return render_svg(counts)

    def __repr__(self) -> str:
        c = self.comparison
        verdict = "conforms" if c.conforms else f"{c.n_violations} violations"
        counts = f"{c.n_events:,} events, {c.explained_events:,} explained, {c.unknown_events:,} unknown"
        return f"<model replay: {verdict}; {counts}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{self.rules.to_html()}"


class ComparisonView:
    """A comparison of recordings that shows itself; `result` holds the values."""

    def __init__(self, result: RecordingComparison) -> None:
        self.result = result

    @property
    def changes(self) -> pd.DataFrame:
        """One row a test."""
        return pd.DataFrame(comparison_document(self.result)["changes"])

    def __repr__(self) -> str:
        return render_comparison_text(self.result)

    def _repr_html_(self) -> str:
        return _pre(render_comparison_text(self.result))
