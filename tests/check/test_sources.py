"""A finding names the function that is at fault: among the sources of a faulty trace stands the one that was broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.check.examples import text_trace
from kvmtrace.check.findings import handler_of
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.formats import open_recording

CASES = Path(__file__).parents[1] / "cases"
# a broken case -> the function whose fault would look so
BROKEN = {
    "cpuid-not-skipped": "kvm_emulate_cpuid",
    "cpuid-skipped-short": "skip_emulated_instruction",
    "cpuid-skipped-long": "skip_emulated_instruction",
    "cpuid-not-traced": "kvm_cpuid",
    "cr-wrong-number": "handle_cr",
    "svm-cr-wrong-number": "cr_interception",
    "ept-violation-untraced": "handle_ept_violation",
    "ept-violation-wrong-error": "handle_ept_violation",
    "svm-npf-wrong-address": "npf_interception",
    "emulated-elsewhere": "x86_emulate_instruction",
    "hlt-not-skipped": "kvm_emulate_halt",
    "hlt-leaves-with-lapic": "kvm_emulate_halt",
    "io-wrong-userspace-exit": "handle_io",
    "out-wrong-port": "handle_io",
    "out-wrong-size": "handle_io",
    "out-not-traced": "kvm_fast_pio",
    "out-executed-twice": "complete_fast_pio_out",
    "svm-in-wrong-direction": "io_interception",
    "svm-out-wrong-next-rip": "io_interception",
    "in-not-completed": "complete_fast_pio_in",
    "mmio-read-not-completed": "complete_emulated_mmio",
    "mmio-write-piece-lost": "complete_emulated_mmio",
    "mmio-exit-untraced": "write_mmio",
    "mmio-longer-than-operand": "emulator_read_write",
    "msr-gp-lost": "kvm_emulate_wrmsr",
    "svm-msr-wrong-direction": "msr_interception",
    "msr-from-userspace-not-skipped": "complete_fast_rdmsr",
    "vectoring-lost": "__vmx_complete_interrupts",
    "vectoring-other-vector": "__vmx_complete_interrupts",
    "svm-exitintinfo-lost": "svm_complete_interrupts",
    "svm-exception-other-error-code": "svm_complete_interrupts",
    "interrupted-not-injected": "vmx_inject_irq",
    "eoi-twice": "apic_set_eoi",
    "lapic-wrong-register": "apic_mmio_write",
    "errno-differs": "kvm_vcpu_ioctl",
    "fpu-not-unloaded": "kvm_arch_vcpu_ioctl_run",
    "triple-fault-resumes": "handle_triple_fault",
    "interrupt-with-cpuid": "handle_external_interrupt",
    "pic-port-leaves": "kvm_io_bus_write",
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_broken_function_is_named(name: str) -> None:
    violations = check_recording(open_recording(CASES / f"{name}.txt")).violations
    named = [violation.source for violation in violations]
    assert any(BROKEN[name] in source for source in named), named


def test_a_handler_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "broken.txt"
    path.write_text(text_trace(all_rules()["J7"].broken))
    (violation,) = check_recording(open_recording(path)).violations
    assert violation.source.count("handle_interrupt_window") == 1


def test_handlers() -> None:
    assert handler_of(1, 10).startswith("kvm_emulate_cpuid")
    assert handler_of(None, 10) == handler_of(1, None) == handler_of(1, 0xFFFF) == ""
