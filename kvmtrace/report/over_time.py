"""What renderers draw over time: the report document's `timeline`. Times are ns since the recording's start."""

from __future__ import annotations

from kvmtrace.lazy_dataclass import dataclass


@dataclass(frozen=True)
class Lane:
    """A vCPU thread."""

    tid: int
    label: str


@dataclass(frozen=True)
class Window:
    """Consecutive segments of one thread, and the follow-up events among them.

    Parameters
    ----------
    lane : index of the thread's lane
    start_ns : begin of the first segment
    dur_ns : length of each segment
    code : part + len(parts) * (index of the exit reason + 1)
    cpu_at, cpus : from which segment on the thread was on which host CPU
    level_at, levels : from which segment on the guest was of which level (1, 2); () without nested guests
    exits : indices of the segments that a VM-exit begins
    rips : the guest's RIP at each of them
    first_exit : number of the first of them, as `--explain` takes it; None if there is none
    event_ns, event_key : follow-up events, in order: when, and the index of FollowUp
    """

    lane: int
    start_ns: int
    dur_ns: tuple[int, ...]
    code: tuple[int, ...]
    cpu_at: tuple[int, ...]
    cpus: tuple[int, ...]
    level_at: tuple[int, ...]
    levels: tuple[int, ...]
    exits: tuple[int, ...]
    rips: tuple[int, ...]
    first_exit: int | None
    event_ns: tuple[int, ...]
    event_key: tuple[int, ...]


@dataclass(frozen=True)
class FollowUp:
    """What a follow-up event was: `what` as in the document's `slowest`, or "interrupt", "exception", "emulated"."""

    what: str
    number: int | None
    write: bool | None


@dataclass(frozen=True)
class Bins:
    """What a thread did in each of many stretches of equal length.

    Parameters
    ----------
    lane : index of the thread's lane
    start_ns, bin_ns : begin of the first stretch, and the length of each
    shares : of each part the share of each bin, in 255ths; () for a part that never occurs
    code, cpu : what the thread did longest, as in Window, and on which host CPU; -1: nothing
    level : of the guest at that time; () without nested guests
    exits, events : VM-exits and follow-up events that begin in it
    exits_before : VM-exits of the thread before the first bin
    """

    lane: int
    start_ns: int
    bin_ns: int
    shares: tuple[tuple[int, ...], ...]
    code: tuple[int, ...]
    cpu: tuple[int, ...]
    level: tuple[int, ...]
    exits: tuple[int, ...]
    events: tuple[int, ...]
    exits_before: int


@dataclass(frozen=True)
class Place:
    """Where something that can be searched for is, `total` times.

    Parameters
    ----------
    what : "reason", "rip" or "key"
    number : index of the reason or FollowUp, or the RIP itself
    lane, ts_ns : of the first few places
    cells : where these are not all: the stretches in which it is, number of the stretch * lanes + lane, ascending
    """

    what: str
    number: int
    total: int
    lane: tuple[int, ...]
    ts_ns: tuple[int, ...]
    cells: tuple[int, ...] = ()


@dataclass(frozen=True)
class Places:
    """All that can be searched for; `left_out` rare RIPs and follow-ups are not named, `cell_ns` is a cell's length."""

    named: tuple[Place, ...] = ()
    cell_ns: int = 1
    left_out: int = 0


@dataclass(frozen=True)
class ChosenExit:
    """A VM-exit worth a look: `dur_ns` to the next VM-entry, `why` in a word or two."""

    lane: int
    ts_ns: int
    dur_ns: int
    reason: str
    guest_rip: int | None
    why: str
    number: int | None = None  # as `--explain` takes it, with --tid; None if unknown
    tid: int | None = None


@dataclass(frozen=True)
class Latency:
    """Exit→entry times over time: per bin the median, 99th percentile and maximum, ns; 0 in bins without exits."""

    bin_ns: int
    p50_ns: tuple[int, ...]
    p99_ns: tuple[int, ...]
    max_ns: tuple[int, ...]


@dataclass(frozen=True)
class Timeline:
    """What the HTML report draws over time: levels of detail from the whole recording down to segments."""

    start_ns: int  # on the recording's clock
    length_ns: int
    parts: tuple[str, ...]
    reasons: tuple[str, ...]
    lanes: tuple[Lane, ...]
    follow_ups: tuple[FollowUp, ...]
    latency: Latency
    windows: tuple[Window, ...]
    chosen: tuple[ChosenExit, ...]
    complete: bool  # windows hold every segment of the recording
    bins: tuple[Bins, ...] = ()  # where they do not: all of the recording, less sharply
    places: Places = Places()  # likewise: where reasons, RIPs and follow-ups are
