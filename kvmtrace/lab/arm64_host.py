"""The arm64 lab: QEMU emulates a machine with EL2; KVM/arm64 is built into Debian's kernel.

With a processor that has the virtualization host extensions KVM runs at EL2 as part of the kernel (VHE); on one that
lacks them its hypervisor code is a small program of its own at EL2 (nVHE).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.lab.arm64_packages import arm64_busybox, arm64_root
from kvmtrace.lab.emulator import Emulator, Limits
from kvmtrace.lab.initramfs import lab_initramfs
from kvmtrace.lab.shared_files import share
from kvmtrace.lab.tools import find_program
from kvmtrace.lab.vmx_host import add_cwd, add_package

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.lab.job import Job
    from kvmtrace.lab.kernels import Kernel

BOOT_LIMIT_S = 300.0
KERNEL_ARGS = ("console=ttyAMA0", "quiet", "panic=-1", "nokaslr", "mitigations=off", "lab.isa=arm64")
# how KVM runs -> processor that makes it so
MODES: dict[str, str] = {"vhe": "max,pauth-impdef=on", "nvhe": "cortex-a57"}
DEFAULT_MODE = "vhe"


def prepare(job: Job, kernel: Kernel, folder: Path) -> Emulator:
    """Return the QEMU that runs the job directory `folder`/job.

    Raises
    ------
    CapabilityError
        QEMU is missing.
    UsageError
        There is no such mode.
    """
    mode = job.mode or DEFAULT_MODE
    if mode not in MODES:
        raise UsageError(f"no mode {mode}; there are {' and '.join(MODES)}")
    program = find_program("qemu-system-aarch64")
    lower = folder / "job" / "lower"
    add_package(lower / "usr" / "lib" / "kvmtrace")
    add_cwd(job, lower)
    command = [
        program,
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
        *("-machine", "virt,virtualization=on,gic-version=3"),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", MODES[mode]),
        *("-smp", str(job.cpus), "-m", str(job.memory_mib)),
        *("-kernel", str(kernel.image)),
        *("-initrd", str(lab_initramfs(kernel, "arm64", arm64_busybox()))),
        *("-append", " ".join((*KERNEL_ARGS, *job.kernel_args))),
        *("-chardev", f"file,id=console,path={folder / 'console'}", "-serial", "chardev:console"),
        *("-device", "virtio-rng-pci"),
        *share(str(arm64_root(with_bcc=job.with_bcc)), "root", readonly=True),
        *share(str(folder / "job"), "job", readonly=False),
    ]
    results = folder / "job"
    return Emulator(
        "QEMU",
        command,
        folder,
        folder / "console",
        results / "stdout",
        results / "stderr",
        results / "out.tar",
        folder / "log",
    )


def limits(job: Job) -> Limits:
    """Return how long the boot and the command may take."""
    return Limits(BOOT_LIMIT_S, job.timeout_s)
