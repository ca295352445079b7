"""The bundled guests: their machines, arguments and known counts. Their code stands in `listings/`.

All but `nested` run in flat real mode: every segment at 0, no page tables, so an address in the listing is the linear
and the guest physical address, on VMX (unrestricted guest), SVM and PVM alike; `nested` begins in flat protected mode
with its only page mapped as it is, and has a listing for each ISA (`Guest.variants`). Memory of every guest:

    0x0000  interrupt vector table      0x3000  data
    0x1000  code                        0x4000  code of further vCPUs (start-up IPI vector 4)
    0x2000  stack, downwards from 0x3000
    0x8000  end of RAM; what lies above is MMIO

A further guest is a listing (address, bytes, text: the tests hold the bytes against a disassembler), a function
that states its counts, and a row in `GUESTS`. If it uses an instruction that no guest used before, the model's
`predict_instructions.py` has to learn it.
"""

from __future__ import annotations

from dataclasses import field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.workload.listing import Listing, read_listing
from kvmtrace.workload.result import KnownCounts

if TYPE_CHECKING:
    from collections.abc import Callable

RAM_BYTES = 0x8000
STACK_TOP = 0x3000


@dataclass(frozen=True)
class Argument:
    """An argument of a guest: it starts in a register of vCPU 0.

    Parameters
    ----------
    name : str, as the command line spells it
    register : str, "rbp"; the guest's listing says what it does with it
    default, maximum : int; the minimum is 1
    meaning : str
    """

    name: str
    register: str
    default: int
    maximum: int
    meaning: str


@dataclass(frozen=True)
class ProtectedMode:
    """Flat protected mode of 32 bits with paging: where the page directory is, and further bits of CR0 and CR4."""

    page_directory: int
    cr0: int = 0
    cr4: int = 0


@dataclass(frozen=True)
class Guest:
    """A bundled guest.

    Parameters
    ----------
    name : str
    summary : one line
    arguments : tuple of Argument
    known : arguments -> KnownCounts
    n_vcpus : int; further vCPUs wait for a start-up IPI from vCPU 0
    irqchip : bool, interrupt controllers in the kernel; without them HLT leaves to userspace
    ends : how a good run ends (GuestRun.ended)
    refused : isa -> why that ISA cannot run this guest
    protected : where the guest begins in protected mode, not in real mode
    unknown : isa -> tracepoints whose count the listing does not tell on that ISA
    file : name of its listing, "" for its own name
    variants : isa -> what runs there under the same name
    """

    name: str
    summary: str
    arguments: tuple[Argument, ...]
    known: Callable[[dict[str, int]], KnownCounts]
    n_vcpus: int = 1
    irqchip: bool = False
    ends: str = "exit-port"
    refused: dict[str, str] = field(default_factory=dict)
    protected: ProtectedMode | None = None
    unknown: dict[str, frozenset[str]] = field(default_factory=dict)
    file: str = ""
    variants: dict[str, Guest] = field(default_factory=dict)

    @cached_property
    def listing(self) -> Listing:
        """The guest's code."""
        return read_listing(self.file or self.name)

    def on(self, isa: str | None) -> Guest:
        """Return what runs on an ISA."""
        return self.variants.get(isa or "", self)

    def known_on(self, isa: str | None, arguments: dict[str, int]) -> KnownCounts:
        """Return what is known before the run on this ISA."""
        known = self.known(arguments)
        unknown = self.unknown.get(isa or "", frozenset())
        tracepoints = {name: n for name, n in known.tracepoints.items() if name not in unknown}
        return replace(known, tracepoints=tracepoints)

    def registers(self, arguments: dict[str, int]) -> dict[str, int]:
        """Return vCPU 0's registers at its first instruction."""
        given = {argument.register: arguments[argument.name] for argument in self.arguments}
        return {"rip": self.listing.entry, "rsp": STACK_TOP, **given}


