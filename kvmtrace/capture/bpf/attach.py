"""Hanging programs on events: what the kernel allows, newest mechanism first.

Everything hangs on file descriptors of this process: when it dies, however it dies, the kernel detaches all
of it. Function probes are made through perf_event_open, never through tracefs, for the same reason.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf import btf_ids as bpf_btf
from kvmtrace.capture.bpf.bpf_syscall import (
    ATTACH_TRACE_FENTRY,
    ATTACH_TRACE_FEXIT,
    ATTACH_TRACE_RAW_TP,
    PERF_TYPE_TRACEPOINT,
    PROG_TYPE_KPROBE,
    PROG_TYPE_RAW_TRACEPOINT,
    PROG_TYPE_TRACEPOINT,
    PROG_TYPE_TRACING,
    hang_program,
    load_program,
    open_raw_tracepoint,
    open_tracing_link,
    perf_event_open,
    program_misses,
)
from kvmtrace.capture.bpf.btf_types import kernel_types
from kvmtrace.capture.ftrace.tracefs import lockdown_mode, mounted
from kvmtrace.errors import CapabilityError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.capture.bpf.event_programs import TracedEvent

RETURN_0 = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)  # r0 = 0; exit
PMU_FOLDER = Path("/sys/bus/event_source/devices")


def pmu_type(name: str) -> int | None:
    """Return the perf event type of the PMU "kprobe" or "uprobe", None if the kernel has none."""
    try:
        return int((PMU_FOLDER / name / "type").read_text())
    except (OSError, ValueError):
        return None


def return_bit(name: str) -> int:
    """Return the config bit that asks that PMU for the function's return."""
    text = (PMU_FOLDER / name / "format" / "retprobe").read_text()  # "config:0"
    return 1 << int(text.rpartition(":")[2])


