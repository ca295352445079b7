"""Predict the events of a bundled guest, of all its vCPUs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.predict.machine import Machine
from kvmtrace.predict.story import PVM

if TYPE_CHECKING:
    from kvmtrace.predict.story import Facts, Prediction
    from kvmtrace.workload import Guest

# ISA -> the module of its machine, where that is no PC
_OTHERS = {"arm64": "kvmtrace.predict.virt_machine"}


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
        The run is longer than `max_steps`, there is no such ISA, or it cannot run this guest.
    """
    if facts.isa in guest.refused:
        raise UsageError(f"{facts.isa} cannot run the guest {guest.name}: {guest.refused[facts.isa]}")
    if not is_predicted(facts.isa):
        raise UsageError(f"nothing can be predicted for the ISA {facts.isa}")
    if facts.isa in _OTHERS:
        found: tuple[Prediction, ...] = import_module(_OTHERS[facts.isa]).predict(guest, arguments, facts, max_steps)
        return found
    machine = Machine(guest.on(facts.isa), arguments, facts, max_steps)
    machine.run()
    return machine.predictions()


def is_predicted(isa: str) -> bool:
    """Say whether the guests of an ISA can be predicted."""
    known = BY_NAME.get(isa)
    return isa == PVM or isa in _OTHERS or (known is not None and known.encode_io is not None)
