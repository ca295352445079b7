"""A VMM small enough to read in one sitting: VM, memory, vCPUs and the KVM_RUN loop.

The order of the calls is the life of a VM: open /dev/kvm, create the VM, give it memory and an interrupt
controller, create vCPUs and set their registers, then KVM_RUN again and again until the guest is done.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError
from kvmtrace.workload import abi
from kvmtrace.workload.devices import Devices

if TYPE_CHECKING:
    from collections import Counter

    from kvmtrace.workload.guests import ProtectedMode

KVM_DEVICE = "/dev/kvm"
# pages that Intel hosts without unrestricted guest mode need for real mode; below 2 GiB as fcntl.ioctl
# passes a C int
TSS_ADDR = 0x7FFBD000
IDENTITY_MAP_ADDR = 0x7FFBC000


class Vm:
    """A VM with `memory_bytes` of RAM at guest physical address 0.

    Parameters
    ----------
    memory_bytes : int, multiple of the page size
    irqchip : bool, create the in-kernel interrupt controllers (then HLT blocks in the kernel)

    Raises
    ------
    CapabilityError
        No usable /dev/kvm, or it refuses a step of the VM's construction.
    """

    def __init__(self, memory_bytes: int, *, irqchip: bool) -> None:
        self.system_fd = _open_kvm()
        self.fd = ioctl(self.system_fd, abi.KVM_CREATE_VM, 0, "KVM_CREATE_VM")
        try:
            self._prepare()
            if irqchip:
                self._create_irqchip()
            self.memory = mmap.mmap(-1, memory_bytes)
            self.memory[:] = bytes(memory_bytes)  # touched now: KVM then maps each page writable at once
            self._give_memory(memory_bytes)
            self.run_bytes = ioctl(self.system_fd, abi.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Place the areas that old Intel hosts need for real mode; the identity map must come before any vCPU."""
        address = abi.SREGS_CR4.pack(IDENTITY_MAP_ADDR)
        ioctl(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, address, "KVM_SET_IDENTITY_MAP_ADDR")
        ioctl(self.fd, abi.KVM_SET_TSS_ADDR, TSS_ADDR, "KVM_SET_TSS_ADDR")

    def _create_irqchip(self) -> None:
        """Create the interrupt controllers of a PC."""
        ioctl(self.fd, abi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")

    def finish(self) -> None:
        """Do what must wait until all vCPUs are there: nothing, on a PC."""

    def _give_memory(self, memory_bytes: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        region = abi.MEMORY_REGION.pack(0, 0, 0, memory_bytes, address)
        ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region, "KVM_SET_USER_MEMORY_REGION")

    def supported_cpuid(self) -> bytearray:
        """Return the struct kvm_cpuid2 of everything this host's KVM offers, x2APIC included."""
        size = abi.CPUID_HEADER.size + abi.MAX_CPUID_ENTRIES * abi.CPUID_ENTRY.size
        cpuid = bytearray(size)
        abi.CPUID_HEADER.pack_into(cpuid, 0, abi.MAX_CPUID_ENTRIES, 0)
        ioctl(self.system_fd, abi.KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID")
        abi.add_x2apic(cpuid)
        return cpuid

    def close(self) -> None:
        """Close the VM; KVM destroys it once its vCPUs are closed too."""
        os.close(self.fd)
        os.close(self.system_fd)


class Vcpu:
    """A vCPU: its file descriptor, its kvm_run page and its loop.

    Parameters
    ----------
    vm : Vm
    vcpu_id : int, also its local APIC id
    slow_ns : userspace exit reason -> ns of delay before that exit is served
    """

    def __init__(self, vm: Vm, vcpu_id: int, slow_ns: dict[int, int]) -> None:
        self.vcpu_id = vcpu_id
        self.slow_ns = slow_ns
        self.devices = Devices()
        self.fd = ioctl(vm.fd, abi.KVM_CREATE_VCPU, vcpu_id, "KVM_CREATE_VCPU")
        self.mapping = mmap.mmap(self.fd, vm.run_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.run = memoryview(self.mapping)
        self.stopping = False
        self._prepare(vm)

    def _prepare(self, vm: Vm) -> None:
        """Tell KVM what the processor offers."""
        ioctl(self.fd, abi.KVM_SET_CPUID2, vm.supported_cpuid(), "KVM_SET_CPUID2")

    def set_registers(self, registers: dict[str, int], *, protected: ProtectedMode | None = None) -> None:
        """Enter flat real mode or protected mode with these registers; those that are not named are 0."""
        sregs = bytearray(abi.SREGS_BYTES)
        ioctl(self.fd, abi.KVM_GET_SREGS, sregs, "KVM_GET_SREGS")
        if protected is None:
            flat = abi.real_mode_sregs(sregs)
        else:
            flat = abi.protected_mode_sregs(sregs, protected.page_directory, protected.cr0, protected.cr4)
        ioctl(self.fd, abi.KVM_SET_SREGS, flat, "KVM_SET_SREGS")
        values = {"rflags": 2, **registers}  # bit 1 of RFLAGS is always set
        regs = abi.REGS.pack(*(values.get(name, 0) for name in abi.REGISTERS))
        ioctl(self.fd, abi.KVM_SET_REGS, regs, "KVM_SET_REGS")

    def loop(self, observed: Counter[str]) -> str:
        """Run the guest until it ends; return how (GuestRun.ended), counting every return of KVM_RUN."""
        while not self.stopping:
            try:
                fcntl.ioctl(self.fd, abi.KVM_RUN, 0)
            except OSError as failure:
                name = errno.errorcode.get(failure.errno or 0, str(failure.errno))
                observed[name] += 1
                if name not in {"EINTR", "EAGAIN"}:  # a signal; a vCPU that was waiting for its start-up IPI
                    return f"KVM_RUN failed with {name}"
                continue
            (reason,) = abi.RUN_EXIT_REASON.unpack_from(self.run, abi.RUN_EXIT_REASON_OFFSET)
            observed[abi.EXIT_NAMES.get(reason, f"KVM_EXIT_{reason}")] += 1
            if ended := self.serve(reason):
                return ended
        return "timeout"

    def serve(self, reason: int) -> str:
        """Do what the guest needs after a userspace exit; return how the guest ended, "" if it goes on."""
        self.delay(reason)
        if reason == abi.EXIT_IO:
            self._serve_io()
            return "exit-port" if self.devices.ended else ""
        if reason == abi.EXIT_MMIO:
            return self._serve_mmio()
        if reason == abi.EXIT_HLT:
            return ""  # the guest goes on behind its HLT, as if an interrupt had woken it
        return describe_end(reason, self.run)

    def delay(self, reason: int) -> None:
        """Wait as long as the VMM is told to before it serves such an exit."""
        if delay_ns := self.slow_ns.get(reason):
            spin(delay_ns)

    def _serve_io(self) -> None:
        access = abi.decode_io(self.run)
        data = slice(access.data_offset, access.data_offset + access.size * access.count)
        if access.out:
            self.devices.write_port(access.port, bytes(self.run[data]))
        else:
            self.run[data] = self.devices.read(access.size * access.count)

    def _serve_mmio(self) -> str:
        access = abi.decode_mmio(self.run)
        if access.write:
            self.devices.write_mmio(access.gpa, access.data)
        else:
            data = self.devices.read(len(access.data))
            self.run[abi.RUN_MMIO_DATA_OFFSET : abi.RUN_MMIO_DATA_OFFSET + len(data)] = data
        return "exit-port" if self.devices.ended else ""

    def stop(self) -> None:
        """Ask the loop to end; a KVM_RUN in progress ends with the next signal to its thread."""
        self.stopping = True
        self.run[abi.RUN_IMMEDIATE_EXIT] = 1

    def close(self) -> None:
        """Unmap kvm_run and close the vCPU."""
        self.run.release()
        self.mapping.close()
        os.close(self.fd)


class VcpuThread(threading.Thread):
    """The thread of one vCPU, named as QEMU names it.

    Attributes
    ----------
    observed : Counter, shared by nobody while the thread runs
    ended : str, how the guest ended on this vCPU; "" while it runs
    failure : BaseException or None, what went wrong in the VMM itself
    """

    def __init__(self, vcpu: Vcpu, observed: Counter[str]) -> None:
        super().__init__(name=f"CPU {vcpu.vcpu_id}/KVM", daemon=True)
        self.vcpu = vcpu
        self.observed = observed
        self.ended = ""
        self.failure: Exception | None = None

    def run(self) -> None:
        """Name the thread for the kernel too, then loop."""
        try:
            _name_thread(self.name)
            self.ended = self.vcpu.loop(self.observed)
        except Exception as failure:  # noqa: BLE001 (the main thread raises it)
            self.failure = failure


def _name_thread(name: str) -> None:
    """Set the kernel's name of this thread; os.open, since open() would add an ioctl to the recording."""
    fd = os.open(f"/proc/self/task/{threading.get_native_id()}/comm", os.O_WRONLY)
    os.write(fd, name.encode())
    os.close(fd)


def _open_kvm() -> int:
    try:
        fd = os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CapabilityError(
            f"there is no {KVM_DEVICE}", "load kvm_intel or kvm_amd, or use `kvmtrace lab run`"
        ) from None
    except OSError as failure:
        raise CapabilityError(
            f"{KVM_DEVICE} cannot be opened: {failure.strerror}", "run as root or join the group kvm"
        ) from None
    version = fcntl.ioctl(fd, abi.KVM_GET_API_VERSION, 0)
    if version != abi.API_VERSION:
        os.close(fd)
        raise CapabilityError(f"{KVM_DEVICE} speaks API version {version}, not {abi.API_VERSION}")
    return fd


def ioctl(fd: int, request: int, argument: int | bytes | bytearray, name: str) -> int:
    """Make a call to KVM, which fills a bytearray in.

    Raises
    ------
    CapabilityError
        KVM refuses; `name` says what.
    """
    try:
        if isinstance(argument, bytearray):
            fcntl.ioctl(fd, request, argument, True)  # the kernel fills it in
            return 0
        result = fcntl.ioctl(fd, request, argument)
    except OSError as failure:
        raise CapabilityError(f"this KVM refuses {name}: {failure.strerror}") from None
    return result if isinstance(result, int) else 0


def describe_end(reason: int, run: memoryview) -> str:
    """Return how the guest ended (GuestRun.ended) at a userspace exit that nobody serves."""
    if reason == abi.EXIT_SHUTDOWN:
        return "shutdown"
    if reason == abi.EXIT_FAIL_ENTRY:
        code, _ = abi.RUN_FAIL.unpack_from(run, abi.RUN_UNION_OFFSET)
        return f"fail-entry {code:#x}"
    if reason == abi.EXIT_INTERNAL_ERROR:
        suberror, _ = abi.RUN_INTERNAL.unpack_from(run, abi.RUN_UNION_OFFSET)
        return f"internal-error {suberror}"
    return f"unexpected {abi.EXIT_NAMES.get(reason, reason)}"


def spin(delay_ns: int) -> None:
    """Wait without sleeping: a sleep would be longer, and would show as a sched_switch."""
    until = time.perf_counter_ns() + delay_ns
    while time.perf_counter_ns() < until:
        pass
