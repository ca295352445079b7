"""What a Perfetto trace holds, as columns: tracks, slices with arguments and flows, counters, violations.

Both writers are given this and nothing else, so the two formats have the same content.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.verdict import Violation

HEX, NUMBER, TEXT = "hex", "number", "text"  # kinds of arguments; of TEXT the values are numbers of Names


class Names:
    """Texts by number, from 1."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.texts: list[str] = [""]

    def number(self, text: str) -> int:
        """Return the number of a text."""
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number


@dataclass(frozen=True)
class Track:
    """A line of the timeline.

    Parameters
    ----------
    number : its own, from 1
    pid, tid : of its process (the VM) and thread; lines that are no thread have a tid that no thread can have
    name : shown
    process : name of the process
    counter : it shows a number over time
    """

    number: int
    pid: int
    tid: int
    name: str
    process: str
    counter: bool = False


@dataclass(frozen=True)
class Argument:
    """What some slices say of themselves: uint64 values, shape (n,), and which slices have one."""

    kind: str
    values: NDArray[np.uint64]
    present: NDArray[np.bool_]


@dataclass(frozen=True)
class Slices:
    """Stretches of time on tracks; those of no length are moments.

    Attributes
    ----------
    track, name : (n,) int64, numbers of Track and of Names
    ts_ns, dur_ns : (n,) int64
    arguments : name -> Argument
    flow : (n,) uint64, slices of the same flow are joined by arrows; 0 none
    begins, ends : (n,) bool, the slice is a flow's first, or last
    """

    track: NDArray[np.int64]
    name: NDArray[np.int64]
    ts_ns: NDArray[np.int64]
    dur_ns: NDArray[np.int64]
    arguments: dict[str, Argument] = field(default_factory=dict)
    flow: NDArray[np.uint64] | None = None
    begins: NDArray[np.bool_] | None = None
    ends: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ts_ns)

    def alike(self) -> Iterator[tuple[NDArray[np.intp], tuple[str, ...], bool]]:
        """Yield (slices, names of their arguments, do they last?): those that have the same arguments and flows."""
        bits = (self.dur_ns > 0).astype(np.int64)
        flags = [self.flow != 0, self.begins, self.ends] if self.flow is not None else []
        columns = [*flags, *(argument.present for argument in self.arguments.values())]
        for i, column in enumerate(columns, 1):
            assert column is not None
            bits |= column.astype(np.int64) << i
        names = list(self.arguments)
        for value in np.unique(bits).tolist():
            own = [name for i, name in enumerate(names, 1 + len(flags)) if value >> i & 1]
            yield np.flatnonzero(bits == value), tuple(own), bool(value & 1)


@dataclass(frozen=True)
class CounterValues:
    """A counter's value from each time on."""

    track: int
    ts_ns: NDArray[np.int64]
    values: NDArray[np.int64]


class TraceWriter(Protocol):
    """Writes content as it comes."""

    def tracks(self, tracks: list[Track]) -> None:
        """Write new tracks, before anything on them."""

    def slices(self, slices: Slices, names: Names) -> None:
        """Write slices; names only grow."""

    def counter(self, values: CounterValues) -> None:
        """Write a counter's values."""

    def violation(self, violation: Violation, track: Track) -> None:
        """Write a violation as a moment."""

    def finish(self) -> None:
        """Write the end."""


def violation_texts(violation: Violation) -> dict[str, str]:
    """Return the arguments of a violation."""
    return {name: str(getattr(violation, name)) for name in ("expected", "observed", "why", "source")}


def flow_kind(slices: Slices, row: int) -> tuple[bool, bool, bool]:
    """Say whether a slice has a flow, is its first, is its last."""
    if slices.flow is None:
        return False, False, False
    columns: list[Any] = [slices.flow, slices.begins, slices.ends]
    has, begins, ends = (bool(column[row]) for column in columns)
    return has, begins, ends
