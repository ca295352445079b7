"""From what the maps say to triggers that have happened: alarms of the moment, rates and quantiles of a while."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf.summary_maps import (
    ALARM_EXIT,
    ALARM_RUN_DELAY,
    ALARM_USERSPACE,
    CELL_ERROR,
    CELL_INTERRUPTED,
    AlarmLimits,
)
from kvmtrace.isa.registry import isa_name
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.watch.triggers import Fired, Trigger, exit_name
from kvmtrace.watch.vm_counters import Counts, labels_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmtrace.capture.bpf.summary_maps import Alarm
    from kvmtrace.watch.vm_counters import CountedVm, Totals

FROM_MAPS = ("slower-than", "rate", "run-delay", "slo")
FEWEST = 20  # exits of which a quantile says something
MOST_VMS = 1 << 20


def limits_of(triggers: Sequence[Trigger]) -> AlarmLimits:
    """Return what the programs in the kernel shall tell at once."""
    slow = [trigger.limit_ns for trigger in triggers if trigger.kind == "slower-than"]
    late = [trigger.limit_ns for trigger in triggers if trigger.kind == "run-delay"]
    return AlarmLimits(min(slow, default=None), min(late, default=None))


def fired_by(alarms: Iterable[Alarm], triggers: Sequence[Trigger]) -> list[Fired]:
    """Return the triggers that alarms mean.

    Where a KVM has VM-exits, userspace exits lie within them: they only count for triggers that name one.
    """
    found = []
    for alarm in alarms:
        isa = isa_name(alarm.isa)
        kind = "run-delay" if alarm.kind == ALARM_RUN_DELAY else "slower-than"
        reason = _reason_of(alarm, isa)
        for trigger in triggers:
            if trigger.kind != kind or alarm.ns < trigger.limit_ns or not trigger.means(reason or ""):
                continue
            if alarm.kind == ALARM_USERSPACE and isa is not None and not trigger.of_userspace:
                continue
            found.append(
                Fired(trigger, alarm.ts_ns, alarm.pid, alarm.tid, alarm.vcpu_id, reason=reason,
                      began_ns=alarm.began_ns, dur_ns=alarm.ns)
            )  # fmt: skip
    return found


def _reason_of(alarm: Alarm, isa: str | None) -> str | None:
    if alarm.kind == ALARM_RUN_DELAY:
        return None
    if alarm.kind == ALARM_EXIT:
        return exit_name(isa, alarm.code)
    special = {CELL_INTERRUPTED: "EINTR", CELL_ERROR: "other"}
    return special.get(alarm.code) or describe_userspace_exit_reason(alarm.code)


class Detectors:
    """Looks at the counters once a second; a trigger fires when its limit is passed, and again after it was kept.

    Parameters
    ----------
    triggers : of any kind; those of rates and quantiles are looked at
    """

    def __init__(self, triggers: Sequence[Trigger]) -> None:
        self._triggers = [trigger for trigger in triggers if trigger.kind in ("rate", "slo")]
        self._past: dict[tuple[int, int, int | None], deque[tuple[int, Counts]]] = {}
        self._above: set[tuple[int, int, int | None]] = set()

    def look(self, vms: list[CountedVm], now_ns: int | None = None) -> list[Fired]:
        """Return what has begun to exceed its limit since the last look."""
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        labels = labels_of(vms, MOST_VMS)
        fired = []
        seen = set()
        for place, vm in enumerate(vms):
            totals = vm.all()
            for number, trigger in enumerate(self._triggers):
                key = (number, vm.pid, vm.started)
                seen.add(key)
                value = self._value(key, trigger, counts_of(totals, trigger), now_ns)
                limit = trigger.per_second if trigger.kind == "rate" else trigger.limit_ns
                if value is None or value <= limit:
                    self._above.discard(key)
                elif key not in self._above:
                    self._above.add(key)
                    fired.append(Fired(trigger, now_ns, vm.pid, vm=labels[place], reason=trigger.reason, value=value))
        self._past = {key: past for key, past in self._past.items() if key in seen}
        self._above &= seen
        return fired

    def _value(self, key: tuple[int, int, int | None], trigger: Trigger, now: Counts, now_ns: int) -> float | None:
        """Return what a trigger measures of a VM; None as long as nothing can be said."""
        past = self._past.setdefault(key, deque())
        window = trigger.window_ns or 10**9
        while len(past) > 1 and past[1][0] <= now_ns - window:
            past.popleft()
        value = None
        if past and past[0][0] <= now_ns - window // 2:
            began_ns, before = past[0]
            if trigger.kind == "rate":
                value = (now.count - before.count) * 1e9 / (now_ns - began_ns)
            else:
                value = quantile_ns([b - a for a, b in zip(before.buckets, now.buckets, strict=True)], trigger.quantile)
        past.append((now_ns, now))
        return value


def counts_of(totals: Totals, trigger: Trigger) -> Counts:
    """Return the counts of the reasons that a trigger means; of any: VM-exits, else userspace exits."""
    found = Counts()
    table = totals.userspace_exits if trigger.of_userspace or not totals.exits else totals.exits
    for (_, reason), counts in table.items():
        if trigger.means(reason):
            found.add(counts)
    return found


def quantile_ns(buckets: list[int], quantile: float) -> float | None:
    """Return a quantile of what lies in buckets of powers of two, within one in proportion; None of too few."""
    total = sum(buckets)
    if total < FEWEST:
        return None
    rank, below = quantile * total, 0
    for bucket, count in enumerate(buckets):
        if below + count >= rank and count:
            low = float(1 << bucket)
            return low + low * (rank - below) / count
        below += count
    return float(1 << len(buckets))
