"""What KVM will trace while a bundled guest runs, predicted without looking at the recording.

`guest_prediction.predict` executes the guest's listing (`cpu.py`) and lets `machine.py` write down what KVM does
about each instruction: the VM-exit, its follow-up events, the exit to userspace and its
completion, and where the guest continues. Only facts of the capture itself are used: which events were
recorded, the ISA, and whether the host's processor reports next RIPs.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from kvmtrace.isa.registry import run_functions
from kvmtrace.lazy_dataclass import dataclass

PVM = "pvm"  # no ISA of the registry: kernel-mode code runs in KVM's emulator, without VM-exits

# every event a prediction can speak of; all others are not its business
PREDICTABLE: frozenset[str] = frozenset(
    {
        "sys_enter_ioctl",
        "sys_exit_ioctl",
        "kvm_vcpu_ioctl",
        "kvm_vcpu_ioctl_return",
        "kvm_fpu",
        *run_functions(),
        *run_functions("_return"),
        "kvm_entry",
        "kvm_exit",
        "kvm_page_fault",
        "kvm_emulate_insn",
        "kvm_pio",
        "kvm_mmio",
        "kvm_cpuid",
        "kvm_msr",
        "kvm_apic",
        "kvm_eoi",
        "kvm_apic_ipi",
        "kvm_apic_accept_irq",
        "kvm_inj_virq",
        "kvm_inj_exception",
        "kvm_vcpu_wakeup",
        "kvm_userspace_exit",
        "kvm_guest_fault",
        "kvm_handle_sys_reg",
        "kvm_sys_access",
        "kvm_wfx_arm64",
        "kvm_hvc_arm64",
        "kvm_nested_vmenter",
        "kvm_nested_vmenter_failed",
        "kvm_nested_intercepts",
        "kvm_nested_vmexit",
        "kvm_nested_vmexit_inject",
    }
)


@dataclass(frozen=True)
class Facts:
    """What a prediction may know of the capture.

    Parameters
    ----------
    isa : name of an ISA of the registry, or "pvm"
    events : recorded event names; a prediction leaves out what was not recorded
    nrips : the processor tells KVM the next RIP. Without it (Isa.decodes_to_skip) KVM runs its emulator to skip an
        instruction, and that is traced
    exit_inside_run : kvm_exit is traced before the ISA's run function returns; some kernels trace it behind
    apicv : the processor delivers interrupts and ends them itself (Isa.interrupts_without_exit): neither
        kvm_inj_virq nor a VM-exit for EOI
    shadowed : a guest hypervisor reads and writes some fields without a VM-exit (NestedEntry.shadowed)
    """

    isa: str
    events: frozenset[str] = PREDICTABLE
    nrips: bool = True
    exit_inside_run: bool = True
    apicv: bool = False
    shadowed: bool = False


@dataclass(frozen=True)
class Expected:
    """A field's predicted value.

    Parameters
    ----------
    name : str, the tracepoint's field
    value : int, or bytes that the field begins with
    mask : the bits that are predicted, None for all
    """

    name: str
    value: int | bytes
    mask: int | None = None

    def holds(self, observed: Any) -> bool:
        """Say whether a recorded value agrees (bytes-like for bytes, else an integer)."""
        if isinstance(self.value, bytes):
            return bytes(observed)[: len(self.value)] == self.value
        if self.mask is None:
            return bool(observed == self.value)
        return (int(observed) ^ self.value) & self.mask == 0


@dataclass(frozen=True)
class Step:
    """One predicted event.

    Parameters
    ----------
    event : str, the kernel's or probe's name
    fields : what is predicted of its fields
    address : linear address of the instruction that it belongs to
    text : that instruction, as the listing has it
    why : what happens, in a few words
    optional : it depends on timing; its absence is no difference
    goes_with : so many steps behind an optional one happen if it does, and only then
    path : for kvm_entry: offsets (RIP) of the instructions that run before the next VM-exit, in order of
        first execution; where an asynchronous VM-exit may strike
    """

    event: str
    fields: tuple[Expected, ...] = ()
    address: int = 0
    text: str = ""
    why: str = ""
    optional: bool = False
    goes_with: int = 0
    path: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Prediction:
    """The predicted events of one vCPU's thread, in order."""

    vcpu_id: int
    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)


def describe_step(step: Step, *, why: bool = True) -> str:
    """Return a step as one line: event, fields, and (with `why`) what happens."""
    fields = " ".join(f"{item.name}={_show(item)}" for item in step.fields)
    return f"{step.event} {fields}".rstrip() + (f"  ({step.why})" if why and step.why else "")


def _show(item: Expected) -> str:
    if isinstance(item.value, bytes):
        return item.value.hex(" ")
    if item.mask == 0xFFFFFFFF:  # a C int
        signed = item.value - (1 << 32) if item.value >> 31 else item.value
        return str(signed) if -100 < signed < 10 else f"{signed:#x}"
    number = f"{item.value:#x}" if abs(item.value) > 9 else str(item.value)
    return number if item.mask is None else f"{number}/{item.mask:#x}"
