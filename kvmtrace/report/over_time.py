"""What renderers draw over time: the report document's `timeline`."""

from __future__ import annotations

from kvmtrace.lazy_dataclass import dataclass


@dataclass(frozen=True)
class Lane:
    """The overview of one vCPU thread: `share[part][bin]` is the part's time in the bin, ns."""

    tid: int
    label: str
    parts: tuple[str, ...]
    share: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Window:
    """Consecutive segments of one thread.

    Parameters
    ----------
    lane : index of the thread's lane
    start_ns : begin of the first segment, since the recording's start
    dur_ns : length of each segment; they follow each other without gaps
    code : part + len(parts) * (index of the exit reason + 1)
    exits : indices of the segments that a VM-exit begins
    rips : the guest's RIP at each of them
    first_exit : number of the first of them, as `--explain` takes it; None if unknown
    """

    lane: int
    start_ns: int
    dur_ns: tuple[int, ...]
    code: tuple[int, ...]
    exits: tuple[int, ...] = ()
    rips: tuple[int, ...] = ()
    first_exit: int | None = None


@dataclass(frozen=True)
class Bins:
    """What a thread did longest in each of many short stretches of equal length; code as in Window, -1: nothing."""

    lane: int
    bin_ns: float
    code: tuple[int, ...]


@dataclass(frozen=True)
class ChosenExit:
    """A VM-exit worth a look: `ts_ns` since the start, `dur_ns` to the next VM-entry, `why` in a word or two."""

    lane: int
    ts_ns: int
    dur_ns: int
    reason: str
    guest_rip: int
    why: str
    number: int | None = None  # as `--explain` takes it, with --tid; None if unknown
    tid: int | None = None


@dataclass(frozen=True)
class Latency:
    """Exit→entry times over time: per bin the median, 99th percentile and maximum, ns; 0 in bins without exits."""

    p50_ns: tuple[int, ...]
    p99_ns: tuple[int, ...]
    max_ns: tuple[int, ...]


@dataclass(frozen=True)
class Timeline:
    """What the HTML report draws over time."""

    start_ns: int
    bin_ns: float
    parts: tuple[str, ...]
    reasons: tuple[str, ...]
    lanes: tuple[Lane, ...]
    latency: Latency
    windows: tuple[Window, ...]
    chosen: tuple[ChosenExit, ...]
    complete: bool  # windows hold every segment of the recording
    bins: tuple[Bins, ...] = ()  # where they do not: all of the recording, less sharply
