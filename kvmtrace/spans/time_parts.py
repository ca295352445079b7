"""Where each vCPU thread's time went: every stretch between two lane rows gets one category.

What a thread does after a step, as long as no other step says otherwise:

| step | the thread is then |
|---|---|
| kvm_entry | in guest mode |
| kvm_exit | in the handler; on its way out of the run function where the probe's return is yet to come |
| the ISA's run function | on the entry path (guest mode, if kvm_entry came before: 5.10) |
| their return | in the handler; on the exit path where kvm_exit is yet to come (SVM before 6.5) |
| kvm_userspace_exit | in userspace; still in the kernel where the ioctl's return comes next |
| sys_exit_ioctl | in userspace |
| KVM_RUN, kvm_fpu load | in the kernel ("handler") |
| sched_switch away | blocked (sleeping) or preempted (runnable), until it is switched in |
| kvm_vcpu_wakeup | as before; what it says was busy waiting moves from handler to halt-polling |

On SVM before 6.5 kvm_exit is traced after the host's interrupts were taken: without the svm_vcpu_run probe that
time counts as guest mode, except from the first step on that shows the thread in the kernel.
"""

from __future__ import annotations

import enum
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import lane_rows
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.keys import SUM_LIMIT, grown
from kvmtrace.spans.lanes import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.pairs import Pairs


class Part(enum.IntEnum):
    """Categories of time; the parts of a budget."""

    GUEST = 0
    ENTRY_EXIT = 1
    HANDLER = 2
    USERSPACE = 3
    BLOCKED = 4
    HALT_POLL = 5
    PREEMPTED = 6
    UNKNOWN = 7


N_PARTS = len(Part)
# what a VM-exit's time is told as, one word for one thing everywhere: each part's name and what it is made of
EXIT_PARTS = {
    "kernel_ns": (Part.HANDLER, Part.ENTRY_EXIT, Part.GUEST),
    "userspace_ns": (Part.USERSPACE,),
    "waiting_ns": (Part.BLOCKED, Part.HALT_POLL),
    "preempted_ns": (Part.PREEMPTED,),
    "unknown_ns": (Part.UNKNOWN,),
}
USERSPACE_EVENTS = ("kvm_userspace_exit", "sys_exit_ioctl")  # without them nobody sees a thread in userspace
_KEEPS = 255

_AFTER = np.full(32, _KEEPS, np.uint8)
_AFTER[Step.ENTRY] = Part.GUEST
_AFTER[Step.EXIT] = Part.HANDLER
_AFTER[Step.USERSPACE_EXIT] = Part.USERSPACE
_AFTER[Step.RUN] = Part.HANDLER
_AFTER[Step.RETURN] = Part.USERSPACE
_AFTER[Step.FPU_LOAD] = Part.HANDLER
_AFTER[Step.WRAP_IN] = Part.ENTRY_EXIT
_AFTER[Step.WRAP_OUT] = Part.HANDLER


@cache
def _steps() -> Any:
    """Return the table as the compiled loop reads it."""
    steps = ("ENTRY", "EXIT", "USERSPACE_EXIT", "WRAP_IN", "WRAP_OUT", "BLOCK", "PREEMPT")
    parts = ("GUEST", "ENTRY_EXIT", "HANDLER", "BLOCKED", "PREEMPTED", "UNKNOWN")
    names: dict[str, int] = {name.lower(): Step[name] for name in steps} | {name.lower(): Part[name] for name in parts}
    return lane_rows.lane_steps(_AFTER, names | {"ret": Step.RETURN, "keeps": _KEEPS})


@dataclass(frozen=True)
class Recorded:
    """What the capture describes.

    Attributes
    ----------
    scheduling : sched_switch
    wakeups : kvm_vcpu_wakeup
    userspace : when the thread is in userspace
    """

    scheduling: bool = False
    wakeups: bool = False
    userspace: bool = False

    def tells(self, name: str) -> bool:
        """Say whether a part of EXIT_PARTS shows; what does not show is absent, not 0."""
        shows = {
            "waiting_ns": self.scheduling or self.wakeups,
            "preempted_ns": self.scheduling,
            "userspace_ns": self.userspace,
        }
        return shows.get(name, True)


@dataclass(frozen=True)
class Sweep:
    """The stretches of a piece of lanes.

    Attributes
    ----------
    part : (n,) uint8, Part of the stretch from each row to the thread's next row
    dur_ns : (n,) int64, its length; 0 for a thread's last row
    owner : (n,) of each lane row, the thread's latest entry or exit up to it; -1 for none
    """

    part: NDArray[np.uint8]
    dur_ns: NDArray[np.int64]
    owner: NDArray[np.int32]


class Clock:
    """Makes each thread's time stamps ascend, across pieces, so that stretches are never negative."""

    def __init__(self) -> None:
        self._latest = np.full(16, np.iinfo(np.int64).min, np.int64)

    def durations(self, lanes: Lanes) -> NDArray[np.int64]:
        """Return the length of the stretch behind each row, ns; 0 for a thread's last row."""
        self._latest = grown(self._latest, int(lanes.thread.max()) + 1, np.iinfo(np.int64).min)
        return lane_rows.step_durations(lanes.thread, lanes.ts_ns, self._latest)


