"""The bpf back end on real kvm_amd: beside ftrace with kprobes, and its filters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvmtrace.decode.summary import read_summary
from kvmtrace.events.opening import open_recording
from tests.capture.test_bpf_recording import compare, missed_by, of_threads, vmm_threads

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "record_twice.py"
COMMANDS = f"""
mkdir twice && python3 {SCRIPT} twice lifecycle || exit 1
record() {{ kvmtrace record --backend bpf --guest lifecycle "$@" || exit 1; }}
record --exit-reason cpuid --exit-reason io -o reason.bpf
record --sample 10 -o sample.bpf
record --slower-than 200us -o slow.bpf
record --summary -o summary.json
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here, back = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("results")
    done = subprocess.run([sys.executable, "-m", "kvmtrace", "lab", "run", "--isa", "svm", "-o", str(back), "--",
                           "bash", "-c", COMMANDS], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return back


def test_both_back_ends_see_the_same_with_probes(results: Path) -> None:
    ftrace, bpf = (open_recording(results / "twice" / f"{name}.dat") for name in ("ftrace", "bpf"))
    tids = vmm_threads(ftrace.events())
    seen = compare(of_threads(ftrace.events(), tids), of_threads(bpf.events(), tids), missed_by(bpf))
    for name in ("kvm_entry", "kvm_exit", "svm_vcpu_run", "svm_vcpu_run_return", "kvm_vcpu_ioctl",
                 "kvm_vcpu_ioctl_return"):
        assert seen[name] > 100, name
    how = {row["event"]: row["how"] for row in bpf.capture.meta["probes"]}
    assert how["svm_vcpu_run"] in ("fentry", "kprobe")
    assert {row["how"] for row in ftrace.capture.meta["probes"]} == {"kprobe", "kretprobe"}


def test_filters_by_reason(results: Path) -> None:
    recording = open_recording(results / "reason.bpf")
    table = recording.events()
    reasons = table.field("kvm_exit", "exit_reason").tolist()
    assert (reasons.count(0x72), reasons.count(0x7b), len(reasons)) == (13, 61, 74)
    assert table.count("kvm_entry") == 74
    assert table.count("kvm_mmio") == 0
    assert recording.capture.meta["filtered_events"] > 0
    assert "exit_reason" in recording.capture.meta["filters"]


def test_samples_one_in_ten(results: Path) -> None:
    table = open_recording(results / "sample.bpf").events()
    assert table.count("kvm_exit") in (13, 14, 15)  # of 136 and some host interrupts
    assert abs(table.count("svm_vcpu_run_return") - table.count("kvm_exit")) <= 1


def test_slow_exits_alone(results: Path) -> None:
    table = open_recording(results / "slow.bpf").events()
    exits, entries = table.rows("kvm_exit"), table.rows("kvm_entry")
    assert 0 < len(exits) < 136
    entries = entries[entries > exits[0]]
    assert (table.ts_ns[entries] - table.ts_ns[exits] >= 200_000).all()


def test_summary_counts_vm_exits(results: Path) -> None:
    (vcpu,) = read_summary((results / "summary.json").read_bytes(), "summary.json").vcpus
    assert {code: vcpu.exits[code].count for code in (0x72, 0x7b, 0x78, 0x7c)} == {0x72: 13, 0x7b: 61, 0x78: 5,
                                                                                      0x7c: 18}
    assert vcpu.guest is not None
    assert vcpu.guest.count == sum(cell.count for cell in vcpu.exits.values())
    assert vcpu.time_ns["guest"] > 0
    assert sum(vcpu.time_ns.values()) == vcpu.wall_ns
