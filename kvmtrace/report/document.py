"""The report document, "kvmtrace.report/1": what every renderer is given, and the JSON that scripts read.

Frozen dataclasses, typed to their leaves; `document_json` writes exactly them, `json_document.from_json` reads
them back. Integers are ns where the name says so, absent is null (never 0), unknown codes keep their number,
percentages are `*_percent` or said in the comment. The meaning of each member is fixed; new members may be added.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

# these are looked up when JSON is read: not only for type checkers
from kvmtrace.bring_up.followed import BringUp  # noqa: TC001
from kvmtrace.check.verdict import Comparison  # noqa: TC001
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.predict.replayed import ReplayedGuest  # noqa: TC001
from kvmtrace.report.over_time import Timeline  # noqa: TC001
from kvmtrace.stats.rows import (
    Detail,
    ExitRow,
    NestedVcpu,
    PerfTables,
    Rate,
    SlowExit,
    StolenRow,
    TriggerRow,
    UserspaceExitRow,
    VcpuRow,
    VmRow,
    WakeUpRow,
)

SCHEMA: Literal["kvmtrace.report/1"] = "kvmtrace.report/1"


@dataclass(frozen=True)
class CaptureInfo:
    """What was recorded, where and how."""

    path: str
    format: str
    host: str | None
    kernel: str | None
    cpu_model: str | None
    isa: str | None  # Isa.name, or "pvm"
    clock: str | None
    backend: str | None
    events: tuple[str, ...]  # recorded tracepoints and probes, "system:name"
    n_events: int
    start_ns: int | None  # of the first event
    duration_ns: int | None
    tracer_cost_ns_per_event: float | None
    n_cpus: int | None = None
    filters: dict[str, str] | None = None  # what the recorder left out on purpose: event or filter -> in words
    selection: str | None = None  # what part of the recording the statistics are about; null: all of it
    vm: str | None = None  # names of the only VMs that are looked at (--vm); null: all of them


@dataclass(frozen=True)
class DamagedPlace:
    """A place that could not be read; what stands before and after it was."""

    offset: int | None  # in the file, bytes
    cpu: int | None
    expected: str
    found: str


@dataclass(frozen=True)
class LossInfo:
    """Events that happened and are not in the recording."""

    events: int | None  # null: some were lost, nobody knows how many
    by_cpu: dict[str, int]
    truncated: bool
    discarded_intervals: int  # exit→entry intervals that may span a loss or run backwards; not in `exits`
    damage: tuple[DamagedPlace, ...] = ()
    ended_by: str | None = (
        None  # "target" "time" "interrupt" "trigger" "disk full" "killed", as the recorder noted; null: unknown
    )
    notes: tuple[str, ...] = ()  # what the recorder said of this recording
    repeated: int = 0  # events that the recorder wrote twice; they count once
    not_understood: dict[str, int] = field(default_factory=dict)  # event -> texts of it that no kernel prints


@dataclass(frozen=True)
class Report:
    """The whole document."""

    capture: CaptureInfo
    loss: LossInfo
    exits: tuple[ExitRow, ...] = ()
    perf_compatible: PerfTables = field(default_factory=PerfTables)
    userspace_exits: tuple[UserspaceExitRow, ...] = ()
    vcpus: tuple[VcpuRow, ...] = ()
    detail: Detail = field(default_factory=Detail)
    rate: Rate | None = None
    bring_up: BringUp | None = None  # the VM's construction, step by step; null: not recorded
    model: Comparison | None = None  # what the comparison with the reference model says; null: not compared
    replay: ReplayedGuest | None = None  # a bundled guest, predicted and recorded; null: none was recorded
    timeline: Timeline | None = None  # only for renderers that draw over time; null in JSON
    slowest: tuple[SlowExit, ...] = ()  # VM-exits, slowest first, waiting and being preempted left out
    vms: tuple[VmRow, ...] = ()  # processes with VMs, the busiest first
    nested: tuple[NestedVcpu, ...] | None = None  # vCPUs that ran a guest of their guest; null: none did
    stolen: tuple[StolenRow, ...] = ()  # who had the CPU while vCPUs waited for one, longest first
    wake_ups: tuple[WakeUpRow, ...] = ()  # from an interrupt's acceptance to guest mode, per VM
    triggers: tuple[TriggerRow, ...] = ()  # why the flight recorder saved it; none for other recordings
    schema: Literal["kvmtrace.report/1"] = SCHEMA
