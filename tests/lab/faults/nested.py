"""Deliberate faults in KVM's nested SVM code, as in the catalogue beside it, all recorded in one boot of a lab host."""

from __future__ import annotations

from faults.catalogue import Fault

_NESTED_C, _SVM_C = "arch/x86/kvm/svm/nested.c", "arch/x86/kvm/svm/svm.c"
# a guest that goes astray does not end
_GUEST = ("-d", "4", "--guest", "nested", "--count", "2")
_DELIVERY = ("-d", "4", "--", "./trigger", "nested-delivery")


def _fault(
    name: str,
    where: tuple[str, str],
    change: tuple[str, str],
    rules: set[str],
    what: str,
    target: tuple[str, ...] = _GUEST,
) -> Fault:
    return Fault(f"nested-{name}", "svm", *where, *change, target, frozenset(rules), what)


NESTED_FAULTS: tuple[Fault, ...] = (
    _fault(
        "l1-goes-on-elsewhere",
        (_NESTED_C, "int nested_svm_vmexit"),
        (r"kvm_rip_write\(vcpu, vmcb01->save\.rip\);", "kvm_rip_write(vcpu, vmcb01->save.rip + 7);"),
        {"N4"},
        "After an exit of L2 that L1 gets, L1 goes on 7 bytes too far.",
    ),
    _fault(
        "l2-begins-elsewhere",
        (_NESTED_C, "static void nested_vmcb02_prepare_save"),
        (r"kvm_rip_write\(&svm->vcpu, vmcb12->save\.rip\);", "kvm_rip_write(&svm->vcpu, vmcb12->save.rip + 6);"),
        {"N3"},
        "L2 is entered 6 bytes behind where L1 asked for.",
    ),
    _fault(
        "l2-goes-on-elsewhere",
        (_SVM_C, "static int svm_skip_emulated_instruction"),
        (
            r"return (__svm_skip_emulated_instruction\(.*\));",
            r"int done = \1; if (is_guest_mode(vcpu)) kvm_rip_write(vcpu, kvm_rip_read(vcpu) + 1); return done;",
        ),
        {"V6"},
        "After L2's RDMSR, which KVM handles itself, L2 goes on one byte too far.",
    ),
    _fault(
        "intercept-ignored",
        (_NESTED_C, "static int nested_svm_intercept"),
        (r"default: \{\s+if \(", "default: { if (exit_code != SVM_EXIT_CPUID && "),
        {"N5"},
        "L1 does not get L2's CPUID although it asked for it.",
    ),
    _fault(
        "exit-reflected-and-handled",
        (_SVM_C, "static int svm_handle_exit"),
        (r"if \(vmexit == NESTED_EXIT_DONE\)", "if (vmexit == NESTED_EXIT_DONE && exit_code != SVM_EXIT_CPUID)"),
        {"N4", "N5", "V13", "V4", "V5", "V6"},
        "L1 gets L2's CPUID, and KVM executes it as well, as if L1 had.",
    ),
    _fault(
        "entry-not-skipped",
        (_NESTED_C, "int nested_svm_vmrun"),
        (r"ret = kvm_skip_emulated_instruction\(vcpu\);", "ret = 1;"),
        {"N3", "V6"},
        "L1's instruction that enters L2 is not skipped: where KVM refuses, L1 executes it for ever.",
    ),
    _fault(
        "wrong-exit-code",
        (_NESTED_C, "int nested_svm_vmexit"),
        (r"(vmcb12->control\.exit_code +)= vmcb02->control\.exit_code;", r"\1= vmcb02->control.exit_code ^ 1;"),
        {"N5", "N6"},
        "L1 finds another exit code than the one of L2's exit.",
    ),
    _fault(
        "wrong-exit-information",
        (_NESTED_C, "int nested_svm_vmexit"),
        (r"(vmcb12->control\.exit_info_1 +)= vmcb02->control\.exit_info_1;", r"\1= vmcb02->control.exit_info_1 | 4;"),
        {"N6"},
        "L1 finds other exit information than L2's exit had.",
    ),
    _fault(
        "delivery-lost",
        (_NESTED_C, "static void nested_save_pending_event_to_vmcb12"),
        (
            r"nr = vcpu->arch\.interrupt\.nr;\s+exit_int_info = nr \| SVM_EVTINJ_VALID;",
            "nr = vcpu->arch.interrupt.nr; exit_int_info = nr & 0;",
        ),
        {"N6"},
        "L1 is not told which interrupt the exit of L2 kept from being delivered.",
        _DELIVERY,
    ),
    _fault(
        "exit-nobody-asked-for",
        (_NESTED_C, "static int nested_svm_exit_handled_msr"),
        (r"(INTERCEPT_MSR_PROT\)\)\)\s+return) NESTED_EXIT_HOST;", r"\1 NESTED_EXIT_DONE;"),
        {"N5"},
        "L1 gets L2's RDMSR although it did not ask for it.",
    ),
    _fault(
        "page-fault-forgotten",
        (_NESTED_C, "int nested_svm_exit_special"),
        (
            r"case SVM_EXIT_NPF:\s+return NESTED_EXIT_HOST;",
            "return NESTED_EXIT_HOST; case SVM_EXIT_NPF: return NESTED_EXIT_DONE;",
        ),
        {"V4", "H3", "N5", "N7"},
        "Page faults of L2, which are KVM's, are neither mended nor given to L1.",
    ),
)
