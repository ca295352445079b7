"""Which events of a set this kernel has, how they are filtered, and switching them on."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.capture.ftrace.vmm_probes import add_vmm_probes
from kvmtrace.errors import CapabilityError
from kvmtrace.isa.probes import PROBES
from kvmtrace.kvm.tracepoints import EVENT_SETS, LIFECYCLE, PROBE_SYSTEM
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from kvmtrace.capture.ftrace.instance import Instance
    from kvmtrace.capture.ftrace.probe_events import Probes
    from kvmtrace.capture.settings import RecordSettings

ALL_SYSTEMS = ("kvm", "kvmmmu")  # every tracepoint of these is in the set "all"

# sys_enter_mmap of memory without a file is the noise of malloc; fd -1 may be 32 or 64 bits wide
FILTERS = {"syscalls:sys_enter_mmap": "fd < 0x7fffffff"}
# with -a these would record every process of the machine, and say little of KVM
NOT_MACHINE_WIDE = (
    "syscalls:sys_enter_openat",
    "syscalls:sys_exit_openat",
    "syscalls:sys_enter_close",
    "syscalls:sys_enter_mmap",
    "syscalls:sys_exit_mmap",
)


@dataclass
class Plan:
    """The events of one recording.

    Parameters
    ----------
    events : (system, name) as tracefs has them; probe events under their group
    missing : "system:name" that were wanted and the kernel lacks
    probes : metadata rows of the probe events: event, function, how
    filters : "system:name" -> filter, for people
    """

    events: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    probes: list[dict[str, str]] = field(default_factory=list)
    filters: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the events as the metadata names them, "system:name"."""
        shown = [(PROBE_SYSTEM if s.startswith(PROBE_SYSTEM) else s, name) for s, name in self.events]
        return [f"{system}:{name}" for system, name in shown]


def wanted_events(instance: Instance, event_set: str) -> list[str]:
    """Return "system:name" of all tracepoints that a set asks for."""
    names = EVENT_SETS[event_set]
    if names is not None:
        return list(names)
    everything = [f"{system}:{name}" for system in ALL_SYSTEMS for name in instance.events_of(system)]
    return list(dict.fromkeys([*LIFECYCLE, *everything]))


def plan_events(instance: Instance, probes: Probes, settings: RecordSettings) -> Plan:
    """Decide what is recorded; adds the probes, switches nothing on.

    Raises
    ------
    CapabilityError
        The kernel has no KVM tracepoints at all.
    """
    if not instance.events_of("kvm"):
        raise CapabilityError(
            "KVM is not loaded: the kernel has no kvm tracepoints",
            "modprobe kvm_intel or kvm_amd; without VMX or SVM try `kvmtrace lab run`",
        )
    plan = Plan()
    machine_wide = settings.target.kind == "all"
    for event in wanted_events(instance, settings.event_set):
        system, _, name = event.partition(":")
        if machine_wide and event in NOT_MACHINE_WIDE:
            plan.filters[event] = "not recorded with -a"
        elif instance.has_event(system, name):
            plan.events.append((system, name))
            if event in FILTERS:
                plan.filters[event] = FILTERS[event]
        else:
            plan.missing.append(event)
    if settings.event_set != "minimal":
        _plan_probes(probes, plan)
        rows = add_vmm_probes(probes, settings.target)
        plan.probes += rows
        plan.events += [(probes.group, row["event"]) for row in rows]
    return plan


def _plan_probes(probes: Probes, plan: Plan) -> None:
    added = probes.add(PROBES)
    plan.events += [(probes.group, name) for name in added]
    plan.missing += [f"{PROBE_SYSTEM}:{name}" for name in PROBES if name not in added]
    for name in added:
        function, is_return, _ = PROBES[name]
        how = "kretprobe" if is_return else "kprobe"
        plan.probes.append({"event": name, "function": function, "how": how})


def enable(instance: Instance, plan: Plan) -> None:
    """Switch the planned events on, with their filters."""
    for system, name in plan.events:
        folder = f"events/{system}/{name}"
        text = FILTERS.get(f"{system}:{name}")
        if text is not None and not instance.try_write(f"{folder}/filter", text):
            del plan.filters[f"{system}:{name}"]
        instance.write(f"{folder}/enable", "1")
