"""The tiny VMM on arm64: a GICv3 in the kernel, registers one by one, PSCI to start further vCPUs.

Source: include/uapi/linux/kvm.h, arch/arm64/include/uapi/asm/kvm.h, Documentation/virt/kvm/api.rst,
Documentation/virt/kvm/devices/arm-vgic-v3.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING

from kvmtrace.workload import abi
from kvmtrace.workload.vmm import Vcpu, Vm, describe_end, ioctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.workload.guests import ProtectedMode

# ioctls on a VM
KVM_ENABLE_CAP = 0x4068AEA3
KVM_CREATE_DEVICE = 0xC00CAEE0
KVM_ARM_PREFERRED_TARGET = 0x8020AEAF
# on a vCPU
KVM_ARM_VCPU_INIT = 0x4020AEAE
KVM_GET_ONE_REG = 0x4010AEAB
KVM_SET_ONE_REG = 0x4010AEAC
# on a device
KVM_SET_DEVICE_ATTR = 0x4018AEE1

CAP_ARM_NISV_TO_USER = 177
ENABLE_CAP = struct.Struct("<II4Q64x")  # cap, flags, args[4]
CREATE_DEVICE = struct.Struct("<III")  # type, fd, flags
DEVICE_ATTR = struct.Struct("<IIQQ")  # flags, group, attr, address of the value
VCPU_INIT = struct.Struct("<8I")  # target, features[7]
ONE_REG = struct.Struct("<QQ")  # id, address of the value

DEV_TYPE_ARM_VGIC_V3 = 7
VGIC_GROUP_ADDRESS, VGIC_GROUP_CONTROL = 0, 4
VGIC_DISTRIBUTOR, VGIC_REDISTRIBUTOR, VGIC_INIT = 2, 3, 0
DISTRIBUTOR_GPA, REDISTRIBUTOR_GPA, REDISTRIBUTOR_BYTES = 0x10000, 0x20000, 0x20000  # of the last so many a vCPU

FEATURE_POWER_OFF, FEATURE_PSCI_0_2 = 1 << 0, 1 << 2
CORE_REGISTER = 0x6030_0000_0010_0000  # arm64, 64 bits, core; + offset in struct kvm_regs / 4
CORE_OFFSETS = {**{f"x{number}": 2 * number for number in range(31)}, "sp": 62, "pc": 64}
INSTRUCTION_BYTES = 4


class Arm64Vm(Vm):
    """A VM of arm64; see Vm."""

    def _prepare(self) -> None:
        """Ask for accesses that the syndrome does not describe."""
        self._gic = -1
        ioctl(self.fd, KVM_ENABLE_CAP, ENABLE_CAP.pack(CAP_ARM_NISV_TO_USER, 0, 0, 0, 0, 0), "KVM_CAP_ARM_NISV_TO_USER")

    def _create_irqchip(self) -> None:
        """Create a GICv3; vCPUs that come later get a redistributor each."""
        device = bytearray(CREATE_DEVICE.pack(DEV_TYPE_ARM_VGIC_V3, 0, 0))
        ioctl(self.fd, KVM_CREATE_DEVICE, device, "KVM_CREATE_DEVICE of a GICv3")
        _, self._gic, _ = CREATE_DEVICE.unpack(device)
        self._set_gic(VGIC_GROUP_ADDRESS, VGIC_DISTRIBUTOR, DISTRIBUTOR_GPA)
        self._set_gic(VGIC_GROUP_ADDRESS, VGIC_REDISTRIBUTOR, REDISTRIBUTOR_GPA)

    def _set_gic(self, group: int, attribute: int, value: int) -> None:
        held = ctypes.c_uint64(value)
        packed = DEVICE_ATTR.pack(0, group, attribute, ctypes.addressof(held))
        ioctl(self._gic, KVM_SET_DEVICE_ATTR, packed, "KVM_SET_DEVICE_ATTR of the GICv3")

    def finish(self) -> None:
        """Initialise the GIC, which needs to know all vCPUs."""
        if self._gic >= 0:
            self._set_gic(VGIC_GROUP_CONTROL, VGIC_INIT, 0)

    def preferred_target(self) -> int:
        """Return the number of this host's kind of processor."""
        init = bytearray(VCPU_INIT.size)
        ioctl(self.fd, KVM_ARM_PREFERRED_TARGET, init, "KVM_ARM_PREFERRED_TARGET")
        return int(VCPU_INIT.unpack(init)[0])

    def close(self) -> None:
        """Close the GIC and the VM."""
        if self._gic >= 0:
            os.close(self._gic)
        super().close()


class Arm64Vcpu(Vcpu):
    """A vCPU of arm64; all but the first wait for PSCI CPU_ON. See Vcpu."""

    def _prepare(self, vm: Vm) -> None:
        assert isinstance(vm, Arm64Vm)
        features = FEATURE_PSCI_0_2 | (FEATURE_POWER_OFF if self.vcpu_id else 0)
        init = VCPU_INIT.pack(vm.preferred_target(), features, *[0] * 6)
        ioctl(self.fd, KVM_ARM_VCPU_INIT, init, "KVM_ARM_VCPU_INIT")

    def set_registers(self, registers: dict[str, int], *, protected: ProtectedMode | None = None) -> None:
        """Set these registers; the others are as after reset: EL1, interrupts masked, MMU off."""
        assert protected is None, "there is one mode"
        for name, value in registers.items():
            self._register(KVM_SET_ONE_REG, name, ctypes.c_uint64(value))

    def _register(self, request: int, name: str, value: ctypes.c_uint64) -> None:
        packed = ONE_REG.pack(CORE_REGISTER + CORE_OFFSETS[name], ctypes.addressof(value))
        ioctl(self.fd, request, packed, f"a register's transfer ({name})")

    def serve(self, reason: int) -> str:
        """Do what the guest needs after a userspace exit; return how the guest ended, "" if it goes on."""
        self.delay(reason)
        server: Callable[[], str] | None = {
            abi.EXIT_MMIO: self._serve_mmio,
            abi.EXIT_ARM_NISV: self._step_over,
            abi.EXIT_SYSTEM_EVENT: self._end_by_event,
        }.get(reason)
        return server() if server else describe_end(reason, self.run)

    def _step_over(self) -> str:
        """Leave an access undone that the syndrome does not describe."""
        pc = ctypes.c_uint64()
        self._register(KVM_GET_ONE_REG, "pc", pc)
        self._register(KVM_SET_ONE_REG, "pc", ctypes.c_uint64(pc.value + INSTRUCTION_BYTES))
        return ""

    def _end_by_event(self) -> str:
        event, _ = abi.RUN_SYSTEM_EVENT.unpack_from(self.run, abi.RUN_UNION_OFFSET)
        return "shutdown" if event == abi.SYSTEM_EVENT_SHUTDOWN else f"system-event {event}"
