"""One part of a recording, ready for the rules: sequence, segments, exits grouped by their table row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.check.alphabet import mask_of
from kvmtrace.check.exit_segments import Exits, Segments, cut_segments, find_exits
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.isa.svm import SVM_EXITS
from kvmtrace.isa.vmx import VMX_EXITS
from kvmtrace.model.states import FOLLOW_UPS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.check.findings import Findings
    from kvmtrace.check.observability import Capability
    from kvmtrace.check.steps import Steps
    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.isa.base import ExitExpectation

TABLES: Mapping[int, Mapping[int, ExitExpectation]] = {ISA_VMX: VMX_EXITS, ISA_SVM: SVM_EXITS}
_LOOKUP = 2048  # codes below it are looked up directly
# row numbers: 0 unknown reason, then all rows of VMX, then all of SVM
EXPECTATIONS: tuple[ExitExpectation | None, ...] = (None, *VMX_EXITS.values(), *SVM_EXITS.values())
NESTED = (
    "kvm_nested_vmenter",
    "kvm_nested_vmrun",
    "kvm_nested_vmexit",
    "kvm_nested_vmexit_inject",
    "kvm_nested_intr_vmexit",
    "kvm_nested_vmenter_failed",
)


def _row_numbers() -> NDArray[np.uint8]:
    """Return isa x code -> row number; the last column is for codes that do not fit."""
    numbers = np.zeros((3, _LOOKUP + 1), np.uint8)
    for number, row in enumerate(EXPECTATIONS):
        if row is None:
            continue
        isa = ISA_VMX if VMX_EXITS.get(row.code) is row else ISA_SVM
        numbers[isa, min(_LOOKUP, row.code)] = number
    return numbers


_ROW_NUMBERS = _row_numbers()


@dataclass(eq=False)
class Batch:
    """What the rules look at.

    Parameters
    ----------
    findings : takes what the rules find that are being applied
    row_number : uint8 per exit, index into EXPECTATIONS; 0 unknown reason
    """

    sequence: Sequence
    steps: Steps
    segments: Segments
    exits: Exits
    row_number: NDArray[np.uint8]
    capability: Capability
    findings: Findings

    def recorded(self, *kinds: str) -> bool:
        """Say whether all these events were recorded."""
        return self.capability.recorded.issuperset(kinds)

    def has_field(self, kind: str, field: str) -> bool:
        """Say whether the events of a kind carry a field."""
        return self.sequence.table.has(kind, field)

    @cached_property
    def groups(self) -> dict[int, NDArray[np.intp]]:
        """Return row number -> its exits, ascending; unknown reasons and nested exits are left out."""
        usable = np.flatnonzero(~self.nested & (self.row_number > 0))
        numbers = self.row_number[usable]
        order = usable[np.argsort(numbers, kind="stable")]
        counts = np.bincount(numbers, minlength=len(EXPECTATIONS))
        bounds = np.append(0, np.cumsum(counts))
        return {int(n): order[bounds[n] : bounds[n + 1]] for n in np.flatnonzero(counts)}

    @cached_property
    def nested(self) -> NDArray[np.bool_]:
        """Say which exits concern a nested guest, or may: the tables describe only KVM's own guests."""
        told = self.exits.has(*NESTED) | self.exits.failed_entry
        # entries into a nested guest: VMLAUNCH, VMRESUME, VMRUN
        enters = among(self.exits.code, (20, 24)) & (self.exits.isa == ISA_VMX)
        enters |= (self.exits.code == 0x80) & (self.exits.isa == ISA_SVM)
        enters &= ~self.exits.has("inject exception")
        if not enters.any() or self.recorded("kvm_nested_vmexit"):
            return told
        first = {int(t): int(np.flatnonzero(enters & (self.thread == t))[0]) for t in np.unique(self.thread[enters])}
        number = np.arange(len(self.exits))
        for thread, begin in first.items():
            told |= (self.thread == thread) & (number >= begin)
        return told

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
        return self._first(name)[self.exits.seg[group]]

    def segment_counts(self, name: str) -> NDArray[np.intp]:
        """Return how many events of a class each segment holds (cached)."""
        if name not in self._counts:
            self._counts[name] = self.segments.counts(name)
        return self._counts[name]

    def once(self, name: str, make: Callable[[Batch], NDArray[Any]]) -> NDArray[Any]:
        """Return make(self), made at the first request of this name."""
        if name not in self._made:
            self._made[name] = make(self)
        return self._made[name]

    @cached_property
    def _made(self) -> dict[str, NDArray[Any]]:
        return {}

    @cached_property
    def _counts(self) -> dict[str, NDArray[np.intp]]:
        return {}

    def _first(self, name: str) -> NDArray[np.intp]:
        if name not in self._firsts:
            self._firsts[name] = self.segments.first_in(name)
        return self._firsts[name]

    @cached_property
    def _firsts(self) -> dict[str, NDArray[np.intp]]:
        return {}


def make_batch(sequence: Sequence, steps: Steps, capability: Capability, findings: Findings) -> Batch:
    """Cut a sequence and look up the table row of each exit."""
    segments = cut_segments(sequence)
    exits = find_exits(segments)
    isa = np.where(exits.isa <= ISA_SVM, exits.isa, 0)
    code = np.where((exits.code >= 0) & (exits.code < _LOOKUP), exits.code, _LOOKUP)
    unknown_big = (code == _LOOKUP) & (exits.raw != 0xFFFFFFFF)
    row_number = np.where(unknown_big, 0, _ROW_NUMBERS[isa, code]).astype(np.uint8)
    return Batch(sequence, steps, segments, exits, row_number, capability, findings)


def allowed_mask(row: ExitExpectation) -> np.uint64:
    """Return the classes of follow-ups that a table row owes or allows."""
    names = {name for must in row.must for name in must.events} | row.may
    return mask_of(*(name for name in FOLLOW_UPS if name in names))


def class_of_kind(kind: str) -> str:
    """Return the class name of a tracepoint: its own, or that of the step it is."""
    return {
        "kvm_inj_exception": "inject exception",
        "kvm_inj_virq": "inject interrupt",
        "kvm_vcpu_wakeup": "wake-up",
        "kvm_halt_poll_ns": "halt poll",
    }.get(kind, kind)
