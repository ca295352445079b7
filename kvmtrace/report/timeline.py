"""A recording over time at every level of detail, made in one pass: bins of the whole, and segments of any moment.

What every thread did goes to a temporary file (spans/doings.py), and into bins that double as time goes on
(spans/time_bins.py). A short recording's segments all go into the document; of a longer one the bins do, with the
segments around what one would look at first. `Stretches` gives the segments of any other moment, without limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.report.chosen_exits import ChosenExits
from kvmtrace.report.over_time import ChosenExit, Lane, Latency, Places, Timeline
from kvmtrace.report.places import find_places
from kvmtrace.report.stretches import Stretches
from kvmtrace.spans.doings import DoingsCollector
from kvmtrace.spans.lane_keys import rip_or_none, split_pair
from kvmtrace.spans.slices import PART_NAMES
from kvmtrace.spans.time_bins import TimeBins
from kvmtrace.spans.time_parts import Part
from kvmtrace.stats.latency_over_time import LatencyOverTime

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmtrace.check.verdict import Violation
    from kvmtrace.report.over_time import Window
    from kvmtrace.spans.lane_keys import LaneKeys
    from kvmtrace.spans.span_builder import Spans

MAX_SEGMENTS = 400_000  # and as many follow-up events: some 3 MB of HTML
AROUND_SEGMENTS = 60_000  # of a longer recording, around chosen exits
AROUND = 60  # segments on either side of a chosen exit


@dataclass(frozen=True)
class Told:
    """What the report knows of the recording, beside its spans.

    Parameters
    ----------
    labels : tid -> label
    before : tid -> its VM-exits before the selected stretch of time
    violations : segments around them are kept
    start_ns, length_ns : of the recording, or of what is selected of it
    """

    labels: Mapping[int, str]
    before: Mapping[int, int]
    violations: Sequence[Violation]
    start_ns: int
    length_ns: int


class TimelineBuilder:
    """Makes the timeline of consecutive pieces of spans.

    Parameters
    ----------
    origin_ns : time that counts as 0
    limit : segments that the document may hold in full; None for all
    """

    def __init__(self, origin_ns: int, limit: int | None = MAX_SEGMENTS) -> None:
        self.origin_ns = origin_ns
        self._limit = limit
        self._doings = DoingsCollector(origin_ns)
        self._bins = TimeBins()
        self._latency = LatencyOverTime(origin_ns)
        self._chosen = ChosenExits()

    def feed(self, spans: Spans) -> None:
        """Take in the next piece."""
        self._bins.feed(self._doings.feed(spans))
        self._latency.feed(spans)
        self._chosen.feed(spans)

    def finish(self, keys: LaneKeys, tids: Sequence[int], told: Told) -> tuple[Timeline, Stretches] | None:
        """Return the timeline, and what gives the rest of it; None without any segment."""
        segments = self._doings.segments
        if not len(segments):
            return None
        threads = segments.threads()
        ends = [int(row["ts_ns"]) + int(row["dur_ns"]) for row in map(segments.last, threads)]
        length_ns = max(told.start_ns + told.length_ns - self.origin_ns, *ends, 1)
        stretches = Stretches(self._doings, self._bins, keys, tids, told.before, length_ns)
        complete = self._limit is None or max(len(segments), len(self._doings.events)) <= self._limit
        lanes = tuple(Lane(tids[thread], told.labels.get(tids[thread], str(tids[thread]))) for thread in threads)
        timeline = Timeline(
            start_ns=self.origin_ns,
            length_ns=length_ns,
            parts=tuple(PART_NAMES[part] for part in Part),
            reasons=tuple(describe_exit_reason(*split_pair(key)) for key in keys.reasons.keys()),  # noqa: SIM118
            lanes=lanes,
            follow_ups=stretches.follow_ups(),
            latency=self._over_time(length_ns),
            windows=self._windows(stretches, told.violations, complete=complete),
            chosen=self._described(stretches, keys),
            complete=complete,
            bins=() if complete else stretches.overview(),
            places=Places() if complete else find_places(self._doings, stretches),
        )
        return timeline, stretches

    def _over_time(self, length_ns: int) -> Latency:
        p50, p99 = self._latency.quantiles(length_ns, 0.5, 0.99)
        longest = self._latency.max_ns(length_ns)
        return Latency(self._latency.bin_ns, tuple(p50.tolist()), tuple(p99.tolist()), tuple(longest.tolist()))

    def _windows(self, stretches: Stretches, violations: Iterable[Violation], *, complete: bool) -> tuple[Window, ...]:
        if complete:
            return tuple(window for lane in range(len(stretches.threads)) for window in stretches.whole(lane))
        moments = [(stretches.lane_of(one.thread), one.ts_ns - self.origin_ns) for one, _ in self._chosen.chosen()]
        lane_of = {tid: lane for lane, tid in enumerate(stretches.tids)}
        moments += [(lane_of[v.tid], v.ts_ns - self.origin_ns) for v in violations if v.tid in lane_of]
        return stretches.around(moments, AROUND, AROUND_SEGMENTS)

    def _described(self, stretches: Stretches, keys: LaneKeys) -> tuple[ChosenExit, ...]:
        rips, reasons = keys.rips.keys(), keys.reasons.keys()
        return tuple(
            ChosenExit(
                lane=stretches.lane_of(one.thread),
                ts_ns=one.ts_ns - self.origin_ns,
                dur_ns=one.dur_ns,
                reason=describe_exit_reason(*split_pair(reasons[one.reason])),
                guest_rip=rip_or_none(rips[one.rip]),
                why=why,
                number=stretches.exit_number(stretches.lane_of(one.thread), one.ts_ns - self.origin_ns),
                tid=stretches.tids[stretches.lane_of(one.thread)],
            )
            for one, why in self._chosen.chosen()
        )
