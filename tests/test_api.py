"""The Python interface on a committed recording: frames are typed, documented and agree with each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import kvmtrace
from kvmtrace.spans.time_parts import EXIT_PARTS

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


def test_what_is_public_is_offered() -> None:
    assert [name for name in dir(kvmtrace) if not name.startswith("_")] == [
        "LoadedRecording",
        "load",
        "load_fleet",
        "load_ipython_extension",
    ]


def test_frames_without_rows_have_their_columns(rec: kvmtrace.LoadedRecording) -> None:
    assert len(rec.replay().violations.rule) == 0
    changes = rec.compare(rec)
    assert set(changes.changes.columns) >= {"name", "metric", "ratio", "significant"}
    assert set(changes.measured.columns) >= {"name", "base_p50_ns", "new_count"}


def test_parts_of_vm_exits_add_up(rec: kvmtrace.LoadedRecording) -> None:
    exits = rec.vm_exits
    known = exits[exits["kernel_ns"].notna()]
    parts = known[["kernel_ns", "userspace_ns", "waiting_ns", "preempted_ns", "unknown_ns"]].sum(axis=1)
    assert (parts == known["dur_ns"]).all()
    assert (exits.groupby("tid")["number"].diff().dropna() == 1).all()
    assert exits["guest_rip"].dtype == "UInt64"


@pytest.mark.parametrize("name", ["svm-6.12-linux-2vcpu.dat", "svm-6.1-smp.dat", "vmx-6.1-lifecycle.dat"])
def test_one_word_means_one_thing_in_json_and_frames(name: str) -> None:
    rec = kvmtrace.load(FIXTURES / name)
    frame, document = rec.vm_exits, rec.report().document
    sums = frame[~frame["lost"]].groupby("name")[list(EXIT_PARTS)].sum(min_count=1)
    rows = {row.name: row for row in document.exits if row.samples}
    assert rows
    for reason, row in rows.items():
        for part in EXIT_PARTS:
            told, framed = getattr(row, part), sums.loc[reason, part]
            assert (told is None and pd.isna(framed)) or told == framed, (reason, part)
    by_number = frame.set_index(["tid", "number"])
    for slow in document.slowest:
        one = by_number.loc[(slow.tid, slow.number)]
        assert (slow.dur_ns, slow.preempted_ns) == (one["dur_ns"], one["preempted_ns"])
        assert slow.waiting_ns == one["waiting_ns"]


def test_what_was_not_recorded_is_absent_not_zero(tmp_path: Path) -> None:
    path = tmp_path / "no-scheduling.txt"
    path.write_text(
        " vmm-100 [000] d..1. 1.000002: kvm_entry: vcpu_id=0 rip=0x1000\n"
        " vmm-100 [000] d..1. 1.000003: kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0\n"
        " vmm-100 [000] d..1. 1.000005: kvm_entry: vcpu_id=0 rip=0x1002\n"
    )
    rec = kvmtrace.load(path)
    (row,) = rec.report().document.exits
    assert (row.kernel_ns, row.userspace_ns, row.waiting_ns, row.preempted_ns) == (2000, None, None, None)
    assert rec.vm_exits["kernel_ns"].tolist() == [2000]
    assert rec.vm_exits[["waiting_ns", "preempted_ns", "userspace_ns"]].isna().all(axis=None)


def test_vm_exits_say_what_they_were_about() -> None:
    rec = kvmtrace.load(FIXTURES / "svm-6.12-lifecycle.dat")
    exits = rec.vm_exits
    io = exits[exits["name"] == "io"]
    assert io["port"].notna().all()
    assert set(io["access"].dropna()) <= {"read", "write"}
    assert (exits.loc[exits["to_userspace"], "userspace_exit"].notna()).all()
    assert exits["vm"].notna().any()


def test_events_are_columns_made_on_demand() -> None:
    events = kvmtrace.load(FIXTURES / "vmx-6.1-smp.dat").events
    some = events[["ts_ns", "event"]]
    assert list(some.columns) == ["ts_ns", "event"]
    assert "_whole" not in vars(events), "nothing else was made"
    assert events.shape == (len(some), len(events.columns))
    kept = events[events["event"] == "kvm_exit"]
    assert list(kept.columns) == list(events.columns)
    assert (kept["event"] == "kvm_exit").all()
    assert (kept["ts_ns"].to_numpy() == some.loc[some["event"] == "kvm_exit", "ts_ns"].to_numpy()).all()
    assert "columns" in repr(events)
    assert "<table" in events._repr_html_()
    assert (events.groupby("event", observed=True).size() > 0).all(), "what a frame can do"
