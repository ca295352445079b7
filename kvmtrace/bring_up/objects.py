"""Which file descriptor is what, and which object of KVM exists.

File descriptors are typed by how they came to be: CREATE_VM on a system file gives a VM file, CREATE_VCPU
on a VM file a vCPU file. One that was open before the recording began is typed by its first use, and
marked as assumed. Works for any VMM, and for several VMs in one process.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmtrace.bring_up.followed import KvmObject
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.bring_up import OBJECT_KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.bring_up.calls import Call

UNKNOWN_PID = 0
MAX_GENERATIONS = 100  # of forks between the process that made a VM and one that uses its descriptors
WITH_FILE = frozenset({"vm", "vcpu"})  # their making returns a descriptor
ONE_PER_VM = frozenset({"irqchip", "pit", "memslots"})


class Vm:
    """What the conditions of the contract ask about a VM."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.vcpu_ids: set[int] = set()
        self.made: set[str] = set()


@dataclass(frozen=True)
class Found:
    """What a descriptor turned out to be.

    Parameters
    ----------
    object : KvmObject
    opened : the open() that made its file, where the call at hand is the first to tell so
    """

    object: KvmObject
    opened: Call | None = None


class ObjectTable:
    """The objects of all VMs of a recording, and the descriptors that stand for them.

    Parameters
    ----------
    processes : tid -> pid where known; threads of unknown process are taken for the same one
    words : what OBJECT_KINDS' texts are filled with
    forks : pid -> pid of the process that forked it, where recorded
    """

    def __init__(self, processes: Mapping[int, int], words: Mapping[str, str], forks: Mapping[int, int]) -> None:
        self.forks = forks
        # a process's first thread is its own: the recorder may have learnt its children alone
        self.processes = {**{pid: pid for pid in processes.values()}, **processes}
        self.words = words
        self.objects: dict[str, KvmObject] = {}
        self.notes: list[str] = []
        self._run_tids: dict[str, dict[int, None]] = {}  # vCPU -> threads that called KVM_RUN on it, in order
        self._vms: dict[str, Vm] = {}
        self._fds: dict[tuple[int, int], str] = {}
        self._closed: dict[tuple[int, int], str] = {}
        self._opens: dict[tuple[int, int], Call] = {}
        self._latest: dict[tuple[str, int], str] = {}  # (kind, process) -> the object that it made last
        self._nameless: dict[tuple[str, int], deque[str]] = {}  # the same -> those assumed for what belongs to them
        self._n_made: Counter[tuple[str, str]] = Counter()  # (kind, parent) -> objects; parent "": all of the kind
        self._holders: dict[int, dict[int, str]] = {}  # descriptor -> process -> object

    def pid(self, tid: int) -> int:
        """Return a thread's process, UNKNOWN_PID where it is not known."""
        return self.processes.get(tid, UNKNOWN_PID)

    def vm_of(self, name: str) -> Vm | None:
        """Return the VM that an object belongs to."""
        return self._vms.get(self._vm_name(name))

    def open(self, call: Call) -> None:
        """Remember an open(): its path is not recorded, a later use of the descriptor tells what it was."""
        if call.ret is not None and call.ret >= 0:
            self._opens[self.pid(call.tid), call.ret] = call

    def close(self, call: Call) -> KvmObject | None:
        """Close a descriptor; return the object that it stood for, if any."""
        key = (self.pid(call.tid), call.fd)
        self._opens.pop(key, None)
        name = self._fds.pop(key, None)
        self._holders.get(call.fd, {}).pop(key[0], None)
        if name is None or (call.ret is not None and call.ret < 0):
            return None
        self._closed[key] = name
        self.objects[name] = replace(self.objects[name], closed_ts_ns=call.ts_ns)
        return self.objects[name]

    def closed_before(self, call: Call) -> str:
        """Return the object that the call's descriptor stood for until it was closed, "" if none."""
        return self._closed.get((self.pid(call.tid), call.fd), "")

    def opened_as(self, call: Call) -> KvmObject | None:
        """Return the object that the call's descriptor stands for, without learning from the call."""
        return self.objects.get(self._fds.get((self.pid(call.tid), call.fd), ""))

    def used_as(self, call: Call, levels: tuple[str, ...]) -> Found | None:
        """Return what the descriptor stands for; an unknown one that works is typed by its use."""
        key = (self.pid(call.tid), call.fd)
        name = self._fds.get(key) or self._inherited(key, call)
        if name:
            return Found(self.objects[name])
        if call.ret is None or call.ret < 0 or not levels or levels[0] == "device":
            return None
        return self._assume(call, levels[0], key)

    def map(self, name: str, n_bytes: int) -> None:
        """Note that a vCPU's kvm_run area was mapped."""
        self.objects[name] = replace(self.objects[name], mmap_bytes=n_bytes)

    def run(self, call: Call, name: str) -> None:
        """Note which thread ran a vCPU, and when it ran first."""
        if name not in self._run_tids:
            self.objects[name] = replace(self.objects[name], first_run_ns=call.ts_ns)
        self._run_tids.setdefault(name, {})[call.tid] = None

    def finished(self) -> tuple[KvmObject, ...]:
        """Return all objects, with the threads that ran them."""
        ran = self._run_tids
        return tuple(
            replace(known, run_tids=tuple(ran[name])) if name in ran else known for name, known in self.objects.items()
        )

    def make_from(self, call: Call, target: KvmObject, kind: str) -> str:
        """Create the object that a successful call made; `ret` is its descriptor where it has one."""
        number = call.arg if kind == "vcpu" else None
        return self._make(call, kind, target.id, call.ret if kind in WITH_FILE else None, number=number)

    def _inherited(self, key: tuple[int, int], call: Call) -> str | None:
        """Return the object of the same descriptor in the one process that has it (fork copies files).

        Of two processes that are known and no kin, a descriptor's number says nothing, but KVM's EIO does.
        """
        owners = self._holders.get(key[1], {})
        if len(owners) != 1 or key in self._closed:
            return None
        pid, name = next(iter(owners.items()))
        is_kin = UNKNOWN_PID in (pid, key[0]) or self._descends(key[0], pid)
        return name if is_kin or call.ret == -errno.EIO else None

    def _descends(self, pid: int, ancestor: int) -> bool:
        for _ in range(MAX_GENERATIONS):
            if pid == ancestor or pid not in self.forks:
                break
            pid = self.forks[pid]
        return pid == ancestor

    def _assume(self, call: Call, level: str, key: tuple[int, int]) -> Found:
        opened = self._opens.pop(key, None) if level == "system" else None
        nameless = self._nameless.get((level, key[0]))
        if opened is None and nameless:  # assumed before, for what belongs to it
            name = nameless.popleft()
            self.objects[name] = replace(self.objects[name], fd=call.fd)
            self._hold(key, name)
            return Found(self.objects[name])
        parent = self._assumed_parent(call, level, key[0])
        name = self._make(opened or call, level, parent, call.fd, assumed=opened is None)
        if opened is None:
            self.notes.append(f"{name} was made before the recording began")
        return Found(self.objects[name], opened)

    def _assumed_parent(self, call: Call, level: str, pid: int) -> str:
        """Return what an object that nobody was seen to make belongs to, assumed as well if need be."""
        parent = ""
        if level != "system":
            parent = self._latest.get(("system", pid)) or self._make(call, "system", "", None, assumed=True)
        if level == "vcpu":
            parent = self._latest.get(("vm", pid)) or self._make(call, "vm", parent, None, assumed=True)
        return parent

    def _hold(self, key: tuple[int, int], name: str) -> None:
        """Note that a process's descriptor stands for an object."""
        self._fds[key] = name
        self._holders.setdefault(key[1], {})[key[0]] = name

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
                id=name,
                kind=kind,
                parent=parent,
                fd=fd,
                number=number,
                tid=call.tid,
                ts_ns=call.ts_ns,
                kernel_object=row.kernel_object.format(**self.words),
                file=row.file.replace(":N", "" if number is None else f":{number}"),
                assumed=assumed,
            )
            self._n_made[kind, parent] += 1
            if parent:
                self._n_made[kind, ""] += 1
            made_by = (kind, self.pid(call.tid))
            self._latest[made_by] = name
            if assumed and fd is None:
                self._nameless.setdefault(made_by, deque()).append(name)
        if kind == "vm":
            self._vms[name] = Vm(self.pid(call.tid))
        vm = self.vm_of(name)
        if vm is not None:
            vm.made.add(kind)
            if number is not None:
                vm.vcpu_ids.add(number)
        if fd is not None:
            key = (self.pid(call.tid), fd)
            self._hold(key, name)
            self._closed.pop(key, None)
        return name

    def _new_id(self, kind: str, parent: str, number: int | None) -> str:
        if kind in ONE_PER_VM:
            return f"{parent}.{kind}"
        if kind == "system":
            return f"kvm{self._n_made[kind, '']}"
        if kind == "vm":
            return f"vm{self._n_made[kind, '']}"
        return f"{parent}.{kind}{self._n_made[kind, parent] if number is None else number}"

    def _vm_name(self, name: str) -> str:
        while name and self.objects[name].kind != "vm":
            name = self.objects[name].parent
        return name
