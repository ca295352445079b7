"""What fuzzing begins with: a small file of every format and variant, written by tests/writers or recorded."""

from __future__ import annotations

import io
import json
import lzma
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from writers.bpf_capture import encode_capture, entry, fpu
from writers.formats import FORMATS
from writers.perf_data import USUAL, PerfDataWriter, comm, finished_round, fork, lost, sample
from writers.ring_buffer import discarded, event, null_padding, page, record, time_extend, time_stamp
from writers.trace_dat import TraceDatWriter

from kvmtrace.formats import open_recording
from kvmtrace.formats.arrow import arrow_writing as arrow
from kvmtrace.formats.summary.summary_file import N_BUCKETS, PHASES

if TYPE_CHECKING:
    import random

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS.parent / "fixtures"
RECORDED = ("svm-6.1-msr-gp", "vmx-6.1-triple-fault", "vmx-6.1-lifecycle", "svm-6.12-interrupt")
META: dict[str, Any] = {
    "schema": "kvmtrace.capture/1",
    "kvmtrace": "0",
    "host": "h",
    "kernel": "6.1",
    "cpu_model": "c",
    "backend": "ftrace",
    "clock": "mono",
    "command": ["a"],
    "events": ["kvm:kvm_exit", "kvm:kvm_entry"],
    "missing_events": ["kvm:kvm_pio"],
    "probes": [{"event": "vmx_vcpu_run", "function": "vmx_vcpu_run", "how": "kprobe"}],
    "target": {"kind": "guest", "pids": [7], "guest": "lifecycle", "guest_arguments": ["1"]},
    "guest_run": {
        "guest": "lifecycle",
        "arguments": {},
        "vcpu_tids": {"0": 77},
        "isa": "vmx",
        "known": {"vmx": {"CPUID": 3}, "ports": {"0x3f8:POUT": 1}},
        "status": 0,
    },
    "loss": {"by_cpu": {"0": 3}, "events": 3},
    "started": "2026-01-01T00:00:00+00:00",
    "duration_ns": 5,
    "filters": [],
    "notes": ["n"],
    "cost_ns_per_event": 12.5,
    "ended_by": "target",
    "n_events": 9,
    "threads": {"77": [70, "v"]},
    "discarded": {"by_cpu": {"1": 2}, "events": 2},
    "complete_from_ns": 1000,
    "complete_until_ns": 9000,
    "buffer_bytes": 9,
}


def vm_entry(rip: int, tid: int = 77) -> bytes:
    return event(10, struct.pack("<IIQ", 0, 0, rip), tid=tid)


def vm_exit(rip: int, reason: int = 10, tid: int = 77) -> bytes:
    return event(11, struct.pack("<IIQIIQQIII", reason, 0, rip, 1, 0, 0, 0, 0, 0, 0), tid=tid)


def strange_records(*unknown: bytes) -> list[bytes]:
    """A page's records of every kind the ring buffer has."""
    switch = event(12, b"qemu".ljust(16, b"\0") + struct.pack("<iIq", 42, 0, -7))
    execs = event(13, struct.pack("<I", 16 | 8 << 16) + b"\x02abc" + b"/bin/sh\0")
    return [
        record(switch, 5),
        time_extend(1 << 30),
        record(execs, 5, big=True),
        discarded(16),
        time_stamp(70_000),
        *unknown,
        null_padding(),
    ]


def pages(first: int, n_pages: int = 3, per_page: int = 20) -> bytes:
    out = []
    for p in range(n_pages):
        records = [record(vm_exit(p * 99 + i) if i % 2 else vm_entry(p * 99 + i), 7) for i in range(per_page)]
        out.append(page(first + p * 1000, records, lost=4 if p == 1 else None))
    return b"".join(out) + page(first + n_pages * 1000, strange_records())


def clock_options() -> list[tuple[int, bytes]]:
    """Options of a guest's trace: TSC2NSEC, OFFSET and TIME_SHIFT of two CPUs with two corrections each."""
    table = struct.pack("<I6q", 2, 1000, 2000, 5, 9, 1 << 20, 1 << 20)
    shift = struct.pack("<QII", 7, 1, 2) + 2 * table + struct.pack("<4q", 20, 20, 20, 20)
    return [(14, struct.pack("<IIQ", 1 << 22, 22, 0)), (7, b"0x10\0"), (12, shift)]


def trace_dat(
    version: str, compression: str = "none", more_options: list[tuple[int, bytes]] | None = None, **more: Any
) -> bytes:
    options = [*(more_options or []), (5, b"Linux box 6.1.0 x86_64\0"), (2, b"CPU: 0\nentries: 9\noverrun: 2\n")]
    more = {"meta": META} | more
    writer = TraceDatWriter([pages(1000), pages(1003, 2)], options=options, compression=compression, **more)
    return getattr(writer, version)()


def perf_records() -> list[bytes]:
    out = [comm(70, 77, "CPU 0/KVM"), fork(70, 78)]
    for i in range(12):
        raw = vm_exit(i) if i % 2 else vm_entry(i)
        out.append(sample(1000 + 9 * i, raw, ident=1 + i % 2))
    return [*out, lost(3, 1200, 0), finished_round(), sample(1300, vm_entry(9))]


def perf_data(*, compressed: bool = False) -> bytes:
    return PerfDataWriter(perf_records(), compressed=compressed).bytes()


def bpf_capture() -> bytes:
    spans = [
        (0, [entry(100 + i, rip=i) for i in range(9)]),
        (1, [fpu(103 + i, 1, lost=i == 3) for i in range(5)]),
        (0, [entry(300, rip=3), fpu(301, 0)]),
    ]
    return encode_capture(spans, {**META, "backend": "bpf"}, last={"loss": {"by_cpu": {"1": 1}}, "n_events": 16})


