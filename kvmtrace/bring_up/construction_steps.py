"""What the following of a construction takes in and gives: calls, steps, objects, judgements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Call:
    """A system call as recorded; `cmd` and `arg` are 0 where the call has none, `ret` None if not seen."""

    name: str
    event_index: int
    ts_ns: int
    dur_ns: int | None
    tid: int
    fd: int
    cmd: int
    arg: int
    ret: int | None


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


class Judgement(NamedTuple):
    """What the model says of one call; see Step."""

    verdict: str
    sentence: str
    source: str = ""
