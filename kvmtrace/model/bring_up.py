"""How a VM is built: the objects, the ioctls that make them, and what KVM owes for each call.

Two kinds of wrong must not be mixed up. A VMM that calls in a wrong order is told so by KVM with an errno:
that is KVM keeping its contract, and the report explains it. KVM answering success where it must refuse
is a violation. Orders that KVM allows are legal whatever a textbook says: QEMU on pc and q35 creates its
vCPUs before the RAM slots.
"""

from __future__ import annotations

import errno
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmtrace.isa.registry import ISAS, union
from kvmtrace.kvm import ioctls
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ObjectKind:
    """A kernel object of a VM.

    Parameters
    ----------
    name : "system" "vm" "vcpu" "device" "irqchip" "pit" "memslots"
    parent : name of the kind it belongs to, "" for the system file
    kernel_object : str, what the kernel allocates; {vcpu} is the vendor module's vCPU
    file : str, its file operations and anon inode name, "" if it has no file descriptor
    sentence : str
    """

    name: str
    parent: str
    kernel_object: str
    file: str
    sentence: str


# what a vendor module allocates around struct kvm_vcpu
# fmt: off
VENDOR_VCPUS: Mapping[str, str] = MappingProxyType({
    **{isa.name: isa.vcpu_object for isa in ISAS},
    "pvm": "struct vcpu_pvm with its switcher state",
})
# fmt: on
_STRUCTURES = " or ".join(union(lambda isa: (isa.control_structure,)))
_EMULATED = ", ".join(isa.name.upper() for isa in ISAS if isa.emulates_real_mode)
VENDOR_VCPU = "struct kvm_vcpu of this host's vendor module"

# fmt: off
OBJECT_KINDS: Mapping[str, ObjectKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            ObjectKind(
                "system",
                "",
                "struct miscdevice kvm_dev (10, 232)",
                "kvm_chardev_ops, /dev/kvm",
                "The open file of /dev/kvm: asks for capabilities and makes VMs.",
            ),
            ObjectKind(
                "vm",
                "system",
                "struct kvm",
                'kvm_vm_fops, anon inode "kvm-vm"',
                "One virtual machine: memory slots, interrupt chips, vCPUs. The first VM of the host turns "
                "virtualization on (VMXON / EFER.SVME) on every CPU.",
            ),
            ObjectKind(
                "vcpu",
                "vm",
                "{vcpu}, kvm_run page, LAPIC",
                'kvm_vcpu_fops, anon inode "kvm-vcpu:N"',
                "One virtual processor, at its reset state (RIP 0xfff0).",
            ),
            ObjectKind(
                "device",
                "vm",
                "struct kvm_device",
                "kvm_device_fops, anon inode of the device's name",
                "An in-kernel device, for example VFIO.",
            ),
            ObjectKind(
                "irqchip",
                "vm",
                "struct kvm_pic, struct kvm_ioapic",
                "",
                "PIC and IOAPIC in the kernel; every later vCPU gets an in-kernel LAPIC.",
            ),
            ObjectKind("pit", "vm", "struct kvm_pit", "", "The i8254 timer in the kernel."),
            ObjectKind(
                "memslots",
                "vm",
                "struct kvm_memory_slot",
                "",
                "Guest-physical memory, backed by the VMM's own address space.",
            ),
        )
    }
)
# fmt: on


@dataclass(frozen=True)
class Refusal:
    """KVM must refuse the call with `errno` while `condition` holds.

    `condition` names a predicate of the VM's state (bring_up/contract_check.py, CONDITIONS).
    """

    condition: str
    errno: int
    sentence: str
    source: str


@dataclass(frozen=True)
class Contract:
    """What KVM owes for one ioctl: what it makes, what it returns, when it refuses (first match wins)."""

    cmd: int
    makes: str = ""
    returns: int | None = None  # the exact value on success, if it is fixed
    refusals: tuple[Refusal, ...] = ()
    sentence: str = ""