class Attachments:
    """Loaded programs on their events; all are detached by `close` or by the end of the process."""

    def __init__(self) -> None:
        self.hooks: list[int] = []
        self.programs: dict[str, int] = {}
        self.how: dict[str, str] = {}

    def tracepoint(self, event: TracedEvent, instructions: bytes, name: str | None = None) -> None:
        """Run a program at a tracepoint.

        Raises
        ------
        CapabilityError
            The kernel does not allow it.
        """
        label = name or event.name
        program = self._load(label, PROG_TYPE_TRACEPOINT, instructions)
        self._hang(label, program, PERF_TYPE_TRACEPOINT, event.tracepoint_id)
        self.how[label] = "syscall tracepoint" if event.system == "syscalls" else "tracepoint"

    def raw_tracepoint(self, event: TracedEvent, instructions: bytes, name: str | None = None) -> bool:
        """Run a program at a tracepoint, on its arguments instead of its record; False where that is not allowed."""
        label = name or event.name
        try:
            program = load_program(label, PROG_TYPE_RAW_TRACEPOINT, instructions)
        except CapabilityError:  # reads memory, on a locked-down kernel
            return False
        return self._link(label, program, "raw tracepoint", lambda: open_raw_tracepoint(event.name, program))

    def btf_tracepoint(self, event: TracedEvent, instructions: bytes, place: tuple[str, int]) -> bool:
        """Run a program at a tracepoint, on its typed arguments; False where that is not allowed.

        Parameters
        ----------
        event : TracedEvent
        instructions : bytes
        place : (BTF's name, id of the type btf_trace_NAME in it)
        """
        program = self._load_traced(event.name, instructions, place, ATTACH_TRACE_RAW_TP)
        return program is not None and self._link(
            event.name, program, "BTF tracepoint", lambda: open_tracing_link(program)
        )

    def function(
        self, event: TracedEvent, traced: bytes | None, probed: bytes | None, btf: dict[str, tuple[str, int]]
    ) -> bool:
        """Run a program at a kernel function's entry or return, by fentry/fexit or else kprobe/kretprobe.

        Parameters
        ----------
        traced, probed : the program in its two forms
        btf : function -> (BTF object, id), from bpf_btf.find_functions

        Returns
        -------
        bool, False where this kernel allows neither or has no such function
        """
        assert event.probe is not None
        function, is_return, _ = event.probe
        if traced and function in btf and self._trace(event.name, traced, btf[function], is_return=is_return):
            return True
        if probed and self._probe(event.name, probed, function, is_return=is_return):
            self.how[event.name] = "kretprobe" if is_return else "kprobe"
            return True
        return False

    def user_function(
        self, name: str, instructions: bytes, binary: str, offset: int, *, is_return: bool = False, pid: int = -1
    ) -> None:
        """Run a program at a function of a user-space binary (a uprobe).

        Parameters
        ----------
        name : str, of the event
        binary : str, path of the executable or library
        offset : int, the function's offset in the file
        pid : int, only in this process; -1 is everywhere

        Raises
        ------
        CapabilityError
            The kernel has no uprobes, or does not allow this one.
        """
        kind = pmu_type("uprobe")
        if kind is None:
            raise CapabilityError("this kernel has no uprobes", "use a kernel with CONFIG_UPROBE_EVENTS")
        program = self._load(name, PROG_TYPE_KPROBE, instructions)
        path = ctypes.create_string_buffer(os.fsencode(binary))
        try:
            hook = perf_event_open(
                kind,
                return_bit("uprobe") if is_return else 0,
                config1=ctypes.addressof(path),
                config2=offset,
                pid=pid,
                cpu=0 if pid < 0 else -1,
            )
        except OSError as error:
            raise CapabilityError(f"no uprobe on {binary}+{offset:#x}: {error.strerror}", "") from None
        self.hooks.append(hook)
        hang_program(hook, program)
        self.how[name] = "uretprobe" if is_return else "uprobe"

    def misses(self) -> dict[str, int]:
        """Return event -> times its program was skipped because the CPU was already running one."""
        counts = {name: program_misses(fd) or 0 for name, fd in self.programs.items()}
        return {name: count for name, count in counts.items() if count}

    def by_mechanism(self) -> dict[str, list[str]]:
        """Return mechanism -> what hangs on it, as the metadata's `attached` says it."""
        return {
            how: sorted(name for name, its in self.how.items() if its == how) for how in sorted(set(self.how.values()))
        }

    def detach(self) -> None:
        """Detach everything; programs that are running still end on their own."""
        for fd in self.hooks:
            os.close(fd)
        self.hooks = []

    def close(self) -> None:
        """Detach everything and unload the programs."""
        self.detach()
        for fd in self.programs.values():
            os.close(fd)
        self.programs = {}

    def _load(self, name: str, program_type: int, instructions: bytes) -> int:
        fd = load_program(name, program_type, instructions)
        self.programs[name] = fd
        return fd

    def _hang(self, name: str, program: int, event_type: int, config: int) -> None:
        try:
            hook = perf_event_open(event_type, config)
            self.hooks.append(hook)
            hang_program(hook, program)
        except OSError as error:
            raise CapabilityError(
                f"no BPF program may be attached to {name}: {error.strerror}",
                "run as root, or with CAP_BPF and CAP_PERFMON",
            ) from None

    def _trace(self, name: str, instructions: bytes, place: tuple[str, int], *, is_return: bool) -> bool:
        program = self._load_traced(name, instructions, place, ATTACH_TRACE_FEXIT if is_return else ATTACH_TRACE_FENTRY)
        return program is not None and self._link(
            name, program, "fexit" if is_return else "fentry", lambda: open_tracing_link(program)
        )

    def _load_traced(self, name: str, instructions: bytes, place: tuple[str, int], attach_type: int) -> int | None:
        module, btf_id = place
        try:
            btf_fd = 0 if module == "vmlinux" else bpf_btf.open_module_btf(module)
        except OSError:
            return None
        try:
            return load_program(
                name, PROG_TYPE_TRACING, instructions, btf_id=btf_id, btf_fd=btf_fd, attach_type=attach_type
            )
        except CapabilityError:
            return None
        finally:
            if btf_fd:
                os.close(btf_fd)

    def _link(self, name: str, program: int, how: str, attach: Callable[[], int]) -> bool:
        try:
            hook = attach()
        except OSError:  # EPERM under lockdown
            os.close(program)
            return False
        self.hooks.append(hook)
        self.programs[name] = program
        self.how[name] = how
        return True

    def _probe(self, name: str, instructions: bytes, function: str, *, is_return: bool) -> bool:
        kind = pmu_type("kprobe")
        if kind is None:
            return False
        text = ctypes.create_string_buffer(function.encode())
        try:
            hook = perf_event_open(kind, return_bit("kprobe") if is_return else 0, config1=ctypes.addressof(text))
        except OSError:  # no such function, or locked down
            return False
        self.hooks.append(hook)
        program = self._load(name, PROG_TYPE_KPROBE, instructions)
        hang_program(hook, program)
        return True


def describe_attachments() -> list[tuple[str, bool, str]]:
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
    found = bpf_btf.find_functions({"schedule"})
    if not found:
        return False, "the kernel has no BTF"
    return _loads(PROG_TYPE_TRACING, ATTACH_TRACE_FENTRY, found["schedule"][1])


def _loads_btf_tracepoint() -> tuple[bool, str]:
    place = kernel_types().tracepoint_type("sched_switch")
    if place is None:
        return False, "the kernel has no BTF"
    return _loads(PROG_TYPE_TRACING, ATTACH_TRACE_RAW_TP, place[1])
