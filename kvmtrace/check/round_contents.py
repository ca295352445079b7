"""Contents of rounds: what local parts of rules may look at, and sequences of such rounds, as often as it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native.round_numbers import Cut
from kvmtrace.check.alphabet import N_STEPS
from kvmtrace.check.excerpt import EXPECTATIONS
from kvmtrace.check.state_machine import UNKNOWN, Steps
from kvmtrace.check.thread_events import Sequence
from kvmtrace.errors import MissingEventError
from kvmtrace.table.event_table import EventTable, RowsByKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.rule import Rule

    Positions = NDArray[np.intp]
    Name = tuple[str, str]  # of an event, of its field

# read where it was recorded, without being needed
ALSO_READ: tuple[Name, ...] = (
    ("kvm_inj_virq", "soft"),
    ("kvm_inj_exception", "exception"),
    ("kvm_inj_exception", "reinjected"),
    ("kvm_inj_exception", "error_code"),
)
ROOM = 200_000  # events of a sequence of repeated rounds
FEW, BASE_OF_FEW, BASE = 2_000, 64, 4  # so few events of all contents are sooner judged several times at once


class NotInContentError(LookupError):
    """A local part of a rule reads what is no part of the content of rounds."""


def content_fields(rules: Iterable[Rule]) -> tuple[Name, ...]:
    """Return the fields that local parts of these rules need."""
    needs: set[str] = set()
    for rule in rules:
        local = [part.needs for part in rule.parts if part.local]
        if rule.local_rows:
            local += [part.needs for row in EXPECTATIONS if row is not None for part in rule.row_parts(row)]
        needs.update(*local, *([rule.needs] if local else []))
    named = {one for need in needs for one in need.split("|") if "." in one}
    pairs = [one.partition(".") for one in named]
    return tuple(sorted({*ALSO_READ, *((kind, field) for kind, _, field in pairs)}))


def read_content(table: EventTable, fields: Iterable[Name]) -> dict[Name, NDArray[Any]]:
    """Return those of these fields that a table has, aligned with its rows of their kind."""
    found = {}
    for kind, field in fields:
        if table.has(kind, field):
            try:
                values = table.field(kind, field)
            except MissingEventError:  # described, and lacking in some of the file
                continue
            if not values.dtype.hasobject:
                found[kind, field] = values
    return found


class ContentTable(EventTable):
    """The table that local parts see: of a content's fields, and of nothing else.

    Parameters
    ----------
    of : EventTable, whose kinds it has
    kind, by_kind : uint16 and RowsByKind, of all its rows
    content : field -> its column
    """

    def __init__(
        self, of: EventTable, kind: NDArray[np.uint16], by_kind: RowsByKind, content: dict[Name, NDArray[Any]]
    ) -> None:
        self.kinds, self.kind_index, self.derived = of.kinds, of.kind_index, of.derived
        self.kind, self.by_kind = kind, by_kind
        self._content = content

    def __len__(self) -> int:
        return len(self.kind)

    def rows(self, name: str) -> Positions:
        """See EventTable; a local part does not look at rows."""
        raise NotInContentError(name)

    def field(self, name: str, field: str) -> NDArray[Any]:
        """See EventTable."""
        if (name, field) not in self._content:
            raise NotInContentError(f"{name}.{field}")
        return self._content[name, field]


def without_rows(table: EventTable) -> EventTable:
    """Return an empty table with the kinds of another."""
    kind = np.zeros(0, np.uint16)
    return ContentTable(table, kind, RowsByKind(kind, len(table.kinds)), {})


def rounds_alone(
    sequence: Sequence, steps: Steps, rounds: Cut, content: dict[Name, NDArray[Any]]
) -> tuple[Sequence, Steps]:
    """Return some rounds of a sequence, each by itself."""
    at, table = rounds.positions, sequence.table
    wrong = np.zeros(len(sequence), bool)
    wrong[steps.position[steps.wrong]] = True
    own = replace(
        sequence,
        table=ContentTable(table, table.kind, table.by_kind, content),
        row=sequence.row[at],
        cls=sequence.cls[at],
        thread=sequence.thread[at],
        broken=sequence.broken[at],
    )
    repeated = ~sequence.first[rounds.start] | sequence.repeated[rounds.start]
    return _each_alone(own, (steps.state[at], wrong[at]), rounds.begins, repeated)


def _each_alone(
    sequence: Sequence,
    steps: tuple[NDArray[np.uint8], NDArray[np.bool_]],
    begins: Positions,
    repeated: NDArray[np.bool_],
) -> tuple[Sequence, Steps]:
    """Return rounds that stand one behind the other as if each were a thread.

    Parameters
    ----------
    steps : state in which each event finds its thread, and whether it is a wrong step
    begins : where each round begins
    repeated : its first event was seen before
    """
    cls, (state, wrong) = sequence.cls, steps
    first, again, broken = np.zeros(len(cls), bool), np.zeros(len(cls), bool), sequence.broken.copy()
    first[begins], again[begins], broken[begins] = True, repeated, False
    state[begins], wrong[begins] = UNKNOWN, False
    position = np.flatnonzero((cls > 0) & (cls <= N_STEPS))
    nothing = np.empty(0, np.int64)
    alone = replace(
        sequence, first=first, broken=broken, again=again, ts_ns=nothing, cpu=nothing.astype(np.int16), keys=None
    )
    return alone, Steps(position, state[position], wrong[position], state)


@dataclass(frozen=True, eq=False)
class Kept:
    """Rounds, one of each content, that outlive the table they come from.

    Parameters
    ----------
    number : int32, of the content of each
    length : intp, events of each
    cls, state, kind : of each event
    content : field -> column, of the events of its kind
    """

    number: NDArray[np.int32]
    length: Positions
    cls: NDArray[np.uint8]
    state: NDArray[np.uint8]
    kind: NDArray[np.uint16]
    content: dict[Name, NDArray[Any]]


def keep(sequence: Sequence, steps: Steps, rounds: Cut, content: dict[Name, NDArray[Any]]) -> Kept:
    """Return copies of some rounds of a sequence, none of them wrong."""
    at, table = rounds.positions, sequence.table
    kind = table.kind[sequence.row[at]]
    own = {}
    for (name, field), column in content.items():
        mine = at[kind == table.kind_index[name]]
        own[name, field] = column[sequence.position_in_kind[mine]]
    return Kept(rounds.number, rounds.length, sequence.cls[at], steps.state[at], kind, own)


def repeated_rounds(
    kept: list[Kept], times: NDArray[np.int64], like: EventTable
) -> Iterator[tuple[int, Sequence, Steps]]:
    """Yield (how many times to count it, sequence, steps): together, each content as often as `times` of it says.

    Parameters
    ----------
    like : EventTable, whose kinds these rounds' events are of
    """
    number, length, cls, state, kind = (
        np.concatenate([getattr(one, name) for one in kept]) for name in ("number", "length", "cls", "state", "kind")
    )
    content = {name: np.concatenate([one.content[name] for one in kept]) for name in kept[0].content}
    table = ContentTable(like, kind, RowsByKind(kind, len(like.kinds)), content)
    start, left, weight = np.cumsum(length) - length, times[number], 1
    base = BASE_OF_FEW if len(cls) < FEW else BASE
    while left.any():
        for chosen in _portions(left % base, length):
            rounds = Cut(start[chosen], start[chosen] + length[chosen], number[chosen])
            at, nothing = rounds.positions, np.zeros(0, np.int64)
            off = np.zeros(len(at), bool)
            thread, tids, cpu = off.astype(np.uint16), np.zeros(1, np.int32), nothing.astype(np.int16)
            sequence = Sequence(table, at, cls[at], thread, tids, off, off, nothing, cpu, len(at))
            all_repeated = np.ones(len(chosen), bool)
            yield weight, *_each_alone(sequence, (state[at], off.copy()), rounds.begins, all_repeated)
        left, weight = left // base, weight * base


def _portions(times: NDArray[np.int64], length: Positions) -> Iterator[Positions]:
    """Yield the numbers of rounds, each so many times, in portions that there is room for."""
    chosen = np.repeat(np.arange(len(times)), times)
    if len(chosen):
        ends = np.cumsum(length[chosen])
        yield from np.split(chosen, np.flatnonzero(np.diff(ends // ROOM)) + 1)
