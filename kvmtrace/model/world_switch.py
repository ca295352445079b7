"""The world switch as data: who does what between the host's and the guest's state, step by step.

One VM-entry and VM-exit of a vCPU, from KVM_RUN to the recorded exit reason and back. Each step says what KVM's code
does, what the processor does by itself, which fields of the vCPU's control structure take part, and between which
recorded events it lies. The steps themselves stand with their ISA (kvmtrace.isa).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvmtrace.isa.base import SwitchStep
from kvmtrace.isa.registry import ISAS

__all__ = ["BRACKETS", "PHASES", "STEPS_BY_ISA", "UNSEEN_BY_ISA", "SwitchStep", "steps_as_dicts"]

# the phases of the lifecycle, in order
# fmt: off
PHASES: tuple[str, ...] = (
    "bind to the CPU",
    "save host state",
    "load guest state",
    "guest mode",
    "save guest state",
    "load host state",
    "record the exit reason",
    "unbind",
)
# fmt: on

STEPS_BY_ISA: dict[str, tuple[SwitchStep, ...]] = {isa.name: isa.world_switch for isa in ISAS}

# ISA -> (event, the next one, what lies between): the intervals that a recording can time
BRACKETS: dict[str, tuple[tuple[str, str, str], ...]] = {isa.name: isa.brackets for isa in ISAS}

# what a recording cannot show of the switch, whatever is recorded
UNSEEN_BY_ISA: dict[str, tuple[str, ...]] = {isa.name: isa.unseen for isa in ISAS}


def steps_as_dicts(isa: str) -> list[dict[str, Any]]:
    """Return the steps of an ISA, by its name, as plain dictionaries, for JSON."""
    return [asdict(step) for step in STEPS_BY_ISA[isa]]
