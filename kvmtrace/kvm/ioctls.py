"""KVM ioctls: number -> name, the file descriptors that take it, and the direction of its argument.

Numbers as x86-64 has them (the argument's size is part of the number). Ioctls that only other architectures
have are left out; removed ones (device assignment, memory aliases) stay, traces of old VMMs hold them.
Sources: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h of 6.1 and 6.12, evaluated by a
compiler; levels from kvm_dev_ioctl, kvm_vm_ioctl, kvm_vcpu_ioctl, kvm_device_ioctl
(virt/kvm/kvm_main.c) and kvm_arch_*_ioctl (arch/x86/kvm/x86.c).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

KVMIO = 0xAE  # the type byte of every KVM ioctl

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
KVM_SET_TSS_ADDR = 0xAE47
KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
KVM_CREATE_IRQCHIP = 0xAE60
KVM_GET_MSR_INDEX_LIST = 0xC004AE02
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_GET_MSR_FEATURE_INDEX_LIST = 0xC004AE0A
KVM_IRQ_LINE = 0x4008AE61
KVM_IRQ_LINE_STATUS = 0xC008AE67
KVM_IRQFD = 0x4020AE76
KVM_CREATE_PIT2 = 0x4040AE77
KVM_IOEVENTFD = 0x4040AE79
KVM_CREATE_DEVICE = 0xC00CAEE0
KVM_RUN = 0xAE80
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_INTERRUPT = 0x4004AE86
KVM_SET_MSRS = 0x4008AE89
KVM_SET_LAPIC = 0x4400AE8F
KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_MP_STATE = 0x8004AE98
KVM_SET_MP_STATE = 0x4004AE99
KVM_NMI = 0xAE9A
KVM_SET_GUEST_DEBUG = 0x4048AE9B
KVM_SET_VCPU_EVENTS = 0x4040AEA0
KVM_ENABLE_CAP = 0x4068AEA3
KVM_KVMCLOCK_CTRL = 0xAEAD
KVM_SMI = 0xAEB7
KVM_SET_NESTED_STATE = 0x4080AEBF
KVM_SET_SREGS2 = 0x4140AECD


@dataclass(frozen=True)
class Ioctl:
    """One KVM ioctl.

    Parameters
    ----------
    number : int, the cmd of ioctl(2)
    name : str, verbatim
    levels : which file descriptors take it, most usual first: "system" "vm" "vcpu" "device"
    """

    number: int
    name: str
    levels: tuple[str, ...]

    @property
    def level(self) -> str:
        """The file descriptor that usually takes it."""
        return self.levels[0]

    @property
    def direction(self) -> str:
        """Where the argument's bytes go: "none", "to_kernel", "from_kernel" or "both"."""
        return DIRECTIONS[self.number >> 30 & 3]

    @property
    def size_bytes(self) -> int:
        """Size of the argument structure; 0 if the argument is a plain number."""
        return self.number >> 16 & 0x3FFF


# _IOC_DIR of include/uapi/asm-generic/ioctl.h
DIRECTIONS = ("none", "to_kernel", "from_kernel", "both")

