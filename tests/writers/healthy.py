"""Healthy event tables made of the clean cases, each case a thread of its own."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats import open_recording
from kvmtrace.table.event_table import LOST_EVENTS, EventKind, EventTable
from kvmtrace.table.parking import materialise
from kvmtrace.table.payload import ColumnPayload

if TYPE_CHECKING:
    from kvmtrace.table.recording import Capture

CASES = sorted((Path(__file__).parents[1] / "cases").glob("*.txt"))
SVM_LATE = ("svm-late",)  # another kernel than the rest


def clean_cases(isa: str) -> list[Path]:
    wanted = []
    for path in CASES:
        text = path.read_text()
        svm = "isa=2" in text
        if (
            "# expect: clean\n" in text
            and svm == (isa == "svm")
            and "LOST" not in text
            and "kvm_entry" in text
            and not path.stem.startswith(SVM_LATE)
        ):
            wanted.append(path)
    return wanted


def joined(isa: str) -> tuple[Capture, EventTable]:
    """Return the clean cases of an ISA side by side: thread 1000 + n runs vCPU n, on CPU n % 4.

    The table is the caller's own: it may be changed.
    """
    capture, table = _joined(isa)
    return capture, materialise(table, np.arange(len(table)))


@cache
def _joined(isa: str) -> tuple[Capture, EventTable]:
    recordings = [open_recording(path) for path in clean_cases(isa)]
    kinds: dict[str, EventKind] = {}
    for recording in recordings:
        for kind in recording.events().kinds:
            known = kinds.get(kind.name, kind)
            kinds[kind.name] = dataclasses.replace(known, fields={**kind.fields, **known.fields})
    kinds.setdefault(LOST_EVENTS, EventKind(LOST_EVENTS, "kvmtrace", {"count": np.dtype(np.int64)}))
    tables = [
        _rebuilt(recording.events(), tuple(kinds.values()), number) for number, recording in enumerate(recordings)
    ]
    table = EventTable.concat(tables)
    table = table.take(np.argsort(table.ts_ns, kind="stable"))
    whole = materialise(table, np.arange(len(table)))
    events = (*tuple(f"kvm:{name}" for name in kinds if name.startswith("kvm_")), "sched:sched_switch")
    return dataclasses.replace(recordings[0].capture, format="trace.dat", events=events), whole


def _rebuilt(table: EventTable, kinds: tuple[EventKind, ...], number: int) -> EventTable:
    index = {kind.name: i for i, kind in enumerate(kinds)}
    mapping = np.array([index[kind.name] for kind in table.kinds], np.uint16)
    payloads = {}
    for old, payload in table.payloads.items():
        name = table.kinds[old].name
        fields = {}
        for field, dtype in kinds[index[name]].fields.items():
            column = (
                payload.column(field).astype(dtype.base)
                if field in payload.fields
                else np.zeros((table.count(name), *dtype.shape), dtype.base)
            )
            # of several vCPUs of a case, the first one gets the case's number
            fields[field] = column * 1000 + number if field in ("vcpu_id", "apicid") else column
        payloads[index[name]] = ColumnPayload(fields)
    n_rows = len(table)
    columns = {
        "ts_ns": table.ts_ns,
        "cpu": np.full(n_rows, number % 4, np.int16),
        "tid": np.where(table.tid == 100, 1000 + number, 2000 + number).astype(np.int32),
        "kind": mapping[table.kind],
        "irq_flags": table.irq_flags,
        "preempt_count": table.preempt_count,
    }
    return EventTable(columns, kinds, payloads)


def with_loss(table: EventTable, cpu: int, start: int, n_lost: int) -> EventTable:
    """Return the table without `n_lost` events of a CPU from its `start`-th on, a lost_events row instead."""
    on_cpu = np.flatnonzero((table.cpu == cpu) & (table.kind != table.kind_index[LOST_EVENTS]))
    gone = on_cpu[start : start + n_lost]
    if start + n_lost >= len(on_cpu):
        return table
    behind = on_cpu[start + n_lost]
    kept = materialise(table, np.setdiff1d(np.arange(len(table)), gone))
    place = int(np.searchsorted(np.setdiff1d(np.arange(len(table)), gone), behind))
    lost = kept.kind_index[LOST_EVENTS]
    values = {"ts_ns": table.ts_ns[behind], "cpu": cpu, "tid": -1, "kind": lost, "irq_flags": 0, "preempt_count": 0}
    columns = {name: np.insert(getattr(kept, name), place, value) for name, value in values.items()}
    before = int(np.count_nonzero(kept.kind[:place] == lost))
    old = kept.payloads[lost].column("count") if lost in kept.payloads else np.empty(0, np.int64)
    payloads = dict(kept.payloads)
    payloads[lost] = ColumnPayload({"count": np.insert(old, before, n_lost)})
    return EventTable(columns, kept.kinds, payloads)
