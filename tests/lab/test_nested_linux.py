"""A Linux that is a hypervisor itself: real kvm_amd in a guest of real kvm_amd, with guests of its own.

L0 is the SVM lab's host, L1 a Debian kernel under QEMU with kvm_amd, L2 what our small unusual VMMs run in it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from lab.counting import count_with_trace_cmd

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab
from kvmtrace.lab.initramfs import add_modules, base_archive, find_busybox
from kvmtrace.lab.kernels import get_kernel
from kvmtrace.lab.linux_guest import GUEST_DONE
from kvmtrace.report.build import build_report
from kvmtrace.spans.vm_exits import collect_vm_exits

UNUSUAL = Path(__file__).parent / "unusual" / "unusual.c"
# port I/O, MMIO, CPUID, HLT and signals; interrupts and NMIs put into L2; debug registers; two L2s by turns
MODES = ("signals", "interrupts", "nmis", "single-step", "cross-pages", "two-vms")
ROUNDS = 60
INIT = f"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for name in $(cat /modules/kvm.list); do insmod /modules/$name.ko || echo "$name: not loaded"; done
for mode in {" ".join(MODES)}; do echo "l2 $mode: $(unusual $mode {ROUNDS} 2>&1)"; done
echo "{GUEST_DONE}"
poweroff -f
"""


def make_l1(folder: Path, series: str) -> None:
    """Put L1's initramfs, with KVM and a VMM of its own, into `folder`."""
    program = folder / "unusual"
    subprocess.run(["cc", "-static", "-O1", "-pthread", "-o", str(program), str(UNUSUAL)], check=True)
    archive = base_archive(find_busybox(), INIT.encode())
    add_modules(archive, get_kernel(series), "kvm", ("kvm_amd",))
    archive.add_file("bin/unusual", program.read_bytes(), 0o755)
    (folder / "l1").write_bytes(archive.to_bytes())


@pytest.fixture(scope="module", params=["6.1", "6.12"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording, made on a host of each kernel; L1's is 6.1."""
    work, out = tmp_path_factory.mktemp("l1"), tmp_path_factory.mktemp("out")
    make_l1(work, "6.1")
    command = f"kvmtrace record --backend ftrace -o l1.dat -- kvmtrace-linux-guest 1 -cpu host,+svm -initrd {work}/l1"
    result = run_lab(
        Job("svm", ("sh", "-c", command), request.param, cwd=work, out=out, timeout_s=500, memory_mib=2048)
    )
    said = result.stdout.decode(errors="replace")
    assert result.status == 0, said + result.stderr.decode(errors="replace")
    assert [mode for mode in MODES if f"l2 {mode}: ok" not in said] == [], said
    return out / "l1.dat"


@pytest.mark.lab
def test_a_linux_hypervisor_conforms(recorded: Path) -> None:
    verdict = check_recording(open_recording(recorded))
    assert (verdict.n_violations, verdict.n_suspicions) == (0, 0), verdict.first_divergence
    for rule in ("N1", "N2", "N3", "N4", "N5", "N6", "N7"):
        assert verdict.rules[rule].checked > 100, rule


@pytest.mark.lab
def test_the_counts_are_those_of_trace_cmd(recorded: Path) -> None:
    events, _ = count_with_trace_cmd(recorded)
    recording = open_recording(recorded)
    l2 = events["kvm_nested_vmexit"]
    levels = np.bincount(collect_vm_exits(recording.iter_events())["level"], minlength=3)
    assert levels.tolist() == [0, events["kvm_exit"] - l2, l2]
    nested = build_report(recording).nested or ()
    assert sum(row.l2_exits for row in nested) == l2 > 500
    assert sum(row.l1_exits for row in nested) == events["kvm_exit"] - l2
    assert sum(row.entries for row in nested) == events["kvm_nested_vmenter"]
    assert sum(row.reflected for row in nested) == events["kvm_nested_vmexit_inject"]
