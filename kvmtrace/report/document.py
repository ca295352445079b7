"""The report document, "kvmtrace.report/1": what every renderer is given, and the JSON that scripts read.

Frozen dataclasses; `dump` is exactly the JSON. Integers are ns where the name says so, absent is null (never
0), unknown codes keep their number, percentages are `*_percent` or said in the comment. The meaning of each
member is fixed; new members may be added.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any

from kvmtrace.stats.rows import Detail, ExitRow, PerfTables, Rate, UserspaceExitRow, VcpuRow

SCHEMA = "kvmtrace.report/1"


@dataclass(frozen=True)
class CaptureInfo:
    """What was recorded, where and how."""

    path: str
    format: str
    host: str | None
    kernel: str | None
    cpu_model: str | None
    isa: str | None  # "vmx" "svm" "pvm"
    clock: str | None
    backend: str | None
    events: tuple[str, ...]  # recorded tracepoints and probes, "system:name"
    n_events: int
    start_ns: int | None  # of the first event
    duration_ns: int | None
    tracer_cost_ns_per_event: float | None
    n_cpus: int | None = None
    filters: Any = None  # what the recorder left out on purpose
    selection: str | None = None  # what part of the recording the statistics are about; null: all of it


@dataclass(frozen=True)
class LossInfo:
    """Events that happened and are not in the recording."""

    events: int | None  # null: some were lost, nobody knows how many
    by_cpu: dict[str, int]
    truncated: bool
    discarded_intervals: int  # exit→entry intervals that may span a loss or run backwards; not in `exits`
    damage: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Report:
    """The whole document. `model`, `bring_up` and `replay` are documents of the layers that make them."""

    capture: CaptureInfo
    loss: LossInfo
    exits: tuple[ExitRow, ...] = ()
    perf_compatible: PerfTables = field(default_factory=PerfTables)
    userspace_exits: tuple[UserspaceExitRow, ...] = ()
    vcpus: tuple[VcpuRow, ...] = ()
    detail: Detail = field(default_factory=Detail)
    rate: Rate | None = None
    bring_up: Any = None
    model: Any = None
    replay: Any = None
    timeline: Any = None  # only for renderers that draw over time; null in JSON
    schema: str = SCHEMA


def dump(value: Any) -> Any:
    """Return a document or a part of it as what JSON knows: dicts, lists, strings, numbers, null."""
    if hasattr(value, "to_dict"):  # documents of other layers know their own JSON
        value = value.to_dict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [dump(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, enum.Enum) else value
    return value.item() if hasattr(value, "item") else str(value)  # a NumPy scalar


def render_json(report: Report, *, only: tuple[str, ...] = ()) -> str:
    """Return the document as JSON, `schema` first.

    Parameters
    ----------
    only : names of the members wanted; () for all
    """
    members = dump(report)
    document = {"schema": members.pop("schema")}
    document.update({name: value for name, value in members.items() if not only or name in only})
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False)
