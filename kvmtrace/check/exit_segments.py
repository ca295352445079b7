"""Segments: what lies between one kvm_entry, kvm_exit or kvm_userspace_exit of a thread and the next.

A segment is named after the boundary that begins it. The segment of a VM-exit holds what KVM did about it;
that of a userspace exit what userspace did and how I/O was completed; that of a VM-entry the guest.
"""

from __future__ import annotations

from dataclasses import field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native import automaton, class_positions
from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT, USERSPACE
from kvmtrace.isa.registry import BY_NUMBER
from kvmtrace.isa.words import INTR_INFO_VALID
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.isa.base import Isa

NO_SEGMENT = -1


@dataclass(frozen=True, eq=False)
class Segments:
    """All segments of a sequence, in its order.

    Parameters
    ----------
    start, stop : intp, sequence positions; start is the boundary itself
    kind : uint8, ENTRY, EXIT, USERSPACE, or 0 behind a break or a thread's begin
    mask : uint64, classes of the events in the segment
    linked : bool, the next segment follows in the same thread without a break
    of : intp over the sequence, number of each event's segment
    """

    sequence: Sequence
    start: NDArray[np.intp]
    stop: NDArray[np.intp]
    kind: NDArray[np.uint8]
    mask: NDArray[np.uint64]
    linked: NDArray[np.bool_]
    of: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.start)

    def has(self, *names: str) -> NDArray[np.bool_]:
        """Say which segments hold an event of one of these classes."""
        bits = np.uint64(sum(1 << CLASS[name] for name in names))
        found: NDArray[np.bool_] = (self.mask & bits) != 0
        return found

    def counts(self, name: str) -> NDArray[np.intp]:
        """Return how many events of the class each segment holds (cached; not to be written to)."""
        return self._found(name)[1]

    def positions(self, name: str) -> NDArray[np.intp]:
        """Return the sequence positions of the class (not to be written to)."""
        order, begin = self._by_class
        number = CLASS[name]
        return order[begin[number] : begin[number + 1]]

    def firsts(self, name: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return (segments that hold the class, position of its first event there)."""
        first = self.first_in(name)
        owners = np.flatnonzero(first >= 0)
        return owners, first[owners]

    def first_in(self, name: str) -> NDArray[np.intp]:
        """Return, per segment, the position of its first event of the class, or -1 (cached; not to be written to)."""
        return self._found(name)[0]

    def _found(self, name: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return, per segment, the first event of a class and how many there are."""
        if name not in self._of_class:
            positions = self.positions(name)
            self._of_class[name] = (
                class_positions.first_in_segments(self.of, positions, len(self)) if len(positions) else self._of_none
            )
        return self._of_class[name]

    @cached_property
    def _of_none(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """What _found() says of a class without events."""
        return np.full(len(self), -1, np.intp), np.zeros(len(self), np.intp)

    def occur(self, *names: str) -> bool:
        """Say whether there is an event of one of these classes."""
        return any(len(self.positions(name)) for name in names)

    @cached_property
    def _of_class(self) -> dict[str, tuple[NDArray[np.intp], NDArray[np.intp]]]:
        return {}

    @cached_property
    def _by_class(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        return class_positions.positions_by_class(self.sequence.cls)

    @cached_property
    def next_kind(self) -> NDArray[np.uint8]:
        """Return the kind of the next segment, 0 where not linked."""
        following = np.zeros(len(self), np.uint8)
        following[:-1] = self.kind[1:]
        following[~self.linked] = 0
        return following

    @cached_property
    def chain(self) -> NDArray[np.intp]:
        """Number the chains: an exit and the userspace exits behind it, up to the next entry, exit or break."""
        begins = self.kind != USERSPACE
        begins[1:] |= ~self.linked[:-1]
        begins[:1] = True
        return np.cumsum(begins) - 1

    @cached_property
    def chain_known(self) -> NDArray[np.bool_]:
        """Say of each segment whether its chain begins with a VM-exit, so that all of it is there."""
        begins = np.flatnonzero(np.diff(self.chain, prepend=-1))
        known: NDArray[np.bool_] = (self.kind == EXIT)[begins][self.chain]
        return known

    @cached_property
    def chain_mask(self) -> NDArray[np.uint64]:
        """Return the classes of the events of each segment's whole chain."""
        begins = np.flatnonzero(np.diff(self.chain, prepend=-1))
        if not len(begins):
            return self.mask
        whole: NDArray[np.uint64] = np.bitwise_or.reduceat(self.mask, begins)[self.chain]
        return whole

    @cached_property
    def resume(self) -> NDArray[np.intp]:
        """Return the next VM-entry segment behind each, before any VM-exit or break; NO_SEGMENT if none."""
        return class_positions.next_entries(self.kind, self.linked, ENTRY, EXIT)


def cut_segments(sequence: Sequence) -> Segments:
    """Cut a sequence into segments."""
    cut = automaton.cut_segments(sequence.knowledge, (ENTRY, EXIT, USERSPACE))
    stop = np.append(cut.start[1:], len(sequence)) if len(cut.start) else cut.start
    return Segments(sequence, cut.start, stop, cut.kind, cut.mask, cut.linked, cut.of)


@dataclass(frozen=True, eq=False)
class Exits:
    """The VM-exit segments with the fields of kvm_exit, one row each.

    Parameters
    ----------
    seg : intp, number of the segment
    isa : uint8, number of the ISA
    code : int64, exit_reason without its flags
    raw : int64, exit_reason as recorded
    """

    segments: Segments
    seg: NDArray[np.intp]
    isa: NDArray[np.uint8]
    raw: NDArray[np.int64]
    code: NDArray[np.int64]
    _fields: dict[str, NDArray[np.uint64]] = field(default_factory=dict)
    _holding: dict[tuple[str, ...], NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seg)

    @cached_property
    def start(self) -> NDArray[np.intp]:
        """Return the sequence positions of the kvm_exit events."""
        positions: NDArray[np.intp] = self.segments.start[self.seg]
        return positions

    def get(self, name: str) -> NDArray[np.uint64]:
        """Return a field of kvm_exit as uint64 (cached); zeros if it was not recorded."""
        if name not in self._fields:
            sequence = self.segments.sequence
            if sequence.table.has("kvm_exit", name):
                self._fields[name] = sequence.values("kvm_exit", name, self.start).astype(np.uint64)
            else:
                self._fields[name] = np.zeros(len(self), np.uint64)
        return self._fields[name]

    @cached_property
    def mask(self) -> NDArray[np.uint64]:
        """Return the class masks of the segments."""
        return self.segments.mask[self.seg]

    @cached_property
    def next_kind(self) -> NDArray[np.uint8]:
        """Return what ends each segment: ENTRY, EXIT, USERSPACE or 0 (unknown)."""
        return self.segments.next_kind[self.seg]

    def has(self, *names: str) -> NDArray[np.bool_]:
        """Say which exits' segments hold an event of one of these classes (cached; not to be written to)."""
        if names not in self._holding:
            bits = np.uint64(sum(1 << CLASS[name] for name in names))
            self._holding[names] = (self.mask & bits) != 0 if self.segments.occur(*names) else np.zeros(len(self), bool)
        return self._holding[names]

    def chain_has(self, *names: str) -> NDArray[np.bool_]:
        """Say the same, the events behind userspace exits up to the next entry included."""
        if not self.segments.occur(*names):
            return np.zeros(len(self), bool)
        bits = np.uint64(sum(1 << CLASS[name] for name in names))
        found: NDArray[np.bool_] = (self._chain_mask & bits) != 0
        return found

    @cached_property
    def _chain_mask(self) -> NDArray[np.uint64]:
        mask: NDArray[np.uint64] = self.segments.chain_mask[self.seg]
        return mask

    @cached_property
    def failed_entry(self) -> NDArray[np.bool_]:
        """Say which exits are failed VM-entries."""
        found = np.zeros(len(self), bool)
        for isa, mine in self.by_isa:
            found |= mine & isa.entry_failed(self.raw)
        return found

    @cached_property
    def bus_lock(self) -> NDArray[np.bool_]:
        """Say in which exits the guest took a bus lock."""
        found = np.zeros(len(self), bool)
        for isa, mine in self.by_isa:
            found |= mine & isa.bus_locked(self.raw)
        return found

    @cached_property
    def vectoring(self) -> NDArray[np.uint64]:
        """Return the information on the interrupted delivery; 0 if not valid."""
        found = np.zeros(len(self), np.uint64)
        for isa, mine in self.by_isa:
            if isa.vectoring_field:
                info = self.get(isa.vectoring_field)
                if not (info & np.uint64(INTR_INFO_VALID)).any():
                    continue
                info = info & np.uint64(0xFFFFFFFF)
                found = np.where(mine & ((info & np.uint64(INTR_INFO_VALID)) != 0), info, found)
        return found

    @cached_property
    def by_isa(self) -> list[tuple[Isa, NDArray[np.bool_]]]:
        """Return each ISA that exits are of, and which exits are."""
        numbers = np.flatnonzero(np.bincount(self.isa)).tolist()
        return [(BY_NUMBER[number], self.isa == number) for number in numbers if number in BY_NUMBER]

    @cached_property
    def resume_rip(self) -> NDArray[np.uint64]:
        """Return the RIP of the next kvm_entry where the segment ends in one, else 0."""
        return self._entry_rip(np.where(self.next_kind == ENTRY, self.seg + 1, NO_SEGMENT))

    @cached_property
    def later_rip(self) -> NDArray[np.uint64]:
        """Return the RIP of the next kvm_entry, userspace exits between allowed; 0 if unknown."""
        return self._entry_rip(self.segments.resume[self.seg])

    def _entry_rip(self, entry_segments: NDArray[np.intp]) -> NDArray[np.uint64]:
        sequence = self.segments.sequence
        rip = np.zeros(len(self), np.uint64)
        if not sequence.table.has("kvm_entry", "rip"):
            return rip
        known = entry_segments >= 0
        rip[known] = sequence.values("kvm_entry", "rip", self.segments.start[entry_segments[known]])
        return rip


def find_exits(segments: Segments) -> Exits:
    """Return the VM-exits among the segments."""
    seg = np.flatnonzero(segments.kind == EXIT)
    sequence = segments.sequence
    start = segments.start[seg]
    if sequence.table.has("kvm_exit", "exit_reason"):
        raw = sequence.values("kvm_exit", "exit_reason", start).astype(np.int64) & 0xFFFFFFFF
    else:
        raw = np.full(len(seg), -1, np.int64)
    if sequence.table.has("kvm_exit", "isa"):
        isa = sequence.values("kvm_exit", "isa", start).astype(np.uint8)
    else:
        isa = np.zeros(len(seg), np.uint8)
    code = raw
    if len(isa) and isa.min() == isa.max():  # mostly
        code = BY_NUMBER[int(isa[0])].code(raw) if int(isa[0]) in BY_NUMBER else raw
    else:
        for number in np.flatnonzero(np.bincount(isa)).tolist():
            if number in BY_NUMBER:
                code = np.where(isa == number, BY_NUMBER[number].code(raw), code)
    return Exits(segments, seg, isa, raw, code)
