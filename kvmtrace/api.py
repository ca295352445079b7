"""Recordings in Python and Jupyter: typed pandas frames, the report, the model's verdict, comparisons, plots."""

from __future__ import annotations

import html
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from kvmtrace.ab.collect_run import run_of
from kvmtrace.ab.recordings import Change, Measured, compare_runs
from kvmtrace.check.verdict import RuleResult, TransitionCount, Violation
from kvmtrace.event_frame import EventFrame
from kvmtrace.formats import open_recording
from kvmtrace.render.text.compare_text import comparison_document, render_comparison_text
from kvmtrace.render.text.report_text import render_text
from kvmtrace.report.build import build_report
from kvmtrace.report.json_document import to_json
from kvmtrace.spans.nested_chains import collect_chains
from kvmtrace.spans.row_columns import nested_columns, userspace_columns, vm_exit_columns
from kvmtrace.spans.slices import PART_NAMES, collect_segments
from kvmtrace.spans.time_parts import Part
from kvmtrace.spans.vm_exits import collect_vm_exits
from kvmtrace.spans.vmm_stays import collect_userspace_exits
from kvmtrace.stats.rows import Budget, VcpuRow
from kvmtrace.table.one_vm import only_vm
from kvmtrace.table.vm_threads import labels_of_threads, processes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kvmtrace.ab.recordings import RecordingComparison
    from kvmtrace.ab.run import RunSamples
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.report.document import Report
    from kvmtrace.spans.slices import Segments
    from kvmtrace.table.columns import RowColumn
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

PIECE_EVENTS = 1 << 18
_MEASURED = [f.name for f in fields(Measured)]


def load(path: str | Path, *, vm: str | None = None) -> LoadedRecording:
    """Open a recording of any format that `kvmtrace report` reads.

    Parameters
    ----------
    vm : look only at this VM: its name, its uuid, or a pattern of names

    Raises
    ------
    FormatError
        The file is not a trace.
    UsageError
        The recording has no such VM.
    """
    return LoadedRecording(only_vm(open_recording(path), vm))


def _frame(columns: Mapping[str, RowColumn]) -> pd.DataFrame:
    """Return columns as a frame: categories for texts, nullable integers where some rows have no value."""
    return pd.DataFrame({name: _values(column) for name, column in columns.items()}, copy=False)


