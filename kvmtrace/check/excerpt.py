"""An excerpt of a recording, ready for the rules: sequence, segments, exits grouped by their table row."""

from __future__ import annotations

from dataclasses import field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvmtrace.check.alphabet import mask_of
from kvmtrace.check.exit_segments import Exits, Segments, cut_segments, find_exits
from kvmtrace.isa.base import EXIT_KINDS
from kvmtrace.isa.registry import BY_NUMBER, ISAS, describe_exit_reason
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.nesting import ENTERS_L2, LEVEL_CHANGES, REFLECTS, REFUSED, TELLS_L2
from kvmtrace.model.states import FOLLOW_UPS, STEPS
from kvmtrace.table.distinct import among, distinct

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.observability import Capability
    from kvmtrace.check.outcomes import Outcomes
    from kvmtrace.check.state_machine import Automaton, Steps
    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.isa.base import ExitRow, Isa

T = TypeVar("T")

_LOOKUP = 2048  # codes below it are looked up directly
# row numbers: 0 unknown reason, then all rows of each ISA
_ROWS = [(isa, row) for isa in ISAS for row in isa.exits.values()]
EXPECTATIONS: tuple[ExitRow | None, ...] = (None, *(row for _, row in _ROWS))
ISA_OF_ROW: tuple[Isa | None, ...] = (None, *(isa for isa, _ in _ROWS))
assert len(EXPECTATIONS) < 1 << 16
# tracepoint -> the class of its events where that is a step's: kvm_inj_virq is "inject interrupt"
_STEP_OF_KIND = {step.kind: name for name, step in STEPS.items() if not step.condition[0]}


def _row_numbers() -> NDArray[np.uint16]:
    """Return isa x code -> row number; the last column is for codes that do not fit."""
    numbers = np.zeros((256, _LOOKUP + 1), np.uint16)
    for number, (isa, row) in enumerate(_ROWS, 1):
        numbers[isa.number, min(_LOOKUP, row.code)] = number
    return numbers


_ROW_NUMBERS = _row_numbers()
# codes that do not fit: only the one of a failed entry has a row
_BIG_CODES = frozenset(row.code for _, row in _ROWS if row.code >= _LOOKUP)
# kind of exits -> whether each row is one
_KINDS = {kind: np.array([row is not None and kind in row.kinds for row in EXPECTATIONS]) for kind in EXIT_KINDS}


