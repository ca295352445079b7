"""The Python interface on a committed recording: frames are typed, documented and agree with each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import kvmtrace

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDINGS = sorted(FIXTURES.glob("*.dat"))


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda path: path.stem)
def rec(request: pytest.FixtureRequest) -> kvmtrace.LoadedRecording:
    return kvmtrace.load(request.param)


def test_vm_exits_are_the_kvm_exit_events(rec: kvmtrace.LoadedRecording) -> None:
    exits = rec.vm_exits
    assert len(exits) == (rec.events.event == "kvm_exit").sum()
    assert isinstance(exits["name"].dtype, pd.CategoricalDtype)
    assert exits["dur_ns"].dtype == "Int64"
    if len(exits):
        at = rec.events.loc[exits["row"].to_numpy()]
        assert (at["ts_ns"].to_numpy() == exits["ts_ns"].to_numpy()).all()
        paired = exits[exits["dur_ns"].notna()]
        assert (paired["dur_ns"] >= 0).all()


def test_userspace_exits_are_the_kvm_userspace_exit_events(rec: kvmtrace.LoadedRecording) -> None:
    assert len(rec.userspace_exits) == (rec.events.event == "kvm_userspace_exit").sum()


def test_budget_parts_sum_to_wall_time(rec: kvmtrace.LoadedRecording) -> None:
    for _, vcpu in rec.vcpus.iterrows():
        parts = [
            vcpu[f"{part}_ns"]
            for part in ("guest", "entry_exit", "handler", "userspace", "blocked", "halt_poll", "preempted", "unknown")
        ]
        assert sum(0 if value is pd.NA else value for value in parts) == vcpu["wall_ns"]


def test_timeline_covers_each_vcpu_without_gaps(rec: kvmtrace.LoadedRecording) -> None:
    timeline = rec.timeline
    for tid, part in timeline.groupby("tid"):
        ends = (part["ts_ns"] + part["dur_ns"]).to_numpy()
        assert (part["ts_ns"].to_numpy()[1:] == ends[:-1]).all(), tid


def test_report_replay_and_comparison_show_themselves(rec: kvmtrace.LoadedRecording) -> None:
    assert "<script" not in rec._repr_html_()
    assert rec.replay().conforms
    assert set(rec.replay().rules.columns) == {"checked", "held", "violated", "unknown"}
    assert not rec.compare(rec).result.significant
    assert rec.report().to_json().startswith('{\n "schema": "kvmtrace.report/1"')


def test_importing_kvmtrace_imports_no_pandas() -> None:
    code = "import sys, kvmtrace; print('pandas' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        kvmtrace.nonsense  # noqa: B018


def test_events_frame_has_nullable_fields(rec: kvmtrace.LoadedRecording) -> None:
    events = rec.events
    name = next(c for c in events.columns if c.startswith("kvm_userspace_exit."))
    present = events[name].notna().to_numpy()
    assert (present == (events.event == "kvm_userspace_exit").to_numpy()).all()
    assert np.issubdtype(events["ts_ns"].dtype, np.int64)
