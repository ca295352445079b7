"""Nothing grows faster than the file: four times of anything that a file can hold takes at most five times as long."""

from __future__ import annotations

import struct
import subprocess
import sys
import time

import pytest
from growth import assert_linear
from writers.bpf_capture import KINDS, encode_frame, encode_head, encode_span, entry
from writers.formats import FORMATS, event_format
from writers.in_memory import InMemory
from writers.perf_data import USUAL, PerfDataWriter, comm, finished_round, fork, lost, sample
from writers.ring_buffer import event, page, record
from writers.trace_dat import TraceDatWriter

from kvmtrace.formats.common.loss import lost_by_cpu_stats
from kvmtrace.formats.known_formats import recognise
from kvmtrace.table.format_text import parse_event_format, parse_header_page, validate_header_event

FULL = "info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0"


def read(data: bytes) -> None:
    recording = recognise(InMemory(data))
    for table in recording.iter_events():
        for kind in table.kinds:
            for name in kind.fields if table.count(kind.name) else ():
                table.field(kind.name, name)


def lines(make_line, n: int) -> bytes:
    return "".join(f"{make_line(i)}\n" for i in range(n)).encode()


def line(body: str, *, task: str = "vcpu", tid: int = 7, cpu: int = 0, ts: int = 0) -> str:
    return f" {task}-{tid} [{cpu:03d}] d..1. 1.{ts % 1000000:06d}: {body}"


