"""The bundled guests: their machines, arguments and known counts. Their code stands in `listings/`.

All run in flat real mode: every segment at 0, no page tables, so an address in the listing is the linear and
the guest physical address, on VMX (unrestricted guest), SVM and PVM alike. Memory of every guest:

    0x0000  interrupt vector table      0x3000  data
    0x1000  code                        0x4000  code of further vCPUs (start-up IPI vector 4)
    0x2000  stack, downwards from 0x3000
    0x8000  end of RAM; what lies above is MMIO
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

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
    """

    name: str
    summary: str
    arguments: tuple[Argument, ...]
    known: Callable[[dict[str, int]], KnownCounts]
    n_vcpus: int = 1
    irqchip: bool = False
    ends: str = "exit-port"
    refused: dict[str, str] = field(default_factory=dict)

    @cached_property
    def listing(self) -> Listing:
        """The guest's code."""
        return read_listing(self.name)

    def registers(self, arguments: dict[str, int]) -> dict[str, int]:
        """Return vCPU 0's registers at its first instruction."""
        given = {argument.register: arguments[argument.name] for argument in self.arguments}
        return {"rip": self.listing.entry, "rsp": STACK_TOP, **given}


def _lifecycle(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    ports = {"0x3f8:POUT": 31 * n, "0x3fd:PIN": 29 * n, "0xf4:POUT": 1}
    return KnownCounts(
        tracepoints={"kvm_pio": 60 * n + 1, "kvm_cpuid": 13 * n, "kvm_msr": 18 * n,
                     "kvm_mmio": 19 * n + 2 * 17 * n},  # a read is traced twice: unsatisfied, then its value
        userspace_exits={"KVM_EXIT_IO": 60 * n + 1, "KVM_EXIT_MMIO": 36 * n, "KVM_EXIT_HLT": 5 * n},
        vmx={"IO_INSTRUCTION": 60 * n + 1, "CPUID": 13 * n, "MSR_READ": 11 * n, "MSR_WRITE": 7 * n,
             "EPT_MISCONFIG": 36 * n - 1, "HLT": 5 * n},  # the very first MMIO is an EPT_VIOLATION
        svm={"io": 60 * n + 1, "cpuid": 13 * n, "msr": 18 * n, "hlt": 5 * n},
        ports=ports, gpas={"0x9000:W": 19 * n, "0x9000:R": 17 * n},
        msrs={"0x277:R": 11 * n, "0x277:W": 7 * n})


GUESTS: dict[str, Guest] = {guest.name: guest for guest in (
    Guest("lifecycle", "every kind of VM-exit without interrupts, each a prime number of times",
          (Argument("count", "rbp", 1, 0xFFFF, "rounds"),), _lifecycle),
)}
