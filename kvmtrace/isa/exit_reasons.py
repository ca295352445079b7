"""Names that check/ still uses; all of it stands in registry.py, vmx.py and svm.py."""

from __future__ import annotations

from kvmtrace.isa.registry import BY_NUMBER, describe_exit_reason
from kvmtrace.isa.svm import SVM
from kvmtrace.isa.vmx import VMX
from kvmtrace.isa.vmx_words import VMX_BASIC_EXIT_REASON_MASK, VMX_BUS_LOCK_DETECTED, VMX_FAILED_VMENTRY

ISA_VMX, ISA_SVM = VMX.number, SVM.number
ISA_NAMES = {number: isa.name for number, isa in BY_NUMBER.items()}
VMX_EXIT_REASONS, SVM_EXIT_REASONS = VMX.names, SVM.names
EXIT_REASONS = {number: isa.names for number, isa in BY_NUMBER.items()}

__all__ = [
    "EXIT_REASONS",
    "ISA_NAMES",
    "ISA_SVM",
    "ISA_VMX",
    "SVM_EXIT_REASONS",
    "VMX_BASIC_EXIT_REASON_MASK",
    "VMX_BUS_LOCK_DETECTED",
    "VMX_EXIT_REASONS",
    "VMX_FAILED_VMENTRY",
    "describe_exit_reason",
]
