"""Which file descriptor is what, which object exists, and whether KVM answered as it must.

File descriptors are typed by how they came to be: CREATE_VM on a system file gives a VM file, CREATE_VCPU
on a VM file a vCPU file. One that was open before the recording began is typed by its first use, and
marked as assumed. Works for any VMM, and for several VMs in one process.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmtrace.bring_up.construction_steps import Judgement, KvmObject, Step
from kvmtrace.kvm import ioctls
from kvmtrace.model.bring_up import (
    CONTRACTS,
    KNOWN_FAILURES,
    OBJECT_KINDS,
    OTHER_PROCESS,
    RUN_AGAIN,
    SOURCES,
    VENDOR_VCPU,
    VENDOR_VCPUS,
    Contract,
    Refusal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmtrace.bring_up.construction_steps import Call

UNKNOWN_PID = 0
# the errnos by which KVM says "this file does not take that ioctl"
WRONG_FILE = {errno.ENOTTY, errno.EINVAL, errno.EPERM}


class _Vm:
    """What the conditions of the contract ask about a VM."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.vcpu_ids: set[int] = set()
        self.made: set[str] = set()


# condition of model/bring_up.py -> does it hold for (vm, argument, calling process)?
CONDITIONS: Mapping[str, Callable[[_Vm | None, int, int], bool]] = {
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
    return Judgement("unknown", f"failed with {_describe_errno(call.ret)}: {os.strerror(-call.ret)}")


class Construction:
    """Follows calls in recorded order.

    Parameters
    ----------
    processes : tid -> pid where known; threads of unknown process are taken for the same one
    isa : "vmx", "svm", another module's name, or None
    forks : pid -> pid of the process that forked it, where recorded
    """

    def __init__(self, processes: Mapping[int, int], isa: str | None, forks: Mapping[int, int] | None = None) -> None:
        self.forks = forks or {}
        # a process's first thread is its own: the recorder may have learnt its children alone
        self.processes = {**{pid: pid for pid in processes.values()}, **processes}
        self.words = {"vcpu": VENDOR_VCPUS.get(isa or "", VENDOR_VCPU)}
        self.objects: dict[str, KvmObject] = {}
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self._vms: dict[str, _Vm] = {}
        self._fds: dict[tuple[int, int], str] = {}
        self._closed: dict[tuple[int, int], str] = {}
        self._opens: dict[tuple[int, int], Call] = {}
        self._owners: dict[str, int] = {}  # object -> process that made it

    def follow(self, call: Call) -> None:
        """Take the next call."""
        getattr(self, f"_follow_{call.name}")(call)

    # -- calls other than ioctl ------------------------------------------------------------------

    def _follow_openat(self, call: Call) -> None:
        # the path is a pointer into the VMM's memory: an open is /dev/kvm's if its fd is used so later
        if call.ret is not None and call.ret >= 0:
            self._opens[self._pid(call.tid), call.ret] = call

    def _follow_mmap(self, call: Call) -> None:
        known = self.objects.get(self._fds.get((self._pid(call.tid), call.fd), ""))
        if known is None or known.kind != "vcpu":
            return
        self.objects[known.id] = replace(known, mmap_bytes=call.arg)
        self._add(
            call,
            "mmap",
            "kvm_run",
            known.id,
            Judgement(
                "ok",
                f"{call.arg} bytes: kvm_run, the PIO page and the coalesced-MMIO ring",
                "kvm_vcpu_mmap (virt/kvm/kvm_main.c)",
            ),
        )

    def _follow_close(self, call: Call) -> None:
        key = (self._pid(call.tid), call.fd)
        self._opens.pop(key, None)
        name = self._fds.pop(key, None)
        if name is None or (call.ret is not None and call.ret < 0):
            return
        self._closed[key] = name
        self.objects[name] = replace(self.objects[name], closed_ts_ns=call.ts_ns)
        self._add(
            call,
            "close",
            "close",
            name,
            Judgement(
                "ok",
                "the object itself lives until its last file, mapping and child are gone",
                "kvm_put_kvm (virt/kvm/kvm_main.c)",
            ),
        )

    # -- ioctls ----------------------------------------------------------------------------------

    def _follow_ioctl(self, call: Call) -> None:
        name = ioctls.describe_ioctl(call.cmd)
        row = ioctls.IOCTLS.get(call.cmd)
        levels = row.levels if row else ()
        target = self._object_of(call, levels)
        if target is None:
            key = (self._pid(call.tid), call.fd)
            self._add(call, "ioctl", name, self._closed.get(key, ""), self._explain_no_file(call, key))
            return
        contract = CONTRACTS.get(call.cmd, Contract(call.cmd))
        judgement = self._judge(call, target, contract, levels)
        made = ""
        if contract.makes and call.ret is not None and call.ret >= 0:
            made = self._make_from(call, target, contract.makes)
        if call.cmd == ioctls.KVM_RUN and target.kind == "vcpu":
            self._note_run(call, target.id)
        self._add(call, "ioctl", name, target.id, judgement, makes=made)

    def _explain_no_file(self, call: Call, key: tuple[int, int]) -> Judgement:
        if call.ret == -errno.EBADF:
            what = f"{self._closed[key]} was closed before" if key in self._closed else "no such descriptor"
            return Judgement("explained", f"{what}: the descriptor is not open", "ksys_ioctl (fs/ioctl.c)")
        return Judgement("unknown", "the descriptor was made before the recording began, or elsewhere")

    def _judge(self, call: Call, target: KvmObject, contract: Contract, levels: tuple[str, ...]) -> Judgement:
        """Say what the contract says of one ioctl on a known object."""
        if call.ret is None:
            return Judgement("unknown", "its return was not recorded")
        refusal = self._refusal(call, target, contract)
        if refusal is not None:
            return _judge_refusal(call.ret, refusal)
        wrong_file = bool(levels) and target.kind not in levels
        if call.ret < 0:
            misuse = f"a {levels[0]} ioctl on a {target.kind} file" if wrong_file else ""
            unknown = target.kind in {"vm", "vcpu"} and self._pid(call.tid) == UNKNOWN_PID and bool(self.processes)
            return _judge_failure(call, misuse, of_unknown_process=unknown)
        if wrong_file:
            return Judgement("violation", f"a {target.kind} file accepted a {levels[0]} ioctl", SOURCES)
        if contract.returns is not None and call.ret != contract.returns:
            return Judgement("violation", f"returned {call.ret}, must return {contract.returns}", SOURCES)
        return Judgement("ok", contract.sentence, SOURCES)

    def _refusal(self, call: Call, target: KvmObject, contract: Contract) -> Refusal | None:
        vm = self._vms.get(self._vm_of(target.id))
        common = (OTHER_PROCESS,) if target.kind in {"vm", "vcpu"} else ()
        refusals: tuple[Refusal, ...] = (*common, *contract.refusals)
        for refusal in refusals:
            if CONDITIONS[refusal.condition](vm, call.arg, self._pid(call.tid)):
                return refusal
        return None

    # -- objects ---------------------------------------------------------------------------------

    def _object_of(self, call: Call, levels: tuple[str, ...]) -> KvmObject | None:
        """Return what the descriptor stands for; an unknown one that works is typed by its use."""
        key = (self._pid(call.tid), call.fd)
        name = self._fds.get(key) or self._inherited(key, call)
        if name:
            return self.objects[name]
        if call.ret is None or call.ret < 0 or not levels or levels[0] == "device":
            return None
        return self.objects[self._assume(call, levels[0], key)]

    def _inherited(self, key: tuple[int, int], call: Call) -> str | None:
        """Return the object of the same descriptor in the one process that has it (fork copies files).

        Of two processes that are known and no kin, a descriptor's number says nothing, but KVM's EIO does.
        """
        owners = {(pid, name) for (pid, fd), name in self._fds.items() if fd == key[1]}
        if len(owners) != 1 or key in self._closed:
            return None
        pid, name = owners.pop()
        is_kin = UNKNOWN_PID in (pid, key[0]) or self._descends(key[0], pid)
        return name if is_kin or call.ret == -errno.EIO else None

    def _descends(self, pid: int, ancestor: int) -> bool:
        seen: set[int] = set()
        while pid in self.forks and pid not in seen and pid != ancestor:
            seen.add(pid)
            pid = self.forks[pid]
        return pid == ancestor

    def _assume(self, call: Call, level: str, key: tuple[int, int]) -> str:
        opened = self._opens.pop(key, None) if level == "system" else None
        nameless = next((o for o in self._own(level, key[0]) if o.assumed and o.fd is None), None)
        if opened is None and nameless is not None:  # assumed before, for what belongs to it
            self.objects[nameless.id] = replace(nameless, fd=call.fd)
            self._fds[key] = nameless.id
            return nameless.id
        parent = ""
        if level != "system":
            systems = self._own("system", key[0])
            parent = systems[-1].id if systems else self._make(call, "system", "", None, assumed=True)
        if level == "vcpu":
            vms = self._own("vm", key[0])
            parent = vms[-1].id if vms else self._make(call, "vm", parent, None, assumed=True)
        name = self._make(opened or call, level, parent, call.fd, assumed=opened is None)
        if opened is not None:
            judgement = Judgement(
                "ok", "its descriptor was then used as KVM's system file", "kvm_chardev_ops (virt/kvm/kvm_main.c)"
            )
            self._add(opened, "open", "/dev/kvm", name, judgement, fd=call.fd, makes=name)
        else:
            self.notes.append(f"{name} was made before the recording began")
        return name

    def _own(self, kind: str, pid: int) -> list[KvmObject]:
        """Return the objects of a kind that a process made."""
        return [known for known in self._all(kind) if self._owners[known.id] == pid]

    def _make_from(self, call: Call, target: KvmObject, kind: str) -> str:
        """Create the object that a successful call made; `ret` is its descriptor where it has one."""
        has_file = kind in {"vm", "vcpu"}
        number = call.arg if kind == "vcpu" else None
        return self._make(call, kind, target.id, call.ret if has_file else None, number=number)

    def _make(
        self,
        call: Call,
        kind: str,
        parent: str,
        fd: int | None,
        *,
        number: int | None = None,
        assumed: bool = False,
    ) -> str:
        name = self._new_id(kind, parent, number)
        if name not in self.objects:
            row = OBJECT_KINDS[kind]
            self.objects[name] = KvmObject(
                name,
                kind,
                parent,
                fd,
                number,
                call.tid,
                call.ts_ns,
                row.kernel_object.format(**self.words),
                row.file.replace(":N", "" if number is None else f":{number}"),
                assumed,
            )
        self._owners.setdefault(name, self._pid(call.tid))
        if kind == "vm":
            self._vms[name] = _Vm(self._pid(call.tid))
        vm = self._vms.get(self._vm_of(name))
        if vm is not None:
            vm.made.add(kind)
            if number is not None:
                vm.vcpu_ids.add(number)
        if fd is not None:
            key = (self._pid(call.tid), fd)
            self._fds[key] = name
            self._closed.pop(key, None)
        return name

    def _new_id(self, kind: str, parent: str, number: int | None) -> str:
        if kind in {"irqchip", "pit", "memslots"}:
            return f"{parent}.{kind}"
        of_kind = self._all(kind)
        if kind == "system":
            return f"kvm{len(of_kind)}"
        if kind == "vm":
            return f"vm{len(of_kind)}"
        siblings = sum(other.parent == parent for other in of_kind)
        return f"{parent}.{kind}{siblings if number is None else number}"

    def _all(self, kind: str) -> list[KvmObject]:
        return [known for known in self.objects.values() if known.kind == kind]

    def _vm_of(self, name: str) -> str:
        while name and self.objects[name].kind != "vm":
            name = self.objects[name].parent
        return name

    def _note_run(self, call: Call, name: str) -> None:
        vcpu = self.objects[name]
        tids = vcpu.run_tids if call.tid in vcpu.run_tids else (*vcpu.run_tids, call.tid)
        first = call.ts_ns if vcpu.first_run_ns is None else vcpu.first_run_ns
        self.objects[name] = replace(vcpu, run_tids=tids, first_run_ns=first)

    def _pid(self, tid: int) -> int:
        return self.processes.get(tid, UNKNOWN_PID)

    def _add(
        self, call: Call, kind: str, name: str, target: str, judgement: Judgement, *, fd: int | None = None,
        makes: str = "",
    ) -> None:  # fmt: skip
        self.steps.append(
            Step(
                call.event_index,
                call.ts_ns,
                call.dur_ns,
                call.tid,
                kind,
                name,
                call.fd if fd is None else fd,
                call.arg,
                call.ret,
                target,
                makes,
                *judgement,
            )
        )
