"""The VMs of a recording, or of the machine: noted while they live, found by their names."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmtrace.capture import pid_namespace, vm_identity
from kvmtrace.capture.vm_identity import (
    MAX_VCPUS,
    MAX_VMS,
    PROC,
    VmIdentity,
    bounded,
    debugfs_folders,
    descendants,
    identify,
    numbers,
)
from kvmtrace.capture.vmm_arguments import UUID, told_by_arguments
from kvmtrace.errors import UsageError
from kvmtrace.kvm.vm_names import is_meant, vm_label

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LISTED = 8  # in a message
YOUNG_S = 3.0  # a process that has no VM yet may get one
YOUNG_LOOK_S, OLD_LOOK_S = 0.25, 2.0  # between looks, at first and later


class Vms:
    """The VMs of a recording: those of the target and its children, or all of the machine.

    Parameters
    ----------
    pid : int or None, the target; None for the whole machine
    argv : the command that the target will become, or ()
    """

    def __init__(self, pid: int | None, argv: Sequence[str] = ()) -> None:
        self.pid = pid
        self.known: dict[tuple[int, int | None], VmIdentity] = {}
        self._ids_are_ours = pid_namespace.is_initial()
        self._seen: dict[int, float] = {}  # process without a VM -> until when it is looked at again
        self._began, self._next = time.monotonic(), 0.0
        told = told_by_arguments(argv) if argv and pid is not None else None
        self._coming = None if told is None or pid is None else identify(pid, argv)
        if self._coming is not None:
            self._coming = replace(self._coming, comm=bounded(os.path.basename(argv[0])[:15]))  # noqa: PTH119

    def look(self, *, force: bool = False) -> None:
        """Note the VMs that exist now.

        Parameters
        ----------
        force : look at processes again that are known, and at those that had no VM; costs a look at every open file
        """
        now = time.monotonic()
        if not self._ids_are_ours or (now < self._next and not force):
            return
        self._next = now + (YOUNG_LOOK_S if now < self._began + YOUNG_S else OLD_LOOK_S)
        folders = debugfs_folders()
        for pid in self._candidates(folders, force=force):
            found = identify(pid, debugfs=folders.get(pid, ()))
            if found is None:
                self._seen.setdefault(pid, time.monotonic() + YOUNG_S)
            else:
                self._note(found)

    def _candidates(self, folders: dict[int, list[str]], *, force: bool) -> list[int]:
        if self.pid is not None:
            return descendants(self.pid)
        known = {pid for pid, _ in self.known}
        if force:
            return numbers(PROC)
        now = time.monotonic()
        if vm_identity.DEBUGFS.is_dir():
            return [pid for pid in folders if pid not in known]
        return [pid for pid in numbers(PROC) if pid not in known and now < self._seen.get(pid, now + 1)]

    def _note(self, found: VmIdentity) -> None:
        """Keep what is new of a VM, and what only an earlier look saw."""
        key = (found.pid, found.started_ticks)
        before = self.known.get(key)
        if before is None and len(self.known) >= MAX_VMS:
            return
        if before is not None:
            found = replace(found, vcpus=before.vcpus | found.vcpus, debugfs=found.debugfs or before.debugfs)
        self.known[key] = found

    def forget(self, pid: int, started_ticks: int | None) -> None:
        """Forget a VM that is gone, so that those of a year have room."""
        self.known.pop((pid, started_ticks), None)
        self._seen = {seen: until for seen, until in self._seen.items() if (PROC / str(seen)).exists()}

    def add_qmp(self, answer: dict[str, Any] | None) -> None:
        """Add what the target's QEMU said itself: its word on name, uuid and vCPU threads goes before all others."""
        if not answer or self.pid is None or "error" in answer:
            return
        own = [key for key in self.known if key[0] == self.pid]
        vm = self.known[own[-1]] if own else VmIdentity(self.pid, kind="qemu")
        cpus = answer.get("cpus")
        for row in cpus if isinstance(cpus, list) else []:
            number, tid = (row.get("cpu-index"), row.get("thread-id")) if isinstance(row, dict) else (None, None)
            if type(number) is int and type(tid) is int and 0 <= number < MAX_VCPUS:
                vm.vcpus[tid] = number
        name, uuid = _member(answer.get("name"), "name"), _member(answer.get("uuid"), "UUID")
        if name:
            vm = replace(vm, name=bounded(name), name_from="qmp")
        if uuid and UUID.match(uuid) and set(uuid) - set("0-"):
            vm = replace(vm, uuid=uuid.lower())
        self.known[own[-1] if own else (self.pid, None)] = vm

    def rows(self) -> list[VmIdentity]:
        """Return the VMs by process id; the command that was to be one, where it was gone before anybody looked."""
        found = sorted(self.known.values(), key=lambda vm: (vm.pid, vm.started_ticks or 0))
        if self._coming is not None and not found:
            return [self._coming]
        return found

    def as_meta(self) -> list[dict[str, Any]]:
        """Return the metadata's `vms`."""
        return [vm.as_meta() for vm in self.rows()]


def _member(value: Any, name: str) -> str | None:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def matches(vm: VmIdentity, wanted: str) -> bool:
    """Say whether `--vm` means this VM."""
    return is_meant(wanted, vm.name, vm.uuid)


def find_running(wanted: str) -> list[VmIdentity]:
    """Return the VMs of the machine that `--vm` means, by process id."""
    return [vm for vm in running() if matches(vm, wanted)]


def running() -> list[VmIdentity]:
    """Return the VMs of the machine, by process id."""
    vms = Vms(None)
    vms.look(force=True)
    return vms.rows()


def find_one(wanted: str) -> VmIdentity:
    """Return the one VM of the machine that `--vm` means.

    Raises
    ------
    UsageError
        None or several are meant.
    CapabilityError
        Processes cannot be told by their ids here.
    """
    pid_namespace.require_initial("finding a VM by its name", "-a, the whole machine,")
    there = running()
    found = [vm for vm in there if matches(vm, wanted)]
    if len(found) == 1:
        return found[0]
    labels = [vm_label(vm.name, vm.kind, vm.comm, vm.pid) for vm in found or there]
    more = f" and {len(labels) - MAX_LISTED} more" if len(labels) > MAX_LISTED else ""
    listed = ", ".join(labels[:MAX_LISTED]) + more
    if found:
        raise UsageError(f"--vm {wanted} means {len(found)} VMs ({listed}); give one, or -a for all")
    raise UsageError(f"no VM {wanted} is running here; there " + (f"is {listed}" if labels else "is none at all"))