def text() -> bytes:
    head = b"# tracer: nop\n#\n# entries-in-buffer/entries-written: 5/5   #P:2\n#\n"
    bodies = [
        "kvm_entry: vcpu 0, rip 0xfff0",
        "kvm_exit: vcpu 0 reason CPUID rip 0xfff2 info1 0x0 info2 0x0",
        "kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x41",
        "kvm_cpuid: func 0 idx 0 rax 1 rbx 2 rcx 3 rdx 4",
        "sched_switch: prev_comm=a prev_pid=9 prev_prio=120 prev_state=R ==> next_comm=b next_pid=0 next_prio=99",
        "kvm_msr: msr_read 10 = 0x5",
        "kvm_userspace_exit: reason KVM_EXIT_IO (2)",
    ]
    rows = [f"       CPU 0/KVM-9    [{i % 2:03d}] d..1. 12.{i:06d}: {body}\n" for i, body in enumerate(bodies)]
    return head + "".join(rows).encode() + b"CPU:1 [LOST 12 EVENTS]\n" + rows[0].encode()


def summary() -> bytes:
    cell = {"count": 2, "samples": 2, "total_ns": 9, "max_ns": 5, "buckets": [0, 1, 1, *([0] * (N_BUCKETS - 3))]}
    row = {
        "tid": 7,
        "pid": 6,
        "comm": "v",
        "vcpu_id": 0,
        "isa": "vmx",
        "wall_ns": 60,
        "first_ns": 5,
        "n_switches": 1,
        "time_ns": dict.fromkeys(PHASES, 10),
        "guest": cell,
        "exits": [{**cell, "exit_reason": 10}],
        "userspace_exits": [{**cell, "reason": 2, "error": None}, {**cell, "reason": None, "error": "EINTR"}],
    }
    value = {"schema": "kvmtrace.summary/1", "meta": META, "vcpus": [row]}
    return json.dumps(value, separators=(",", ":")).encode()


def qmp() -> bytes:
    """What a QMP server says, from the greeting on."""
    said: list[dict[str, Any]] = [
        {"QMP": {"version": {"qemu": {"micro": 9, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}},
        {"return": {}},
        {"return": {"qemu": {"micro": 9, "minor": 2, "major": 7}, "package": "Debian"}},
        {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"},
        {"return": {"enabled": True, "present": True}},
        {"return": [{"cpu-index": 0, "thread-id": 77, "props": {"core-id": 0}, "qom-path": "/machine/unattached/1"}]},
        {"return": [{"name": "kvm-accel", "parent": "accel"}]},
        {"error": {"class": "GenericError", "desc": "no"}},
    ]
    return b"".join(json.dumps(answer).encode() + b"\n" for answer in said)


def exported(data: bytes) -> dict[str, bytes]:
    """The recording `data` as Parquet and Arrow."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        recording = open_recording(file.name)
        outs = {"parquet": io.BytesIO(), "arrow": io.BytesIO()}
        arrow.write_parquet(recording, outs["parquet"])
        arrow.write_arrow(recording, outs["arrow"])
    return {name: out.getvalue() for name, out in outs.items()}


def synthetic_seeds() -> dict[str, bytes]:
    """One small file per format and variant."""
    small = trace_dat("v6")
    return {
        "trace.dat-v6": small,
        "trace.dat-v6-foreign": trace_dat(
            "v6", meta=None, instances={"kt": [page(900, strange_records(record(event(999, b"unknown!"), 2)))]}
        ),
        "trace.dat-v6-instance": trace_dat("v6", instances={"kt": [pages(500, 1)]}),
        "trace.dat-v6-tsc": trace_dat("v6", more_options=clock_options()),
        "trace.dat-v7": trace_dat("v7"),
        "trace.dat-v7-zlib": trace_dat("v7", "zlib"),
        "trace.dat-v7-zstd": trace_dat("v7", "zstd"),
        "perf.data": perf_data(),
        "perf.data-zstd": perf_data(compressed=True),
        "bpf": bpf_capture(),
        "text": text(),
        "summary": summary(),
        "qmp": qmp(),
        **exported(small),
    }


def recorded_seeds() -> dict[str, bytes]:
    """Real recordings, the smaller ones."""
    recorded = {name: (FIXTURES / f"{name}.dat").read_bytes() for name in RECORDED}
    packed = TESTS / "report" / "recorded" / "svm-6.1-interrupt.perf.data.xz"
    return {**recorded, "perf.data-recorded": lzma.decompress(packed.read_bytes())}


def composed(rng: random.Random, damage: Any) -> bytes:
    """A file whose parts were damaged before they were put together (and compressed).

    Parameters
    ----------
    damage : (rng, bytes) -> bytes
    """
    if rng.random() < 0.3:
        records = [damage(rng, r) if rng.random() < 0.3 else r for r in perf_records()]
        attrs = [(10, USUAL if rng.random() < 0.7 else rng.getrandbits(24), [1]), (11, USUAL, [2])]
        return PerfDataWriter(records, attrs=attrs, compressed=rng.random() < 0.7).bytes()
    cpus = [damage(rng, pages(1000, 2)), pages(1003, 1)]
    cpus = [cpu.ljust(-(-len(cpu) // 4096) * 4096, b"\0") for cpu in cpus]
    formats = {name: [damage(rng, t) if rng.random() < 0.3 else t for t in texts] for name, texts in FORMATS.items()}
    compression = rng.choice(["none", "zlib", "zstd"])
    writer = TraceDatWriter(cpus, formats=formats, compression=compression, meta=META if rng.random() < 0.5 else None)
    return writer.v6() if compression == "none" and rng.random() < 0.5 else writer.v7()
