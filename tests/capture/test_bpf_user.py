"""Probes on user-space functions, by symbol table and for real."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture.bpf.uprobes import UserProbe
from kvmtrace.capture.elf_symbols import find_functions
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 101
PROGRAM = f"""
import ctypes
libc = ctypes.CDLL("libc.so.6")
for i in range({CALLS}):
    libc.a64l(b"./kvm")
"""


def result_here() -> int:
    import ctypes

    function = ctypes.CDLL("libc.so.6").a64l
    function.restype = ctypes.c_long
    result = function(b"./kvm")
    assert isinstance(result, int)
    return result


def find_libc() -> str:
    import ctypes

    ctypes.CDLL("libc.so.6")
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("/libc.so.6"):
            return line.split()[-1]
    raise AssertionError("no libc is mapped")


def test_functions_are_found_where_the_loader_finds_them() -> None:
    import ctypes

    path = find_libc()
    offset = find_functions(path, ["a64l", "no_such_function"])
    assert set(offset) == {"a64l"}
    libc = ctypes.CDLL("libc.so.6")
    address = ctypes.cast(libc.a64l, ctypes.c_void_p).value
    assert address is not None
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, rest = line.partition("-")
        end, _, begin, *_ = rest.split()
        if line.endswith(path) and int(start, 16) <= address < int(end, 16):
            assert offset["a64l"] == address - int(start, 16) + int(begin, 16)
            return
    raise AssertionError("a64l is not in libc's mapping")


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01" + bytes(20), b"\x7fELF\x01\x01" + bytes(90)]
)
def test_what_is_no_elf_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=str(path)):
        find_functions(path, ["main"])


@pytest.mark.kvm
def test_calls_and_results_join_the_stream(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from kvmtrace.capture.bpf.bpf_recorder import record
    from kvmtrace.capture.settings import RecordSettings, TargetSpec
    from kvmtrace.formats import open_recording

    libc = find_libc()
    probes = (
        UserProbe("libc_a64l", libc, "a64l", ("text=$arg1:x64",)),
        UserProbe("libc_a64l_return", libc, "a64l", ("ret=$retval:s64",), is_return=True),
    )
    run: Callable[..., object] = record
    run(
        RecordSettings(
            tmp_path / "u.bpf", TargetSpec("command", command=(sys.executable, "-c", PROGRAM)), event_set="minimal"
        ),
        probes,
    )
    recording = open_recording(tmp_path / "u.bpf")
    table = recording.events()
    assert table.count("libc_a64l") == CALLS
    assert set(table.field("libc_a64l_return", "ret").tolist()) == {result_here()}
    assert [row["how"] for row in recording.capture.meta["probes"]] == ["uprobe", "uretprobe"]
