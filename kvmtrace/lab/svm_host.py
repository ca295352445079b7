"""The SVM lab: QEMU emulates an AMD processor with SVM; the root file system is this machine's, read-only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.lab.emulator import Emulator, Limits
from kvmtrace.lab.initramfs import lab_initramfs
from kvmtrace.lab.shared_files import share
from kvmtrace.lab.tools import find_program

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.lab.job import Job
    from kvmtrace.lab.kernels import Kernel

BOOT_LIMIT_S = 180.0
# panic=-1 with -no-reboot: a panic ends QEMU at once
KERNEL_ARGS = ("console=ttyS0", "quiet", "panic=-1", "nokaslr", "mitigations=off", "random.trust_cpu=on", "lab.isa=svm")


def prepare(job: Job, kernel: Kernel, folder: Path) -> Emulator:
    """Return the QEMU that runs the job directory `folder`/job.

    Raises
    ------
    CapabilityError
        QEMU is missing.
    """
    program = find_program("qemu-system-x86_64")
    results = folder / "job"
    arguments = (*KERNEL_ARGS, f"lab.kernel_root={kernel.root}", *job.kernel_args)
    command = [
        program,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-nic",
        "none",
        "-machine",
        "pc",
        "-accel",
        # CPUs that really run at once meet text that another one is patching: 6.12 panicked in every other run
        "tcg,thread=single" if job.cpus > 1 else "tcg,thread=multi",
        "-cpu",
        "EPYC,+svm,+npt",
        "-smp",
        str(job.cpus),
        "-m",
        str(job.memory_mib),
        "-kernel",
        str(kernel.image),
        "-initrd",
        str(lab_initramfs(kernel, "svm")),
        "-append",
        " ".join(arguments),
        "-chardev",
        f"file,id=console,path={folder / 'console'}",
        "-serial",
        "chardev:console",
        "-device",
        "virtio-rng-pci",
        *share("/", "root", readonly=True),
        *share(str(results), "job", readonly=False),
    ]
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