# fmt: off
_ROWS = (
    Ioctl(0x0000AE00, "KVM_GET_API_VERSION", ("system",)),
    Ioctl(0x0000AE01, "KVM_CREATE_VM", ("system",)),
    Ioctl(0xC004AE02, "KVM_GET_MSR_INDEX_LIST", ("system",)),
    Ioctl(0x0000AE03, "KVM_CHECK_EXTENSION", ("system", "vm")),
    Ioctl(0x0000AE04, "KVM_GET_VCPU_MMAP_SIZE", ("system",)),
    Ioctl(0xC008AE05, "KVM_GET_SUPPORTED_CPUID", ("system",)),
    Ioctl(0xC008AE09, "KVM_GET_EMULATED_CPUID", ("system",)),
    Ioctl(0xC004AE0A, "KVM_GET_MSR_FEATURE_INDEX_LIST", ("system",)),
    Ioctl(0x4018AE40, "KVM_SET_MEMORY_REGION", ("vm",)),
    Ioctl(0x4010AE67, "KVM_REGISTER_COALESCED_MMIO", ("vm",)),
    Ioctl(0x4010AE68, "KVM_UNREGISTER_COALESCED_MMIO", ("vm",)),
    Ioctl(0x0000AE41, "KVM_CREATE_VCPU", ("vm",)),
    Ioctl(0x4010AE42, "KVM_GET_DIRTY_LOG", ("vm",)),
    Ioctl(0x4020AE43, "KVM_SET_MEMORY_ALIAS", ("vm",)),
    Ioctl(0x0000AE44, "KVM_SET_NR_MMU_PAGES", ("vm",)),
    Ioctl(0x0000AE45, "KVM_GET_NR_MMU_PAGES", ("vm",)),
    Ioctl(0x4020AE46, "KVM_SET_USER_MEMORY_REGION", ("vm",)),
    Ioctl(0x0000AE47, "KVM_SET_TSS_ADDR", ("vm",)),
    Ioctl(0x4008AE48, "KVM_SET_IDENTITY_MAP_ADDR", ("vm",)),
    Ioctl(0x40A0AE49, "KVM_SET_USER_MEMORY_REGION2", ("vm",)),
    Ioctl(0x0000AE60, "KVM_CREATE_IRQCHIP", ("vm",)),
    Ioctl(0x4008AE61, "KVM_IRQ_LINE", ("vm",)),
    Ioctl(0xC208AE62, "KVM_GET_IRQCHIP", ("vm",)),
    Ioctl(0x8208AE63, "KVM_SET_IRQCHIP", ("vm",)),
    Ioctl(0x0000AE64, "KVM_CREATE_PIT", ("vm",)),
    Ioctl(0xC048AE65, "KVM_GET_PIT", ("vm",)),
    Ioctl(0x8048AE66, "KVM_SET_PIT", ("vm",)),
    Ioctl(0xC008AE67, "KVM_IRQ_LINE_STATUS", ("vm",)),
    Ioctl(0x8040AE69, "KVM_ASSIGN_PCI_DEVICE", ("vm",)),
    Ioctl(0x4008AE6A, "KVM_SET_GSI_ROUTING", ("vm",)),
    Ioctl(0x4040AE70, "KVM_ASSIGN_DEV_IRQ", ("vm",)),
    Ioctl(0x0000AE71, "KVM_REINJECT_CONTROL", ("vm",)),
    Ioctl(0x4040AE72, "KVM_DEASSIGN_PCI_DEVICE", ("vm",)),
    Ioctl(0x4008AE73, "KVM_ASSIGN_SET_MSIX_NR", ("vm",)),
    Ioctl(0x4010AE74, "KVM_ASSIGN_SET_MSIX_ENTRY", ("vm",)),
    Ioctl(0x4040AE75, "KVM_DEASSIGN_DEV_IRQ", ("vm",)),
    Ioctl(0x4020AE76, "KVM_IRQFD", ("vm",)),
    Ioctl(0x4040AE77, "KVM_CREATE_PIT2", ("vm",)),
    Ioctl(0x0000AE78, "KVM_SET_BOOT_CPU_ID", ("vm",)),
    Ioctl(0x4040AE79, "KVM_IOEVENTFD", ("vm",)),
    Ioctl(0x4038AE7A, "KVM_XEN_HVM_CONFIG", ("vm",)),
    Ioctl(0x4030AE7B, "KVM_SET_CLOCK", ("vm",)),
    Ioctl(0x8030AE7C, "KVM_GET_CLOCK", ("vm",)),
    Ioctl(0x0000AE80, "KVM_RUN", ("vcpu",)),
    Ioctl(0x8090AE81, "KVM_GET_REGS", ("vcpu",)),
    Ioctl(0x4090AE82, "KVM_SET_REGS", ("vcpu",)),
    Ioctl(0x8138AE83, "KVM_GET_SREGS", ("vcpu",)),
    Ioctl(0x4138AE84, "KVM_SET_SREGS", ("vcpu",)),
    Ioctl(0xC018AE85, "KVM_TRANSLATE", ("vcpu",)),
    Ioctl(0x4004AE86, "KVM_INTERRUPT", ("vcpu",)),
    Ioctl(0xC008AE88, "KVM_GET_MSRS", ("vcpu", "system")),
    Ioctl(0x4008AE89, "KVM_SET_MSRS", ("vcpu",)),
    Ioctl(0x4008AE8A, "KVM_SET_CPUID", ("vcpu",)),
    Ioctl(0x4004AE8B, "KVM_SET_SIGNAL_MASK", ("vcpu",)),
    Ioctl(0x81A0AE8C, "KVM_GET_FPU", ("vcpu",)),
    Ioctl(0x41A0AE8D, "KVM_SET_FPU", ("vcpu",)),
    Ioctl(0x8400AE8E, "KVM_GET_LAPIC", ("vcpu",)),
    Ioctl(0x4400AE8F, "KVM_SET_LAPIC", ("vcpu",)),
    Ioctl(0x4008AE90, "KVM_SET_CPUID2", ("vcpu",)),
    Ioctl(0xC008AE91, "KVM_GET_CPUID2", ("vcpu",)),
    Ioctl(0xC028AE92, "KVM_TPR_ACCESS_REPORTING", ("vcpu",)),
    Ioctl(0x4008AE93, "KVM_SET_VAPIC_ADDR", ("vcpu",)),
    Ioctl(0x8004AE98, "KVM_GET_MP_STATE", ("vcpu",)),
    Ioctl(0x4004AE99, "KVM_SET_MP_STATE", ("vcpu",)),
    Ioctl(0x0000AE9A, "KVM_NMI", ("vcpu",)),
    Ioctl(0x4048AE9B, "KVM_SET_GUEST_DEBUG", ("vcpu",)),
    Ioctl(0x4008AE9C, "KVM_X86_SETUP_MCE", ("vcpu",)),
    Ioctl(0x8008AE9D, "KVM_X86_GET_MCE_CAP_SUPPORTED", ("system",)),
    Ioctl(0x4040AE9E, "KVM_X86_SET_MCE", ("vcpu",)),
    Ioctl(0x8040AE9F, "KVM_GET_VCPU_EVENTS", ("vcpu",)),
    Ioctl(0x8070AE9F, "KVM_GET_PIT2", ("vm",)),
    Ioctl(0x4040AEA0, "KVM_SET_VCPU_EVENTS", ("vcpu",)),
    Ioctl(0x4070AEA0, "KVM_SET_PIT2", ("vm",)),
    Ioctl(0x8080AEA1, "KVM_GET_DEBUGREGS", ("vcpu",)),
    Ioctl(0x0000AEA2, "KVM_SET_TSC_KHZ", ("vcpu", "vm")),
    Ioctl(0x4080AEA2, "KVM_SET_DEBUGREGS", ("vcpu",)),
    Ioctl(0x0000AEA3, "KVM_GET_TSC_KHZ", ("vcpu", "vm")),
    Ioctl(0x4068AEA3, "KVM_ENABLE_CAP", ("vcpu", "vm")),
    Ioctl(0x4040AEA4, "KVM_ASSIGN_SET_INTX_MASK", ("vm",)),
    Ioctl(0x9000AEA4, "KVM_GET_XSAVE", ("vcpu",)),
    Ioctl(0x4020AEA5, "KVM_SIGNAL_MSI", ("vm",)),
    Ioctl(0x5000AEA5, "KVM_SET_XSAVE", ("vcpu",)),
    Ioctl(0x8188AEA6, "KVM_GET_XCRS", ("vcpu",)),
    Ioctl(0x4188AEA7, "KVM_SET_XCRS", ("vcpu",)),
    Ioctl(0x4010AEAB, "KVM_GET_ONE_REG", ("vcpu",)),
    Ioctl(0x4010AEAC, "KVM_SET_ONE_REG", ("vcpu",)),
    Ioctl(0x0000AEAD, "KVM_KVMCLOCK_CTRL", ("vcpu",)),
    Ioctl(0x4020AEAE, "KVM_ARM_VCPU_INIT", ("vcpu",)),
    Ioctl(0x8020AEAF, "KVM_ARM_PREFERRED_TARGET", ("vm",)),
    Ioctl(0xC008AEB0, "KVM_GET_REG_LIST", ("vcpu",)),
    Ioctl(0x4020AEB2, "KVM_SET_PMU_EVENT_FILTER", ("vm",)),
    Ioctl(0x0000AEB7, "KVM_SMI", ("vcpu",)),
    Ioctl(0xC008AEBA, "KVM_MEMORY_ENCRYPT_OP", ("vm", "vcpu")),
    Ioctl(0x8010AEBB, "KVM_MEMORY_ENCRYPT_REG_REGION", ("vm",)),
    Ioctl(0x8010AEBC, "KVM_MEMORY_ENCRYPT_UNREG_REGION", ("vm",)),
    Ioctl(0x4018AEBD, "KVM_HYPERV_EVENTFD", ("vm",)),
    Ioctl(0xC080AEBE, "KVM_GET_NESTED_STATE", ("vcpu",)),
    Ioctl(0x4080AEBF, "KVM_SET_NESTED_STATE", ("vcpu",)),
    Ioctl(0xC018AEC0, "KVM_CLEAR_DIRTY_LOG", ("vm",)),
    Ioctl(0xC008AEC1, "KVM_GET_SUPPORTED_HV_CPUID", ("vcpu", "system")),
    Ioctl(0x4188AEC6, "KVM_X86_SET_MSR_FILTER", ("vm",)),
    Ioctl(0x0000AEC7, "KVM_RESET_DIRTY_RINGS", ("vm",)),
    Ioctl(0xC048AEC8, "KVM_XEN_HVM_GET_ATTR", ("vm",)),
    Ioctl(0x4048AEC9, "KVM_XEN_HVM_SET_ATTR", ("vm",)),
    Ioctl(0xC048AECA, "KVM_XEN_VCPU_GET_ATTR", ("vcpu",)),
    Ioctl(0x4048AECB, "KVM_XEN_VCPU_SET_ATTR", ("vcpu",)),
    Ioctl(0x8140AECC, "KVM_GET_SREGS2", ("vcpu",)),
    Ioctl(0x4140AECD, "KVM_SET_SREGS2", ("vcpu",)),
    Ioctl(0x0000AECE, "KVM_GET_STATS_FD", ("vcpu", "vm")),
    Ioctl(0x9000AECF, "KVM_GET_XSAVE2", ("vcpu",)),
    Ioctl(0x400CAED0, "KVM_XEN_HVM_EVTCHN_SEND", ("vm",)),
    Ioctl(0x4020AED2, "KVM_SET_MEMORY_ATTRIBUTES", ("vm",)),
    Ioctl(0xC040AED4, "KVM_CREATE_GUEST_MEMFD", ("vm",)),
    Ioctl(0xC040AED5, "KVM_PRE_FAULT_MEMORY", ("vcpu",)),
    Ioctl(0xC00CAEE0, "KVM_CREATE_DEVICE", ("vm",)),
    Ioctl(0x4018AEE1, "KVM_SET_DEVICE_ATTR", ("device", "vcpu")),
    Ioctl(0x4018AEE2, "KVM_GET_DEVICE_ATTR", ("device", "vcpu", "system")),
    Ioctl(0x4018AEE3, "KVM_HAS_DEVICE_ATTR", ("device", "vcpu", "system")),
)
# fmt: on

IOCTLS: Mapping[int, Ioctl] = MappingProxyType({row.number: row for row in _ROWS})
IOCTL_NUMBERS: Mapping[str, int] = MappingProxyType({row.name: row.number for row in _ROWS})


def is_kvm_ioctl(cmd: int) -> bool:
    """Say whether an ioctl command belongs to KVM (type byte 0xAE), known or not."""
    return cmd >> 8 & 0xFF == KVMIO


def describe_ioctl(cmd: int) -> str:
    """Name an ioctl command ("KVM_RUN"); "UNKNOWN(0xae7f)" if it is in no header."""
    row = IOCTLS.get(cmd & 0xFFFFFFFF)
    return row.name if row else f"UNKNOWN({cmd & 0xFFFFFFFF:#x})"
