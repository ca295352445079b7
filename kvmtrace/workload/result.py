"""What is known of a guest's run: before it (`KnownCounts`) and after it (`GuestRun`)."""

from __future__ import annotations

import json
from dataclasses import asdict, field
from typing import Any

from kvmtrace.lazy_dataclass import dataclass

SCHEMA = "kvmtrace.guest_run/1"


@dataclass(frozen=True)
class KnownCounts:
    """Counts that follow from the listing alone; a key that is absent is not known, never 0.

    Parameters
    ----------
    tracepoints : kernel name -> events; further events of that name mean a fault
    userspace_exits : KVM_EXIT_* name as the kernel prints it ("KVM_EXIT_IO") -> returns of KVM_RUN, errno 0
    vmx, svm, arm64 : exit reason as the kernel prints it ("IO_INSTRUCTION", "io", "HVC64") -> kvm_exit events.
        First-touch faults and anything the host causes (EXTERNAL_INTERRUPT, PREEMPTION_TIMER, IRQ) are not counted here
    ports, gpas, msrs : key as `perf kvm stat` prints it ("0x3f8:POUT", "0x9000:W", "0x277:R") -> accesses
    """

    tracepoints: dict[str, int] = field(default_factory=dict)
    userspace_exits: dict[str, int] = field(default_factory=dict)
    vmx: dict[str, int] = field(default_factory=dict)
    svm: dict[str, int] = field(default_factory=dict)
    arm64: dict[str, int] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    gpas: dict[str, int] = field(default_factory=dict)
    msrs: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GuestRun:
    """One run of a bundled guest.

    Parameters
    ----------
    guest : str, its name in GUESTS
    arguments : str -> int, every argument the guest takes, defaults included
    isa : "vmx" "svm" "pvm" "arm64" or None, as guessed from the host's KVM modules
    pid : int, the VMM process
    vcpu_tids : vcpu_id -> tid of its thread
    ended : "exit-port" (the guest wrote its status to the exit port or address), "shutdown" (triple fault, PSCI
        SYSTEM_OFF), "internal-error", "fail-entry", "timeout"
    status : int or None, what the guest wrote to the exit port or address; 0 is success
    duration_ns : int, from opening /dev/kvm until all vCPUs stopped
    known : what the listing says must have happened
    observed : KVM_EXIT_* name -> returns of KVM_RUN as the VMM saw them; errno name ("EINTR") for failures
    slowed : userspace exit reason -> ns that the VMM added to each, {} for none
    """

    guest: str
    arguments: dict[str, int]
    isa: str | None
    pid: int
    vcpu_tids: dict[int, int]
    ended: str
    status: int | None
    duration_ns: int
    known: KnownCounts
    observed: dict[str, int]
    slowed: dict[str, int] = field(default_factory=dict)
    schema: str = SCHEMA

    @property
    def succeeded(self) -> bool:
        """Whether the guest ended as its listing says."""
        return self.status == 0 if self.ended == "exit-port" else self.ended == "shutdown"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict (vcpu_tids keyed by str)."""
        values = asdict(self)
        values["vcpu_tids"] = {str(vcpu_id): tid for vcpu_id, tid in self.vcpu_tids.items()}
        return values

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> GuestRun:
        """Return the GuestRun that to_dict() described; unknown keys are ignored.

        Raises
        ------
        KeyError, TypeError
            A required key is missing.
        """
        known = KnownCounts(**values["known"])
        names = set(GuestRun.__dataclass_fields__)
        rest = {name: value for name, value in values.items() if name in names}
        tids = {int(vcpu_id): tid for vcpu_id, tid in values["vcpu_tids"].items()}
        return GuestRun(**{**rest, "known": known, "vcpu_tids": tids})
