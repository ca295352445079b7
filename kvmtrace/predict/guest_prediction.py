"""Predict the events of a bundled guest, of all its vCPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.predict.machine import Machine
from kvmtrace.predict.story import PVM

if TYPE_CHECKING:
    from kvmtrace.predict.story import Facts, Prediction
    from kvmtrace.workload import Guest


def predict(
    guest: Guest, arguments: dict[str, int], facts: Facts, *, max_steps: int = 1_000_000
) -> tuple[Prediction, ...]:
    """Predict the events of every vCPU of a bundled guest.

    Parameters
    ----------
    guest : Guest
    arguments : every argument of the guest
    facts : Facts of the capture to compare with, or of the host to be imagined
    max_steps : more predicted events than this are refused

    Returns
    -------
    one Prediction per vCPU, by vcpu_id

    Raises
    ------
    UsageError
        The run is longer than `max_steps`, or there is no such ISA.
    """
    isa = BY_NAME.get(facts.isa)
    if facts.isa != PVM and (isa is None or isa.encode_io is None):
        raise UsageError(f"nothing can be predicted for the ISA {facts.isa}")
    machine = Machine(guest, arguments, facts, max_steps)
    machine.run()
    return machine.predictions()
