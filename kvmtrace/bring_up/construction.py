"""A VM's construction, call by call: what each call meant, and whether KVM answered as it must."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.bring_up.contract_check import Judgement, contract_of, judge_ioctl, judge_without_file
from kvmtrace.bring_up.followed import Step
from kvmtrace.bring_up.objects import ObjectTable
from kvmtrace.kvm import ioctls
from kvmtrace.model.bring_up import VENDOR_VCPU, VENDOR_VCPUS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.bring_up.calls import Call
    from kvmtrace.bring_up.objects import Found

MAPPED = Judgement(
    "ok", "{} bytes: kvm_run, the PIO page and the coalesced-MMIO ring", "kvm_vcpu_mmap (virt/kvm/kvm_main.c)"
)
CLOSED = Judgement(
    "ok", "the object itself lives until its last file, mapping and child are gone", "kvm_put_kvm (virt/kvm/kvm_main.c)"
)
OPENED = Judgement("ok", "its descriptor was then used as KVM's system file", "kvm_chardev_ops (virt/kvm/kvm_main.c)")


class Construction:
    """Follows calls in recorded order.

    Parameters
    ----------
    processes : tid -> pid where known; threads of unknown process are taken for the same one
    isa : Isa.name, another module's name, or None
    forks : pid -> pid of the process that forked it, where recorded
    """

    def __init__(self, processes: Mapping[int, int], isa: str | None, forks: Mapping[int, int] | None = None) -> None:
        self.table = ObjectTable(processes, {"vcpu": VENDOR_VCPUS.get(isa or "", VENDOR_VCPU)}, forks or {})
        self.steps: list[Step] = []
        self._followers = {
            "openat": self.table.open,
            "mmap": self._follow_mmap,
            "close": self._follow_close,
            "ioctl": self._follow_ioctl,
        }

    def follow(self, call: Call) -> None:
        """Take the next call."""
        self._followers[call.name](call)

    def _follow_mmap(self, call: Call) -> None:
        known = self.table.opened_as(call)
        if known is None or known.kind != "vcpu":
            return
        self.table.map(known.id, call.arg)
        self._add(call, "mmap", "kvm_run", known.id, MAPPED._replace(sentence=MAPPED.sentence.format(call.arg)))

    def _follow_close(self, call: Call) -> None:
        known = self.table.close(call)
        if known is not None:
            self._add(call, "close", "close", known.id, CLOSED)

    def _follow_ioctl(self, call: Call) -> None:
        name = ioctls.describe_ioctl(call.cmd)
        row = ioctls.IOCTLS.get(call.cmd)
        levels = row.levels if row else ()
        found = self.table.used_as(call, levels)
        if found is None:
            self._add(call, "ioctl", name, self.table.closed_before(call), judge_without_file(call, self.table))
            return
        self._tell_opened(call, found)
        target = found.object
        judgement = judge_ioctl(call, target, levels, self.table)
        kind, made = contract_of(call).makes, ""
        if kind and call.ret is not None and call.ret >= 0:
            made = self.table.make_from(call, target, kind)
        if call.cmd == ioctls.KVM_RUN and target.kind == "vcpu":
            self.table.run(call, target.id)
        self._add(call, "ioctl", name, target.id, judgement, makes=made)

    def _tell_opened(self, call: Call, found: Found) -> None:
        """Add the open() of KVM's system file once its first use has told what it was."""
        if found.opened is not None:
            name = found.object.id
            self._add(found.opened, "open", "/dev/kvm", name, OPENED, fd=call.fd, makes=name)

    def _add(
        self, call: Call, kind: str, name: str, target: str, judgement: Judgement, *, fd: int | None = None,
        makes: str = "",
    ) -> None:  # fmt: skip
        self.steps.append(
            Step(
                event_index=call.event_index,
                ts_ns=call.ts_ns,
                dur_ns=call.dur_ns,
                tid=call.tid,
                call=kind,
                name=name,
                fd=call.fd if fd is None else fd,
                arg=call.arg,
                ret=call.ret,
                object=target,
                makes=makes,
                verdict=judgement.verdict,
                sentence=judgement.sentence,
                source=judgement.source,
            )
        )
