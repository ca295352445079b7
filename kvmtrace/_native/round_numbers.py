"""Rounds of a vCPU, each from a VM-entry to the next, numbered by what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given
from kvmtrace._native.key_numbers import SEED
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_CLASSES = 64


@dataclass(frozen=True)
class RoundEvents:
    """The events of a sequence.

    Parameters
    ----------
    cls : uint8, below 64
    first : bool, a thread begins
    repeated : bool, of a thread's first events, those that were seen before
    odd : bool, a round with such an event is like no other; not of its first event
    place : intp, of each event among those of its kind
    """

    cls: NDArray[np.uint8]
    first: NDArray[np.bool_]
    repeated: NDArray[np.bool_]
    odd: NDArray[np.bool_]
    place: NDArray[np.intp]


@dataclass(frozen=True)
class Cut:
    """Rounds of a sequence.

    Parameters
    ----------
    start, stop : intp, the first position and the one behind the last, that of the entry that ends it included
    number : int32, of the content; -1 of rounds that are cut off, odd or too long, or where there is no room
    """

    start: NDArray[np.intp]
    stop: NDArray[np.intp]
    number: NDArray[np.int32]

    def at(self, chosen: NDArray[Any]) -> Cut:
        """Return some of them."""
        return Cut(self.start[chosen], self.stop[chosen], self.number[chosen])

    @property
    def length(self) -> NDArray[np.intp]:
        """Return how many events each has."""
        return self.stop - self.start

    @property
    def positions(self) -> NDArray[np.intp]:
        """Return the positions of all their events, round by round."""
        return ranges(self.start, self.stop)

    @property
    def begins(self) -> NDArray[np.intp]:
        """Return where in `positions` each of them begins."""
        length: NDArray[np.intp] = np.cumsum(self.length) - self.length
        return length


def ranges(start: NDArray[np.intp], stop: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the numbers from each start up to its stop."""
    length = stop - start
    begin = np.cumsum(length) - length
    return np.repeat(start - begin, length) + np.arange(int(length.sum()))


class RoundNumbers:
    """Numbers the contents of rounds 0, 1, 2 ..., as long as there is room.

    Parameters
    ----------
    most : contents
    n_bytes : of all contents together
    """

    def __init__(self, most: int, n_bytes: int) -> None:
        n_slots = 1 << (2 * most - 1).bit_length()
        self._n = np.zeros(1, np.int64)
        self._at, self._hash = np.zeros(most + 1, np.int64), np.zeros(most, np.uint64)
        self._slots, self._bytes = np.zeros(n_slots, np.int32), np.empty(n_bytes, np.uint8)

    def __len__(self) -> int:
        return int(self._n[0])

    def clear(self) -> None:
        """Forget all contents."""
        self._n[:] = 0
        self._slots[:] = 0

    def number(
        self, events: RoundEvents, columns: Mapping[int, Sequence[NDArray[Any]]], entry: int, longest: int
    ) -> Cut:
        """Cut events into rounds, and number the contents of these.

        Parameters
        ----------
        columns : class -> columns, of any types without objects, that belong to the content
        entry : the class that begins a round, and ends it
        longest : events of a round that gets a number

        Raises
        ------
        IndexError
            A place is outside of a column.
        """
        n = len(events.cls)
        start, stop, number = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int32)
        given_events, _kept = _as_c(events, columns)
        table = ffi.new("RoundTable *")
        table.n_slots, table.most, table.n_bytes = len(self._slots), len(self._hash), len(self._bytes)
        table.seed, table.n_known, table.at = SEED, filled(self._n), filled(self._at)
        table.slots, table.hash, table.bytes = filled(self._slots), filled(self._hash), filled(self._bytes)
        found = lib.number_rounds(given_events, entry, longest, table, filled(start), filled(stop), filled(number))
        if found < 0:
            raise IndexError("a place outside of its column")
        return Cut(start[:found].copy(), stop[:found].copy(), number[:found].copy())


def _as_c(events: RoundEvents, columns: Mapping[int, Sequence[NDArray[Any]]]) -> tuple[Any, list[Any]]:
    """Return C's `RoundEvents`, and what must outlive it."""
    out, begin = ffi.new("RoundEvents *"), np.zeros(_CLASSES + 1, np.int64)
    kept: list[Any] = [
        np.ascontiguousarray(column)
        for column in (events.cls, events.first, events.repeated, events.odd, events.place, begin)
    ]
    own = ffi.new("ClassColumn[]", max(sum(map(len, columns.values())), 1))
    used = 0
    for cls in range(_CLASSES):
        for values in columns.get(cls, ()):
            assert not values.dtype.hasobject
            size = values.dtype.itemsize * int(np.prod(values.shape[1:], dtype=np.int64))
            if not size:
                continue
            raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            own[used].values, own[used].n, own[used].size = given(raw), len(values), size
            kept.append(raw)
            used += 1
        begin[cls + 1] = used
    out.n = len(events.cls)
    out.cls, out.first, out.repeated, out.odd, out.place, out.begin = map(given, kept[:6])
    out.columns = own
    kept.append(own)
    return out, kept
