"""Whether KVM answered a call as its contract (model/bring_up.py) says."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from kvmtrace.bring_up.objects import UNKNOWN_PID
from kvmtrace.kvm import ioctls
from kvmtrace.model.bring_up import (
    CONTRACTS,
    KNOWN_FAILURES,
    OTHER_PROCESS,
    RUN_AGAIN,
    SOURCES,
    Contract,
    Refusal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmtrace.bring_up.calls import Call
    from kvmtrace.bring_up.followed import KvmObject
    from kvmtrace.bring_up.objects import ObjectTable, Vm

# the errnos by which KVM says "this file does not take that ioctl"
WRONG_FILE = {errno.ENOTTY, errno.EINVAL, errno.EPERM}


class Judgement(NamedTuple):
    """What the model says of one call; see Step."""

    verdict: str
    sentence: str
    source: str = ""


# condition of model/bring_up.py -> does it hold for (vm, argument, calling process)?
CONDITIONS: Mapping[str, Callable[[Vm | None, int, int], bool]] = {
    "argument": lambda _vm, arg, _pid: arg != 0,
    "irqchip": lambda vm, _arg, _pid: vm is not None and "irqchip" in vm.made,
    "pit": lambda vm, _arg, _pid: vm is not None and "pit" in vm.made,
    "vcpus": lambda vm, _arg, _pid: vm is not None and bool(vm.vcpu_ids),
    "vcpu_id": lambda vm, arg, _pid: vm is not None and arg in vm.vcpu_ids,
    # a thread whose process the recorder did not learn is not held to be of another one
    "other_process": lambda vm, _arg, pid: vm is not None and UNKNOWN_PID not in (vm.pid, pid) and vm.pid != pid,
}


def _describe_errno(ret: int) -> str:
    return errno.errorcode.get(-ret, str(-ret))


MAX_ERRNO = 4095  # the kernel has no more; what a damaged file says may be any number


def _judge_refusal(ret: int, refusal: Refusal) -> Judgement:
    """Compare an answer with the refusal that was due."""
    must = errno.errorcode[refusal.errno]
    if ret == -refusal.errno:
        return Judgement("explained", f"refused with {must}: {refusal.sentence}", refusal.source)
    if ret < 0:
        sentence = f"failed with {_describe_errno(ret)}; {must} was due: {refusal.sentence}"
        return Judgement("unknown", sentence, refusal.source)
    return Judgement("violation", f"succeeded, must fail with {must}: {refusal.sentence}", refusal.source)


def _judge_failure(call: Call, misuse: str, *, of_unknown_process: bool) -> Judgement:
    """Explain a failure that no refusal of the contract predicted."""
    assert call.ret is not None
    if call.ret == -errno.EIO and of_unknown_process:
        sentence = f"refused with EIO: {OTHER_PROCESS.sentence} (which one thread {call.tid} is of was not recorded)"
        return Judgement("explained", sentence, OTHER_PROCESS.source)
    if misuse and -call.ret in WRONG_FILE:
        return Judgement("explained", misuse, SOURCES)
    known = KNOWN_FAILURES.get((call.cmd, -call.ret))
    if known is not None and not misuse:
        return Judgement("explained", f"refused with {_describe_errno(call.ret)}: {known[0]}", known[1])
    if call.cmd == ioctls.KVM_RUN and -call.ret in RUN_AGAIN:
        sentence = f"back to userspace with {_describe_errno(call.ret)}, to be called again"
        return Judgement("ok", sentence, SOURCES)
    return Judgement("unknown", f"failed with {_describe_errno(call.ret)}: {os.strerror(min(-call.ret, MAX_ERRNO))}")


def contract_of(call: Call) -> Contract:
    """Return what KVM owes for an ioctl."""
    return CONTRACTS.get(call.cmd, Contract(call.cmd))


def judge_ioctl(call: Call, target: KvmObject, levels: tuple[str, ...], table: ObjectTable) -> Judgement:
    """Say what the contract says of one ioctl on a known object.

    Parameters
    ----------
    levels : kinds of file that take the ioctl, () if it is not known
    """
    if call.ret is None:
        return Judgement("unknown", "its return was not recorded")
    contract = contract_of(call)
    refusal = _refusal(call, target, contract, table)
    if refusal is not None:
        return _judge_refusal(call.ret, refusal)
    wrong_file = bool(levels) and target.kind not in levels
    if call.ret < 0:
        misuse = f"a {levels[0]} ioctl on a {target.kind} file" if wrong_file else ""
        of_vm = target.kind in {"vm", "vcpu"}
        unknown = of_vm and table.pid(call.tid) == UNKNOWN_PID and bool(table.processes)
        return _judge_failure(call, misuse, of_unknown_process=unknown)
    if wrong_file:
        return Judgement("violation", f"a {target.kind} file accepted a {levels[0]} ioctl", SOURCES)
    if contract.returns is not None and call.ret != contract.returns:
        return Judgement("violation", f"returned {call.ret}, must return {contract.returns}", SOURCES)
    return Judgement("ok", contract.sentence, SOURCES)


def judge_without_file(call: Call, table: ObjectTable) -> Judgement:
    """Explain an ioctl on a descriptor that stands for nothing known."""
    if call.ret == -errno.EBADF:
        closed = table.closed_before(call)
        what = f"{closed} was closed before" if closed else "no such descriptor"
        return Judgement("explained", f"{what}: the descriptor is not open", "ksys_ioctl (fs/ioctl.c)")
    return Judgement("unknown", "the descriptor was made before the recording began, or elsewhere")


def _refusal(call: Call, target: KvmObject, contract: Contract, table: ObjectTable) -> Refusal | None:
    vm = table.vm_of(target.id)
    common = (OTHER_PROCESS,) if target.kind in {"vm", "vcpu"} else ()
    refusals: tuple[Refusal, ...] = (*common, *contract.refusals)
    for refusal in refusals:
        if CONDITIONS[refusal.condition](vm, call.arg, table.pid(call.tid)):
            return refusal
    return None
