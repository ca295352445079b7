"""The bpf back end on real kvm_amd and kvm_intel: beside ftrace with kprobes, its filters, its summary.

bcc takes half a minute for a set of programs in the SVM lab and minutes in the VMX lab. So compiled programs are kept
in the lab's cache, and the VMX lab runs what was compiled in the SVM lab: on one kernel both have the same tracepoints.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kvmtrace.capture.bpf.compiler import compile_cached
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.formats.summary.summary_file import read_summary
from kvmtrace.lab.cache import cache_dir
from tests.capture.test_bpf_raw import assert_same_summary
from tests.capture.test_bpf_recording import compare, missed_by, of_threads, vmm_threads

pytestmark = [pytest.mark.lab, pytest.mark.slow]

HERE = Path(__file__).parent
PROGRAMS = "bpf-programs"
STORM = 60_000  # VM-exits
BUFFER = "4M"  # stands in the programs: the same in both labs
PREPARE = f"""
export KVMTRACE_BPF_CACHE=$PWD/{PROGRAMS}
mkdir -p {PROGRAMS} && chown -R $(id -u) {PROGRAMS} && chmod 700 {PROGRAMS} || exit 1
record() {{ kvmtrace record --backend bpf --buffer-size {BUFFER} --guest "$@" || exit 1; }}
"""
SVM = (
    PREPARE
    + f"""
mkdir twice && python3 {HERE}/record_twice.py twice lifecycle || exit 1
mkdir summaries && python3 {HERE}/summarise_twice.py summaries lifecycle || exit 1
record lifecycle -o lifecycle.bpf
record lifecycle --exit-reason cpuid --exit-reason io -o reason.bpf
record lifecycle --sample 10 -o sample.bpf
record lifecycle --slower-than 200us -o slow.bpf
record smp --vcpu 1 -o vcpu.bpf
kvmtrace record --backend bpf --buffer-size 16k --guest storm --count {STORM} -o storm.bpf & recorder=$!
until [ -s .storm.bpf.kvmtrace-*/out ]; do sleep 0.1; done; sleep 0.5
kill -STOP $recorder; sleep 1; kill -CONT $recorder; wait $recorder || exit 1
kvmtrace record --summary --guest lifecycle -o summary.json
"""
)


def run_in_lab(isa: str, commands: str, here: Path, back: Path) -> Path:
    """Run commands on an emulated host; return the folder with what they wrote. Compiled programs are kept."""
    kept = cache_dir() / PROGRAMS
    kept.mkdir(exist_ok=True)
    shutil.copytree(kept, here / PROGRAMS)
    argv = [sys.executable, "-m", "kvmtrace", "lab", "run", "--isa", isa, "-o", str(back), "--", "sh", "-c", commands]
    done = subprocess.run(argv, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if (back / PROGRAMS).is_dir():
        for path in (back / PROGRAMS).iterdir():
            temporary = kept / f".{path.name}.{os.getpid()}"
            shutil.copyfile(path, temporary)
            temporary.rename(kept / path.name)
    return back


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in_lab("svm", SVM, tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("results"))


def test_both_back_ends_see_the_same_with_probes(results: Path) -> None:
    ftrace, bpf = (open_recording(results / "twice" / f"{name}.dat") for name in ("ftrace", "bpf"))
    tids = vmm_threads(ftrace.events())
    seen = compare(of_threads(ftrace.events(), tids), of_threads(bpf.events(), tids), missed_by(bpf))
    for name in (
        "kvm_entry",
        "kvm_exit",
        "svm_vcpu_run",
        "svm_vcpu_run_return",
        "kvm_vcpu_ioctl",
        "kvm_vcpu_ioctl_return",
    ):
        assert seen[name] > 100, name
    how = {row["event"]: row["how"] for row in bpf.capture.meta["probes"]}
    assert how["svm_vcpu_run"] in ("fentry", "kprobe")
    assert {row["how"] for row in ftrace.capture.meta["probes"]} == {"kprobe", "kretprobe"}


def test_filters_by_reason(results: Path) -> None:
    recording = open_recording(results / "reason.bpf")
    table = recording.events()
    reasons = table.field("kvm_exit", "exit_reason").tolist()
    assert (reasons.count(0x72), reasons.count(0x7B), len(reasons)) == (13, 61, 74)
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
    assert {code: vcpu.exits[code].count for code in (0x72, 0x7B, 0x78, 0x7C)} == {
        0x72: 13,
        0x7B: 61,
        0x78: 5,
        0x7C: 18,
    }
    assert vcpu.guest is not None
    assert vcpu.guest.count == sum(cell.count for cell in vcpu.exits.values())
    assert vcpu.time_ns["guest"] > 0
    assert sum(vcpu.time_ns.values()) == vcpu.wall_ns


def test_raw_and_plain_tracepoints_count_the_same(results: Path) -> None:
    attached = assert_same_summary(results / "summaries")
    assert set(attached["raw tracepoint"]) == {"kvm_exit", "kvm_entry", "kvm_fpu", "kvm_userspace_exit"}
    assert attached["BTF tracepoint"] == ["sched_switch"]


def test_one_vcpu_alone(results: Path) -> None:
    recording = open_recording(results / "vcpu.bpf")
    table = recording.events()
    assert set(table.field("kvm_exit", "vcpu_id").tolist()) == {1}
    assert set(table.field("kvm_entry", "vcpu_id").tolist()) == {1}
    assert recording.capture.meta["filters"]["vcpu"] == "only vCPU 1"


def test_recorded_and_lost_are_what_the_guest_did(results: Path) -> None:
    recording = open_recording(results / "storm.bpf")
    lost = Counter[str]()
    for kinds in recording.capture.meta["loss"]["by_cpu_and_event"].values():
        lost.update(kinds)
    table = recording.events()
    known = recording.capture.meta["guest_run"]["known"]["tracepoints"]
    assert lost["kvm_exit"] > 0
    assert {name: table.count(name) + lost[name] for name in known} == known
    cpuid = np.count_nonzero(table.field("kvm_exit", "exit_reason") == 0x72)
    assert table.count("kvm_cpuid") + lost["kvm_cpuid"] == STORM >= cpuid


def test_the_vmx_lab_records_with_bpf(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that the SVM lab compiled run on kvm_intel; what they record conforms to the model."""
    back = run_in_lab(
        "vmx",
        PREPARE + "record lifecycle -o lifecycle.bpf",
        tmp_path_factory.mktemp("job"),
        tmp_path_factory.mktemp("results"),
    )
    recording = open_recording(back / "lifecycle.bpf")
    table = recording.events()
    reasons = Counter(table.field("kvm_exit", "exit_reason").tolist())
    assert {code: reasons[code] for code in (10, 12, 30)} == {10: 13, 12: 5, 30: 61}  # CPUID, HLT, IO_INSTRUCTION
    assert recording.capture.meta["loss"]["events"] == 0
    how = {row["event"]: row["how"] for row in recording.capture.meta["probes"]}
    assert how["vmx_vcpu_run"] in ("fentry", "kprobe")
    assert table.count("vmx_vcpu_run") == table.count("kvm_entry")
    comparison = check_recording(recording)
    assert comparison.conforms
    assert comparison.isa == "vmx"
    assert comparison.rules["V3"].unknown >= table.count("kvm_entry")