@dataclass(eq=False)
class Excerpt:
    """What the rules look at: the events of all vCPU threads up to where each of them is cut.

    Parameters
    ----------
    sequence : the tracked events, thread by thread
    steps : those that change a thread's state, looked up in `automaton`
    whole : the same with the unfinished ends of the threads, which the next excerpt begins with
    row_number : uint16 per exit, index into EXPECTATIONS; 0 unknown reason
    vcpu_ids : sequence.key_of a thread -> vCPU that it ran last, as far as the recording has been read
    memory : what rules remember from excerpt to excerpt, see `remember`
    final : no excerpt follows
    known_until_ns : where the first CPU's events end in a damaged recording
    told_of : rule -> what its local parts found, where that is known (rounds.py)
    """

    sequence: Sequence
    steps: Steps
    segments: Segments
    exits: Exits
    row_number: NDArray[np.uint16]
    capability: Capability
    automaton: Automaton
    whole: Sequence
    final: bool = False
    known_until_ns: int = 1 << 62
    vcpu_ids: dict[int, int] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    told_of: dict[str, Outcomes] | None = None

    def recorded(self, *kinds: str) -> bool:
        """Say whether all these events were recorded."""
        return self.capability.recorded.issuperset(kinds)

    def has_field(self, kind: str, field: str) -> bool:
        """Say whether the events of a kind carry a field."""
        return self.capability.meets(f"{kind}.{field}")

    def values_or(self, kind: str, field: str, positions: NDArray[np.intp], fill: int) -> NDArray[Any]:
        """Return a field of the events at these positions, which are all of kind `kind`; `fill` if not recorded."""
        if not self.has_field(kind, field):
            return np.full(len(positions), fill, np.int64)
        return self.sequence.values(kind, field, positions)

    def remember(self, name: str, make: Callable[[], T]) -> T:
        """Return what was made at the first request of this name in the whole recording."""
        if name not in self.memory:
            self.memory[name] = make()
        found: T = self.memory[name]
        return found

    def exit_name(self, number: int | np.intp) -> str:
        """Return the name of an exit's reason."""
        return describe_exit_reason(int(self.exits.isa[number]), int(self.exits.raw[number]))

    @cached_property
    def groups(self) -> dict[int, NDArray[np.intp]]:
        """Return row number -> its exits, ascending; unknown reasons and exits that change the level are left out."""
        usable = np.flatnonzero(~self.nested & (self.row_number > 0))
        numbers = self.row_number[usable]
        order = usable[np.argsort(numbers, kind="stable")]
        counts = np.bincount(numbers, minlength=len(EXPECTATIONS))
        bounds = np.append(0, np.cumsum(counts))
        return {int(n): order[bounds[n] : bounds[n + 1]] for n in np.flatnonzero(counts)}

    @cached_property
    def nested(self) -> NDArray[np.bool_]:
        """Say behind which exits the vCPU goes on in another guest's context, or may: the tables say nothing of that.

        The exits of a nested guest that KVM itself handles are like all others.
        """
        refused = self.of_kind("nested_entry") & self.exits.has(REFUSED)  # L1 goes on behind its instruction
        refused &= ~self.exits.chain_has(*(event for event in LEVEL_CHANGES if event != REFUSED), TELLS_L2)
        told = (self.exits.chain_has(*LEVEL_CHANGES) & ~refused) | self.exits.failed_entry
        if self.recorded(TELLS_L2, REFLECTS) and not self.capability.recorded.isdisjoint(ENTERS_L2):
            return told
        told |= self.exits.has(TELLS_L2)
        enters = self.of_kind("nested_entry")
        enters &= ~self.exits.has("inject exception")
        if not enters.any():
            return told
        first = {int(t): int(np.flatnonzero(enters & (self.thread == t))[0]) for t in distinct(self.thread[enters])}
        number = np.arange(len(self.exits))
        for thread, begin in first.items():
            told |= (self.thread == thread) & (number >= begin)
        return told

    @cached_property
    def tells_vectoring(self) -> NDArray[np.bool_]:
        """Say of which exits the recording has the field that tells an interrupted delivery."""
        told = [isa for isa in ISAS if self.has_field("kvm_exit", isa.vectoring_field)]
        return among(self.exits.isa, [isa.number for isa in told])

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        """Say which exits are of a kind (isa.base.EXIT_KINDS; cached, not to be written to)."""
        if kind not in self._of_kind:
            self._of_kind[kind] = _KINDS[kind].take(self.row_number)
        return self._of_kind[kind]

    def of_isa(self, chosen: Callable[[Isa], Any]) -> NDArray[np.bool_]:
        """Say which exits are of an ISA that is chosen, by one of its traits perhaps."""
        return among(self.exits.isa, [isa.number for isa in ISAS if chosen(isa)])

    def isa_of(self, group: NDArray[np.intp]) -> Isa:
        """Return the ISA of a group of exits, which are all of one."""
        return BY_NUMBER[int(self.exits.isa[group[0]])]

    @cached_property
    def thread(self) -> NDArray[np.uint16]:
        """Return the thread number of each exit."""
        return self.sequence.thread[self.exits.start]

    @cached_property
    def step_classes(self) -> NDArray[np.uint8]:
        """Return the class of each step."""
        return self.sequence.cls[self.steps.position]

    def first_in_exit(self, name: str, group: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the position of the first event of a class in each exit's segment, or -1."""
        return self.segments.first_in(name).take(self.exits.seg.take(group))

    def segment_counts(self, name: str) -> NDArray[np.intp]:
        """Return how many events of a class each segment holds (cached; not to be written to)."""
        return self.segments.counts(name)

    def once(self, name: str, make: Callable[[Excerpt], T]) -> T:
        """Return make(self), made at the first request of this name."""
        if name not in self._made:
            self._made[name] = make(self)
        found: T = self._made[name]
        return found

    @cached_property
    def _of_kind(self) -> dict[str, NDArray[np.bool_]]:
        return {}

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}


def _row_numbers_of(exits: Exits) -> NDArray[np.uint16]:
    """Return the table row of each exit, 0 for an unknown reason."""
    fits = (exits.code >= 0) & (exits.code < _LOOKUP)
    if len(exits) and exits.isa.min() == exits.isa.max() and fits.all():  # mostly
        of_isa: NDArray[np.uint16] = _ROW_NUMBERS[int(exits.isa[0])].take(exits.code)
        return of_isa
    row_number = _ROW_NUMBERS[exits.isa, np.where(fits, exits.code, _LOOKUP)]
    row_number[~fits & ~among(exits.code, _BIG_CODES)] = 0
    return row_number


def make_excerpt(
    sequence: Sequence,
    steps: Steps,
    capability: Capability,
    automaton: Automaton,
    whole: Sequence | None = None,
    *,
    final: bool = False,
) -> Excerpt:
    """Cut a sequence and look up the table row of each exit."""
    segments = cut_segments(sequence)
    exits = find_exits(segments)
    row_number = _row_numbers_of(exits)
    return Excerpt(sequence, steps, segments, exits, row_number, capability, automaton, whole or sequence, final=final)


def owed_events(row: ExitRow) -> frozenset[str]:
    """Return the events that a table row owes, in any of its duties."""
    return frozenset(name for must in row.must for name in must.events)


def is_port_access(row: ExitRow) -> bool:
    """Say whether the exit is an IN or OUT instruction: it owes a kvm_pio."""
    return "kvm_pio" in owed_events(row)


def allowed_mask(row: ExitRow) -> np.uint64:
    """Return the classes of follow-ups that a table row owes or allows."""
    names = owed_events(row) | row.may
    return mask_of(*(name for name in FOLLOW_UPS if name in names))


def class_of_kind(kind: str) -> str:
    """Return the class name of a tracepoint: its own, or that of the step it is."""
    return _STEP_OF_KIND.get(kind, kind)
