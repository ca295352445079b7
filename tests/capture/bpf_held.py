"""Which BPF programs and maps processes hold; which of our programs nobody does."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kvmtrace.capture.bpf.bpf_syscall import loaded_ids


def held_by(pid: int) -> tuple[set[int], set[int]]:
    """Return the ids of the BPF programs and maps that a process holds."""
    programs, maps = set(), set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("prog_id", "map_id"):
                    (programs if name == "prog_id" else maps).add(int(value))
    return programs, maps


def forgotten_programs() -> set[int]:
    """Return the ids of our programs that are in the kernel though no living process holds them.

    Somebody else may be recording on this machine: theirs are none of those.
    """
    before = loaded_ids()
    for process in Path("/proc").iterdir():
        if before and process.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                before -= held_by(int(process.name))[0]
    return before & loaded_ids()
