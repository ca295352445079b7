"""Nested guests on VMX: which VM-exits of L2 KVM keeps, which L1 gets, and what it then finds.

Sources: nested_vmx_reflect_vmexit, nested_vmx_l0_wants_exit, nested_vmx_l1_wants_exit, nested_vmx_vmexit,
vmx_check_nested_events (vmx/nested.c), vmx_exit_handlers_fastpath (vmx/vmx.c); the same in 6.1 and 6.12, where KVM
keeps #VE and Hyper-V's TLB flushes as well.
"""

from __future__ import annotations

from kvmtrace.isa.base import Nesting
from kvmtrace.isa.nested_entry import NestedEntry

EXCEPTION_NMI, EXTERNAL_INTERRUPT, TRIPLE_FAULT, INIT, SIPI = 0, 1, 2, 3, 4
TASK_SWITCH, CPUID, HLT, INVD, VMCALL, VMWRITE = 9, 10, 12, 13, 18, 25
VM_INSTRUCTIONS = (19, 20, 21, 22, 24, 26, 27, 50, 53)  # VMREAD and VMWRITE: a bitmap of L1 decides
MTF, EPT_VIOLATION, EPT_MISCONFIG, PREEMPTION_TIMER, XSETBV = 37, 48, 49, 52, 55
PML_FULL, VMFUNC, BUS_LOCK, NOTIFY = 62, 59, 74, 75

# fields of the VMCS by their encoding
EXCEPTION_BITMAP, PROCESSOR_CONTROLS, CR3_TARGETS, ENTRY_EVENT, EXIT_LENGTH = 0x4004, 0x4002, 0x400A, 0x4016, 0x440C
GUEST_RSP, GUEST_RIP, GUEST_RFLAGS, GUEST_GDTR, GUEST_IDTR, HOST_RSP, HOST_RIP = (
    0x681C, 0x681E, 0x6820, 0x6816, 0x6818, 0x6C14, 0x6C16,
)  # fmt: skip
# vmx/vmcs_shadow_fields.h, 6.1 and 6.12: what a shadow VMCS serves without an exit; True: writes as well
_SHADOWED: dict[int, bool] = {
    **dict.fromkeys((0x4402, 0x4404, 0x4406, EXIT_LENGTH, 0x4408, 0x440A, 0x4816, 0x4818, 0x6400, 0x640A), False),
    **dict.fromkeys((0x2400, 0x2401), False),
    **dict.fromkeys((PROCESSOR_CONTROLS, 0x4000, EXCEPTION_BITMAP, 0x4018, ENTRY_EVENT, 0x401A, 0x401C, 0x4824), True),
    **dict.fromkeys((GUEST_RIP, GUEST_RSP, 0x6800, 0x6802, 0x6804, GUEST_RFLAGS, 0x6000, 0x6004, 0x6006), True),
    **dict.fromkeys((0x0810, 0x0812, 0x0C08, 0x0C0A, 0x482E, 0x6C06, 0x6C08), True),
}

# fmt: off
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
    entry=NestedEntry(
        instructions={
            "vmclear": 19, "vmlaunch": 20, "vmptrld": 21, "vmread": 23, "vmresume": 24, "vmwrite": 25, "vmxon": 27,
        },
        enters=frozenset({"vmlaunch", "vmresume"}),
        refuses=("CR3-target count", range(5)),
        asked={HLT: ("processor-based controls", 7), EXCEPTION_NMI: ("exceptions", 0)},
        numbers={
            "exceptions": EXCEPTION_BITMAP, "processor-based controls": PROCESSOR_CONTROLS,
            "CR3-target count": CR3_TARGETS, "event": ENTRY_EVENT, "length": EXIT_LENGTH, "ip": GUEST_RIP,
            "sp": GUEST_RSP, "flags": GUEST_RFLAGS, "gdt": GUEST_GDTR, "idt": GUEST_IDTR, "host_ip": HOST_RIP,
            "host_sp": HOST_RSP,
        },
        reads="vmread",
        writes="vmwrite",
        shadowed=_SHADOWED,
    ),
    sources={
        "kept": "nested_vmx_l0_wants_exit (vmx/nested.c), nested_ept_inject_page_fault (vmx/nested.c); 6.1 and 6.12",
        "hidden": "nested_vmx_l0_wants_exit, nested_vmx_l1_wants_exit (vmx/nested.c); 6.1 and 6.12",
        "given": "nested_vmx_l1_wants_exit (vmx/nested.c); 6.1 and 6.12",
        "invented": "vmx_check_nested_events, nested_vmx_inject_exception_vmexit, nested_vmx_triple_fault, "
                    "nested_ept_inject_page_fault (vmx/nested.c); 6.1 and 6.12",
        "unless": "nested_vmx_l0_wants_exit (vmx/nested.c), kvm_hv_is_tlb_flush_hcall (hyperv.h); 6.12",
        "reflected_info": "nested_vmx_reflect_vmexit, nested_vmx_vmexit (vmx/nested.c); 6.1 and 6.12",
        "carried_field": "vmcs12_save_pending_event (vmx/nested.c); 6.1 and 6.12",
        "never_carries": "vmcs12_save_pending_event (vmx/nested.c); 6.1 and 6.12",
        "taken_field": "nested_vmx_vmexit (6.1), vmx_check_nested_events (6.12) (vmx/nested.c)",
        "rewrites": "handle_vmwrite, load_vmcs12_host_state (vmx/nested.c); 6.1 and 6.12",
        "unnamed": "handle_fastpath_preemption_timer, vmx_exit_handlers_fastpath (vmx/vmx.c); 6.1 and 6.12",
        "entry": "nested_vmx_run, nested_vmx_check_controls (vmx/nested.c), vmx/vmcs_shadow_fields.h; 6.1 and 6.12",
    },
    source_reflects="nested_vmx_l0_wants_exit, nested_vmx_l1_wants_exit, nested_vmx_vmexit (vmx/nested.c)",
    source_reenters="nested_vmx_run, nested_vmx_enter_non_root_mode (vmx/nested.c)",
)
# fmt: on
