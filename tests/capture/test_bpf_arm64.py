"""What the BPF back end recorded on real KVM/arm64: the guests' known counts, and the model accepts it."""

from __future__ import annotations

import lzma
from collections import Counter
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.formats.summary.summary_file import read_summary
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.predict.align_recording import replay_recording
from kvmtrace.workload.result import GuestRun

HERE = Path(__file__).parent / "arm64"
ARM64 = BY_NAME["arm64"]


@pytest.mark.parametrize("guest", ["lifecycle", "smp"])
def test_a_recorded_guest_conforms(guest: str, tmp_path: Path) -> None:
    """The probe on KVM_RUN told another register's value as its command, and V1 accused KVM."""
    path = tmp_path / f"{guest}.bpf"
    path.write_bytes(lzma.decompress((HERE / f"arm64-6.1-{guest}.bpf.xz").read_bytes()))
    recording = open_recording(path)
    table = recording.events()
    run = GuestRun.from_dict(recording.capture.meta["guest_run"])
    assert {name: len(table.rows(name)) for name in run.known.tracepoints} == run.known.tracepoints
    reasons = Counter(ARM64.describe(int(code)) for code in table.field("kvm_exit", "exit_reason"))
    assert {name: reasons[name] for name in run.known.arm64} == run.known.arm64
    verdict = check_recording(recording)
    assert (verdict.n_violations, verdict.n_suspicions, verdict.unexplained) == (0, 0, {})
    assert verdict.rules["V1"].held
    replay = replay_recording(open_recording(path))
    assert replay is not None
    assert replay.differences == ()


def test_a_summary_counts_exits_by_two_fields() -> None:
    """It saw no VM-exit at all: their reason is in no one field."""
    path = HERE / "arm64-6.1-lifecycle.summary.json"
    (vcpu,) = read_summary(path.read_bytes(), path.name).vcpus
    counts = {ARM64.describe(code): cell.count for code, cell in vcpu.exits.items()}
    assert counts == {"DABT_LOW": 37, "SYS64": 18, "HVC64": 13, "IABT_LOW": 1, "IRQ": 2}
    assert vcpu.guest is not None
    assert vcpu.guest.count == sum(counts.values())
    (stay,) = vcpu.userspace_exits.values()
    assert (stay.count, stay.samples) == (37, 36)
