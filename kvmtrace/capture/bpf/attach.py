"""Hanging programs on events: what the kernel allows, newest mechanism first.

Everything hangs on file descriptors of this process: when it dies, however it dies, the kernel detaches all
of it. Function probes are made through perf_event_open, never through tracefs, for the same reason.
"""

from __future__ import annotations

import ctypes
import os
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
from kvmtrace.errors import RESOURCES, CapabilityError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.capture.bpf.event_programs import TracedEvent

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
            remedy = RESOURCES.get(error.errno or 0, "run as root, or with CAP_BPF and CAP_PERFMON")
            raise CapabilityError(f"no BPF program may be attached to {name}: {error.strerror}", remedy) from None

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
