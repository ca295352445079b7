"""From a recording to its replay: which guest it is, what the recording can show, which thread is which vCPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.observability import Evidence, find_capability
from kvmtrace.isa.registry import BY_NAME, BY_NUMBER, isa_name, run_functions
from kvmtrace.predict.align import Alignment, Replay, align
from kvmtrace.predict.guest_prediction import is_predicted, predict
from kvmtrace.predict.story import PREDICTABLE, PVM, Facts
from kvmtrace.table.distinct import among, distinct
from kvmtrace.table.event_table import LOST_EVENTS
from kvmtrace.workload.machines import machine_of

if TYPE_CHECKING:
    from kvmtrace.isa.base import Isa
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Capture, Recording
    from kvmtrace.workload import Guest

MAX_EVENTS = 200_000  # a replay of more is a table that nobody reads
_COMM = re.compile(rb"CPU (\d+)/KVM")


def replay_recording(recording: Recording, *, max_events: int = MAX_EVENTS) -> Replay | None:
    """Replay a recording of a bundled guest; None if it is not one, or holds more than `max_events`.

    Raises
    ------
    FormatError
        The recording cannot be read.
    """
    if find_guest(recording.capture) is None:
        return None
    return replay_events(recording.capture, recording.events(), max_events=max_events)


def replay_events(
    capture: Capture,
    events: EventTable,
    *,
    guest: str | None = None,
    arguments: dict[str, int] | None = None,
    max_events: int = MAX_EVENTS,
) -> Replay | None:
    """Replay the events of a capture.

    Parameters
    ----------
    capture, events : of one recording
    guest, arguments : what ran, for captures whose metadata do not say; default arguments for those not given
    max_events : for more, None is returned
    """
    named = find_guest(capture, _isa_of(capture, events))
    if guest is not None:
        named = machine_of(_isa_of(capture, events)).guests[guest], arguments or {}
    if named is None or len(events) > max_events:
        return None
    which, given = named
    complete = {argument.name: given.get(argument.name, argument.default) for argument in which.arguments}
    facts = facts_of(capture, events)
    tids = vcpu_threads(capture, events)
    if facts is None or not tids or facts.isa in which.refused:
        return None
    predictions = predict(which, complete, facts)
    aligned = [align(prediction, events, tids.get(prediction.vcpu_id, -1), facts.events) for prediction in predictions]
    return _sum_up(which, complete, facts, aligned, events)


def find_guest(capture: Capture, isa: str | None = None) -> tuple[Guest, dict[str, int]] | None:
    """Return the bundled guest that a capture says it recorded, with its arguments.

    Parameters
    ----------
    isa : what the events say, for a guest that did not live to tell; None: any that has such a guest
    """
    run = capture.meta.get("guest_run") or {}
    target = capture.meta.get("target") or {}
    name = run.get("guest") or target.get("guest")
    arguments = run.get("arguments") or target.get("guest_arguments") or {}
    isa = run["isa"] if isinstance(run.get("isa"), str) else isa
    machines = [machine_of(isa)] if isa else list(map(machine_of, BY_NAME))
    guests = next((machine.guests for machine in machines if name in machine.guests), {})
    if not isinstance(name, str) or name not in guests or not isinstance(arguments, dict):
        return None
    given = {str(key): int(value) for key, value in arguments.items() if isinstance(value, int)}
    # more than a guest takes is not what was recorded, and would take for ever to predict
    if any(not 1 <= given.get(a.name, a.default) <= a.maximum for a in guests[name].arguments):
        return None
    return guests[name], given


def facts_of(capture: Capture, events: EventTable) -> Facts | None:
    """Return what a prediction may know of this recording; None if it tells no ISA."""
    evidence = Evidence(set())
    evidence.look_at(events)
    capability = find_capability(capture, events, evidence)
    isa = _isa_of(capture, events)
    if isa is None:
        return None
    recorded = capability.recorded & PREDICTABLE
    known = BY_NAME.get(isa)
    if known is None:
        recorded -= {"kvm_entry", "kvm_exit", *run_functions(), *run_functions("_return")}
        return Facts(isa, frozenset(recorded), True, "exit_irqs_on" not in capability.traits, False)
    if not is_predicted(isa):
        return None
    nrips = not known.decodes_to_skip or not _skips_by_emulation(events)
    inside = "exit_irqs_on" not in capability.traits
    apicv = known.interrupts_without_exit and events.count("kvm_apicv_accept_irq") > 0
    return Facts(isa, frozenset(recorded), nrips, inside, apicv, _is_shadowed(known, events))


def _is_shadowed(isa: Isa, events: EventTable) -> bool:
    """Say whether a guest hypervisor reads fields of its guest without VM-exits."""
    entry = isa.nesting.entry if isa.nesting is not None else None
    if entry is None or not entry.reads or not events.count("kvm_nested_vmenter") or not events.count("kvm_exit"):
        return False
    return not np.any(events.field("kvm_exit", "exit_reason") == entry.instructions[entry.reads])


def _isa_of(capture: Capture, events: EventTable) -> str | None:
    if events.count("kvm_exit") and events.has("kvm_exit", "isa"):
        return isa_name(int(events.field("kvm_exit", "isa")[0]))
    run = capture.meta.get("guest_run") or {}
    if run.get("isa") in {*BY_NAME, PVM}:
        return str(run["isa"])
    return PVM if events.count("kvm_emulate_insn") else None


def _skips_by_emulation(events: EventTable) -> bool:
    """Say whether a kvm_emulate_insn at the same RIP follows CPUID, MSR or HLT exits: no next RIPs."""
    if not events.count("kvm_emulate_insn") or not events.count("kvm_exit"):
        return False
    exits, emulated = events.rows("kvm_exit"), events.rows("kvm_emulate_insn")
    isa = BY_NUMBER.get(int(events.field("kvm_exit", "isa")[0]))
    skipped = isa.codes("cpuid", "msr", "halt") if isa is not None else frozenset()
    chosen = among(events.field("kvm_exit", "exit_reason"), skipped)
    rips = events.field("kvm_exit", "guest_rip")
    # the last exit of the same thread before each emulation
    for tid in distinct(events.tid[exits]):
        own = np.flatnonzero(events.tid[exits] == tid)
        after = np.flatnonzero(events.tid[emulated] == tid)
        before = np.searchsorted(exits[own], emulated[after]) - 1
        known = before >= 0
        position = own[before[known]]
        same = rips[position] == events.field("kvm_emulate_insn", "rip")[after[known]]
        if np.any(chosen[position] & same):
            return True
    return False


def vcpu_threads(capture: Capture, events: EventTable) -> dict[int, int]:
    """Return vcpu_id -> tid: as the workload reported, else by kvm_entry, else by the threads' names."""
    run = capture.meta.get("guest_run") or {}
    reported = run.get("vcpu_tids")
    if isinstance(reported, dict) and reported:
        return {int(vcpu_id): int(tid) for vcpu_id, tid in reported.items()}
    if events.count("kvm_entry") and events.has("kvm_entry", "vcpu_id"):  # which arm64's has not
        ids = events.field("kvm_entry", "vcpu_id")
        tids = events.tid[events.rows("kvm_entry")]
        return {int(vcpu_id): int(tids[np.flatnonzero(ids == vcpu_id)[0]]) for vcpu_id in distinct(ids)}
    if events.count("task_rename"):
        names = events.field("task_rename", "newcomm")
        pairs = zip(names, events.field("task_rename", "pid"), strict=True)
        return {int(found[1]): int(tid) for name, tid in pairs if (found := _COMM.match(bytes(name)))}
    running = events.tid[events.rows("kvm_entry" if events.count("kvm_entry") else "kvm_fpu")]
    first = dict.fromkeys(int(tid) for tid in running)
    return dict(enumerate(first))


def _sum_up(
    guest: Guest, arguments: dict[str, int], facts: Facts, aligned: list[Alignment], events: EventTable
) -> Replay:
    lost: int | None = 0
    if events.count(LOST_EVENTS):
        counts = events.field(LOST_EVENTS, "count")
        lost = None if np.any(counts < 0) else int(counts.sum())
    return Replay(
        guest=guest.name,
        arguments=arguments,
        isa=facts.isa,
        events=tuple(sorted(facts.events)),
        n_steps=sum(vcpu.n_steps for vcpu in aligned),
        n_matched=sum(vcpu.n_matched for vcpu in aligned),
        n_lost=lost,
        vcpus=tuple(aligned),
    )
