"""Any stretch of a recording's timeline, as segments or as bins, without limits: what the page and the viewer draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.report.over_time import Bins, FollowUp, Window
from kvmtrace.spans.doings import Doings
from kvmtrace.spans.lane_keys import PAGE_SHIFT, LaneKeys, rip_or_none, split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.time_bins import TimeBins, code_of
from kvmtrace.spans.time_parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.spans.doings import DoingsCollector
    from kvmtrace.spans.keys import KeyIndex
    from kvmtrace.spans.thread_store import Run
    from kvmtrace.spans.time_bins import ThreadBins

WINDOW_SEGMENTS = 40_000  # of one lane's stretch told one by one
# the families of follow-up events: (step, member of LaneKeys); their indices stand one behind the other
FAMILIES: tuple[tuple[tuple[Step, ...], str], ...] = (
    ((Step.PIO,), "ports"),
    ((Step.MMIO_READ, Step.MMIO_WRITE), "mmio"),
    ((Step.MSR,), "msrs"),
    ((Step.CR,), "crs"),
    ((Step.HYPERCALL,), "hypercalls"),
    ((Step.PAGE_FAULT, Step.GUEST_FAULT), "pages"),
    ((Step.REGISTER,), "registers"),
    ((Step.CALL,), "calls"),
    ((Step.INJECT,), "vectors"),
)


# member of LaneKeys whose keys have the direction above the number -> what is accessed
_WRITTEN = {"ports": "port", "msrs": "msr", "crs": "cr", "registers": "sysreg"}


def _follow_up(member: str, key: int) -> FollowUp:
    high, low = split_pair(key)
    if member in _WRITTEN:
        return FollowUp(_WRITTEN[member], low, bool(high))
    if member == "mmio":
        return FollowUp("mmio", key >> 1, bool(key & 1))
    if member == "vectors":
        return FollowUp("exception" if high else "interrupt", low & 0xFF, None)
    if member == "pages":
        return FollowUp("page", key << PAGE_SHIFT, None)
    return FollowUp("smccc" if member == "calls" else "hypercall", key, None)


class Stretches:
    """Gives the segments, follow-up events and bins of any stretch of time.

    Parameters
    ----------
    doings : what every thread did
    bins : the same in bins
    keys, tids : of the spans
    before : tid -> its VM-exits before the first segment
    length_ns : of the recording
    """

    def __init__(  # noqa: PLR0917 (all of them are the recording)
        self, doings: DoingsCollector, bins: TimeBins, keys: LaneKeys, tids: Sequence[int], before: Mapping[int, int],
        length_ns: int,
    ) -> None:  # fmt: skip
        self._doings, self._bins = doings, bins
        self.threads = doings.segments.threads()
        self.tids = [tids[thread] for thread in self.threads]
        self.length_ns = length_ns
        self._before = before
        self._families: list[tuple[str, list[int]]] = []
        self._offset = np.zeros(256, np.int64)
        offset = 0
        for steps, member in FAMILIES:
            index: KeyIndex = getattr(keys, member)
            self._offset[list(steps)] = offset
            self._families.append((member, index.keys()))
            offset += len(index)
        self._offset[Step.EMULATE] = offset
        self._rips = np.array([*(rip_or_none(rip) or 0 for rip in keys.rips.keys()), 0], np.uint64)  # noqa: SIM118

    def follow_ups(self) -> tuple[FollowUp, ...]:
        """Return all follow-up events that there are, in the order of their indices."""
        found = [_follow_up(member, key) for member, keys in self._families for key in keys]
        return (*found, FollowUp("emulated", None, None))

    def indices(self, events: NDArray[Any]) -> NDArray[np.int64]:
        """Return the index in follow_ups() of each event."""
        found: NDArray[np.int64] = self._offset[events["step"]] + events["key"]
        return found

    def rip(self, number: int) -> int:
        """Return the RIP of a number in the segments."""
        return int(self._rips[number])

    def lane_of(self, thread: int) -> int:
        """Return the lane of a thread number."""
        return self.threads.index(thread)

    def exit_number(self, lane: int, at_ns: int) -> int | None:
        """Return the number of the VM-exit at or before a moment, None if there is none."""
        store = self._doings.segments
        for run, _, stop in store.runs(self.threads[lane], at_ns, at_ns):
            return self._number(lane, run, stop) or None
        return None

    def rips(self) -> list[int]:
        """Return all RIPs that there are, in the order of their numbers."""
        found: list[int] = self._rips[:-1].tolist()
        return found

    def numbered(self, lane: int, number: int) -> tuple[int, int, int] | None:
        """Return a lane's VM-exit of this number as next_place does, None if it has none."""
        number -= self._before.get(self.tids[lane], 0)
        if not 1 <= number <= self._doings.segments.counted(self.threads[lane]):
            return None
        run = next(run for run in reversed(self._doings.segments.all_runs(self.threads[lane])) if run.before < number)
        rows = self._doings.segments.rows(run, 0, run.n)
        at = int(np.flatnonzero(rows["rip"] >= 0)[number - run.before - 1])
        return self._exit(lane, int(rows["ts_ns"][at]))

    def next_place(
        self, lane: int, since_ns: int, reasons: NDArray[np.bool_], rips: NDArray[np.bool_], keys: NDArray[np.bool_]
    ) -> tuple[int, int, int] | None:
        """Return a lane's next moment that a mask names, by reason, RIP or follow-up, with its VM-exit.

        Returns
        -------
        (when, begin of the VM-exit, its length), None if there is none
        """
        thread, found = self.threads[lane], []
        rips = np.append(rips, False)  # -1: no VM-exit begins
        reasons = np.append(reasons, False)
        for run, first, stop in self._doings.segments.runs(thread, since_ns):
            rows = self._doings.segments.rows(run, first, stop)
            wanted = (rows["rip"] >= 0) & (rips[rows["rip"]] | reasons[rows["reason"]]) & (rows["ts_ns"] >= since_ns)
            if wanted.any():
                found.append(int(rows["ts_ns"][np.argmax(wanted)]))
                break
        for run, first, stop in self._doings.events.runs(thread, since_ns) if keys.any() else ():
            events = self._doings.events.rows(run, first, stop)
            wanted = keys[self.indices(events)] & (events["ts_ns"] >= since_ns)
            if wanted.any():
                found.append(int(events["ts_ns"][np.argmax(wanted)]))
                break
        return self._exit(lane, min(found)) if found else None

    def _exit(self, lane: int, at_ns: int) -> tuple[int, int, int]:
        """Return a moment with the begin and length of the VM-exit that is handled then; of none, the moment itself."""
        thread, begin = self.threads[lane], at_ns
        for run, _, stop in self._doings.segments.runs(thread, at_ns, at_ns):
            own = np.flatnonzero(self._doings.segments.rows(run, 0, stop)["rip"] >= 0)
            begin = int(self._doings.segments.rows(run, 0, stop)["ts_ns"][own[-1]]) if len(own) else at_ns
        for run, first, stop in self._doings.segments.runs(thread, at_ns):
            rows = self._doings.segments.rows(run, first, stop)
            guest = np.flatnonzero((rows["part"] == Part.GUEST) & (rows["ts_ns"] >= at_ns))
            if len(guest):
                return at_ns, begin, int(rows["ts_ns"][guest[0]]) - begin
        return at_ns, begin, self.length_ns - begin

    def _number(self, lane: int, run: Run, stop: int) -> int:
        """Return how many VM-exits of its thread have begun before a row of a run."""
        own = np.count_nonzero(self._doings.segments.rows(run, 0, stop)["rip"] >= 0)
        return self._before.get(self.tids[lane], 0) + run.before + int(own)

    def whole(self, lane: int) -> list[Window]:
        """Return all segments of a lane."""
        return self.stretch(lane, 0, self.length_ns)

    def stretch(self, lane: int, begin_ns: int, end_ns: int) -> list[Window]:
        """Return the segments of a lane between two times, one window for each run of the file."""
        runs = self._doings.segments.runs(self.threads[lane], begin_ns, end_ns)
        return [self._window(lane, run, first, stop) for run, first, stop in runs]

    def around(self, moments: Iterable[tuple[int, int]], on_either_side: int, limit: int) -> tuple[Window, ...]:
        """Return windows around (lane, ns), up to `limit` segments in all; windows that touch are one."""
        wanted: dict[tuple[int, int], tuple[Run, list[tuple[int, int]]]] = {}
        left = limit
        for lane, at_ns in moments:
            for run, first, _ in self._doings.segments.runs(self.threads[lane], at_ns, at_ns):
                piece = max(first - on_either_side, 0), min(first + on_either_side, run.n)
                if piece[1] - piece[0] <= left:
                    left -= piece[1] - piece[0]
                    wanted.setdefault((lane, run.offset), (run, []))[1].append(piece)
        return tuple(
            self._window(lane, run, first, stop)
            for (lane, _), (run, pieces) in sorted(wanted.items(), key=lambda item: item[0])
            for first, stop in _merged(pieces)
        )

    def _window(self, lane: int, run: Run, first: int, stop: int) -> Window:
        rows = self._doings.segments.rows(run, first, stop)
        exits = np.flatnonzero(rows["rip"] >= 0)
        cpu_at = _changes(rows["cpu"])
        level_at = _changes(rows["level"]) if rows["level"].any() else np.empty(0, np.intp)
        begin, end = int(rows["ts_ns"][0]), int(rows["ts_ns"][-1] + rows["dur_ns"][-1])
        events = self._events(lane, begin, end)
        return Window(
            lane=lane,
            start_ns=begin,
            # what lies between two segments (a clock that stepped back) belongs to the one before
            dur_ns=tuple(np.diff(np.append(rows["ts_ns"], end)).tolist()),
            code=tuple(code_of(rows).tolist()),
            cpu_at=tuple(cpu_at.tolist()),
            cpus=tuple(rows["cpu"][cpu_at].tolist()),
            level_at=tuple(level_at.tolist()),
            levels=tuple(rows["level"][level_at].tolist()),
            exits=tuple(exits.tolist()),
            rips=tuple(self._rips[rows["rip"][exits]].tolist()),
            first_exit=self._number(lane, run, first) + 1 if len(exits) else None,
            event_ns=tuple(events["ts_ns"].tolist()),
            event_key=tuple(self.indices(events).tolist()),
        )

    def _events(self, lane: int, begin_ns: int, end_ns: int) -> NDArray[Any]:
        events = self._doings.events.between(self.threads[lane], begin_ns, end_ns)
        return events[(events["ts_ns"] >= begin_ns) & (events["ts_ns"] < end_ns)]

    def overview(self) -> tuple[Bins, ...]:
        """Return the bins of the whole recording."""
        made = [self._bins.of(thread, self.length_ns) for thread in self.threads]
        return tuple(
            _bins(lane, 0, self._bins.bin_ns, bins, self._before.get(self.tids[lane], 0))
            for lane, bins in enumerate(made)
            if bins is not None
        )

    def at_level(self, begin_ns: int, end_ns: int, n_bins: int) -> tuple[list[Window], list[Bins]]:
        """Return every lane's stretch: as segments where they are few, else as so many bins.

        Lanes whose bins of the whole recording are as sharp are left out.
        """
        windows: list[Window] = []
        bins: list[Bins] = []
        for lane, thread in enumerate(self.threads):
            if self._doings.segments.count_between(thread, begin_ns, end_ns) <= WINDOW_SEGMENTS:
                windows += self.stretch(lane, begin_ns, end_ns)
            elif (end_ns - begin_ns) // n_bins < self._bins.bin_ns:
                bins.append(self._sharper(lane, begin_ns, end_ns, n_bins))
        return windows, bins

    def is_whole(self, begin_ns: int, end_ns: int) -> bool:
        """Say whether at_level() gives every lane's stretch as segments."""
        count = self._doings.segments.count_between
        return all(count(thread, begin_ns, end_ns) <= WINDOW_SEGMENTS for thread in self.threads)

    def _sharper(self, lane: int, begin_ns: int, end_ns: int, n_bins: int) -> Bins:
        thread = self.threads[lane]
        segments = self._doings.segments.between(thread, begin_ns, end_ns)
        events = self._events(lane, begin_ns, end_ns)
        bins = TimeBins(begin_ns, end_ns, n_bins)
        bins.feed(Doings(np.zeros(len(segments), np.uint16), segments, np.zeros(len(events), np.uint16), events))
        made = bins.of(0, end_ns)
        assert made is not None
        return _bins(lane, begin_ns, bins.bin_ns, made, self.exit_number(lane, max(begin_ns - 1, 0)) or 0)


def _changes(values: NDArray[Any]) -> NDArray[np.intp]:
    """Return where each run of equal values begins."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))


def _merged(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges joined where they touch."""
    made: list[tuple[int, int]] = []
    for first, stop in sorted(pieces):
        if made and first <= made[-1][1]:
            made[-1] = made[-1][0], max(stop, made[-1][1])
        else:
            made.append((first, stop))
    return made


def _bins(lane: int, start_ns: int, bin_ns: int, made: ThreadBins, before: int) -> Bins:
    shares = np.clip(np.rint(made.part_ns * (255 / max(bin_ns, 1))), 0, 255).astype(np.int64)
    # what is there at all is drawn
    shares[(shares == 0) & (made.part_ns > 0)] = 1
    return Bins(
        lane=lane,
        start_ns=start_ns,
        bin_ns=bin_ns,
        shares=tuple(tuple(part.tolist()) if part.any() else () for part in shares.T),
        code=tuple(made.code.tolist()),
        cpu=tuple(made.cpu.tolist()),
        level=tuple(np.maximum(made.level, 0).tolist()) if (made.level > 0).any() else (),
        exits=tuple(made.exits.tolist()),
        events=tuple(made.events.tolist()),
        exits_before=before,
    )
