"""Nested guests on SVM: which VM-exits of L2 KVM keeps, which L1 gets, and what it then finds.

Sources: nested_svm_exit_special, nested_svm_exit_handled, nested_svm_intercept, nested_svm_vmexit,
svm_check_nested_events (svm/nested.c), svm_check_intercept, emulate_svm_instr, svm_enter_smm (svm/svm.c); the same in
6.1 and 6.12, where nested_svm_exit_special keeps Hyper-V's TLB flushes as well.
"""

from __future__ import annotations

from kvmtrace.isa.base import Nesting
from kvmtrace.isa.nested_entry import NestedEntry

INTERRUPT, NMI, SMI, INIT, SHUTDOWN, NPF = 0x60, 0x61, 0x62, 0x63, 0x7F, 0x400
IO, MSR, VMRUN, HYPERCALL, VMLOAD, VMSAVE, ERR, SW = 0x7B, 0x7C, 0x80, 0x81, 0x82, 0x83, 0xFFFFFFFF, 0xF0000000
EXCEPTIONS = range(0x40, 0x60)
DECODED = "kvm_emulate_insn"

# the words of kvm_nested_intercepts: bit i of each is the intercept of the code 32 * word + i
_INTERCEPTS: dict[int, tuple[str, int]] = {
    **{0x00 + bit: ("cr_read", bit) for bit in range(16)},
    **{0x10 + bit: ("cr_write", bit) for bit in range(16)},
    **{code: ("exceptions", code - 0x40) for code in EXCEPTIONS},
    **{0x60 + bit: ("intercept1", bit) for bit in range(32)},
    **{0x80 + bit: ("intercept2", bit) for bit in range(32)},
    **{0xA0 + bit: ("intercept3", bit) for bit in range(32)},
}

# fmt: off
SVM_NESTING = Nesting(
    kept={INTERRUPT: "kvm_nested_intr_vmexit", NMI: "", NPF: "kvm_page_fault"},
    given=frozenset({ERR}),
    # exceptions: those that KVM intercepts for itself it handles first
    may_be_given=frozenset({IO, MSR, *EXCEPTIONS}),
    invented={
        INTERRUPT: "kvm_nested_intr_vmexit",
        **dict.fromkeys((NMI, SMI, INIT, SHUTDOWN, ERR, SW), ""),
        **dict.fromkeys(EXCEPTIONS, ""),
        NPF: "kvm_page_fault|kvm_emulate_insn",
        # an instruction that KVM decodes for L2, and L1 asked for
        **dict.fromkeys((*range(0x40), *range(0x64, 0x7F), *range(0x80, 0x90)), DECODED),
    },
    unasked=frozenset({VMLOAD, VMSAVE}),  # emulate_svm_instr asks nobody
    intercepts=_INTERCEPTS,
    unless={HYPERCALL: "kvm_hv_"},
    reflected_info={"exit_info1": "info1", "exit_info2": "info2"},
    carried_field="exit_int_info",
    never_carries=frozenset({ERR}),
    entry=NestedEntry(
        instructions={"vmrun": VMRUN},
        enters=frozenset({"vmrun"}),
        refuses=("address space", range(1, 1 << 32)),
        asked=_INTERCEPTS,
        structure={
            "cr_read": (0x00, 2), "cr_write": (0x02, 2), "exceptions": (0x08, 4), "intercept1": (0x0C, 4),
            "intercept2": (0x10, 4), "intercept3": (0x14, 4), "address space": (0x58, 4), "event": (0xA8, 8),
            "flags": (0x570, 8), "ip": (0x578, 8), "sp": (0x5D8, 8), "ax": (0x5F8, 8),
        },
    ),
    exceptions=EXCEPTIONS[0],
    skips_entry=True,
    returns=True,
    sources={
        "kept": "nested_svm_exit_special, svm_check_nested_events (svm/nested.c), npf_interception (svm/svm.c); "
                "6.1 and 6.12",
        "given": "nested_svm_intercept (svm/nested.c); 6.1 and 6.12",
        "may_be_given": "nested_svm_exit_handled_msr, nested_svm_intercept_ioio, nested_svm_exit_special "
                        "(svm/nested.c); 6.1 and 6.12",
        "invented": "svm_check_nested_events, nested_svm_inject_exception_vmexit, nested_svm_triple_fault, "
                    "nested_svm_inject_npf_exit, nested_svm_vmrun (svm/nested.c), svm_check_intercept, svm_enter_smm "
                    "(svm/svm.c); 6.1 and 6.12",
        "unasked": "emulate_svm_instr (svm/svm.c); 6.1 and 6.12",
        "intercepts": "nested_svm_intercept, enter_svm_guest_mode (svm/nested.c), TRACE_EVENT(kvm_nested_intercepts) "
                      "(trace.h); 6.1 and 6.12",
        "unless": "nested_svm_exit_special (svm/nested.c), kvm_hv_is_tlb_flush_hcall (hyperv.h); 6.12",
        "reflected_info": "nested_svm_vmexit (svm/nested.c); 6.1 and 6.12",
        "carried_field": "nested_save_pending_event_to_vmcb12 (svm/nested.c); 6.1 and 6.12",
        "never_carries": "nested_svm_vmexit (svm/nested.c); 6.1 and 6.12",
        "skips_entry": "nested_svm_vmrun (svm/nested.c); 6.1 and 6.12",
        "returns": "nested_svm_vmexit (svm/nested.c); 6.1 and 6.12",
        "exceptions": "nested_svm_intercept (svm/nested.c); 6.1 and 6.12",
        "entry": "nested_svm_vmrun, __nested_vmcb_check_controls (svm/nested.c), struct vmcb (asm/svm.h); 6.1 and 6.12",
    },
    source_reflects="nested_svm_exit_special, nested_svm_intercept, nested_svm_vmexit (svm/nested.c)",
    source_reenters="nested_svm_vmrun, enter_svm_guest_mode (svm/nested.c)",
)
# fmt: on
