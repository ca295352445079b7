"""Format texts as kernels from 2.6.31 to 7.x show them, made from the declarations of their tracepoints.

A row names the event and the kernels that have it so, then its fields as `declaration:size` (`s` behind the size:
signed); offsets follow from the sizes. The spellings differ, too: arrays before or behind the name, `char buf` without
a size, relative places of dynamic arrays, pointers, bit masks, structures.

Sources: arch/x86/kvm/trace.h, include/trace/events/{kvm,sched,task,syscalls}.h, kernel/trace/trace_entries.h
"""

from __future__ import annotations

import re

from writers.formats import event_format

ROWS = """\
kvm_entry | 2.6.31-5.6
    unsigned int vcpu_id:4
kvm_entry | 5.7-6.12
    unsigned int vcpu_id:4, unsigned long rip:8
kvm_entry | 6.9
    unsigned int vcpu_id:4, unsigned long rip:8, bool immediate_exit:1
kvm_entry | 6.14-7.x
    unsigned int vcpu_id:4, unsigned long rip:8, bool immediate_exit:1, u32 intr_info:4, u32 error_code:4
kvm_exit | 2.6.31
    unsigned int exit_reason:4, unsigned long guest_rip:8
kvm_exit | 2.6.38-4.16
    unsigned int exit_reason:4, unsigned long guest_rip:8, u32 isa:4, u64 info1:8, u64 info2:8
kvm_exit | 4.17-5.9
    unsigned int exit_reason:4, unsigned long guest_rip:8, u32 isa:4, u64 info1:8, u64 info2:8,
    unsigned int vcpu_id:4
kvm_exit | 5.10-6.15
    unsigned int exit_reason:4, unsigned long guest_rip:8, u32 isa:4, u64 info1:8, u64 info2:8, u32 intr_info:4,
    u32 error_code:4, unsigned int vcpu_id:4
kvm_exit | 6.16-7.x
    unsigned int exit_reason:4, unsigned long guest_rip:8, u32 isa:4, u64 info1:8, u64 info2:8, u32 intr_info:4,
    u32 error_code:4, unsigned int vcpu_id:4, u64 requests:8
kvm_page_fault | 2.6.31-5.18
    unsigned long fault_address:8, unsigned int error_code:4
kvm_page_fault | 5.19-6.0
    unsigned int vcpu_id:4, unsigned long guest_rip:8, u64 fault_address:8, unsigned int error_code:4
kvm_page_fault | 6.1-7.x
    unsigned int vcpu_id:4, unsigned long guest_rip:8, u64 fault_address:8, u64 error_code:8
kvm_inj_virq | 2.6.31-5.18
    unsigned int irq:4
kvm_inj_virq | 5.19-7.x
    unsigned int vector:4, bool soft:1, bool reinjected:1
kvm_inj_exception | 2.6.31-5.18
    u8 exception:1, u8 has_error:1, u32 error_code:4
kvm_inj_exception | 5.19-7.x
    u8 exception:1, u8 has_error:1, bool reinjected:1, u32 error_code:4
kvm_emulate_insn | 2.6.31-7.x
    __u64 rip:8, __u32 csbase:4, __u8 len:1, __u8 insn[15]:15, __u8 flags:1, __u8 failed:1
kvm_emulate_insn | arrays before the name
    __u64 rip:8, __u32 csbase:4, __u8 len:1, __u8[15] insn:15, __u8 flags:1, __u8 failed:1
kvm_pio | 2.6.31-3.12
    unsigned int rw:4, unsigned int port:4, unsigned int size:4, unsigned int count:4
kvm_pio | 3.13-7.x
    unsigned int rw:4, unsigned int port:4, unsigned int size:4, unsigned int count:4, unsigned int val:4
kvm_userspace_exit | 2.6.37-7.x
    __u32 reason:4, int errno:4s
kvm_fpu | 2.6.35-7.x
    u32 load:4
kvm_mmio | 2.6.31-7.x
    u32 type:4, u32 len:4, u64 gpa:8, u64 val:8
kvm_msr | 2.6.31
    unsigned int write:4, u32 ecx:4, unsigned long data:8
kvm_msr | 2.6.35-7.x
    unsigned write:4, u32 ecx:4, u64 data:8, u8 exception:1
kvm_cpuid | 2.6.31-4.1
    unsigned int function:4, unsigned long rax:8, unsigned long rbx:8, unsigned long rcx:8, unsigned long rdx:8
kvm_cpuid | 5.7-7.x
    unsigned int function:4, unsigned int index:4, unsigned long rax:8, unsigned long rbx:8,
    unsigned long rcx:8, unsigned long rdx:8, bool found:1, bool used_max_basic:1
kvm_nested_vmenter_failed | 5.7-6.0
    const char * msg:8, u32 err:4
kvm_nested_vmenter_failed | 6.1-7.x
    __data_loc char[] msg:4s, u32 err:4
kvm_hv_flush_tlb | 4.18-5.x
    u64 processor_mask:8, u64 address_space:8, u64 flags:8
sched_switch | 2.6.31-7.x
    char prev_comm[16]:16, pid_t prev_pid:4s, int prev_prio:4s, long prev_state:8s, char next_comm[16]:16,
    pid_t next_pid:4s, int next_prio:4s
sched_switch | with constants
    char prev_comm[TASK_COMM_LEN]:16, pid_t prev_pid:4s, int prev_prio:4s, long prev_state:8s,
    char next_comm[TASK_COMM_LEN]:16, pid_t next_pid:4s, int next_prio:4s
sched_process_exec | 3.4-7.x
    __data_loc char[] filename:4s, pid_t pid:4s, pid_t old_pid:4s
task_rename | 3.4-7.x
    pid_t pid:4s, char oldcomm[16]:16, char newcomm[16]:16, short oom_score_adj:2s
sys_enter_ioctl | 2.6.31-7.x
    int nr:4s, unsigned int fd:8, unsigned int cmd:8, unsigned long arg:8
sys_enter_openat | 6.18-7.x
    int __syscall_nr:4s, int dfd:8, const char * filename:8, int flags:8, umode_t mode:8,
    __data_loc char[] __filename_val:4s
sys_exit_ioctl | 2.6.31-7.x
    int nr:4s, long ret:8s
print | 2.6.31-5.x
    unsigned long ip:8, char buf:0s
print | 5.x-7.x
    unsigned long ip:8, char buf[]:0s
bprint | 2.6.31-5.x
    unsigned long ip:8, const char * fmt:8, u32 buf:0
bprint | 5.x-7.x
    unsigned long ip:8, const char * fmt:8, u32 buf[]:0
raw_data | 4.10-7.x
    unsigned int id:4, char buf:0s
kernel_stack | 2.6.31-5.x
    int size:4s, unsigned long caller[8]:64
kernel_stack | 5.13-7.x
    int size:4s, unsigned long caller[]:0
user_stack | 2.6.31-7.x
    unsigned int tgid:4, unsigned long caller[8]:64
hwlat | 4.9-7.x
    unsigned int count:4, unsigned int nmi_count:4, u64 duration:8, struct timespec64 timestamp:16
funcgraph_exit | 2.6.31-7.x
    unsigned long func:8, int depth:4s, unsigned int overrun:4, unsigned long long rettime:8
ipi_raise | 3.17-7.x
    __data_loc unsigned long[] target_cpus:4, const char * reason:8
ipi_send_cpumask | 6.4-7.x
    __data_loc cpumask_t cpumask:4, unsigned long callsite:8, void * callback:8
relative | 5.17-7.x
    __rel_loc char[] text:4s, __rel_loc u8[] bytes:4
hrtimer_expire | 2.6.31-7.x
    void * hrtimer:8, s64 now:8s, union timeout tv64:8, enum mode mode:4
block_bio | 2.6.31-7.x
    dev_t dev:4, sector_t sector:8, char rwbs[8]:8, unsigned char cdb[16]:16
filemap | 3.10-7.x
    unsigned long pfn:8, dev_t s_dev:4, struct inode * inode:8, u8 uuid[16]:16, long double x:16
"""


def _fields(text: str) -> list[tuple[str, int, int, int]]:
    fields, offset = [], 8
    for part in text.split(", "):
        declared, _, size = part.rpartition(":")
        signed, number = int(size.endswith("s")), int(size.rstrip("s"))
        unit = number if number in (1, 2, 4, 8) else 4 if number % 4 == 0 else 1
        offset = -(-offset // unit) * unit
        fields.append((declared, offset, number, signed))
        offset += number
    return fields


def kernel_formats() -> list[tuple[str, int, list[tuple[str, int, int, int]], bytes]]:
    """Return (event and kernels, id, fields as (declaration, offset, size, signed), format text) of all rows."""
    made = []
    for number, row in enumerate(re.split(r"\n(?=\w)", ROWS.strip()), 2000):
        title, _, declared = row.partition("\n")
        event, _, kernels = title.partition(" | ")
        fields = _fields(" ".join(declared.split()))
        made.append((f"{event} {kernels}", number, fields, event_format(event, number, fields)))
    return made
