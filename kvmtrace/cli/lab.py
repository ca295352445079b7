"""`kvmtrace lab`: emulated hosts with real kvm_intel, kvm_amd and KVM/arm64."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmtrace.cli.completion import guests_of_the_lab
from kvmtrace.cli.output import check_folder, check_output, force_option
from kvmtrace.cli.parameter_types import FiniteRange

if TYPE_CHECKING:
    from collections.abc import Callable

HOST_OPTIONS = (
    click.option(
        "--isa", type=click.Choice(["vmx", "svm", "arm64"]), required=True, help="Which virtualization extension."
    ),
    click.option(
        "--kernel",
        type=click.Choice(["6.1", "6.12", "7"]),
        default="6.1",
        show_default=True,
        help="Debian kernel of the host (7: from Debian 13's backports).",
    ),
    click.option(
        "--mode",
        type=click.Choice(["vhe", "nvhe"]),
        help="arm64: KVM as part of a kernel at EL2 (vhe, the default), or with a hypervisor of its own there.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=FiniteRange(min=1),
        default=900.0,
        show_default=True,
        help="Seconds the command may take.",
    ),
    click.option(
        "--cpus", type=click.IntRange(1, 16), default=1, show_default=True, help="CPUs of the host (SVM, arm64)."
    ),
    click.option(
        "--memory",
        "memory_mib",
        type=click.IntRange(512),
        default=2048,
        show_default=True,
        help="Memory of the host in MiB.",
    ),
    click.option(
        "--module-dir",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Load kvm.ko, kvm-intel.ko, kvm-amd.ko from there where present.",
    ),
    click.option(
        "--with-bcc",
        is_flag=True,
        help="VMX, arm64: a root file system that also holds bcc, for the bpf back end.",
    ),
    click.option(
        "--kernel-arg",
        "kernel_args",
        multiple=True,
        metavar="WORD",
        help="For the host kernel's command line, may be repeated: preempt=full; a module's parameter: kvm_amd.npt=0.",
    ),
    click.option(
        "--retries",
        type=click.IntRange(0, 100),
        default=0,
        show_default=True,
        help="Run again so often if the host itself fails: it hangs, or its kernel panics.",
    ),
)


def host_options(function: Callable[..., int]) -> Callable[..., int]:
    """Add the options that describe the host."""
    for option in reversed(HOST_OPTIONS):
        function = option(function)
    return function


class Progress:
    """Says on standard error how far the lab is; nothing unless it is a terminal."""

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
    """Run and record on an emulated host with real kvm_intel, kvm_amd or KVM/arm64.

    The hosts are Debian kernels under Bochs (VMX) and QEMU (SVM, arm64), so this machine needs none of them. Kernels
    are fetched through apt into $KVMTRACE_LAB_CACHE (~/.cache/kvmtrace/lab) and never installed.
    """


@command.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Example: kvmtrace lab run --isa svm -o out -- trace-cmd record -e kvm kvmtrace-linux-guest 2",
)
@host_options
@click.option(
    "-o",
    "out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Bring the files that CMD makes or changes in its directory back to DIR.",
)
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD ARG...")
def run(cmd: tuple[str, ...], **settings: Any) -> int:
    """Run CMD as root on an emulated host; the exit code is CMD's.

    CMD sees a copy of the current directory; what it writes there is brought back with -o only. `kvmtrace` and
    `kvmtrace-linux-guest [VCPUS]`, which boots a small Linux under QEMU, are on its PATH. The SVM host shares this
    machine's file system read-only; the VMX host has Python's standard library, busybox, and of QEMU, trace-cmd,
    perf and strace what is installed here; the arm64 host has Python, busybox, trace-cmd, perf and QEMU of Debian's.
    """
    if settings["out"] is not None:
        check_folder(settings["out"])
    from kvmtrace.lab.job import Job
    from kvmtrace.lab.lab_run import run_lab

    job = Job(command=cmd, **settings)
    return run_lab(job, stream=True, phase=Progress(f"{job.isa} lab")).status


@command.command(
    short_help="Record a guest on an emulated host.",
    epilog="Example: kvmtrace lab record --isa vmx --guest lifecycle -o vmx.dat",
)
@host_options
@click.option(
    "--guest",
    required=True,
    metavar="NAME",
    shell_complete=guests_of_the_lab,
    help="A bundled guest, or linux: QEMU booting a small Linux.",
)
@click.option("--vcpus", type=click.IntRange(1, 2), default=1, show_default=True, help="Of the Linux guest.")
@click.option("--count", type=click.IntRange(min=1), help="Count argument of the bundled guest.")
@click.option("--events", type=click.Choice(["minimal", "lifecycle", "all"]), default="lifecycle", show_default=True)
@click.option("--backend", type=click.Choice(["ftrace", "bpf"]), default="ftrace", show_default=True)
@click.option(
    "-o",
    "output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="Where the recording goes.",
)
@force_option
def record(output: Path, *, force: bool, **settings: Any) -> int:
    """Record a bundled guest, or QEMU booting Linux, on an emulated host."""
    check_output(output, force=force)
    from kvmtrace.lab.guest_recording import LabRecording, record_in_lab
    from kvmtrace.lab.job import Job
    from kvmtrace.lab.run_folder import run_folder

    what = {name: settings.pop(name) for name in ("guest", "vcpus", "count", "events", "backend")}
    recording = LabRecording(**what)
    with run_folder("record") as folder:
        job = Job(command=("true",), out=folder / "out", **settings)
        record_in_lab([recording], job, stream=True, phase=Progress(f"{job.isa} lab"))
        shutil.move(folder / "out" / f"{recording.name}.dat", output)
    return 0