# true of every VM and vCPU ioctl
# fmt: off
OTHER_PROCESS = Refusal(
    "other_process",
    errno.EIO,
    "a VM belongs to the process (mm) that created it",
    "kvm_vm_ioctl, kvm_vcpu_ioctl (virt/kvm/kvm_main.c): kvm->mm != current->mm",
)

CONTRACTS: Mapping[int, Contract] = MappingProxyType(
    {
        contract.cmd: contract
        for contract in (
            Contract(
                ioctls.KVM_GET_API_VERSION,
                returns=12,
                refusals=(
                    Refusal(
                        "argument",
                        errno.EINVAL,
                        "the argument must be 0",
                        "kvm_dev_ioctl (virt/kvm/kvm_main.c)",
                    ),
                ),
                sentence="the API version has been 12 since Linux 2.6.22",
            ),
            Contract(
                ioctls.KVM_CREATE_VM,
                makes="vm",
                sentence="kvm_create_vm: struct kvm, hardware_enable_all, then a file descriptor for it",
            ),
            Contract(
                ioctls.KVM_GET_VCPU_MMAP_SIZE,
                refusals=(
                    Refusal(
                        "argument",
                        errno.EINVAL,
                        "the argument must be 0",
                        "kvm_dev_ioctl (virt/kvm/kvm_main.c)",
                    ),
                ),
                sentence="how much of a vCPU's file to map: kvm_run, the PIO page, the coalesced-MMIO ring",
            ),
            Contract(
                ioctls.KVM_SET_IDENTITY_MAP_ADDR,
                refusals=(
                    Refusal(
                        "vcpus",
                        errno.EINVAL,
                        "the identity map's address is fixed once a vCPU exists",
                        "kvm_arch_vm_ioctl (arch/x86/kvm/x86.c)",
                    ),
                ),
                sentence=f"a page table for real mode without unrestricted guest ({_EMULATED})",
            ),
            Contract(
                ioctls.KVM_SET_TSS_ADDR,
                sentence=f"room for a task state segment, for {_EMULATED} without unrestricted guest",
            ),
            Contract(
                ioctls.KVM_CREATE_IRQCHIP,
                makes="irqchip",
                refusals=(
                    Refusal(
                        "irqchip",
                        errno.EEXIST,
                        "the VM already has an interrupt chip in the kernel",
                        "kvm_arch_vm_ioctl (arch/x86/kvm/x86.c)",
                    ),
                    Refusal(
                        "vcpus",
                        errno.EINVAL,
                        "interrupt chips must be created before the first vCPU, which gets "
                        "its LAPIC at creation",
                        "kvm_arch_vm_ioctl (arch/x86/kvm/x86.c)",
                    ),
                ),
                sentence="kvm_pic_init, kvm_ioapic_init, default interrupt routing",
            ),
            Contract(
                ioctls.KVM_CREATE_PIT2,
                makes="pit",
                refusals=(
                    Refusal(
                        "pit",
                        errno.EEXIST,
                        "the VM already has a timer in the kernel",
                        "kvm_arch_vm_ioctl (arch/x86/kvm/x86.c)",
                    ),
                ),
                sentence="kvm_create_pit",
            ),
            Contract(
                ioctls.KVM_SET_USER_MEMORY_REGION,
                makes="memslots",
                sentence="kvm_vm_ioctl_set_memory_region; legal at any time, also after vCPUs",
            ),
            Contract(
                ioctls.KVM_SET_USER_MEMORY_REGION2,
                makes="memslots",
                sentence="kvm_vm_ioctl_set_memory_region; legal at any time, also after vCPUs",
            ),
            Contract(
                ioctls.KVM_CREATE_VCPU,
                makes="vcpu",
                refusals=(
                    Refusal(
                        "vcpu_id",
                        errno.EEXIST,
                        "the VM already has a vCPU of this id",
                        "kvm_vm_ioctl_create_vcpu (virt/kvm/kvm_main.c)",
                    ),
                ),
                sentence=f"kvm_arch_vcpu_create: the vendor's vCPU, its {_STRUCTURES}, run page, LAPIC, "
                "RESET; then its file descriptor",
            ),
            Contract(ioctls.KVM_CREATE_DEVICE, makes="device", sentence="kvm_ioctl_create_device"),
            Contract(
                ioctls.KVM_RUN,
                refusals=(
                    Refusal(
                        "argument",
                        errno.EINVAL,
                        "the argument must be 0",
                        "kvm_vcpu_ioctl (virt/kvm/kvm_main.c)",
                    ),
                ),
                sentence="kvm_arch_vcpu_ioctl_run: the vCPU runs on this thread until userspace is needed",
            ),
        )
    }
)

