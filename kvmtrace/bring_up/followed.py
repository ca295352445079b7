"""A VM's construction as values: the report document's `bring_up`."""

from __future__ import annotations

import errno
import os
from dataclasses import field

from kvmtrace.lazy_dataclass import dataclass


@dataclass(frozen=True)
class Step:
    """One call of the construction.

    Parameters
    ----------
    call : "open" "ioctl" "mmap" "close"
    name : "KVM_CREATE_VM", "/dev/kvm", "kvm_run"
    object, makes : ids of the object called upon and of the one made ("vm0.vcpu1"), "" if none
    verdict : "ok", "explained" (KVM refused as it must), "violation", "unknown"
    sentence, source : why, and where the kernel says so
    """

    event_index: int
    ts_ns: int
    dur_ns: int | None
    tid: int
    call: str
    name: str
    fd: int
    arg: int
    ret: int | None
    object: str
    makes: str
    verdict: str
    sentence: str
    source: str


@dataclass(frozen=True)
class KvmObject:
    """A kernel object: "kvm0", "vm0", "vm0.vcpu1", "vm0.irqchip".

    Parameters
    ----------
    number : int or None, vCPU id
    tid, ts_ns : the thread that made it, and when
    run_tids : threads that called KVM_RUN on a vCPU, in order
    mmap_bytes : size of a vCPU's mapped kvm_run area
    assumed : made before the recording began
    """

    id: str
    kind: str
    parent: str
    fd: int | None
    number: int | None
    tid: int
    ts_ns: int
    kernel_object: str
    file: str
    assumed: bool = False
    closed_ts_ns: int | None = None
    first_run_ns: int | None = None
    run_tids: tuple[int, ...] = ()
    mmap_bytes: int | None = None


@dataclass(frozen=True)
class VmmStep:
    """One probed call of the VMM: `role` is the event, `argument` its recorded argument or result in words."""

    event_index: int
    ts_ns: int
    tid: int
    role: str
    argument: str
    sentence: str


@dataclass(frozen=True)
class Accelerator:
    """An accelerator of the VMM's list that was tried; `ret` of its initialisation, None if it never returned."""

    name: str
    ret: int | None

    @property
    def sentence(self) -> str:
        """What came of it."""
        if self.ret is None:
            return f"{self.name} was not seen to be initialised"
        if self.ret >= 0:
            return f"{self.name} was taken"
        reason = f"{errno.errorcode.get(-self.ret, str(self.ret))}: {os.strerror(min(-self.ret, 4095))}"
        return f"{self.name} failed to initialise ({reason})"


@dataclass(frozen=True)
class VmmStart:
    """The VMM's start.

    Parameters
    ----------
    steps : probed calls in recorded order, type registrations aside
    n_types : types registered
    inheritance : chains from a type to its root, as registered: ("kvm-accel", "accel", "object")
    findings : where the start differs from the model's order or inheritance; a VMM's freedom, not KVM's fault
    accelerators : those tried, in order; the next of the list follows where one fails
    """

    steps: tuple[VmmStep, ...]
    n_types: int
    inheritance: tuple[tuple[str, ...], ...]
    findings: tuple[str, ...]
    accelerators: tuple[Accelerator, ...] = ()


@dataclass(frozen=True)
class QmpCheck:
    """QEMU's answers held against the trace.

    Parameters
    ----------
    version : str, QEMU's version, "" if unknown
    kvm : bool or None, KVM is enabled
    threads : vCPU index -> thread id, as QEMU says
    agreed, differed : findings in words
    error : str, why QEMU could not be asked, ""
    """

    version: str
    kvm: bool | None
    threads: dict[int, int]
    agreed: tuple[str, ...]
    differed: tuple[str, ...]
    error: str = ""


@dataclass(frozen=True)
class BringUp:
    """The report document's `bring_up`.

    Parameters
    ----------
    steps : the calls in recorded order
    objects : what they made
    ioctl_counts : ioctl name -> calls in the whole recording
    n_explained : calls that KVM refused as its contract says
    n_violations : calls whose result contradicts the contract
    notes : what the recording does not show
    vmm : the VMM's own start, None if its functions were not probed
    qmp : what QEMU itself said, beside what the trace shows; None if it was not asked
    """

    steps: tuple[Step, ...]
    objects: tuple[KvmObject, ...]
    ioctl_counts: dict[str, int] = field(default_factory=dict)
    n_explained: int = 0
    n_violations: int = 0
    notes: tuple[str, ...] = ()
    vmm: VmmStart | None = None
    qmp: QmpCheck | None = None

    @property
    def conforms(self) -> bool:
        """Say whether KVM kept its contract in every recorded call."""
        return self.n_violations == 0