def _lifecycle(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    ports = {"0x3f8:POUT": 31 * n, "0x3fd:PIN": 29 * n, "0xf4:POUT": 1}
    return KnownCounts(
        tracepoints={
            "kvm_pio": 60 * n + 1,
            "kvm_cpuid": 13 * n,
            "kvm_msr": 18 * n,
            "kvm_mmio": 19 * n + 2 * 17 * n,
        },  # a read is traced twice: unsatisfied, then its value
        userspace_exits={"KVM_EXIT_IO": 60 * n + 1, "KVM_EXIT_MMIO": 36 * n, "KVM_EXIT_HLT": 5 * n},
        vmx={
            "IO_INSTRUCTION": 60 * n + 1,
            "CPUID": 13 * n,
            "MSR_READ": 11 * n,
            "MSR_WRITE": 7 * n,
            "EPT_MISCONFIG": 36 * n - 1,
            "HLT": 5 * n,
        },  # the very first MMIO is an EPT_VIOLATION
        svm={"io": 60 * n + 1, "cpuid": 13 * n, "msr": 18 * n, "hlt": 5 * n},
        ports=ports,
        gpas={"0x9000:W": 19 * n, "0x9000:R": 17 * n},
        msrs={"0x277:R": 11 * n, "0x277:W": 7 * n},
    )


def _storm(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_cpuid": n, "kvm_pio": 1},
        userspace_exits={"KVM_EXIT_IO": 1},
        vmx={"CPUID": n, "IO_INSTRUCTION": 1},
        svm={"cpuid": n, "io": 1},
        ports={"0xf4:POUT": 1},
    )


def _interrupt(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    msrs = {"0x1b:R": 1, "0x1b:W": 1, "0x80f:W": 1, "0x83e:W": 1, "0x832:W": 1, "0x838:W": n, "0x80b:W": n}
    return KnownCounts(
        tracepoints={"kvm_msr": 5 + 2 * n, "kvm_eoi": n, "kvm_pio": 1},
        userspace_exits={"KVM_EXIT_IO": 1},
        vmx={"HLT": n, "MSR_READ": 1, "MSR_WRITE": 4 + 2 * n, "IO_INSTRUCTION": 1},
        svm={"hlt": n, "msr": 5 + 2 * n, "io": 1},
        ports={"0xf4:POUT": 1},
        msrs=msrs,
    )


def _smp(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    n_writes = 8 + 4 * n  # x2APIC and APIC on: 2 each; INIT, SIPI, ready, its EOI; per trip 2 IPIs and 2 EOIs
    msrs = {"0x1b:R": 2, "0x1b:W": 2, "0x80f:W": 2, "0x830:W": 3 + 2 * n, "0x80b:W": 1 + 2 * n}
    return KnownCounts(
        tracepoints={"kvm_msr": 2 + n_writes, "kvm_eoi": 1 + 2 * n, "kvm_pio": 2},
        userspace_exits={"KVM_EXIT_IO": 2},
        vmx={"HLT": 1 + 2 * n, "MSR_READ": 2, "MSR_WRITE": n_writes, "IO_INSTRUCTION": 2},
        svm={"hlt": 1 + 2 * n, "msr": 2 + n_writes, "io": 2},
        ports={"0xf4:POUT": 2},
        msrs=msrs,
    )


def _string_io(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    # OUTSB 37 and 1, OUTSW 11: an exit per element; INSB 41 bytes in two pages; INSD 7 at once
    return KnownCounts(
        tracepoints={"kvm_pio": 52 * n + 1},
        userspace_exits={"KVM_EXIT_IO": 52 * n + 1},
        ports={"0x3f8:POUT": 48 * n, "0x3fd:PIN": 3 * n, "0x3fd:POUT": n, "0xf4:POUT": 1},
    )


def _mmio_split(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    # kvm_mmio: a write once per page, a read once unsatisfied and once with its value: 1 2, 2 2, 1 2, 2 2, 3;
    # pieces of up to 8 bytes: 1 1, crossing 2 2, 16 bytes 2 2, 16 crossing 3 3, read-modify-write 2
    return KnownCounts(
        tracepoints={"kvm_mmio": 17 * n, "kvm_pio": 1},
        userspace_exits={"KVM_EXIT_MMIO": 18 * n, "KVM_EXIT_IO": 1},
        ports={"0xf4:POUT": 1},
    )


def _triple_fault(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_cpuid": n},
        userspace_exits={"KVM_EXIT_SHUTDOWN": 1},
        vmx={"CPUID": n, "TRIPLE_FAULT": 1},
        svm={"cpuid": n, "shutdown": 1},
    )


def _msr_gp(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_msr": n, "kvm_inj_exception": n, "kvm_pio": 1},
        userspace_exits={"KVM_EXIT_IO": 1},
        vmx={"MSR_WRITE": n, "IO_INSTRUCTION": 1},
        svm={"msr": n, "io": 1},
        ports={"0xf4:POUT": 1},
        msrs={"0x1b:W": n},
    )


def _nested(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_msr": 2 + n, "kvm_pio": n + 1, "kvm_nested_intercepts": 3 * n, **_nested_entries(n)},
        userspace_exits={"KVM_EXIT_IO": n + 1},
        svm={"vmrun": 4 * n, "msr": 2 + n, "io": n + 1, "cpuid": n, "DE excp": n, "hlt": n},
        ports={"0x3f8:POUT": n, "0xf4:POUT": 1},
        msrs={"0x277:R": n, "0xc0000080:W": 1, "0xc0010117:W": 1},
    )


def _nested_vmx(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_msr": 1 + n, "kvm_pio": n + 1, **_nested_entries(n)},
        userspace_exits={"KVM_EXIT_IO": n + 1},
        # VMREAD and VMWRITE are left out: with a shadow VMCS the processor answers some of them
        vmx={
            "VMON": 1,
            "VMCLEAR": 1 + n,
            "VMPTRLD": 1 + n,
            "VMLAUNCH": 2 * n,
            "VMRESUME": 2 * n,
            "MSR_READ": n,
            "MSR_WRITE": 1,
            "IO_INSTRUCTION": n + 1,
            "CPUID": n,
            "HLT": n,
        },
        ports={"0x3f8:POUT": n, "0xf4:POUT": 1},
        msrs={"0x277:R": n, "0x3a:W": 1},
    )


def _nested_entries(n: int) -> dict[str, int]:
    """Each round is refused once and enters three times, and each time L1 gets an exit."""
    return {"kvm_nested_vmenter": 3 * n, "kvm_nested_vmenter_failed": n, "kvm_nested_vmexit_inject": 3 * n}


# PVM's interrupt injection into emulated real mode ends the interrupt, the guest's own EOI is a second one
_EOI_TWICE = {"pvm": frozenset({"kvm_eoi"})}
_ROUNDS = (Argument("count", "rbp", 1, 0xFFFF, "rounds"),)
_NESTED_ON_SVM = Guest(
    "nested",
    "a hypervisor with a guest of its own",
    (Argument("count", "rbp", 7, 0xFFFF, "rounds"),),
    _nested,
    refused={"pvm": "it offers no nesting"},
    protected=ProtectedMode(0x7000),
)
_NESTED_ON_VMX = replace(
    _NESTED_ON_SVM,
    known=_nested_vmx,
    protected=ProtectedMode(0x7000, cr0=1 << 5, cr4=1 << 13),  # NE and VMXE: VMXON asks for both
    file="nested-vmx",
)
_NESTED = replace(_NESTED_ON_SVM, variants={"vmx": _NESTED_ON_VMX})

GUESTS: dict[str, Guest] = {
    guest.name: guest
    for guest in (
        Guest(
            "lifecycle", "every kind of VM-exit without interrupts, each a prime number of times", _ROUNDS, _lifecycle
        ),
        Guest(
            "storm",
            "as many VM-exits per second as possible",
            (Argument("count", "rsi", 100_000, 0xFFFFFFFF, "VM-exits"),),
            _storm,
        ),
        Guest(
            "interrupt",
            "timer interrupts that wake the vCPU from HLT",
            (
                Argument("count", "rbp", 23, 0xFFFF, "interrupts"),
                Argument("period", "rdi", 2_000_000, 0xFFFFFFFF, "ns until each fires"),
            ),
            _interrupt,
            irqchip=True,
            unknown=_EOI_TWICE,
        ),
        Guest(
            "smp",
            "two vCPUs that wake each other with interprocessor interrupts",
            (Argument("count", "rbp", 17, 0xFFFF, "round trips"),),
            _smp,
            n_vcpus=2,
            irqchip=True,
            unknown=_EOI_TWICE,
        ),
        Guest("string-io", "REP OUTS and REP INS", _ROUNDS, _string_io),
        Guest(
            "mmio-split",
            "MMIO that crosses pages or exceeds 8 bytes",
            (Argument("count", "rbp", 3, 0xFFFF, "rounds"),),
            _mmio_split,
        ),
        Guest(
            "triple-fault",
            "an exception that nothing handles",
            (Argument("count", "rbp", 3, 0xFFFF, "CPUIDs before it"),),
            _triple_fault,
            ends="shutdown",
        ),
        Guest(
            "msr-gp",
            "#GP injected after an illegal WRMSR",
            (Argument("count", "rbp", 11, 0xFFFF, "illegal WRMSRs"),),
            _msr_gp,
        ),
        _NESTED,
    )
}
