"""Nested guests on VMX: which VM-exits of L2 KVM keeps, which L1 gets, and what it then finds.

Sources: nested_vmx_reflect_vmexit, nested_vmx_l0_wants_exit, nested_vmx_l1_wants_exit, nested_vmx_vmexit,
vmx_check_nested_events (vmx/nested.c), vmx_exit_handlers_fastpath (vmx/vmx.c); the same in 6.1 and 6.12, where KVM
keeps #VE and Hyper-V's TLB flushes as well.
"""

from __future__ import annotations

from kvmtrace.isa.base import Nesting

EXCEPTION_NMI, EXTERNAL_INTERRUPT, TRIPLE_FAULT, INIT, SIPI = 0, 1, 2, 3, 4
TASK_SWITCH, CPUID, INVD, VMCALL, VMWRITE = 9, 10, 13, 18, 25
VM_INSTRUCTIONS = (19, 20, 21, 22, 24, 26, 27, 50, 53)  # VMREAD and VMWRITE: a bitmap of L1 decides
MTF, EPT_VIOLATION, EPT_MISCONFIG, PREEMPTION_TIMER, XSETBV = 37, 48, 49, 52, 55
PML_FULL, VMFUNC, BUS_LOCK, NOTIFY = 62, 59, 74, 75

VMX_NESTING = Nesting(
    kept={
        **dict.fromkeys((EXTERNAL_INTERRUPT, PREEMPTION_TIMER, VMFUNC), ""),
        **dict.fromkeys((EPT_VIOLATION, EPT_MISCONFIG), "kvm_page_fault|kvm_emulate_insn"),
    },
    hidden=frozenset({BUS_LOCK, NOTIFY}),
    given=frozenset({TRIPLE_FAULT, TASK_SWITCH, CPUID, INVD, VMCALL, XSETBV, *VM_INSTRUCTIONS}),
    invented={
        **dict.fromkeys((EXCEPTION_NMI, EXTERNAL_INTERRUPT, TRIPLE_FAULT, INIT, SIPI, MTF, PREEMPTION_TIMER), ""),
        **dict.fromkeys((EPT_VIOLATION, EPT_MISCONFIG, PML_FULL), "kvm_page_fault|kvm_emulate_insn"),
    },
    unless={VMCALL: "kvm_hv_"},
    reflected_info={"exit_info1": "info1", "exit_int_info": "intr_info"},
    carried_field="exit_info2",
    never_carries=frozenset({TRIPLE_FAULT}),
    taken_field="exit_int_info",
    rewrites=frozenset({VMWRITE}),
    unnamed=frozenset({PREEMPTION_TIMER}),
    source_reflects="nested_vmx_l0_wants_exit, nested_vmx_l1_wants_exit, nested_vmx_vmexit (vmx/nested.c)",
    source_reenters="nested_vmx_run, nested_vmx_enter_non_root_mode (vmx/nested.c)",
)
