"""Lanes: the steps of each vCPU thread, one thread after the other, as columns.

All statistics over time need the same thing: per thread, the events that change what the thread is doing,
in order. A lane row is such a step. Lanes are made once per table and shared by all statistics.

Tables arrive in pieces. What a later piece may still change is held back: of each thread, the rows from its
last VM-entry on (of a thread without VM-entries, from its last userspace exit or KVM_RUN on). That row ends
this piece and, marked `opening`, begins the next one. So every exit→entry interval lies within one piece,
every stretch between two rows is seen exactly once, and the result does not depend on how the recording
was cut; only a loss that is told behind a cut comes too late for what was complete before it.
"""

from __future__ import annotations

import enum
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import thread_rows
from kvmtrace.kvm.nested_events import ENTERS_L2, REFLECTS, REFUSED, TELLS_L2
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray


REASON_BITS = 24
REASON_MASK = (1 << REASON_BITS) - 1


class Step(enum.IntEnum):
    """What a lane row says its thread did."""

    NONE = 0
    ENTRY = 1  # kvm_entry
    EXIT = 2  # kvm_exit; arg: RIP's number << REASON_BITS | exit reason's number
    USERSPACE_EXIT = 3  # kvm_userspace_exit; arg: (reason, errno) number
    RUN = 4  # KVM_RUN entered: sys_enter_ioctl, kvm_vcpu_ioctl probe
    RETURN = 5  # an ioctl returned to userspace
    FPU_LOAD = 6  # kvm_fpu load: KVM_RUN has begun
    BLOCK = 7  # switched out, sleeping
    PREEMPT = 8  # switched out, runnable
    RESUME = 9  # switched in
    WRAP_IN = 10  # the ISA's run function called
    WRAP_OUT = 11  # ... returned
    WAKEUP = 12  # kvm_vcpu_wakeup; arg: ns * 2 + waited
    PIO = 13  # kvm_pio; arg: number of (port, direction)
    MMIO_READ = 14  # kvm_mmio read done; arg: number of (gpa, type)
    MMIO_WRITE = 15  # kvm_mmio write
    MSR = 16  # kvm_msr; arg: number of (msr, write)
    CR = 17  # kvm_cr; arg: number of (cr, write)
    HYPERCALL = 18  # kvm_hypercall; arg: number of nr
    PAGE_FAULT = 19  # kvm_page_fault; arg: number of the page
    INJECT = (
        20  # kvm_inj_virq, kvm_inj_exception; arg: number of (exception, vector); only with LaneBuilder's every_step
    )
    EMULATE = 21  # kvm_emulate_insn; likewise, without arg
    GUEST_FAULT = 22  # kvm_guest_fault: a fault on a guest's page, or on no memory, which kvm_mmio tells; arg: likewise
    NESTED_EXIT = 23  # kvm_nested_vmexit: the exit was taken in L2
    NESTED_ENTRY = 24  # kvm_nested_vmenter, kvm_nested_vmrun: the vCPU goes on in L2
    REFLECT = 25  # kvm_nested_vmexit_inject: ... in L1, which gets an exit
    NESTED_FAILED = 26  # kvm_nested_vmenter_failed: ... in L1, L2 was not entered
    REGISTER = 27  # kvm_handle_sys_reg; arg: number of (system register, write)
    CALL = 28  # kvm_hvc_arm64; arg: number of the function called


NESTED_STEP_OF: dict[str, Step] = {
    TELLS_L2: Step.NESTED_EXIT,
    **dict.fromkeys(ENTERS_L2, Step.NESTED_ENTRY),
    REFLECTS: Step.REFLECT,
    REFUSED: Step.NESTED_FAILED,
}
NESTED_STEPS = tuple(dict.fromkeys(NESTED_STEP_OF.values()))
# steps that only vCPU threads make: a thread's lane begins at its first one
MARKS = (Step.ENTRY, Step.EXIT, Step.USERSPACE_EXIT, Step.RUN, Step.FPU_LOAD)


@dataclass(frozen=True)
class Lanes:
    """Lane rows, sorted by (thread, order of recording).

    Attributes
    ----------
    thread : (n,) uint16, dense number of the thread
    step : (n,) uint8, Step
    ts_ns : (n,) int64
    arg : (n,) int64, see Step
    cpu : (n,) int16
    loss : (n,) int32, how often the row's CPU had lost events before it
    opening : (n,) bool, the row ended the piece before and was counted there
    suspect : (n,) bool, events of the thread may have been lost between this row and its next
    row : (n,) int64, the event's row in the recording, where it was asked for (LaneBuilder)
    """

    thread: NDArray[np.uint16]
    step: NDArray[np.uint8]
    ts_ns: NDArray[np.int64]
    arg: NDArray[np.int64]
    cpu: NDArray[np.int16]
    loss: NDArray[np.int32]
    opening: NDArray[np.bool_]
    suspect: NDArray[np.bool_]
    row: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.step)

    def take(self, rows: NDArray[Any] | slice) -> Lanes:
        """Return these rows."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        taken: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns.items()}
        return Lanes(**taken)

    @staticmethod
    def concat(parts: list[Lanes]) -> Lanes:
        """Return the rows of all parts, one part after the other."""
        names = [field.name for field in fields(Lanes) if getattr(parts[0], field.name) is not None]
        return Lanes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @staticmethod
    def empty(*, rows: bool = False) -> Lanes:
        """Return no rows; with `rows`, with an empty column `row`."""
        return Lanes(
            thread=np.empty(0, np.uint16),
            step=np.empty(0, np.uint8),
            ts_ns=np.empty(0, np.int64),
            arg=np.empty(0, np.int64),
            cpu=np.empty(0, np.int16),
            loss=np.empty(0, np.int32),
            opening=np.empty(0, bool),
            suspect=np.empty(0, bool),
            row=np.empty(0, np.int64) if rows else None,
        )

    def reasons(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        """Return the exit reason's number of these EXIT rows."""
        numbers: NDArray[np.int64] = self.arg[rows] & REASON_MASK
        return numbers

    @cached_property
    def _starts(self) -> NDArray[np.intp]:
        return np.concatenate([[0], np.flatnonzero(~self.same_thread()) + 1]).astype(np.intp)

    def same_thread(self) -> NDArray[np.bool_]:
        """Return, for each row but the last, whether the next row is of the same thread; shape (n-1,)."""
        same: NDArray[np.bool_] = self.thread[:-1] == self.thread[1:]
        return same

    def starts(self) -> NDArray[np.intp]:
        """Return the first row of each thread."""
        if not len(self):
            return np.empty(0, np.intp)
        return self._starts

    def last(self, wanted: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Return, for each row, the latest row of its thread up to itself that is wanted; -1 for none."""
        return thread_rows.latest_wanted(wanted, self.thread)
