"""Which selftests run in which lab, and which do not: by name, with the reason."""

from __future__ import annotations

_LOAD = "a load test: minutes under emulation, and millions of page faults all alike"
NOT_RUN: dict[str, str] = dict.fromkeys(
    (
        "access_tracking_perf_test",
        "demand_paging_test",
        "dirty_log_perf_test",
        "dirty_log_test",
        "hardware_disable_test",
        "kvm_page_table_test",
        "max_guest_memory_test",
        "memslot_modification_stress_test",
        "memslot_perf_test",
        "mmu_stress_test",
        "rseq_test",
        "save_restore_pf_stress_test",
    ),
    _LOAD,
)
_OTHER_ISA = {"svm": ("vmx_", "evmcs_"), "vmx": ("svm_", "sev_"), "arm64": ("x86",)}
# arguments that make a test small enough for the lab of an ISA
ARGUMENTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("arm64", "access_tracking_perf_test"): ("-b", "4M"),
    ("arm64", "arch_timer"): ("-n", "1", "-i", "2", "-m", "0"),
    ("arm64", "arch_timer_edge_cases"): ("-i", "20"),
    ("arm64", "debug-exceptions"): ("-i", "100"),
    ("arm64", "demand_paging_test"): ("-b", "4M"),
    ("arm64", "dirty_log_perf_test"): ("-b", "4M", "-i", "2"),
    ("arm64", "kvm_page_table_test"): ("-b", "4M", "-v", "1"),
    ("arm64", "vgic_lpi_stress"): ("-i", "20"),
    ("arm64", "memslot_modification_stress_test"): ("-v", "1", "-b", "4M", "-i", "3"),
    ("arm64", "memslot_perf_test"): ("-s", "64", "-l", "1"),
}
_NOT_RUN_ON: dict[tuple[str, str], str] = {
    ("vmx", "vmx_preemption_timer_test"): "hangs the emulated host (Bochs delivers no interrupt while IF=0)",
}
# what fails for the emulator's sake; the recording is checked all the same
ENVIRONMENT: dict[str, str] = {
    "arch_timer": "an emulated timer is later than the margin that it allows",
    "arch_timer_edge_cases": "it asks for two processors",
    "debug_regs": "QEMU raises no #DB for what the test single-steps",
    "memslot_perf_test": "its alarm of 10 s goes off first",
    "monitor_mwait_test": "the emulated MONITOR faults otherwise",
    "nested_exceptions_test": "QEMU 7.2 gives another error code for a page fault in a page-table walk",
    "set_id_regs": "fields of an ID register of an emulated Cortex-A57 cannot be written",
    "svm_nested_soft_inject_test": "QEMU's CPU lacks NRIPS",
    "vgic_init": "6.12.117 declares the VM dead (EIO) where its own test expects another error",
}


def why_not(isa: str, test: str) -> str | None:
    """Return why a test is not run in the lab of an ISA, None if it is."""
    if test.startswith(_OTHER_ISA[isa]):
        return "of the other instruction set"
    if (isa, test) in ARGUMENTS:
        return None
    return NOT_RUN.get(test) or _NOT_RUN_ON.get((isa, test))


def split(isa: str, tests: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Split tests into (those to run, those not: name -> why)."""
    left_out = {test: why for test in tests if (why := why_not(isa, test))}
    return [test for test in tests if test not in left_out], left_out
