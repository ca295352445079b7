"""LAPIC timers that fire once: each of their interrupts has a write that started the timer.

The vCPU's own thread starts them, and accepts their interrupts, so that the order is certain.
Source: apic_timer_expired, kvm_apic_inject_pending_timer_irqs, start_apic_timer (lapic.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.deliveries import in_words
from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, interrupt_log
from kvmtrace.check.userspace_changes import ioctl_kind, setter_rows
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.msrs import MSR_IA32_TSC_DEADLINE
from kvmtrace.model.interrupts import LVT_PERIODIC, TIMER_REGISTERS, TIMER_SETTERS
from kvmtrace.table.distinct import among
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]

_FIRED, _STARTED = range(2)


@dataclass
class TimerShots:
    """What is known of the vCPUs' timers.

    Parameters
    ----------
    fired_ns : lane of the log -> when its timer fired; lanes whose timer was started since, or may be, are left out
    n_judged : interrupts of this excerpt
    wrong : those of a timer that was not started again
    """

    fired_ns: dict[int, int] = field(default_factory=dict)
    n_judged: int = 0
    wrong: list[Doubt] = field(default_factory=list)

    def follow(self, excerpt: Excerpt, fired: Rows, values: Numbers) -> None:
        """Follow the timers through an excerpt's new rows.

        Parameters
        ----------
        fired : log's entries that accept the timer's vector, by lane and row
        values : of APIC_LVTT then
        """
        self.n_judged, self.wrong = 0, []
        log, times = interrupt_log(excerpt), excerpt.whole.table.ts_ns
        fired = fired[values & LVT_PERIODIC == 0]
        entries = np.append(fired, _starts(excerpt))
        what = np.repeat(np.array([_FIRED, _STARTED]), [len(fired), len(entries) - len(fired)])
        forgets = _forgets(excerpt)
        row, lane = log.row[entries], log.lane[entries]
        order = np.lexsort((row, lane))
        epoch = np.searchsorted(forgets, row)
        # a timer whose time had passed is told of before the write that started it
        behind = log.behind[entries]
        early = (what == _FIRED) & ((behind == NONE) | log.is_kind(behind, "kvm_msr"))
        latest = {here: (0, at_ns) for here, at_ns in self.fired_ns.items()}  # lane -> (epoch, when it fired)
        for i in order.tolist():
            here, now, at_ns = int(lane[i]), int(epoch[i]), int(times[row[i]])
            then, since_ns = latest.pop(here, (NONE, 0))
            if what[i] == _STARTED:
                continue
            self.n_judged += 1
            if then == now and not early[i]:
                expected = "the timer started again: it fires once, and it fired"
                self.wrong.append(Doubt(int(row[i]), since_ns, at_ns, expected, in_words(excerpt, int(entries[i]))))
            latest[here] = now, at_ns
        self.fired_ns = {here: at_ns for here, (then, at_ns) in latest.items() if then == len(forgets)}


def _starts(excerpt: Excerpt) -> Rows:
    """Return the log's entries that start a timer, or may."""
    log = interrupt_log(excerpt)
    msrs, writes = log.of_kind("kvm_msr"), log.of_kind("kvm_apic")
    deadline = log.values("kvm_msr", "ecx", msrs) == MSR_IA32_TSC_DEADLINE
    deadline &= log.values("kvm_msr", "write", msrs) != 0
    register = among(log.values("kvm_apic", "reg", writes), TIMER_REGISTERS)
    register &= log.values("kvm_apic", "rw", writes) != 0
    found: Rows = np.append(msrs[deadline], writes[register])
    return found


def _forgets(excerpt: Excerpt) -> Rows:
    """Return the new rows, ascending, at which timers may have been started otherwise."""
    table = excerpt.whole.table
    rows = [
        setter_rows(excerpt, TIMER_SETTERS),
        np.array(vcpu_owners(excerpt).changes, np.intp),
        table.rows("kvm_userspace_exit") if ioctl_kind(excerpt) is None else np.empty(0, np.intp),
        table.rows(LOST_EVENTS),
    ]
    found = np.sort(np.concatenate(rows))
    return found[found >= excerpt.whole.n_parked]
