"""The bundled guests of arm64. Their code stands in `listings/arm64/`.

All run at EL1 with the MMU off: an address in the listing is the guest physical address. Memory of every guest:

    0x1000  code                        0x4000  exception vectors
    0x2000  code of further vCPUs       0x8000  end of RAM; what lies above is MMIO, or the interrupt controller's
    0x3000  data

Which exits a host makes on its own (IRQ, the first touch of a page) is not known before.
"""

from __future__ import annotations

from functools import cached_property

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.workload.guests import Argument, Guest
from kvmtrace.workload.listing import Listing, read_listing
from kvmtrace.workload.result import KnownCounts


@dataclass(frozen=True)
class Arm64Guest(Guest):
    """A bundled guest of arm64; see Guest. Its arguments start in general registers of vCPU 0."""

    @cached_property
    def listing(self) -> Listing:
        """The guest's code."""
        return read_listing(self.name, "arm64")

    def registers(self, arguments: dict[str, int]) -> dict[str, int]:
        """Return vCPU 0's registers at its first instruction."""
        given = {argument.register: arguments[argument.name] for argument in self.arguments}
        return {"pc": self.listing.entry, **given}


def _lifecycle(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        # a read is traced twice: unsatisfied, then its value; the last store is the end
        tracepoints={
            "kvm_mmio": 19 * n + 2 * 17 * n + 1,
            "kvm_hvc_arm64": 13 * n,
            "kvm_handle_sys_reg": 18 * n,
            "kvm_sys_access": 18 * n,
        },
        userspace_exits={"KVM_EXIT_MMIO": 36 * n + 1},
        arm64={"HVC64": 13 * n, "SYS64": 18 * n},
        gpas={"0x9000:W": 19 * n, "0x9000:R": 17 * n, "0xf000:W": 1},
    )


def _storm(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_hvc_arm64": n, "kvm_mmio": 1},
        userspace_exits={"KVM_EXIT_MMIO": 1},
        arm64={"HVC64": n},
        gpas={"0xf000:W": 1},
    )


def _interrupt(_arguments: dict[str, int]) -> KnownCounts:
    # how often WFI is left before the timer fires is the host's affair
    return KnownCounts(tracepoints={"kvm_mmio": 3}, userspace_exits={"KVM_EXIT_MMIO": 1}, gpas={"0xf000:W": 1})


def _smp(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    n_sgis = 1 + 2 * n  # ready, then an SGI each way per trip
    return KnownCounts(
        tracepoints={
            "kvm_hvc_arm64": 1,
            "kvm_handle_sys_reg": n_sgis,
            "kvm_sys_access": n_sgis,
            "kvm_mmio": 3,  # GICD_CTLR, and each vCPU's end
        },
        userspace_exits={"KVM_EXIT_MMIO": 2},
        arm64={"HVC64": 1, "SYS64": n_sgis},
        gpas={"0xf000:W": 2},
    )


def _smc(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_hvc_arm64": 1},
        userspace_exits={"KVM_EXIT_SYSTEM_EVENT": 1},
        arm64={"SMC64": n, "HVC64": 1},
    )


def _dabt_split(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_mmio": 4 * n + 2 * 6 * n + 1},
        userspace_exits={"KVM_EXIT_MMIO": 10 * n + 1, "KVM_EXIT_ARM_NISV": 2 * n},
    )


def _stage2(_arguments: dict[str, int]) -> KnownCounts:
    return KnownCounts(tracepoints={"kvm_mmio": 1}, userspace_exits={"KVM_EXIT_MMIO": 1}, gpas={"0xf000:W": 1})


def _undefined(arguments: dict[str, int]) -> KnownCounts:
    n = arguments["count"]
    return KnownCounts(
        tracepoints={"kvm_handle_sys_reg": n, "kvm_sys_access": n, "kvm_mmio": 1},
        userspace_exits={"KVM_EXIT_MMIO": 1},
        arm64={"SYS64": n},
        gpas={"0xf000:W": 1},
    )


def _count(default: int, meaning: str, maximum: int = 0xFFFF) -> Argument:
    return Argument("count", "x19", default, maximum, meaning)


ARM64_GUESTS: dict[str, Guest] = {
    guest.name: guest
    for guest in (
        Arm64Guest(
            "lifecycle",
            "every kind of VM-exit without interrupts, each a prime number of times",
            (_count(1, "rounds"),),
            _lifecycle,
        ),
        Arm64Guest(
            "storm", "as many VM-exits per second as possible", (_count(100_000, "VM-exits", 0xFFFFFFFF),), _storm
        ),
        Arm64Guest(
            "interrupt",
            "timer interrupts that wake the vCPU from WFI",
            (
                _count(23, "interrupts"),
                Argument("period", "x22", 2_000_000, 0x7FFFFFFF, "ticks of the virtual timer until each fires"),
            ),
            _interrupt,
            irqchip=True,
        ),
        Arm64Guest(
            "smp",
            "two vCPUs that wake each other with software-generated interrupts",
            (_count(17, "round trips"),),
            _smp,
            n_vcpus=2,
            irqchip=True,
        ),
        Arm64Guest(
            "smc",
            "secure monitor calls, and an end by PSCI SYSTEM_OFF",
            (_count(11, "SMCs"),),
            _smc,
            ends="shutdown",
        ),
        Arm64Guest(
            "dabt-split",
            "MMIO of every size and sign, and accesses that the syndrome does not describe",
            (_count(3, "rounds"),),
            _dabt_split,
        ),
        Arm64Guest("stage2", "first touches of pages of RAM", (_count(3, "rounds"),), _stage2),
        Arm64Guest(
            "undefined",
            "undefined-instruction exceptions injected for a register that is hidden",
            (_count(11, "exceptions"),),
            _undefined,
        ),
    )
}
