"""What BPF programs can hang on here; nothing is attached to find out."""

from __future__ import annotations

import os
import struct

from kvmtrace.capture.bpf import btf_ids
from kvmtrace.capture.bpf.attach import pmu_type
from kvmtrace.capture.bpf.bpf_syscall import (
    ATTACH_TRACE_FENTRY,
    ATTACH_TRACE_RAW_TP,
    PROG_TYPE_RAW_TRACEPOINT,
    PROG_TYPE_TRACING,
    load_program,
)
from kvmtrace.capture.bpf.btf_types import kernel_types
from kvmtrace.capture.tracefs import lockdown_mode, mounted
from kvmtrace.errors import CapabilityError

RETURN_0 = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)  # r0 = 0; exit


def describe_mechanisms() -> list[tuple[str, bool, str]]:
    """Say which mechanisms this host has, newest first.

    Returns
    -------
    (mechanism, usable, remark) rows; programs are loaded to find out, nothing is attached; without privileges a
    mechanism that needs them is not usable
    """
    return [
        ("fentry/fexit", *_loads_fentry()),
        ("BTF tracepoint", *_loads_btf_tracepoint()),
        ("raw tracepoint", *_loads(PROG_TYPE_RAW_TRACEPOINT)),
        ("kprobe/kretprobe", *_has_pmu("kprobe", "CONFIG_KPROBES")),
        ("tracepoint", *_has_events("events", "CONFIG_EVENT_TRACING")),
        ("syscall tracepoint", *_has_events("events/syscalls", "CONFIG_FTRACE_SYSCALLS")),
        ("uprobe/uretprobe", *_has_pmu("uprobe", "CONFIG_UPROBE_EVENTS")),
    ]


def _has_pmu(name: str, option: str) -> tuple[bool, str]:
    usable = pmu_type(name) is not None
    return usable, "" if usable else f"the kernel is built without {option}"


def _has_events(folder: str, option: str) -> tuple[bool, str]:
    tracefs = mounted()
    if tracefs is None:
        return False, "tracefs is not mounted (record does it itself)"
    usable = os.path.isdir(tracefs / folder)  # noqa: PTH112 (False where we may not look)
    return usable, "" if usable else f"{tracefs / folder} is not there: no privilege, or built without {option}"


def _loads(program_type: int, attach_type: int = 0, btf_id: int = 0) -> tuple[bool, str]:
    """Say whether the kernel takes a program of a type, one that does nothing."""
    try:
        os.close(load_program("kvmtrace_probe", program_type, RETURN_0, attach_type=attach_type, btf_id=btf_id))
    except CapabilityError as error:
        return False, error.problem
    return True, ""


def _loads_fentry() -> tuple[bool, str]:
    locked = lockdown_mode()
    if locked not in (None, "none"):
        return False, f"kernel lockdown={locked}"
    found = btf_ids.find_functions({"schedule"})
    if not found:
        return False, "the kernel has no BTF"
    return _loads(PROG_TYPE_TRACING, ATTACH_TRACE_FENTRY, found["schedule"][1])


def _loads_btf_tracepoint() -> tuple[bool, str]:
    place = kernel_types().tracepoint_type("sched_switch")
    if place is None:
        return False, "the kernel has no BTF"
    return _loads(PROG_TYPE_TRACING, ATTACH_TRACE_RAW_TP, place[1])
