"""What one recording contributes to a comparison: values only; collect_run.py makes them."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

KERNEL, USERSPACE, EITHER = "kernel", "userspace", "any"  # paths of a key


@dataclass(frozen=True, order=True)
class Key:
    """One population of durations.

    Parameters
    ----------
    kind : "vm_exit" (kvm_exit to kvm_entry) or "userspace" (return of KVM_RUN to the next KVM_RUN)
    isa : int, Isa.number; 0 for userspace exits
    reason : int, exit reason or KVM_EXIT_*
    path : "kernel" or "userspace": where the exit was handled; "any" where one side does not tell
    """

    kind: str
    isa: int
    reason: int
    path: str


@dataclass(frozen=True)
class Samples:
    """Durations of one key in one run, in time order: start stamps and durations, ns."""

    ts_ns: NDArray[np.int64]
    dur_ns: NDArray[np.int64]


@dataclass(frozen=True)
class Traced:
    """How a run was recorded: what must be alike on both sides for times and rates to be comparable.

    Parameters
    ----------
    isa : str or None
    enabled : names of the events that were recorded, occurring or not; None: the file does not say
    occurring : names of the events that there are
    frequent : of these, those that make up a noticeable part: what they cost shows in every time
    filters : event -> what the recorder left out of it, in words
    guest : str or None, the bundled guest with its arguments
    backend : str or None, the recorder
    lost : int or None, events that were lost; None: some, nobody knows how many
    """

    isa: str | None = None
    enabled: frozenset[str] | None = None
    occurring: frozenset[str] = frozenset()
    frequent: frozenset[str] = frozenset()
    filters: Mapping[str, str] = field(default_factory=dict)
    guest: str | None = None
    backend: str | None = None
    lost: int | None = 0

    def has(self, event: str) -> bool:
        """Say whether an event was recorded; where the file does not say, whether it occurs."""
        return event in (self.occurring if self.enabled is None else self.enabled)


@dataclass(frozen=True)
class RunSamples:
    """What one recording contributes.

    Parameters
    ----------
    name : str, for messages
    start_ns, wall_ns : span of the recording
    guest_ns : int or None, time in guest mode; rates are per second of it, or of wall time if None
    samples : Key -> Samples
    budget_ns : budget part -> ns, summed over vCPUs; None: the recording cannot tell this part
    transitions : (state, event, next state) -> count, from the comparison with the model
    violations : int
    late_exit : bool or None, kvm_exit is traced with interrupts on, after host interrupts were served (older
        kernels); None if the recording does not say
    traced : how it was recorded; None: not known, as of samples that no recording holds
    """

    name: str
    start_ns: int
    wall_ns: int
    guest_ns: int | None
    samples: Mapping[Key, Samples]
    budget_ns: Mapping[str, int | None]
    transitions: Mapping[tuple[str, str, str], int]
    violations: int = 0
    late_exit: bool | None = None
    traced: Traced | None = None