def _values(column: RowColumn) -> Any:
    values, absent = column.values, column.absent
    if column.texts is not None:
        return pd.Categorical.from_codes(values if absent is None else np.where(absent, -1, values), column.texts)
    if absent is None:
        return values
    return pd.arrays.IntegerArray(values, absent)  # type: ignore[attr-defined,unused-ignore]


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
        n_exits = self.table.count("kvm_exit")
        return f"<kvmtrace recording {capture.path}: {len(self.table):,} events, {n_exits:,} VM-exits>"

    @cached_property
    def table(self) -> EventTable:
        """The event table (NumPy columns), see kvmtrace.table.event_table."""
        return self.recording.events()

    @cached_property
    def events(self) -> EventFrame:
        """All events: ts_ns, cpu, tid, event, irq_flags, preempt_count, and `event.field` columns (nullable integers).

        Columns are made when they are asked for: `rec.events[["ts_ns", "event"]]`; see EventFrame.
        """
        return EventFrame(self.table)

    @cached_property
    def vm_exits(self) -> pd.DataFrame:
        """One row a VM-exit, in recorded order; what is not known is <NA>, integers stay integers.

        Columns
        -------
        ts_ns, name (as the kernel prints it), dur_ns (to the next VM-entry), guest_before_ns, tid, pid, vm (its
        name, else that of the process), vcpu_id, number (of the thread's VM-exits: what `kvmtrace report --explain`
        takes), cpu, level (of guest: 1, or 2 for a guest of the guest), isa, exit_reason, guest_rip, entry_rip, info1,
        info2, intr_info, error_code

        of the first such event before the next VM-entry: port, gpa (MMIO, else the fault's), msr, cr, register (arm64's
        trapped system register, by name), hypercall (its number), syndrome (arm64: ESR_EL2 of a fault or a trapped
        register), cause (the same in words), access ("read", "write"), size (bytes), data, vector (injected),
        userspace_reason, userspace_exit (its name), errno

        parts of dur_ns, which add up to it: kernel_ns, userspace_ns (the VMM), waiting_ns (blocked or halt-polling),
        preempted_ns, unknown_ns

        to_userspace, lost (events may have been lost within), entry_ts_ns, entry_cpu, row and entry_row (in `events`)
        """
        rows = collect_vm_exits(self.recording.iter_events(PIECE_EVENTS))
        frame = _frame(vm_exit_columns(rows, labels_of_threads(self.recording)))
        pids = frame["tid"].map(processes_of(self.recording)).astype("Int64")
        frame.insert(frame.columns.get_loc("vm"), "pid", pids)
        return frame

    @cached_property
    def userspace_exits(self) -> pd.DataFrame:
        """One row a return of KVM_RUN.

        Columns: ts_ns, name, reason, errno, tid, vm (its name, else that of the process), cpu, dur_ns (to the next
        one), lost, row.
        """
        rows = collect_userspace_exits(self.recording.iter_events(PIECE_EVENTS))
        return _frame(userspace_columns(rows, labels_of_threads(self.recording)))

    @cached_property
    def nested_exits(self) -> pd.DataFrame:
        """One row a VM-exit of a guest's guest (L2), from the exit until L2 goes on, with all that L1 does between.

        Columns: ts_ns, name, isa, exit_reason, tid, number (as in `vm_exits`), guest_rip, reflected (L1 got it),
        complete (L2 was seen to go on), l1_exits (that L1 took meanwhile), dur_ns, and its parts, which add up to it:
        l0_ns, l1_guest_ns, userspace_ns, waiting_ns, preempted_ns, unknown_ns.
        """
        return _frame(nested_columns(*collect_chains(self.recording.iter_events(PIECE_EVENTS))))

    @cached_property
    def vcpus(self) -> pd.DataFrame:
        """One row a vCPU thread: tid, pid, comm, vm, vcpu_id, wall_ns, the budget's parts (ns), migrations, exits."""
        rows = []
        for vcpu in self.report().document.vcpus:
            row = {name: value for name, value in vars(vcpu).items() if name not in {"budget", "cpus"}}
            rows.append({**row, **vars(vcpu.budget)})
        names = [f.name for f in fields(VcpuRow) if f.name not in {"budget", "cpus"}]
        frame = pd.DataFrame(rows, columns=[*names, *(f.name for f in fields(Budget))])
        return frame.astype({name: "Int64" for name in frame.columns if name not in {"comm", "vm"}})

    @cached_property
    def segments(self) -> Segments:
        """What each vCPU thread was doing over time, as columns; see kvmtrace.spans.slices."""
        return collect_segments(self.recording.iter_events(PIECE_EVENTS))

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """The segments as a frame: ts_ns, dur_ns, tid, doing, exit (being handled), cpu, guest_rip."""
        made = self.segments
        distinct = list(dict.fromkeys(["", *made.reasons]))  # several numbers may have one name
        number = np.array([distinct.index(name) for name in ["", *made.reasons]], np.int32)
        return pd.DataFrame(
            {
                "ts_ns": made.ts_ns,
                "dur_ns": made.dur_ns,
                "tid": np.array(made.tids or (0,))[made.thread],
                "doing": pd.Categorical.from_codes(made.part.astype(np.int32), [PART_NAMES[part] for part in Part]),
                "exit": pd.Categorical.from_codes(number[made.reason + 1], distinct),
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
        return ComparisonView(compare_runs([self._run], [other._run], min_effect=min_effect))

    @cached_property
    def _run(self) -> RunSamples:
        return run_of(self.recording, self._report)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def _pre(text: str) -> str:
    return f'<pre style="font-family:monospace;font-size:12px;line-height:1.35">{html.escape(text)}</pre>'


def _records(items: Sequence[Any], kind: type) -> pd.DataFrame:
    """Return dataclass instances as a frame, which has its columns without any, too."""
    return pd.DataFrame([vars(item) for item in items], columns=[f.name for f in fields(kind)])


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
        return _records(self.comparison.violations, Violation).drop(columns="context")

    @property
    def rules(self) -> pd.DataFrame:
        """One row a rule: checked, held, violated, unknown."""
        frame = _records(tuple(self.comparison.rules.values()), RuleResult)
        return frame.set_axis(pd.Index(self.comparison.rules, dtype=object))

    @property
    def transitions(self) -> pd.DataFrame:
        """One row a transition taken: from_state, event, to_state, count, p50_ns, p99_ns."""
        return _records(self.comparison.transitions, TransitionCount)

    def diagram(self) -> Any:
        """Return the lifecycle diagram with this recording's counts, as an IPython SVG."""
        from IPython.display import SVG

        return SVG(self._svg())

    def _svg(self) -> str:
        from kvmtrace.render.model.diagram_svg import render_svg

        counts = {(t.from_state, t.event, t.to_state): t.count for t in self.comparison.transitions}
        return render_svg(counts)

    def __repr__(self) -> str:
        c = self.comparison
        verdict = c.verdict
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
        own = [f.name for f in fields(Change) if f.name != "key"]
        names = ["kind", "isa", "reason", "path", "name", *own, "regression"]
        return pd.DataFrame(comparison_document(self.result)["changes"], columns=names)

    @property
    def measured(self) -> pd.DataFrame:
        """One row a kind of exit: both sides next to each other, tested or not."""
        columns = {f"{side}_{name}": (side, name) for name in _MEASURED for side in ("base", "new")}
        rows = [
            {"name": row["name"], **{column: (row[side] or {}).get(name) for column, (side, name) in columns.items()}}
            for row in comparison_document(self.result)["measured"]
        ]
        return pd.DataFrame(rows, columns=["name", *columns])

    def __repr__(self) -> str:
        return render_comparison_text(self.result)

    def _repr_html_(self) -> str:
        return _pre(render_comparison_text(self.result))
