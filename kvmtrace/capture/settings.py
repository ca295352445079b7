"""What a recording is asked to do, and what it reports back; shared by both back ends.

A back end is a function `record(settings: RecordSettings) -> RecordResult`.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmtrace.capture.bpf.monitor import Table

META_SCHEMA = "kvmtrace.capture/1"
META_MAGIC = b"KVMTRACE-META-1\n"  # the last 16 bytes of a file with a metadata trailer


@dataclass(frozen=True)
class TargetSpec:
    """Whose events are wanted.

    Parameters
    ----------
    kind : "guest" (a bundled guest is started), "command" (started too), "pid" (already running), "all"
    guest : str or None, name of the bundled guest
    guest_arguments : further arguments of `python -m kvmtrace.workload`, such as ("--count", "5000")
    command : argv of the command
    pid : int or None, process whose threads, present and later, are recorded
    as_root : bool, under sudo run the command as root instead of as the invoking user
    output : descriptor that takes what a command prints; None: ours. With it the command has a session of its own,
        reads nothing, and whatever of its process group is left at its end is killed
    """

    kind: str
    guest: str | None = None
    guest_arguments: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    pid: int | None = None
    as_root: bool = False
    output: int | None = None


@dataclass(frozen=True)
class RecordSettings:
    """One recording.

    Parameters
    ----------
    output : Path of the capture; appears, complete, when the recording has ended
    target : TargetSpec
    backend : "auto" "ftrace" "bpf"
    event_set : key of kvm.tracepoints.EVENT_SETS
    duration_s : float or None, end after so many seconds
    max_bytes : int or None, keep only the newest events that fit (the rest is counted as discarded)
    summary : bool, aggregate in the kernel, no event stream (bpf only)
    clock : str or None, name of the trace clock; None is the back end's default ("mono")
    buffer_bytes : int or None, kernel buffer per CPU; None is the back end's default
    argv : the command line, for the metadata
    filters : in-kernel filters of the bpf back end, name -> value as the user gave it
        ("thread", "vcpu", "exit_reason", "slower_than_ns", "sample")
    monitor : Table or None, the automaton to step in the kernel instead of recording events (bpf only)
    tell : called with what the user should know at once
    qmp : Path or None, QMP socket of the QEMU that is recorded; only questions are asked
    """

    output: Path
    target: TargetSpec
    backend: str = "auto"
    event_set: str = "lifecycle"
    duration_s: float | None = None
    max_bytes: int | None = None
    summary: bool = False
    clock: str | None = None
    buffer_bytes: int | None = None
    argv: tuple[str, ...] = ()
    filters: dict[str, Any] = field(default_factory=dict)
    qmp: Path | None = None
    monitor: Table | None = None
    tell: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class RecordResult:
    """What a recording holds; everything is in the file's metadata too.

    Parameters
    ----------
    path : Path of the finished capture
    meta : the metadata object "kvmtrace.capture/1" as stored (loss, duration, target, notes, ...)
    n_events : int or None, events in the file
    by_kind : events per kind, None where counting them is not free
    file_bytes : int, size of the capture
    recorder_cpu_s : float, CPU time the recorder itself took
    """

    path: Path
    meta: dict[str, Any]
    file_bytes: int
    recorder_cpu_s: float
    n_events: int | None = None
    by_kind: dict[str, int] | None = None

    @property
    def lost(self) -> int | None:
        """Events lost in the kernel's buffers; None: some, nobody knows how many."""
        lost = self.meta["loss"]["events"]
        assert lost is None or isinstance(lost, int)
        return lost

    @property
    def kvm_seen(self) -> bool | None:
        """Whether an event of KVM was recorded; None: nobody looked through so much."""
        seen = self.meta.get("kvm_seen")
        return seen if isinstance(seen, bool) else None

    @property
    def ended_by(self) -> str:
        """What ended it: "target", "time", "interrupt" (Ctrl-C, SIGTERM), "disk full"."""
        return str(self.meta["ended_by"])

    @property
    def target_status(self) -> int | None:
        """Exit status of a started command or guest (-N: killed by signal N)."""
        status = self.meta["target_status"]
        assert status is None or isinstance(status, int)
        return status
