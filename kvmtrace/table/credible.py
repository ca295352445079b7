"""Which types the fields that analyses read may have; a file's format texts are no more to be trusted than its data.

A field whose declared type cannot be right (`char guest_rip[16]`) counts as not recorded: rules and tables that
need it say so, and its bytes are not taken for something else.

Source: arch/x86/kvm/trace.h, include/trace/events/{kvm,sched,task}.h, kernel/trace/trace_syscalls.c
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SYSTEMS = frozenset({"kvm", "kvmmmu", "kvmtrace", "sched", "task", "syscalls"})
TEXTS = frozenset({"comm", "prev_comm", "next_comm", "oldcomm", "newcomm", "parent_comm", "child_comm"})
BYTES = frozenset({"insn"})
FLAGS = frozenset(
    (
        "dm",
        "entering",
        "exception",
        "failed",
        "fast",
        "found",
        "grow",
        "has_error",
        "immediate_exit",
        "load",
        "reinjected",
        "rw",
        "smm",
        "soft",
        "used_max_basic",
        "valid",
        "waited",
        "write",
    )
)
NUMBERS = frozenset(
    (
        "action",
        "address",
        "apicid",
        "arg",
        "child_pid",
        "cmd",
        "count",
        "cpl",
        "cr",
        "csbase",
        "data",
        "dest_cpu",
        "eax",
        "ebx",
        "ecx",
        "edx",
        "err",
        "errno",
        "error",
        "error_code",
        "exit_code",
        "exit_reason",
        "fault_address",
        "fd",
        "flags",
        "function",
        "gpa",
        "gsi",
        "guest_pgd",
        "guest_rip",
        "gva",
        "icrh",
        "icrl",
        "id",
        "index",
        "info1",
        "info2",
        "intr_info",
        "isa",
        "len",
        "level",
        "msr",
        "nested_rip",
        "new",
        "next_pid",
        "next_prio",
        "next_tsc_offset",
        "nr",
        "ns",
        "old",
        "opcode",
        "orig_cpu",
        "parent_pid",
        "pid",
        "pin",
        "port",
        "prev_pid",
        "prev_prio",
        "prev_state",
        "previous_tsc_offset",
        "rax",
        "rbx",
        "rcx",
        "rdx",
        "reason",
        "reg",
        "rep_cnt",
        "rep_idx",
        "req",
        "ret",
        "rip",
        "runtime",
        "size",
        "smbase",
        "tgid",
        "tm",
        "tsc_offset",
        "type",
        "val",
        "vcpu",
        "vcpu_id",
        "vec",
        "vector",
        "version",
    )
)


def is_credible(system: str, name: str, dtype: np.dtype[Any]) -> bool:
    """Say whether field `name` of an event of `system` may have this type; fields nobody reads may have any."""
    if system not in SYSTEMS:
        return True
    if name in NUMBERS:
        return dtype.kind in "iu" and not dtype.shape
    if name in FLAGS:
        return dtype.kind in "iub" and not dtype.shape
    if name in TEXTS:
        return dtype.kind == "S"
    if name in BYTES:
        return len(dtype.shape) == 1 and dtype.base.kind == "u" and dtype.base.itemsize == 1
    return True
