"""Which vCPU a KVM_RUN is of: a thread may run several, in turn, and a vCPU may go from thread to thread."""

from __future__ import annotations

from typing import NamedTuple

from kvmtrace.model.states import RUN_STEPS, STEPS


class Identity(NamedTuple):
    """A field that tells the vCPU: of the step `step`, which is an event `kind`."""

    step: str
    kind: str
    field: str
    sentence: str


# best first; the first one that a recording has is used throughout
# fmt: off
VCPU_IDENTITY: tuple[Identity, ...] = (
    Identity("KVM_RUN", "kvm_vcpu_ioctl", "filp", "the vCPU's file"),
    *(Identity(step, STEPS[step].kind, "vcpu", "the vCPU's structure in the kernel") for step in RUN_STEPS.values()),
    Identity("call KVM_RUN", "sys_enter_ioctl", "fd", "the vCPU's descriptor in its process"),
    Identity("VM-entry", "kvm_entry", "vcpu_id", "the vCPU's number in its VM: two VMs may share it"),
)
# fmt: on
# a KVM_RUN begins with the first of these steps behind the last of those
RUN_BEGINS: tuple[str, ...] = ("call KVM_RUN", "KVM_RUN", "FPU load")
RUN_ENDS: tuple[str, ...] = ("userspace exit", "ioctl ends", "return to VMM")
