"""System calls by number: each machine has its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.capture.bpf.bpf_syscall import SYSTEM_CALLS

NAMES = ("bpf", "perf_event_open", "membarrier")
# of linux-libc-dev: arm64 has the generic numbers
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_those_of_the_headers(machine: str) -> None:
    found = {
        name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    }
    assert tuple(found[name] for name in NAMES) == SYSTEM_CALLS[machine]
