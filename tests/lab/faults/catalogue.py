"""Deliberate faults in KVM, one changed line each, and what the checker must say about them.

A fault is our own edit: in which function of which file, which text (a regular expression) is replaced by
what. The kernel source itself is not here; it comes from Debian's linux-source-6.1 when a test runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Edit:
    """What is replaced by what in the kernel's source.

    Parameters
    ----------
    file : relative to the kernel source
    function : the line of the file that begins the function, verbatim up to its opening parenthesis; "" for the
        whole file (a declaration)
    pattern, replacement : regular expression that matches once in the function's body, and its substitute
    """

    file: str
    function: str
    pattern: str
    replacement: str


@dataclass(frozen=True)
class Fault:
    """One wrong line.

    Parameters
    ----------
    name : str
    isa : the lab that shows it
    file : relative to the kernel source
    function : the line of the file that begins the function, verbatim up to its opening parenthesis
    pattern, replacement : regular expression that matches once in the function's body, and its substitute
    target : arguments of `kvmtrace record` that make the fault happen
    rules : the rules one of which must be broken
    what : str, what is wrong with KVM, in a sentence
    suspicion : the events leave a way out (a redundant prefix, say), so it may be a mere suspicion
    kernel_args : for the lab host's command line
    """

    name: str
    isa: str
    file: str
    function: str
    pattern: str
    replacement: str
    target: tuple[str, ...]
    rules: frozenset[str]
    what: str
    suspicion: bool = False
    kernel_args: tuple[str, ...] = ()


FAULTS: tuple[Fault, ...] = (
    Fault(
        "vmx-cpuid-skips-a-byte-more",
        "vmx",
        "arch/x86/kvm/vmx/vmx.c",
        "static int skip_emulated_instruction",
        r"rip = orig_rip \+ instr_len;",
        "rip = orig_rip + instr_len + (exit_reason.basic == EXIT_REASON_CPUID);",
        ("--guest", "lifecycle", "--count", "2"),
        frozenset({"V6", "H6"}),
        "After CPUID the guest continues one byte too far.",
        suspicion=True,
    ),
    Fault(
        "svm-in-skips-a-byte-more",
        "svm",
        "arch/x86/kvm/svm/svm.c",
        "static int io_interception",
        r"svm->next_rip = svm->vmcb->control\.exit_info_2;",
        "svm->next_rip = svm->vmcb->control.exit_info_2 + in;",
        ("--guest", "lifecycle", "--count", "2"),
        frozenset({"H5"}),
        "After IN the guest continues one byte too far.",
        suspicion=True,
    ),
    Fault(
        "halt-reported-as-signal",
        "svm",
        "arch/x86/kvm/x86.c",
        "int kvm_emulate_halt_noskip",
        r"KVM_EXIT_HLT\)",
        "KVM_EXIT_INTR)",
        ("--guest", "lifecycle", "--count", "2"),
        frozenset({"V7"}),
        "HLT leaves to userspace as KVM_EXIT_INTR although no signal came.",
    ),
    Fault(
        "svm-interrupted-delivery-is-lost",
        "svm",
        "arch/x86/kvm/svm/svm.c",
        "static void svm_complete_interrupts",
        r"kvm_queue_interrupt\(vcpu, vector, false\);",
        ";",
        ("-d", "15", "--", "kvmtrace-linux-guest", "1"),
        frozenset({"V9", "J3"}),
        "An interrupt whose delivery the exit interrupted is never delivered.",
        # with shadow paging, page faults interrupt deliveries often; with nested paging hardly ever
        kernel_args=("kvm_amd.npt=0",),
    ),
    Fault(
        "in-completed-twice",
        "vmx",
        "arch/x86/kvm/x86.c",
        "static int complete_fast_pio_in",
        r"complete_emulator_pio_in\(vcpu, &val\);",
        "complete_emulator_pio_in(vcpu, &val); complete_emulator_pio_in(vcpu, &val);",
        ("--guest", "lifecycle", "--count", "2"),
        frozenset({"V5", "V8"}),
        "A port read that userspace served is completed twice.",
    ),
    Fault(
        "eoi-of-the-neighbour",
        "svm",
        "arch/x86/kvm/lapic.c",
        "static int apic_set_eoi",
        r"int vector = apic_find_highest_isr\(apic\);",
        "int vector = apic_find_highest_isr(apic) ^ 1;",
        ("--guest", "interrupt", "--count", "1"),
        frozenset({"V11", "J6"}),
        "EOI ends another vector than the one in service.",
    ),
    Fault(
        "fpu-stays-loaded",
        "svm",
        "arch/x86/kvm/x86.c",
        "int kvm_arch_vcpu_ioctl_run",
        r"kvm_put_guest_fpu\(vcpu\);",
        "if (kvm_run->exit_reason != KVM_EXIT_HLT) kvm_put_guest_fpu(vcpu);",
        ("--guest", "lifecycle", "--count", "2"),
        frozenset({"V1"}),
        "KVM_RUN returns to the VMM with the guest's FPU state after HLT.",
    ),
    Fault(
        "gp-forgotten",
        "vmx",
        "arch/x86/kvm/x86.c",
        "int kvm_emulate_wrmsr",
        r"trace_kvm_msr_write_ex\(ecx, data\);",
        "trace_kvm_msr_write_ex(ecx, data); r = 0;",
        ("--guest", "msr-gp", "--count", "3"),
        frozenset({"V4", "V5", "V6"}),
        "An illegal WRMSR is refused, but the guest continues behind it without #GP.",
    ),
    Fault(
        "run-returns-something-else",
        "svm",
        "virt/kvm/kvm_main.c",
        "static long kvm_vcpu_ioctl",
        r"trace_kvm_userspace_exit\(vcpu->run->exit_reason, r\);",
        "trace_kvm_userspace_exit(vcpu->run->exit_reason, r); r = r ? r : 1;",
        ("--guest", "lifecycle", "--count", "2"),
        frozenset({"V12"}),
        "The ioctl KVM_RUN returns another value than KVM says it does.",
    ),
    Fault(
        "second-mmio-piece-is-lost",
        "svm",
        "arch/x86/kvm/x86.c",
        "static int complete_emulated_mmio",
        r"if \(frag->len <= 8\) \{",
        "if (frag->len) {",
        ("--guest", "mmio-split", "--count", "3"),
        frozenset({"V8"}),
        "Of a 16-byte MMIO access only the first 8 bytes reach userspace.",
    ),
)


def apply_fault(source: Path, fault: Fault) -> None:
    """Change the one line of `fault` in an unpacked kernel source; see `apply_edit`."""
    apply_edit(source, Edit(fault.file, fault.function, fault.pattern, fault.replacement))


def apply_edit(source: Path, edit: Edit) -> None:
    """Make one change in an unpacked kernel source.

    Raises
    ------
    ValueError
        The function is not there, or the pattern does not match exactly once in it.
    """
    path = source / edit.file
    text = path.read_text()
    start, end = _body(text, edit)
    changed, count = re.subn(edit.pattern, edit.replacement, text[start:end])
    if count != 1:
        raise ValueError(f"{edit.file}: {edit.pattern} matches {count} times in {edit.function or 'it'}")
    path.write_text(text[:start] + changed + text[end:])


def _body(text: str, edit: Edit) -> tuple[int, int]:
    """Return where the function's body begins and ends."""
    if not edit.function:
        return 0, len(text)
    start = -1
    # a declaration of the same name ends in a semicolon: take the definition
    for found in re.finditer(rf"^{re.escape(edit.function)}\([^;{{]*\n\{{", text, re.MULTILINE):
        start = found.end()
    end = text.find("\n}\n", start)
    if start < 0 or end < 0:
        raise ValueError(f"{edit.file} has no function {edit.function}")
    return start, end
