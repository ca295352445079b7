"""The VMM's own start, from type registration to the vCPU threads, held against the order the model expects."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.bring_up.followed import Accelerator, VmmStart, VmmStep
from kvmtrace.kvm.vmm_symbols import VMM_FUNCTIONS
from kvmtrace.model.bring_up import INHERITANCE, VMM_ORDER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.table.event_table import EventTable

SENTENCES = {function.role: function.sentence for function in VMM_FUNCTIONS}
TYPE_REGISTER = "vmm_type_register"
INIT_RETURN = "vmm_accel_init_machine_return"
MAX_STEPS = 500


def _argument(events: EventTable, role: str, position: int) -> str:
    fields = [name for name in events.kinds[events.kind_index[role]].fields if not name.startswith("__")]
    words = []
    for name in fields:
        value = events.field(role, name)[position]
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(int(value))
        words.append(f"{name} {text}")
    return ", ".join(words)


def _steps(events: EventTable) -> list[VmmStep]:
    found: list[VmmStep] = []
    for role, sentence in SENTENCES.items():
        if role != TYPE_REGISTER:
            found += [
                VmmStep(
                    int(row), int(events.ts_ns[row]), int(events.tid[row]), role, _argument(events, role, i), sentence
                )
                for i, row in enumerate(events.rows(role)[:MAX_STEPS].tolist())
            ]
    return sorted(found, key=lambda step: step.event_index)


def _accelerators(events: EventTable, steps: list[VmmStep]) -> tuple[Accelerator, ...]:
    """Return which accelerators were tried: the name found last before each initialisation, and its return."""
    tried: list[Accelerator] = []
    name = ""
    for step in steps:
        if step.role == "vmm_accel_find":
            name = step.argument.removeprefix("accel ")
        elif step.role == "vmm_accel_init_machine":
            tried.append(Accelerator(name or "an accelerator", None))
        elif step.role == INIT_RETURN and tried and events.has(INIT_RETURN, "ret"):
            position = int(np.searchsorted(events.rows(INIT_RETURN), step.event_index))
            tried[-1] = replace(tried[-1], ret=int(events.field(INIT_RETURN, "ret")[position]))
    return tuple(tried)


def _parents(events: EventTable) -> dict[str, str]:
    if not events.has(TYPE_REGISTER, "qom_type"):
        return {}
    names = [
        np.char.decode(events.field(TYPE_REGISTER, field).astype("S64"), "utf-8", "replace").tolist()
        for field in ("qom_type", "parent")
    ]
    return dict(zip(*names, strict=True))


def chain_of(name: str, parents: Mapping[str, str]) -> tuple[str, ...]:
    """Return a type and its ancestors; a registration that names itself as ancestor ends the chain."""
    chain = [name]
    while chain[-1] in parents and parents[chain[-1]] not in (*chain, ""):
        chain.append(parents[chain[-1]])
    return tuple(chain)


def _order_findings(first: Mapping[str, int]) -> list[str]:
    """Compare the first occurrences with the model's order; what did not occur says nothing."""
    return [
        f"{later} came before {earlier}, which it needs"
        for earlier, later in VMM_ORDER
        if earlier in first and later in first and first[later] < first[earlier]
    ]


def follow_vmm(events: EventTable, ioctls: Mapping[str, int]) -> VmmStart | None:
    """Follow the probed functions of the VMM.

    Parameters
    ----------
    events : EventTable
    ioctls : name of an ioctl ("KVM_CREATE_VM") -> row of its first call

    Returns
    -------
    VmmStart, or None if no VMM function was probed
    """
    steps = _steps(events)
    parents = _parents(events)
    if not steps and not parents:
        return None
    first = dict(ioctls)
    for step in reversed(steps):
        first[step.role] = step.event_index
    findings = _order_findings(first)
    chains = []
    for expected in INHERITANCE:
        if expected[0] in parents:
            chains.append(chain_of(expected[0], parents))
            if chains[-1] != expected:
                findings.append(f"{' → '.join(chains[-1])} was registered; the model expects {' → '.join(expected)}")
    return VmmStart(tuple(steps), len(parents), tuple(chains), tuple(findings), _accelerators(events, steps))
