"""Why the flight recorder saved a recording, with the number of the VM-exit that it was about."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.stats.rows import TriggerRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.report.document import Report
    from kvmtrace.table.recording import Recording

NEAR_NS = 1_000_000  # the recorder's clock was read a moment beside the event's


def with_triggers(report: Report, recording: Recording) -> Report:
    """Return a report that says why its recording was saved; as it is for recordings that nothing triggered."""
    told = recording.capture.meta.get("triggers") or []
    if not told:
        return report
    ids = {row.tid: (row.vcpu_id, row.vm) for row in report.vcpus}
    rows = [_row(one, ids) for one in told]
    wanted = [(row.tid, one["began_ns"]) for row, one in zip(rows, told, strict=True) if row.tid and one["began_ns"]]
    numbers = _numbers(recording, wanted)
    return replace(report, triggers=tuple(_numbered(*pair, numbers) for pair in zip(rows, told, strict=True)))


def _numbered(row: TriggerRow, told: dict[str, Any], numbers: dict[tuple[int, int], int]) -> TriggerRow:
    if row.kind != "slower-than" or row.tid is None or told["began_ns"] is None:
        return row
    return replace(row, number=numbers.get((row.tid, told["began_ns"])))


def _row(told: dict[str, Any], ids: dict[int, tuple[int | None, str | None]]) -> TriggerRow:
    vcpu_id, vm = ids.get(told["tid"], (None, None))
    return TriggerRow(
        kind=told["kind"] or "unknown",
        trigger=told["trigger"] or "",
        ts_ns=told["ts_ns"] or 0,
        pid=told["pid"],
        tid=told["tid"],
        vcpu_id=told["vcpu_id"] if told["vcpu_id"] is not None else vcpu_id,
        vm=told["vm"] or vm,
        reason=told["reason"],
        dur_ns=told["dur_ns"],
        value=told["value"],
        detail=told["detail"],
    )


def _numbers(recording: Recording, wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Return (tid, time of a VM-exit) -> its number among the thread's, from 1; without those that are not recorded."""
    places = set(wanted)
    if not places:
        return {}
    near = dict.fromkeys(places, NEAR_NS)
    numbers: dict[tuple[int, int], int] = {}
    seen = dict.fromkeys((tid for tid, _ in places), 0)
    for table in recording.iter_events():
        rows = table.rows("kvm_exit")
        for tid in seen:
            times = table.ts_ns[rows[table.tid[rows] == tid]]
            for place in places:
                if place[0] != tid or not len(times):
                    continue
                closest = int(np.argmin(np.abs(times - place[1])))
                distance = abs(int(times[closest]) - place[1])
                if distance < near[place]:
                    near[place], numbers[place] = distance, seen[tid] + closest + 1
            seen[tid] += len(times)
    return numbers