DUMP = """
import kvmtrace.capture.bpf.summary_maps as summary
def write(text):
    open("summary.c", "w").write(text)
    raise SystemExit
summary.compile_cached = write
summary.SummaryPrograms(1)
"""


def test_the_vmx_lab_summarises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason of kvm_exit as the raw tracepoint's program reads it from kvm_intel; compiled here for the lab."""
    folders = [tmp_path / name for name in ("first", "first-back", "second", "second-back")]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "dump.py").write_text(DUMP)
    run_in_lab(
        "vmx",
        "export PYTHONPATH=$(sed -n 's/.*PYTHONPATH=\\([^ ]*\\) .*/\\1/p' $(command -v kvmtrace)); python3 dump.py",
        folders[0],
        folders[1],
    )
    text = (folders[1] / "summary.c").read_text()
    assert "#define VMX_EXIT_REASON_AT" in text
    (cache_dir() / PROGRAMS).chmod(0o700)
    monkeypatch.setenv("KVMTRACE_BPF_CACHE", str(cache_dir() / PROGRAMS))
    compile_cached(text)
    run_in_lab("vmx", PREPARE + "kvmtrace record --summary --guest lifecycle -o summary.json", folders[2], folders[3])
    text = (folders[3] / "summary.json").read_text()
    (vcpu,) = read_summary(text.encode(), "summary.json").vcpus
    counts = {code: cell.count for code, cell in vcpu.exits.items()}
    assert {code: counts[code] for code in (10, 12, 30, 31, 32)} == {10: 13, 12: 5, 30: 61, 31: 11, 32: 7}
    assert "kvm_exit" in json.loads(text)["meta"]["attached"]["raw tracepoint"]
    assert vcpu.vcpu_id == 0
