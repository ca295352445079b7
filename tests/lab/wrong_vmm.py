"""`python wrong_vmm.py`: a VMM that does what KVM must refuse, each step once; prints nothing, fails if KVM accepts."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading

from kvmtrace.workload import abi

LIBC = ctypes.CDLL(None, use_errno=True)


def call(fd: int, cmd: int, arg: int = 0) -> int:
    """Call ioctl; return its result, or minus errno."""
    result = int(LIBC.ioctl(ctypes.c_int(fd), ctypes.c_ulong(cmd), ctypes.c_ulong(arg)))
    return -ctypes.get_errno() if result < 0 else result


def make(fd: int, cmd: int, arg: int = 0) -> int:
    """Call an ioctl that must work."""
    result = call(fd, cmd, arg)
    assert result >= 0, errno.errorcode[-result]
    return result


def run_in_other_process(vcpu: int) -> None:
    """KVM_RUN from a child: another mm, so -EIO."""
    child = os.fork()
    if child == 0:
        os._exit(0 if call(vcpu, abi.KVM_RUN) == -errno.EIO else 1)
    assert os.waitpid(child, 0)[1] == 0


def run_once(vcpu: int, area: mmap.mmap) -> None:
    """KVM_RUN that returns at once, from a thread of its own."""
    area[abi.RUN_IMMEDIATE_EXIT] = 1
    thread = threading.Thread(target=lambda: call(vcpu, abi.KVM_RUN))
    thread.start()
    thread.join()


def main() -> None:
    """Build two VMs in one process, wrongly where it can be done wrongly."""
    system = os.open("/dev/kvm", os.O_RDWR)
    first, second = make(system, abi.KVM_CREATE_VM), make(system, abi.KVM_CREATE_VM)
    size = make(system, abi.KVM_GET_VCPU_MMAP_SIZE)

    make(first, abi.KVM_CREATE_IRQCHIP)
    assert call(first, abi.KVM_CREATE_IRQCHIP) == -errno.EEXIST
    vcpu = make(first, abi.KVM_CREATE_VCPU)
    assert call(first, abi.KVM_CREATE_VCPU) == -errno.EEXIST

    other = make(second, abi.KVM_CREATE_VCPU)
    assert call(second, abi.KVM_CREATE_IRQCHIP) == -errno.EINVAL
    identity = ctypes.c_uint64(0x7FFBC000)
    assert call(second, abi.KVM_SET_IDENTITY_MAP_ADDR, ctypes.addressof(identity)) == -errno.EINVAL

    assert call(system, abi.KVM_CREATE_VCPU) < 0  # on the wrong file
    assert call(vcpu, abi.KVM_RUN, 1) == -errno.EINVAL
    for fd in (vcpu, other):
        run_once(fd, mmap.mmap(fd, size))
    run_in_other_process(vcpu)

    os.close(second)
    assert call(second, abi.KVM_CREATE_VCPU, 1) == -errno.EBADF
    os.close(other)
    assert call(other, abi.KVM_RUN) == -errno.EBADF
    try:
        fcntl.ioctl(vcpu, abi.KVM_GET_REGS, bytes(abi.REGS.size))  # the first VM is as good as ever
    finally:
        os.close(vcpu)
        os.close(first)
        os.close(system)


if __name__ == "__main__":
    main()
