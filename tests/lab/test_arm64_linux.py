"""QEMU boots a Debian guest with KVM/arm64 in the lab: nested emulation, some minutes a boot."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from lab.counting import count_with_trace_cmd

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, LabRecording, record_in_lab

if TYPE_CHECKING:
    from pathlib import Path

# a boot that takes longer than this is one that hangs
LIMIT_S = 1500
COUNTED = (
    *("kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_guest_fault", "kvm_handle_sys_reg", "kvm_mmio"),
    *("kvm_wfx_arm64", "kvm_hvc_arm64", "vgic_update_irq_pending", "kvm_timer_update_irq"),
)


def boot(out: Path, mode: str, kernel: str, recording: LabRecording) -> Path:
    """Record a boot, which conforms; return the recording."""
    record_in_lab([recording], Job("arm64", ("true",), kernel, out=out, mode=mode, timeout_s=LIMIT_S))
    path = out / f"{recording.name}.dat"
    recorded = open_recording(path)
    verdict = check_recording(recorded)
    assert recorded.loss.events == 0
    assert (verdict.n_violations, verdict.n_suspicions, verdict.unexplained) == (0, 0, {}), verdict.first_divergence
    assert len(recorded.events().rows("kvm_exit")) > 1500
    return path


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kernel"), [("vhe", "6.1"), ("nvhe", "6.12")])
def test_qemu_boots_linux(mode: str, kernel: str, tmp_path: Path) -> None:
    path = boot(tmp_path, mode, kernel, LabRecording("linux", with_trace_cmd=True))
    table = open_recording(path).events()
    events, reasons = count_with_trace_cmd(path.with_suffix(".trace-cmd.dat"))
    assert {name: len(table.rows(name)) for name in COUNTED} == {name: events[name] for name in COUNTED}
    assert Counter(map(int, table.field("kvm_exit", "exit_reason"))) == reasons


@pytest.mark.lab
@pytest.mark.slow
def test_qemu_boots_linux_on_two_vcpus(tmp_path: Path) -> None:
    """The one that switches the machine off stops the other."""
    boot(tmp_path, "vhe", "6.12", LabRecording("linux", 2))
