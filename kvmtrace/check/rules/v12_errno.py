"""V12: kvm_userspace_exit carries the value that the ioctl returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, USERSPACE
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.ordering import STEPS_OF_A_NEW_CALL
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V12",
    "errno equals the return value",
    VIOLATION,
    ("kvm_userspace_exit.errno",),
    "kvm_userspace_exit carries the value that the ioctl returns.",
    "kvm_vcpu_ioctl (virt/kvm/kvm_main.c)",
    places="userspace exit",
    blames_handler=False,
    healthy="""
sys_enter_ioctl: fd=12 cmd=0xae80 arg=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_fpu: load=0
kvm_userspace_exit: reason=10 errno=-4
sys_exit_ioctl: ret=0xfffffffffffffffc
sys_enter_ioctl: fd=12 cmd=0xae80 arg=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
sys_enter_ioctl: fd=12 cmd=0xae80 arg=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_fpu: load=0
kvm_userspace_exit: reason=10 errno=-4
sys_exit_ioctl: ret=0
sys_enter_ioctl: fd=12 cmd=0xae80 arg=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.part("the range of errno", adds=False, local=True)
def _range(excerpt: Excerpt, found: Found) -> None:
    """Check that KVM_RUN returns 0 or a negative errno."""
    positions = excerpt.segments.positions("userspace exit")
    errno = excerpt.sequence.values("kvm_userspace_exit", "errno", positions).astype(np.int64)
    at = np.flatnonzero((errno > 0) | (errno < -4095))
    found.violate(positions[at], lambda i: ("errno 0 or negative", f"{int(errno[at[i]])}"))


@RULE.part("what kvm_vcpu_ioctl returns", needs=("kvm_vcpu_ioctl_return.ret",), adds=False, local=True)
def _probe(excerpt: Excerpt, found: Found) -> None:
    _check_return(excerpt, found, "ioctl ends", "kvm_vcpu_ioctl_return")


@RULE.part("what the system call returns", needs=("sys_exit_ioctl.ret",), adds=False, local=True)
def _system_call(excerpt: Excerpt, found: Found) -> None:
    _check_return(excerpt, found, "return to VMM", "sys_exit_ioctl")


def _check_return(excerpt: Excerpt, found: Found, name: str, kind: str) -> None:
    """Compare with the first such return behind the userspace exit, if nothing else was called between."""
    segments, sequence = excerpt.segments, excerpt.sequence
    owners, positions = segments.firsts(name)
    mine = segments.kind[owners] == USERSPACE
    owners, positions = owners[mine], positions[mine]
    if not len(owners):
        return
    new_call = [CLASS[step] for step in STEPS_OF_A_NEW_CALL]
    count = np.append(0, np.cumsum(among(sequence.cls, new_call) | sequence.broken))
    start = segments.start[owners]
    direct = count[positions + 1] == count[start + 1]
    start, positions = start[direct], positions[direct]
    errno = sequence.values("kvm_userspace_exit", "errno", start).astype(np.int64)
    ret = sequence.values(kind, "ret", positions).astype(np.int64)
    at = np.flatnonzero(errno != ret)
    found.check(len(start))
    found.violate(
        positions[at],
        lambda i: (f"return value {int(errno[at[i]])}, as kvm_userspace_exit said", f"{int(ret[at[i]])}"),
    )