TEXTS = {
    "threads": lambda i: line("kvm_fpu: load", task=f"t{i}", tid=i + 1),
    "CPUs": lambda i: line("kvm_fpu: load", cpu=i % 32768),
    "events' names": lambda i: line(f"event_{i}: x"),
    "exit reasons": lambda i: line(f"kvm_exit: vcpu 0 reason R{chr(103 + i % 19) * (i % 50 + 1)} rip 0x1 {FULL}"),
    "vCPUs": lambda i: line(f"kvm_exit: vcpu {i} reason HLT rip 0x1 {FULL}"),
    "shapes of a text": lambda i: line(f"kvm_mmu_x: {'yz' * (i % 997)}{chr(103 + i % 19)}"),
    "losses": lambda i: f"CPU:{i % 32768} [LOST {i + 1} EVENTS]" if i else line("kvm_fpu: load"),
    "lines that are none": lambda i: f"strange {i}" if i else line("kvm_fpu: load"),
    "wrapped lines": lambda i: line(f"kvm_exit: vcpu {i}") + f"\n reason HLT rip 0x1\n {FULL}",
    "heads without an event": lambda i: line("kvm_fpu: load") if not i else " vcpu-7 [000] 1.000001:",
    "keys": lambda i: line(f"some_event: a={i} b={i} c={i}"),
    "quotes": lambda i: "> " * 3 + line("kvm_fpu: load"),
    "numbers": lambda i: f"{i + 1}: " + line("kvm_fpu: load"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_lines_of_text(what):
    assert_linear(lambda n: lines(TEXTS[what], n), read, 4000)


LONG = {
    "spaces in a line": lambda n: "a" + " " * n + "b",
    "spaces behind a thread": lambda n: " a-1" + " " * n + "[000] 1.5: kvm_fpu: load",
    "spaces before flags": lambda n: " a-1 [000]" + " " * n + "d..1." + " " * n + "1.5: x: y",
    "hyphens": lambda n: "-" * n,
    "digits": lambda n: line("kvm_exit: " + "1" * n),
    "hexadecimal": lambda n: line("kvm_exit: vcpu 0 reason HLT rip 0x" + "f" * n),
    "words of a reason": lambda n: line("kvm_exit: vcpu 0 reason" + " a" * n),
    "colons": lambda n: line("a:" * n),
    "keys": lambda n: line("x: " + " ".join(f"k{i}=1" for i in range(n // 8))),
    "a key again and again": lambda n: line("x: a=1 b=2 " * (n // 12)),
    "parts of a switch": lambda n: line("sched_switch: prev_comm=" + "a prev_pid=1 prev_state=R " * (n // 26)),
    "tasks": lambda n: line("sched_switch: " + "a:1 [1] R ==> " * (n // 14)),
    "instruction bytes": lambda n: line("kvm_emulate_insn: 0:1:" + "66 " * (n // 3)),
    "greater signs": lambda n: "> " * n + line("kvm_fpu: load"),
    "entities": lambda n: "&gt;&" * n + line("kvm_fpu: load"),
    "empty lines": lambda n: "\n \n" * n,
    "carriage returns": lambda n: "\r" * n + line("kvm_fpu: load"),
}


@pytest.mark.parametrize("what", LONG)
def test_a_long_line_of_text(what):
    head = line("kvm_fpu: load") + "\n"
    assert_linear(lambda n: (head + LONG[what](n) + "\n").encode(), read, 50_000)


def field_line(declared: str) -> str:
    return f'name: x\nID: 3\nformat:\n\tfield:{declared};\toffset:8;\tsize:4;\tsigned:0;\n\nprint fmt: "x"\n'


FORMAT_TEXTS = {
    **{f"declaration of {part!r}": lambda n, part=part: field_line(f"int{part * n}x") for part in
       (" ", "\t", "a", "a ", "[", "[]", "a[", "]", "[ ]", "*", "a-", "_ ")},
    **{f"text of {part!r}": lambda n, part=part: f"name: x\nID: 3\nformat:\n{part * n}\nprint fmt: \"x\"\n" for part in
       (" ", "\n", " \n", "field:", "\tfield: a", ";", "offset:1;", "\tfield:int x;\toffset:0;", "print fmt: ")},
    "fields": lambda n: "name: x\nID: 3\nformat:\n" + "".join(
        f"\tfield:int f{i};\toffset:8;\tsize:4;\tsigned:0;\n" for i in range(n // 20)),
}  # fmt: skip


@pytest.mark.parametrize("what", FORMAT_TEXTS)
def test_a_format_text(what):
    def use(text: str) -> None:
        parse_event_format(text, "kvm")
        parse_header_page(text)
        validate_header_event(text)

    assert_linear(FORMAT_TEXTS[what], use, 50_000)


@pytest.mark.parametrize("part", [b"overrun:\n", b"CPU: 1\n", b"overrun: 1 ", b" "])
def test_statistics_of_the_tracer(part):
    assert_linear(lambda n: [b"CPU: 0\n" + part * n], lost_by_cpu_stats, 50_000)


def entries(n: int, cpu: int = 0) -> bytes:
    recorded = [record(event(10, struct.pack("<IIQ", 0, 0, i), tid=7), 7) for i in range(20)]
    return b"".join(page(1000 * p + cpu, recorded) for p in range(n))


def formats(n: int) -> dict[str, list[bytes]]:
    more = [event_format(f"event{i}", 100 + i, [("int a", 8, 4, 1)]) for i in range(min(n, 60_000))]
    return {**FORMATS, "more": more}


def of_many_events(n: int) -> bytes:
    pages = [
        page(1000 * p, [record(event(100 + p * 20 + i, struct.pack("<Q", i), tid=7), 7) for i in range(20)])
        for p in range(n // 20)
    ]
    return TraceDatWriter([b"".join(pages)], formats=formats(n)).v6()


TRACE_DAT = {
    "pages": (lambda n: TraceDatWriter([entries(n)]).v6(), 100),
    "pages, packed": (lambda n: TraceDatWriter([entries(n)], compression="zstd").v7(), 100),
    "CPUs": (lambda n: TraceDatWriter([entries(1, i) for i in range(n)]).v6(), 50),
    "CPUs, packed": (lambda n: TraceDatWriter([entries(1, i) for i in range(n)], compression="zstd").v7(), 50),
    "instances": (lambda n: TraceDatWriter([b""], instances={f"i{i}": [entries(1)] for i in range(n)}).v6(), 50),
    "formats": (lambda n: TraceDatWriter([entries(1)], formats=formats(n)).v6(), 1500),
    "kinds that occur": (of_many_events, 400),
    "options": (lambda n: TraceDatWriter([entries(1)], options=[(9, b"x")] * n).v6(), 20_000),
    "options, version 7": (lambda n: TraceDatWriter([entries(1)], options=[(9, b"x")] * n).v7(), 20_000),
    "statistics": (lambda n: TraceDatWriter([entries(1)], options=[(2, b"CPU: 0\noverrun: 3\n")] * n).v6(), 20_000),
    "threads": (lambda n: TraceDatWriter([entries(1)], comms={i: f"t{i}" for i in range(n)}).v6(), 20_000),
    "metadata": (
        lambda n: TraceDatWriter([entries(1)], meta={"threads": {str(i): [1, "x"] for i in range(n)}}).v6(),
        10_000,
    ),
}


@pytest.mark.parametrize("what", TRACE_DAT)
def test_a_trace_dat(what):
    make, n = TRACE_DAT[what]
    assert_linear(make, read, n)


def perf_samples(n: int) -> list[bytes]:
    return [sample(i, event(10, struct.pack("<IIQ", 0, 0, i), tid=7)) for i in range(n)]


PERF = {
    "samples": (lambda n: PerfDataWriter(perf_samples(n)).bytes(), 4000),
    "samples, packed": (lambda n: PerfDataWriter(perf_samples(n), compressed=True).bytes(), 4000),
    "samples of one time": (lambda n: PerfDataWriter(perf_samples(1) * n).bytes(), 4000),
    "rounds": (lambda n: PerfDataWriter([*perf_samples(5), finished_round()] * n).bytes(), 2000),
    "threads": (lambda n: PerfDataWriter([*(comm(i, i, "x") for i in range(n)), *perf_samples(9)]).bytes(), 4000),
    "forks": (lambda n: PerfDataWriter([*(fork(i, i) for i in range(n)), *perf_samples(9)]).bytes(), 4000),
    "losses": (lambda n: PerfDataWriter([lost(1, i, i % 9000) for i in range(n)]).bytes(), 4000),
    "attributes": (
        lambda n: PerfDataWriter(perf_samples(99), attrs=[(10, USUAL, [i]) for i in range(n)]).bytes(),
        2000,
    ),
    "layouts": (
        lambda n: PerfDataWriter(
            perf_samples(n), attrs=[(10, USUAL | (i % 2048) << 12 & 0xF000, [i]) for i in range(n)]
        ).bytes(),
        1000,
    ),
    "ids": (lambda n: PerfDataWriter(perf_samples(99), attrs=[(10, USUAL, list(range(n)))]).bytes(), 20_000),
}


@pytest.mark.parametrize("what", PERF)
def test_a_perf_data(what):
    make, n = PERF[what]
    assert_linear(make, read, n)


BPF = {
    "spans": (lambda n: encode_head() + b"".join(
        encode_frame(1, i % 8, 1000 * i, encode_span([entry(i)])) for i in range(n)), 4000),
    "frames of metadata": (lambda n: encode_head() + encode_frame(2, 0, 0, b'{"a":  1}'.ljust(16)) * n, 4000),
    "no frames": (lambda n: encode_head() + b"KTFRxxxx" * n, 4000),
    "kinds": (lambda n: encode_head(kinds=KINDS * n) + encode_frame(1, 0, 0, encode_span([entry(1)])), 500),
}  # fmt: skip


@pytest.mark.parametrize("what", BPF)
def test_a_bpf_capture(what):
    make, n = BPF[what]
    assert_linear(make, read, n)


def test_200_000_spaces_in_a_declaration_and_200_000_threads():
    """What took more than a minute each."""
    begin = time.process_time()
    parse_event_format(field_line("int" + " " * 200_000 + "x"), "kvm")
    read(lines(lambda i: line("kvm_fpu: load", task=f"t{i}", tid=i + 1), 200_000))
    assert time.process_time() - begin < 20


def test_more_names_of_events_than_there_are_numbers(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(lines(lambda i: line(f"event_{i}: x"), 66_000))
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "check", str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "at most 65,000 event names" in done.stderr
