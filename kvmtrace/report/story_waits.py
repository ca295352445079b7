"""Who ran while the vCPU of a story waited for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.stats.stolen import StolenAccumulator
from kvmtrace.stats.vcpus import Identities
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from kvmtrace.check.explain import Story
    from kvmtrace.table.recording import Recording


def who_ran(recording: Recording, story: Story) -> tuple[tuple[str, int], ...]:
    """Return who ran for how long, ns, while the story's vCPU was preempted, longest first."""
    table = recording.events()
    begin, end = story.events[0].ts_ns, story.events[-1].ts_ns
    if not table.count("sched_switch"):
        return ()
    inside = (table.ts_ns >= begin) & (table.ts_ns <= end)
    inside[table.rows(LOST_EVENTS)] = False
    # what each CPU ran when the story began
    switches = table.rows("sched_switch")
    before = switches[table.ts_ns[switches] < begin]
    for cpu in np.unique(table.cpu[before]).tolist():
        inside[before[table.cpu[before] == cpu][-1:]] = True
    part = table.take(np.flatnonzero(inside))
    identities = Identities()
    identities.add_recorded(recording)
    rows = [table.rows(event) for event in ("kvm_entry", "kvm_exit")]
    vcpus = np.unique(table.tid[np.concatenate(rows)]).tolist()
    stolen = StolenAccumulator()
    stolen.feed(part, [story.tid], {})
    found, _ = stolen.finish(recording, {tid: identities.pids.get(tid) for tid in vcpus})
    return tuple((row.who, row.total_ns) for row in found)
