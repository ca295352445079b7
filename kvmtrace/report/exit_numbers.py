"""Which VM-exit of its thread a violation belongs to, and which vCPU that is: what `--explain` is to be given."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.table.vm_threads import names_of_threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.check.verdict import Violation
    from kvmtrace.report.document import Report
    from kvmtrace.table.recording import Recording


def with_numbers(report: Report, recording: Recording) -> Report:
    """Return a report whose violations and slowest VM-exits say all that leads on to the story of one exit."""
    ids = {row.tid: row.vcpu_id for row in report.vcpus}
    names = names_of_threads(recording)
    slowest = tuple(replace(row, vcpu_id=ids.get(row.tid), vm=names.get(row.tid)) for row in report.slowest)
    report = replace(report, slowest=slowest)
    model = report.model
    if model is None or not (model.violations or model.first_divergence):
        return report
    every = [*model.violations, *([model.first_divergence] if model.first_divergence else [])]
    numbers, seen = number_exits(recording, every)
    ids = {**seen, **{tid: known for tid, known in ids.items() if known is not None}}

    def led_on(violation: Violation) -> Violation:
        vcpu_id = violation.vcpu_id if violation.vcpu_id is not None else ids.get(violation.tid)
        number = numbers.get((violation.tid, violation.event_index))
        return replace(violation, vcpu_id=vcpu_id, vm=names.get(violation.tid), vm_exit=number or None)

    first = led_on(model.first_divergence) if model.first_divergence else None
    violations = tuple(led_on(violation) for violation in model.violations)
    return replace(report, model=replace(model, violations=violations, first_divergence=first))


def number_exits(
    recording: Recording, violations: Iterable[Violation]
) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """Count the VM-exits of a violation's thread up to its event: a second look at the recording, for a few events.

    Returns
    -------
    (tid, event_index) -> number of the VM-exit at or before it, from 1; 0 if there was none
    tid -> vCPU id, of threads with violations
    """
    places = sorted({(violation.tid, violation.event_index) for violation in violations})
    numbers = dict.fromkeys(places, 0)
    ids: dict[int, int] = {}
    start = 0
    for table in recording.iter_events():
        rows = table.rows("kvm_exit")
        for tid in sorted({tid for tid, _ in places}):
            own = rows[table.tid[rows] == tid] + start
            for place in places:
                if place[0] == tid:
                    numbers[place] += int(np.searchsorted(own, place[1], "right"))
            if len(own) and tid not in ids and table.has("kvm_exit", "vcpu_id"):
                at = int(np.searchsorted(rows, own[-1] - start))
                ids[tid] = int(table.field("kvm_exit", "vcpu_id")[at])
        start += len(table)
        if places and start > max(index for _, index in places) and all(tid in ids for tid, _ in places):
            break
    return numbers, ids
