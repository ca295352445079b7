"""`kvmtrace lab`: emulated hosts with real kvm_intel and kvm_amd."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click


class Progress:
    """One line on standard error that says how far the lab is; nothing unless it is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start = time.monotonic()
        self._on = sys.stderr.isatty()

    def __call__(self, phase: str) -> None:
        """Say that `phase` begins."""
        if self._on:
            click.echo(f"[{self._title} {time.monotonic() - self._start:5.1f} s] {phase}", err=True)


@click.group(name="lab", epilog="Example: kvmtrace lab run --isa vmx -- kvmtrace record --guest lifecycle")
def command() -> None:
    """Run commands on an emulated host with real kvm_intel or kvm_amd.

    The hosts are Debian kernels under Bochs (VMX) and QEMU (SVM): no VMX or SVM of this machine is needed.
    """


@command.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Example: kvmtrace lab run --isa svm -o out -- trace-cmd record -e kvm kvmtrace-linux-guest 2",
)
@click.option(
    "--isa", type=click.Choice(["vmx", "svm"]), required=True, help="Which virtualization extension."
)
@click.option("--kernel", type=click.Choice(["6.1", "6.12"]), default="6.1", show_default=True)
@click.option(
    "-o",
    "out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Bring the files that CMD makes or changes in its directory back to DIR.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1),
    default=900.0,
    show_default=True,
    help="Seconds that CMD may take.",
)
@click.option(
    "--cpus", type=click.IntRange(1, 16), default=1, show_default=True, help="CPUs of the host (SVM)."
)
@click.option(
    "--memory", "memory_mib", type=click.IntRange(256), default=2048, show_default=True, help="MiB."
)
@click.option(
    "--module-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Load kvm.ko, kvm-intel.ko, kvm-amd.ko from there where present.",
)
@click.option(
    "--kernel-arg", "kernel_args", multiple=True, help="For the kernel's command line; kvm_amd.npt=0 too."
)
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def run(cmd: tuple[str, ...], **settings: Any) -> int:
    """Run CMD as root on an emulated host; the exit code is CMD's.

    CMD sees a copy of the current directory; what it writes there is brought back with -o only.
    """
    from kvmtrace.lab.job import Job
    from kvmtrace.lab.run import run_lab

    job = Job(command=cmd, **settings)
    return run_lab(job, stream=True, phase=Progress(f"{job.isa} lab")).status
