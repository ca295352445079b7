"""The part of the /dev/kvm interface that the tiny VMM uses: ioctl numbers and structure layouts.

Source: include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h, Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import struct

from kvmtrace.lazy_dataclass import dataclass

API_VERSION = 12

# ioctls on /dev/kvm
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05

# ioctls on a VM
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
KVM_CREATE_IRQCHIP = 0xAE60

# ioctls on a vCPU
KVM_RUN = 0xAE80
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90

# KVM_EXIT_*: kvm_run.exit_reason -> the name the kernel prints
EXIT_IO = 2
EXIT_HLT = 5
EXIT_MMIO = 6
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTR = 10
EXIT_INTERNAL_ERROR = 17
EXIT_SYSTEM_EVENT = 24
EXIT_ARM_NISV = 28
# fmt: off
EXIT_NAMES: dict[int, str] = {
    EXIT_IO: "KVM_EXIT_IO",
    EXIT_HLT: "KVM_EXIT_HLT",
    EXIT_MMIO: "KVM_EXIT_MMIO",
    EXIT_SHUTDOWN: "KVM_EXIT_SHUTDOWN",
    EXIT_FAIL_ENTRY: "KVM_EXIT_FAIL_ENTRY",
    EXIT_INTR: "KVM_EXIT_INTR",
    EXIT_INTERNAL_ERROR: "KVM_EXIT_INTERNAL_ERROR",
    EXIT_SYSTEM_EVENT: "KVM_EXIT_SYSTEM_EVENT",
    EXIT_ARM_NISV: "KVM_EXIT_ARM_NISV",
}
# fmt: on

# struct kvm_run: offsets of what the VMM reads and writes
RUN_IMMEDIATE_EXIT = 1
RUN_EXIT_REASON = struct.Struct("<I")  # at 8
RUN_EXIT_REASON_OFFSET = 8
RUN_UNION_OFFSET = 32
RUN_IO = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
RUN_MMIO = struct.Struct("<Q8sIB")  # phys_addr, data[8], len, is_write
RUN_MMIO_DATA_OFFSET = RUN_UNION_OFFSET + 8
RUN_FAIL = struct.Struct("<QI")  # hardware_entry_failure_reason, cpu
RUN_INTERNAL = struct.Struct("<II")  # suberror, ndata
RUN_SYSTEM_EVENT = struct.Struct("<II")  # type, ndata
SYSTEM_EVENT_SHUTDOWN = 1
IO_OUT = 1  # KVM_EXIT_IO_OUT; in is 0

MEMORY_REGION = struct.Struct("<IIQQQ")  # slot, flags, guest_phys_addr, memory_size, userspace_addr

# struct kvm_regs: 18 u64
REGISTERS = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rsp",
    "rbp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rip",
    "rflags",
)
REGS = struct.Struct("<18Q")

# struct kvm_sregs: eight segments, gdt, idt, then cr0 cr2 cr3 cr4 cr8 efer apic_base, interrupt_bitmap[4]
SEGMENT = struct.Struct("<QIH10B")  # base, limit, selector, type present dpl db s l g avl unusable padding
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
SREGS_BYTES = 0x138
SREGS_CR4 = struct.Struct("<Q")  # at 8 * 24 + 2 * 16 + 3 * 8
SREGS_CR4_OFFSET = 248
SREGS_CR0_OFFSET = 224
SREGS_CR3_OFFSET = 240
CR0_PE, CR0_PG = 1, 1 << 31
CR4_PSE = 1 << 4
CR4_OSFXSR = 1 << 9  # SSE instructions do not raise #UD

# struct kvm_cpuid2: nent, padding; entries of 40 bytes
CPUID_HEADER = struct.Struct("<II")
CPUID_ENTRY = struct.Struct("<7I12x")  # function, index, flags, eax, ebx, ecx, edx
MAX_CPUID_ENTRIES = 256
CPUID_1_ECX_X2APIC = 1 << 21


@dataclass(frozen=True)
class IoExit:
    """kvm_run.io: `count` elements of `size` bytes at `data_offset` of the kvm_run mapping."""

    out: bool
    size: int
    port: int
    count: int
    data_offset: int


@dataclass(frozen=True)
class MmioExit:
    """kvm_run.mmio: one piece of at most 8 bytes."""

    write: bool
    gpa: int
    data: bytes


def decode_io(run: memoryview) -> IoExit:
    """Decode kvm_run.io."""
    out, size, port, count, offset = RUN_IO.unpack_from(run, RUN_UNION_OFFSET)
    return IoExit(out == IO_OUT, size, port, count, offset)


def decode_mmio(run: memoryview) -> MmioExit:
    """Decode kvm_run.mmio."""
    gpa, data, length, write = RUN_MMIO.unpack_from(run, RUN_UNION_OFFSET)
    return MmioExit(bool(write), gpa, data[:length])


def real_mode_sregs(sregs: bytearray) -> bytes:
    """Turn the reset state into flat real mode: every segment at 0, SSE allowed.

    Parameters
    ----------
    sregs : struct kvm_sregs as KVM_GET_SREGS gave it after reset; it is changed in place
    """
    for number, name in enumerate(SEGMENTS):
        if name in {"tr", "ldt"}:
            continue
        offset = number * SEGMENT.size
        _, limit, _, *attributes = SEGMENT.unpack_from(sregs, offset)
        SEGMENT.pack_into(sregs, offset, 0, limit, 0, *attributes)
    (cr4,) = SREGS_CR4.unpack_from(sregs, SREGS_CR4_OFFSET)
    SREGS_CR4.pack_into(sregs, SREGS_CR4_OFFSET, cr4 | CR4_OSFXSR)
    return bytes(sregs)


def protected_mode_sregs(sregs: bytearray, page_directory: int, cr0: int, cr4: int) -> bytes:
    """Turn the reset state into flat protected mode of 32 bits, paging on; changed in place.

    Parameters
    ----------
    sregs : struct kvm_sregs as KVM_GET_SREGS gave it after reset
    page_directory : its address; its pages may have 4 MiB
    cr0, cr4 : further bits to be set
    """
    for number, name in enumerate(SEGMENTS):
        if name in {"tr", "ldt"}:
            continue
        kind, selector = (11, 8) if name == "cs" else (3, 16)
        attributes = (kind, 1, 0, 1, 1, 0, 1, 0, 0, 0)  # type present dpl db s l g avl unusable padding
        SEGMENT.pack_into(sregs, number * SEGMENT.size, 0, 0xFFFFFFFF, selector, *attributes)
    for offset, bits in (
        (SREGS_CR0_OFFSET, CR0_PE | CR0_PG | cr0),
        (SREGS_CR3_OFFSET, page_directory),
        (SREGS_CR4_OFFSET, CR4_PSE | cr4),
    ):
        (value,) = SREGS_CR4.unpack_from(sregs, offset)
        SREGS_CR4.pack_into(sregs, offset, value | bits)
    return bytes(sregs)


def add_x2apic(cpuid: bytearray) -> None:
    """Make sure that CPUID leaf 1 offers x2APIC (KVM emulates it on every host); changed in place."""
    (n_entries, _) = CPUID_HEADER.unpack_from(cpuid)
    for number in range(n_entries):
        offset = CPUID_HEADER.size + number * CPUID_ENTRY.size
        function, index, flags, eax, ebx, ecx, edx = CPUID_ENTRY.unpack_from(cpuid, offset)
        if function == 1:
            ecx |= CPUID_1_ECX_X2APIC
            CPUID_ENTRY.pack_into(cpuid, offset, function, index, flags, eax, ebx, ecx, edx)
