"""Which types the fields that analyses read may have; a file's format texts are no more to be trusted than its data.

A field whose declared type cannot be right (`char guest_rip[16]`) counts as not recorded: rules and tables that
need it say so, and its bytes are not taken for something else.

Source: arch/x86/kvm/trace.h, include/trace/events/{kvm,sched,task}.h, kernel/trace/trace_syscalls.c
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.isa.shared import NESTED_STRUCTURE

if TYPE_CHECKING:
    import numpy as np

SYSTEMS = frozenset({"kvm", "kvmmmu", "kvmtrace", "sched", "task", "syscalls"})
TEXTS = frozenset({"comm", "prev_comm", "next_comm", "oldcomm", "newcomm", "parent_comm", "child_comm"})
BYTES = frozenset({"insn"})
# fmt: off
FLAGS = frozenset(
    (
        "coalesced", "dm", "entering", "exception", "failed", "fast", "found", "ft", "gpa_match", "grow",
        "has_error", "immediate_exit", "is_read", "is_wfe", "is_write", "level", "load", "need_flush_tlb", "now",
        "offset_matched", "reinjected", "rw", "set", "smm", "soft", "tdp_enabled", "use_master_clock",
        "used_max_basic", "valid", "waited", "was", "write",
    )
)
NUMBERS = frozenset(
    (
        "CRm", "CRn", "Op0", "Op1", "Op2", "__syscall_nr", "a0", "a1", "a2", "a3", "a4", "a5", "action", "addr",
        "address", "apicid", "arg", "asid", "child_pid", "chip", "cmd", "code", "count", "cpl", "cr", "cr_read",
        "cr_write", "csbase", "data", "delta", "dest_cpu", "dest_id", "e", "eax", "ebx", "ecx", "edx", "elcr",
        "err", "errno", "error", "error_code", "esr", "esr_ec", "event_inj", "exceptions", "exit_code",
        "exit_info1", "exit_info2", "exit_int_info", "exit_int_info_err", "exit_reason", "exp_time", "far",
        "fault_address", "fd", "filp", "flags", "function", "gpa", "gsi", "guest_pgd", "guest_rip", "gva",
        "host_clock", "hsr", "hv_timer_in_use", "hxfar", "icr_low", "icrh", "icrl", "id", "imm", "imr", "index",
        "info1", "info2", "ingpa", "inhibits", "int_ctl", "intercept1", "intercept2", "intercept3", "intr_info",
        "ipa", "irq", "irq_num", "irq_source_id", "irqchip", "isa", "len", "msr", "nested_rip", "new",
        "next_pid", "next_prio", "next_tsc_offset", "nr", "nr_vcpus_matched_tsc", "ns", "offset", "old",
        "online_vcpus", "opcode", "orig_cpu", "outgpa", "parent_pid", "pid", "pin", "port", "prev_pid",
        "prev_prio", "prev_state", "previous_tsc_offset", "r0", "rax", "rbx", "rcx", "rdx", "reason", "reg",
        "rep_cnt", "rep_idx", "req", "ret", "rflags", "rip", "runtime", "size", "slb", "smbase", "system_time", "tgid",
        "time_now", "timer_idx", "timer_index", "tm", "token", "tsc_offset", "tsc_shift", "tsc_timestamp",
        "tsc_to_system_mul", "type", "val", "vcpu", "vcpu_id", "vcpu_idx", "vcpu_pc", "vec", "vector",
        "version", NESTED_STRUCTURE, "vp_index",
    )
)
# fmt: on


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
