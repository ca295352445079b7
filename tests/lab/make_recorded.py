"""`python tests/lab/make_recorded.py [KERNEL...]`: record healthy but unusual VMMs, in the SVM lab.

Each recording is small and packed (trace.dat 7, zstd) and goes to tests/check/recorded; manifest.json there says where
it is from and what is expected.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from writers.packing import packed

from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab

RECORDED = Path(__file__).resolve().parents[1] / "check" / "recorded"
SOURCE = Path(__file__).resolve().parent / "unusual" / "unusual.c"
ROUNDS = 30
# mode of unusual.c -> the kind of healthy behaviour that it stands for
KINDS: dict[str, str] = {
    "two-vcpus": "two vCPUs run by one thread in turn",
    "three-vcpus": "three vCPUs run by one thread in turn",
    "two-vms": "the vCPUs of two VMs, both number 0, run by one thread in turn",
    "handover": "one vCPU run by two threads in turn",
    "sync-regs": "RIP moved through KVM_CAP_SYNC_REGS by a VMM that also uses KVM_SET_REGS",
    "immediate-exit": "every other KVM_RUN only completes what is pending",
    "set-registers": "registers written back, and moved once nothing is pending",
    "signals": "KVM_RUNs interrupted by signals",
    "single-step": "KVM_GUESTDBG_SINGLESTEP",
    "breakpoint": "a hardware breakpoint of the VMM",
    "interrupts": "interrupts through KVM_INTERRUPT and interrupt windows",
    "nmis": "NMIs through KVM_NMI",
    "cross-pages": "MMIO that crosses from one page to an unrelated one, to memory and from memory",
}


def record(kernel: str, out: Path) -> None:
    """Record all modes in one boot."""
    with tempfile.TemporaryDirectory() as work:
        program = Path(work) / "unusual"
        subprocess.run(["cc", "-static", "-O1", "-pthread", "-o", str(program), str(SOURCE)], check=True)
        lines = [
            f"kvmtrace record --backend ftrace -o {mode}.dat -- {program} {mode} {ROUNDS} || exit 1" for mode in KINDS
        ]
        result = run_lab(Job("svm", ("sh", "-ec", "\n".join(lines)), kernel, cwd=Path(work), out=out))
    assert result.status == 0, (result.stdout + result.stderr).decode()


def entry(path: Path, kernel: str, mode: str) -> dict[str, object]:
    """Return what the manifest says of a recording."""
    capture = open_recording(path).capture
    return {
        "kind": KINDS[mode],
        "source": f"tests/lab/unusual/unusual.c in the SVM lab, kernel {kernel}: tests/lab/make_recorded.py",
        "command": ["kvmtrace", "record", "--backend", "ftrace", "--", "unusual", mode, str(ROUNDS)],
        "kernel": capture.kernel,
        "cpu": capture.cpu_model,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "expected": {"violations": 0},
    }


def store(kernel: str, folder: Path) -> None:
    """Pack the recordings in `folder` into tests/check/recorded."""
    RECORDED.mkdir(exist_ok=True)
    listing = RECORDED / "manifest.json"
    manifest = json.loads(listing.read_text()) if listing.exists() else {}
    for mode in KINDS:
        target = RECORDED / f"svm-{kernel}-{mode}.dat"
        target.write_bytes(packed(folder / f"{mode}.dat"))
        manifest[target.name] = entry(target, kernel, mode)
    listing.write_text(json.dumps(dict(sorted(manifest.items())), indent=1) + "\n")


if __name__ == "__main__":
    for series in sys.argv[1:] or ("6.1", "7"):
        with tempfile.TemporaryDirectory() as recorded:
            record(series, Path(recorded))
            store(series, Path(recorded))