# calls worth a step whenever they happen, not only before the first KVM_RUN
STRUCTURAL = frozenset(
    {
        ioctls.KVM_CREATE_VM,
        ioctls.KVM_CREATE_VCPU,
        ioctls.KVM_CREATE_IRQCHIP,
        ioctls.KVM_CREATE_PIT2,
        ioctls.KVM_CREATE_DEVICE,
        ioctls.KVM_SET_USER_MEMORY_REGION,
        ioctls.KVM_SET_USER_MEMORY_REGION2,
    }
)

# QEMU's start, as (what must come first, what needs it); vmm_... are the probes of kvm/vmm_symbols.py
VMM_ORDER: tuple[tuple[str, str], ...] = (
    ("vmm_accel_find", "vmm_accel_init_machine"),
    ("vmm_accel_init_machine", "KVM_CREATE_VM"),
    ("KVM_CREATE_VM", "vmm_accel_init_machine_return"),
    ("vmm_accel_init_machine_return", "vmm_board_init"),
    ("vmm_board_init", "vmm_cpus_init"),
    ("vmm_cpus_init", "vmm_cpu_new"),
    ("vmm_cpu_new", "vmm_init_vcpu"),
    ("vmm_init_vcpu", "vmm_kvm_init_vcpu"),
    ("vmm_kvm_init_vcpu", "KVM_CREATE_VCPU"),
    ("KVM_CREATE_VCPU", "vmm_kvm_arch_init_vcpu"),
    ("vmm_board_init", "vmm_memory_init"),
)

# QEMU 7.2's chains of QOM types that a KVM machine rests on (accel/kvm/kvm-all.c, target/i386/cpu.c, host-cpu.c)
INHERITANCE: tuple[tuple[str, ...], ...] = (
    ("kvm-accel", "accel", "object"),
    ("tcg-accel", "accel", "object"),
    ("host-x86_64-cpu", "max-x86_64-cpu", "x86_64-cpu", "cpu", "device", "object"),
    ("pc-i440fx-7.2-machine", "generic-pc-machine", "x86-machine", "machine", "object"),
)
# fmt: on

_LARGER = "the array is too small: the VMM asks again with a larger one"

# failures that belong to a healthy construction: (ioctl, errno) -> (why, where the kernel says so). What decides
# between success and failure is not in a trace, so success is no violation.
# fmt: off
KNOWN_FAILURES: Mapping[tuple[int, int], tuple[str, str]] = MappingProxyType({
    (ioctls.KVM_GET_MSR_INDEX_LIST, errno.E2BIG): (_LARGER, "kvm_arch_dev_ioctl (arch/x86/kvm/x86.c)"),
    (ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST, errno.E2BIG): (_LARGER, "kvm_arch_dev_ioctl (arch/x86/kvm/x86.c)"),
    (ioctls.KVM_GET_SUPPORTED_CPUID, errno.E2BIG): (_LARGER, "kvm_dev_ioctl_get_cpuid (arch/x86/kvm/cpuid.c)"),
    (ioctls.KVM_KVMCLOCK_CTRL, errno.EINVAL): (
        "the guest has not set up its kvmclock, so it cannot be told that it was stopped",
        "kvm_set_guest_paused (arch/x86/kvm/x86.c)"),
})
# fmt: on

# answers of KVM_RUN that mean "come back", not "failed"
RUN_AGAIN = frozenset({errno.EINTR, errno.EAGAIN})

SOURCES = "virt/kvm/kvm_main.c, arch/x86/kvm/x86.c, Documentation/virt/kvm/api.rst"
