"""`make fixtures`: record every bundled guest, and a Linux boot, in each lab with each kernel, into fixtures/.

One boot of a lab host records all guests of an ISA and kernel. `make_fixtures.py vmx-6.1 svm-6.12/nested ...` does only
these: a host, or one recording of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from counting import count_with_trace_cmd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from writers.packing import packed

from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, LabRecording, record_in_lab
from kvmtrace.workload.machines import machine_of

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SCHEMA = "kvmtrace.fixture/1"
# name of a host -> ISA, kernel, mode of its lab
HOSTS: dict[str, tuple[str, str, str | None]] = {
    f"{isa}-{kernel}": (isa, kernel, None) for isa in ("vmx", "svm") for kernel in ("6.1", "6.12")
}
HOSTS["arm64-6.1"] = ("arm64", "6.1", None)
HOSTS["arm64-6.12"] = ("arm64", "6.12", None)
HOSTS["arm64-nvhe-6.1"] = ("arm64", "6.1", "nvhe")
HOSTS["arm64-nvhe-6.12"] = ("arm64", "6.12", "nvhe")
# the other hosts of arm64 differ in little: some of the guests stand for all, which the lab's tests record
SOME: dict[str, frozenset[str]] = {
    "arm64-6.12": frozenset({"interrupt", "smc"}),
    "arm64-nvhe-6.1": frozenset({"lifecycle", "interrupt"}),
    "arm64-nvhe-6.12": frozenset({"lifecycle", "smp", "dabt-split"}),
}
COUNTS = {"storm": 997}  # others than the guests' own
# trace.dat 6, as the recorder writes it; all others are packed (version 7, zstd: a tenth of the size)
PLAIN = {
    "vmx-6.1-lifecycle": "the README's example: every trace-cmd and KernelShark opens it",
    "svm-6.1-smp": "tests cut and flip its pages",
    "vmx-6.12-lifecycle": "tests cut and flip its pages",
    "vmx-6.1-triple-fault": "tests put events of other kernels into its pages",
}
# all events of a Linux boot are 3 MB: once per ISA, with one and with two vCPUs
LINUX = {
    "vmx-6.1": (1, "lifecycle"),
    "svm-6.12": (2, "lifecycle"),
    "vmx-6.12": (1, "minimal"),
    "svm-6.1": (1, "minimal"),
}


def recordings(host: str, only: str = "") -> list[LabRecording]:
    """List what is recorded on a host, all or one of a name."""
    isa, _, _ = HOSTS[host]
    made = [
        LabRecording(guest, count=COUNTS.get(guest))
        for guest in machine_of(isa).guests
        if guest in SOME.get(host, {guest})
    ]
    if host in LINUX:
        vcpus, events = LINUX[host]
        made.append(LabRecording("linux", vcpus, events=events))
    return [recording for recording in made if only in {"", recording.name}]


def main(hosts: list[str]) -> None:
    """Record on the hosts named, or on all."""
    FIXTURES.mkdir(exist_ok=True)
    for named in hosts or HOSTS:
        host, _, only = named.partition("/")
        isa, kernel, mode = HOSTS[host]
        with tempfile.TemporaryDirectory() as out:
            made = recordings(host, only)
            result = record_in_lab(made, Job(isa, ("true",), kernel, out=Path(out), mode=mode), stream=True)
            print(f"{host}: {len(made)} recordings in {result.wall_s:.0f} s, booted in {result.booted_s:.0f} s")
            for recording in made:
                store(Path(out) / f"{recording.name}.dat", host, recording)


def store(recorded: Path, host: str, recording: LabRecording) -> None:
    """Move a recording into fixtures/ and write its manifest."""
    target = FIXTURES / f"{host}-{recording.name}.dat"
    if target.stem in PLAIN:
        shutil.move(recorded, target)
    else:
        target.write_bytes(packed(recorded))
    target.chmod(0o644)
    manifest = describe(target, host, recording)
    target.with_suffix(".dat.json").write_text(json.dumps(manifest, indent=1) + "\n")


def describe(path: Path, host: str, recording: LabRecording) -> dict[str, object]:
    """Return the manifest of a fixture; the expected counts are trace-cmd's."""
    isa, kernel, mode = HOSTS[host]
    where = ["--isa", isa, "--kernel", kernel, *(["--mode", mode] if mode else [])]
    capture = open_recording(str(path)).capture
    events, reasons = count_with_trace_cmd(path)
    return {
        "schema": SCHEMA,
        "source": "recorded by kvmtrace in its lab: make fixtures",
        "command": ["kvmtrace", "lab", "run", *where, "--", *recording.command()],
        "isa": isa,
        "kernel": capture.kernel,
        "cpu": capture.cpu_model,
        "guest": recording.guest,
        "vcpus": recording.vcpus if recording.guest == "linux" else None,
        "event_set": recording.events,
        "stored": PLAIN.get(path.stem, "packed: trace.dat 7, zstd, by trace-cmd convert; metadata as recorded"),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "expected": {
            "by": "trace-cmd report -R",
            "events": dict(sorted(events.items())),
            "exit_reasons": {str(reason): n for reason, n in sorted(reasons.items())},
        },
    }


if __name__ == "__main__":
    main(sys.argv[1:])