def sweep(lanes: Lanes, dur_ns: NDArray[np.int64]) -> Sweep:
    """Give each stretch its category (halt-polling apart, see `halt_polls`)."""
    part, owner = lane_rows.sweep_lanes(lanes.thread, lanes.step, lanes.suspect, _steps())
    return Sweep(part, dur_ns, owner)


@dataclass(frozen=True)
class Moves:
    """Time that moves from one part to another: (rows that it belongs to, ns, from, to)."""

    rows: NDArray[np.intp]
    ns: NDArray[np.int64]
    target: NDArray[np.uint8]


def halt_polls(lanes: Lanes, swept: Sweep, recorded: Recorded) -> Moves:
    """Find the handler time that kvm_vcpu_wakeup says was halt-polling (or sleep, where unscheduled).

    kvm_vcpu_wakeup tells how long the vCPU was halted, polling first. It polled until it was switched out
    asleep, or else to the end. Source: kvm_vcpu_halt, virt/kvm/kvm_main.c
    """
    wakeups = np.flatnonzero(lanes.step == Step.WAKEUP)
    if not len(wakeups):
        return Moves(wakeups, np.zeros(0, np.int64), np.zeros(0, np.uint8))
    step = lanes.step
    anchors = (step == Step.WAKEUP) | (_AFTER[step] != _KEEPS)
    before = lanes.last(anchors)[np.maximum(wakeups - 1, 0)]
    known = (wakeups > 0) & (before >= 0) & (lanes.thread[np.maximum(wakeups - 1, 0)] == lanes.thread[wakeups])
    wakeups, before = wakeups[known], before[known]
    halted_ns, waited = lanes.arg[wakeups] >> 1, lanes.arg[wakeups] & 1
    asleep = np.append(np.flatnonzero(step == Step.BLOCK), len(lanes))
    stop = np.minimum(asleep[np.searchsorted(asleep, before, side="right")], wakeups)
    in_handler = np.concatenate([[0], np.cumsum(np.where(swept.part == Part.HANDLER, swept.dur_ns, 0))])
    clock = np.concatenate([[0], np.cumsum(swept.dur_ns)])
    preempted = np.concatenate([[0], np.cumsum(np.where(swept.part == Part.PREEMPTED, swept.dur_ns, 0))])
    begin = np.maximum(clock[wakeups] - halted_ns, clock[before])
    ns = clock[stop] - begin - (preempted[stop] - preempted[before])
    ns = np.clip(ns, 0, in_handler[stop] - in_handler[before])
    slept = (waited == 1) & (not recorded.scheduling)
    return Moves(before.astype(np.intp), ns, np.where(slept, Part.BLOCKED, Part.HALT_POLL).astype(np.uint8))


class PartSums:
    """Time per group and part, ns, exact."""

    def __init__(self) -> None:
        self._sums = np.zeros((16, N_PARTS), np.int64)

    def add(
        self,
        groups: NDArray[np.int32],
        parts: NDArray[np.uint8],
        dur_ns: NDArray[np.int64],
        owner: NDArray[np.int32] | None = None,
    ) -> None:
        """Add stretches.

        Parameters
        ----------
        groups : of each stretch, -1 for none
        owner : of each stretch, the one whose group counts, -1 for none; None: its own
        """
        n_groups = int(groups.max(initial=-1)) + 1
        if n_groups > len(self._sums):
            self._sums = np.pad(self._sums, ((0, max(n_groups, 2 * len(self._sums)) - len(self._sums)), (0, 0)))
        lane_rows.sum_parts(parts, dur_ns, groups, self._sums, limit=SUM_LIMIT, owner=owner)

    def move(self, groups: NDArray[np.int32], moves_ns: NDArray[np.int64], target: NDArray[np.uint8]) -> None:
        """Move time from the handler to other parts."""
        self.add(groups, target, moves_ns)
        self.add(groups, np.full(len(groups), Part.HANDLER, np.uint8), -moves_ns)

    def of(self, group: int) -> dict[Part, int]:
        """Return the parts of a group."""
        sums = self._sums[group].tolist() if group < len(self._sums) else [0] * N_PARTS
        return {part: sums[part] for part in Part}


class ReasonSplit:
    """Where the time of each exit reason went, over its sound exit→entry pairs."""

    def __init__(self) -> None:
        self._sums = PartSums()

    def feed(self, lanes: Lanes, pairs: Pairs, swept: Sweep, moves: Moves) -> None:
        """Take in the next piece."""
        if len(pairs.edges) < 2:
            return
        handled = pairs.handling & pairs.sound
        group = np.full(len(lanes), -1, np.int32)  # of each lane row
        group[pairs.edges[:-1][handled]] = pairs.reasons[:-1][handled]
        self._sums.add(group, swept.part, swept.dur_ns, swept.owner)
        owner = swept.owner[moves.rows]
        reasons = np.where(owner >= 0, group[owner], -1)
        mine = reasons >= 0
        reasons = reasons[mine]
        self._sums.move(reasons, moves.ns[mine], moves.target[mine])

    def of(self, reason: int) -> dict[str, int]:
        """Return the ns of a reason's number in each of EXIT_PARTS."""
        sums = self._sums.of(reason)
        return {name: sum(sums[part] for part in parts) for name, parts in EXIT_PARTS.items()}
