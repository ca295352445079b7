"""The model's smaller tables, everything that decides beside states, transitions and exit rows, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from kvmtrace.check.rule_registry import all_rules
from kvmtrace.isa.registry import ISAS
from kvmtrace.kvm.apic import describe_apic_register
from kvmtrace.kvm.msrs import describe_msr
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.model import (
    held_registers,
    injection,
    interrupts,
    nesting,
    ordering,
    side_events,
    states,
    traced_by,
    transitions,
    userspace_actions,
    vcpu_sources,
    wake_ups,
)
from kvmtrace.model.predicates import CHECKS, PREDICATES
from kvmtrace.model.thresholds import THRESHOLDS

if TYPE_CHECKING:
    from kvmtrace.check.rule import Rule
    from kvmtrace.isa.base import Nesting


def rule_as_dict(rule: Rule) -> dict[str, Any]:
    """Return a rule as a JSON-ready dictionary, without its functions."""
    return {
        "id": rule.id,
        "title": rule.title,
        "severity": rule.severity,
        "needs": list(rule.needs),
        "sentence": rule.sentence,
        "source": rule.source,
        "cannot_see": rule.cannot_see,
        "parts": [{"about": part.about, "needs": list(part.needs)} for part in rule.parts],
        "of_exit_rows": bool(rule.row_parts_of),
    }


def _ordering_rows() -> dict[str, Any]:
    """Return which step may follow which."""
    return {
        "within_an_exit": [order._asdict() for order in ordering.ORDER],
        "call_steps": list(ordering.CALL_STEPS),
        "never_next": {step: sorted(never) for step, never in ordering.NEVER_NEXT.items()},
        "never_next_if_paired": {step: sorted(never) for step, never in ordering.NEVER_NEXT_IF_PAIRED.items()},
        "new_call": list(ordering.STEPS_OF_A_NEW_CALL),
        "preparation": list(ordering.PREPARATION),
        "run_steps": list(ordering.RUN_STEPS),
        "return_steps": list(ordering.RETURN_STEPS),
        "fast_path_events": sorted(ordering.FAST_PATH_EVENTS),
        "not_on_fast_path": sorted(ordering.NOT_ON_FAST_PATH),
        "fast_path_msrs": {f"{msr:#x}": name for msr, name in ordering.FAST_PATH_MSRS.items()},
        "fpu_bracket": list(ordering.FPU_BRACKET),
        "exclusive": [list(pair) for pair in ordering.EXCLUSIVE],
        "follow_up_states": sorted(transitions.FOLLOW_UP_STATES),
        "late_exit_states": sorted(transitions.LATE_EXIT_STATES),
        "guest_events": sorted(transitions.GUEST_EVENTS),
        "vcpu_events": list(states.VCPU_EVENTS),
        "progress_events": list(states.PROGRESS_EVENTS),
        "remapping_events": list(states.REMAPPING_EVENTS),
        "remapping_ioctls": list(states.REMAPPING_IOCTLS),
        "lapic_events": list(states.LAPIC_EVENTS),
        "stand_ins": states.STAND_INS,
        "lifecycle_parts": {part: list(steps) for part, steps in states.LIFECYCLE_PARTS.items()},
    }


def _side_event_rows() -> dict[str, Any]:
    """Return what happens beside the lifecycle."""
    return {
        "places": dict(side_events.PLACES),
        "rows": {kind: row._asdict() for kind, row in side_events.SIDE_EVENTS.items()},
        "icr_busy": side_events.ICR_BUSY,
        "vmm_prefix": side_events.VMM_PREFIX,
    }


def _nesting_rows() -> dict[str, Any]:
    """Return what tells the level of a nested guest."""
    return {
        "levels": {str(level): sentence for level, sentence in nesting.LEVELS.items()},
        "events": {row.event: row._asdict() for row in nesting.LEVEL_EVENTS},
        "tells_l2": nesting.TELLS_L2,
        "enters_l2": list(nesting.ENTERS_L2),
        "enters_l1": list(nesting.ENTERS_L1),
        "reflects": nesting.REFLECTS,
        "says_why": list(nesting.SAYS_WHY),
        "with_entry": nesting.WITH_ENTRY,
        "leaves_silently": nesting.LEAVES_SILENTLY,
        "level_setters": dict(nesting.LEVEL_SETTERS),
        "doings": list(nesting.DOINGS),
        "level_changes": list(nesting.LEVEL_CHANGES),
        "nested_events": list(nesting.NESTED_EVENTS),
        "isas": {isa.name: _nesting_of(isa.nesting) for isa in ISAS if isa.nesting is not None},
    }


def _nesting_of(tables: Nesting) -> dict[str, Any]:
    """Return which VM-exits of a nested guest an ISA's KVM keeps and passes on, without what predictions need."""
    return {one.name: _plain(getattr(tables, one.name)) for one in fields(tables) if one.name != "entry"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return sorted(value) if isinstance(value, frozenset) else value


def _interrupt_rows() -> dict[str, Any]:
    """Return how interrupts go from cause to delivery."""
    return {
        "senders": {kind: row._asdict() for kind, row in interrupts.SENDERS.items()},
        "parting_events": list(interrupts.PARTING_EVENTS),
        "followed_events": list(interrupts.FOLLOWED_EVENTS),
        "routing_registers": {f"{register:#x}": name for register, name in interrupts.ROUTING_REGISTERS.items()},
        "routing_msrs": {f"{msr:#x}": name for msr, name in interrupts.ROUTING_MSRS.items()},
        "routing_ioctls": list(interrupts.ROUTING_IOCTLS),
        "foreign_lines": list(interrupts.FOREIGN_LINES),
        "other_interfaces": list(interrupts.OTHER_INTERFACES),
        "other_interfaces_by": list(interrupts.OTHER_INTERFACES_BY),
        "other_senders": list(interrupts.OTHER_SENDERS),
        "lapic_setters": list(interrupts.LAPIC_SETTERS),
        "pending_setters": list(interrupts.PENDING_SETTERS),
        "apic_base_enabled": interrupts.APIC_BASE_ENABLED,
        "line_events": list(interrupts.LINE_EVENTS),
        "spiv_directed_eoi": interrupts.SPIV_DIRECTED_EOI,
        "spiv_enabled": interrupts.SPIV_ENABLED,
        "local_vectors": {f"{register:#x}": name for register, name in interrupts.LOCAL_VECTORS.items()},
        "lvt_masked": interrupts.LVT_MASKED,
        "lvt_periodic": interrupts.LVT_PERIODIC,
        "timer_registers": {f"{register:#x}": name for register, name in interrupts.TIMER_REGISTERS.items()},
        "timer_setters": list(interrupts.TIMER_SETTERS),
        "entry_bits": {
            "read_only": interrupts.READ_ONLY_ENTRY_BITS,
            "vector": interrupts.ENTRY_VECTOR,
            "level": interrupts.ENTRY_LEVEL,
            "masked": interrupts.ENTRY_MASKED,
            "remote_irr": interrupts.ENTRY_REMOTE_IRR,
            "logical": interrupts.ENTRY_LOGICAL,
            "mode_at": interrupts.ENTRY_MODE,
            "destination_at": interrupts.ENTRY_DESTINATION,
        },
        "broadcast": interrupts.BROADCAST,
        "rtc_pin": interrupts.RTC_PIN,
        "isa_pins": interrupts.N_ISA_PINS,
    }


def _wake_up_rows() -> dict[str, Any]:
    """Return what ends an HLT."""
    return {
        "wakes_from_hlt": list(wake_ups.WAKES_FROM_HLT),
        "hardware_delivery": list(wake_ups.HARDWARE_DELIVERY),
    }


def _vcpu_rows() -> dict[str, Any]:
    """Return which vCPU a KVM_RUN is of."""
    return {
        "identity": {f"{row.kind}.{row.field}": f"{row.sentence} ({row.step})" for row in vcpu_sources.VCPU_IDENTITY},
        "run_begins": list(vcpu_sources.RUN_BEGINS),
        "run_ends": list(vcpu_sources.RUN_ENDS),
    }


def _injection_rows() -> dict[str, Any]:
    """Return what is injected, and by which event."""
    return {
        "injected_by": {kind: list(types) for kind, types in injection.INJECTED_BY.items()},
        "legal_losses": injection.LEGAL_LOSSES,
        "soft_vectors": list(injection.SOFT_VECTORS),
        "instead_of_a_step": list(injection.INSTEAD_OF_A_STEP),
        "asynchronous_without_code": list(injection.ASYNCHRONOUS_WITHOUT_CODE),
        "reset_rips": {f"{rip:#x}": why for rip, why in injection.RESET_RIPS.items()},
        "smi_rip": injection.SMI_RIP,
        "irr_delivery_modes": {f"{mode:#x}": name for mode, name in injection.IRR_DELIVERY_MODES.items()},
        "auto_eoi": injection.AUTO_EOI,
        "not_traced_beside": {event: list(others) for event, others in injection.NOT_TRACED_BESIDE.items()},
        "smi_delivery_mode": injection.SMI_DELIVERY_MODE,
        "init_delivery_mode": injection.INIT_DELIVERY_MODE,
        "sipi_delivery_mode": injection.SIPI_DELIVERY_MODE,
    }


def _register_rows() -> dict[str, Any]:
    """Return which registers hold what is written to them, and which bits a write must not set."""
    reserved = held_registers.RESERVED_X2APIC
    return {
        "held_msrs": {describe_msr(msr): f"{bits:#x}" for msr, bits in held_registers.HELD_MSRS.items()},
        "held_lapic": {describe_apic_register(reg): f"{bits:#x}" for reg, bits in held_registers.HELD_LAPIC.items()},
        "msr_setters": list(held_registers.MSR_SETTERS),
        "reserved_x2apic": {describe_apic_register(reg): f"{bits:#x}" for reg, bits in reserved.items()},
    }


def _userspace_rows() -> dict[str, Any]:
    """Return what userspace may do between two KVM_RUNs."""
    return {
        "state_setters": list(userspace_actions.STATE_SETTERS),
        "rip_setters": list(userspace_actions.RIP_SETTERS),
        "mode_setters": list(userspace_actions.MODE_SETTERS),
        "smi_setters": list(userspace_actions.SMI_SETTERS),
        "smi_requests": list(userspace_actions.SMI_REQUESTS),
        "pic_setters": list(userspace_actions.PIC_SETTERS),
        "pic_resetters": list(userspace_actions.PIC_RESETTERS),
        "setter_traces": list(userspace_actions.SETTER_TRACES),
        "completed": [describe_userspace_exit_reason(reason) for reason in userspace_actions.COMPLETED],
        "completed_by": {describe_userspace_exit_reason(r): by for r, by in userspace_actions.COMPLETED_BY.items()},
        "continued": [describe_userspace_exit_reason(reason) for reason in userspace_actions.CONTINUED],
        "continued_events": list(userspace_actions.CONTINUED_EVENTS),
        "executed_events": list(userspace_actions.EXECUTED_EVENTS),
    }


def deciding_rows() -> dict[str, Any]:
    """Return these tables as one JSON-ready object."""
    return {
        "rules": {name: rule_as_dict(rule) for name, rule in all_rules().items()},
        "predicates": {name: asdict(predicate) for name, predicate in PREDICATES.items()},
        "checks": {name: asdict(check) for name, check in CHECKS.items()},
        "thresholds": {name: row._asdict() for name, row in THRESHOLDS.items()},
        "ordering": _ordering_rows(),
        "side_events": _side_event_rows(),
        "interrupts": _interrupt_rows(),
        "wake_ups": _wake_up_rows(),
        "nesting": _nesting_rows(),
        "vcpus": _vcpu_rows(),
        "injection": _injection_rows(),
        "userspace": _userspace_rows(),
        "registers": _register_rows(),
        "traced_by": dict(traced_by.TRACED_BY),
    }


def condition_lines() -> list[str]:
    """Return a line for each predicate and comparison of the exit rows."""
    conditions = [f"{name}: {row.sentence} [{', '.join(row.needs)}]" for name, row in PREDICATES.items()]
    return conditions + [
        f"{name} ({row.rule}): {row.sentence} [{', '.join(row.needs)}]" for name, row in CHECKS.items()
    ]


def lines_of(value: Any, name: str = "") -> list[str]:
    """Return nested tables as "name: words" lines, one a row."""
    if isinstance(value, dict) and "value" in value:
        return [f"{name}: {value['value']:,} {value['unit']}: {value['sentence']}"]
    if isinstance(value, dict) and "place" in value:
        cause = f", behind {' or '.join(value['after'])}" if value["after"] else ""
        return [f"{value['kind']}: {value['place']}{cause}: {value['sentence']} [{value['source']}]"]
    if isinstance(value, dict):
        return [
            line
            for key, inner in value.items()
            for line in lines_of(inner, f"{name}, {key}".removeprefix(", ").replace("_", " "))
        ]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [f"{name}: {' '.join(str(word) for word in _order_words(row))}" for row in value]
    words = ", ".join(" or ".join(one) if isinstance(one, list) else str(one) for one in _as_list(value))
    return [f"{name}: {words or 'none'}"]


def _order_words(row: dict[str, Any]) -> tuple[str, ...]:
    which = "the last" if row["last"] else "the first"
    return which, row["earlier"], "before the first", row["later"], f"[{row['source']}]"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
