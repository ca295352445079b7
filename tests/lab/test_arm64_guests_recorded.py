"""Real KVM/arm64 in the lab: every bundled guest does what its listing says, and the model accepts it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from lab.counting import count_with_trace_cmd

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.lab import Job, LabRecording, record_in_lab
from kvmtrace.predict.align_recording import replay_recording
from kvmtrace.predict.replayed import replayed
from kvmtrace.render.text.replay_text import render_replay
from kvmtrace.workload.arm64_guests import ARM64_GUESTS
from kvmtrace.workload.result import GuestRun

if TYPE_CHECKING:
    from pathlib import Path

COUNTS = {"storm": 997}


@pytest.mark.lab
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
@pytest.mark.parametrize("mode", ["vhe", "nvhe"])
def test_every_guest(mode: str, kernel: str, tmp_path: Path) -> None:
    recordings = [LabRecording(name, count=COUNTS.get(name), with_trace_cmd=True) for name in ARM64_GUESTS]
    record_in_lab(recordings, Job("arm64", ("true",), kernel, out=tmp_path, mode=mode, timeout_s=2400))
    for name in ARM64_GUESTS:
        check_guest(tmp_path / f"{name}.dat")


def check_guest(path: Path) -> None:
    recording = open_recording(str(path))
    table = recording.events()
    run = GuestRun.from_dict(recording.capture.meta["guest_run"])
    assert run.isa == "arm64"
    assert run.succeeded, run.ended
    assert recording.loss.events == 0
    assert {name: len(table.rows(name)) for name in run.known.tracepoints} == run.known.tracepoints
    reasons = Counter(map(int, table.field("kvm_exit", "exit_reason")))
    exits = Counter({BY_NAME["arm64"].describe(reason): count for reason, count in reasons.items()})
    assert {name: exits[name] for name in run.known.arm64} == run.known.arm64
    events, _ = count_with_trace_cmd(path.with_suffix(".trace-cmd.dat"))
    for name in ("kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_mmio", "kvm_guest_fault", "kvm_hvc_arm64"):
        ours = len(table.rows(name)) if any(kind.name == name for kind in table.kinds) else 0
        assert ours == events[name], name
    replay = replay_recording(open_recording(str(path)))
    assert replay is not None
    assert replay.differences == (), render_replay(replayed(replay))
    verdict = check_recording(open_recording(str(path)))
    assert verdict.n_violations == 0
    assert verdict.unexplained == {}
