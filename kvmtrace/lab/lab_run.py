"""Runs a job in a lab from beginning to end."""

from __future__ import annotations

import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import UsageError
from kvmtrace.lab import arm64_host, results_disk, svm_host, vmx_host
from kvmtrace.lab.arm64_packages import arm64_busybox, get_arm64_kernel, get_own_kernel
from kvmtrace.lab.emulator import LabFailedError, run_emulator
from kvmtrace.lab.job import LAB_DIRECTORY, Job, write_job
from kvmtrace.lab.kernels import get_kernel
from kvmtrace.lab.linux_guest import GUEST_SERIES, link_linux_guest
from kvmtrace.lab.run_folder import run_folder
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.lab.kernels import Kernel

HOSTS = {"vmx": vmx_host, "svm": svm_host, "arm64": arm64_host}


@dataclass(frozen=True)
class LabResult:
    """What a job in the lab came to.

    Attributes
    ----------
    status : int, the command's exit code
    stdout, stderr : bytes the command wrote
    booted_s, total_s : seconds from the emulator's start until the command began, and until it was gone
    wall_s : seconds in all, with fetching and building
    files : paths brought back, relative to `Job.out`, sorted
    kernel : str, release of the lab host's kernel
    """

    status: int
    stdout: bytes
    stderr: bytes
    booted_s: float
    total_s: float
    wall_s: float
    files: tuple[str, ...]
    kernel: str


def run_lab(job: Job, *, stream: bool = False, phase: Callable[[str], object] = str) -> LabResult:
    """Run a job on an emulated host with real KVM.

    Parameters
    ----------
    job : what to run, and where
    stream : pass the command's output on to our own while it runs (it is in the result in any case)
    phase : told of progress: "preparing", "booting", "running", "fetching"

    Raises
    ------
    CapabilityError
        The lab cannot be built, or did not run to the end (LabFailedError, with the console's last lines).
    UsageError
        The job makes no sense.
    """
    _validate(job)
    for _ in range(job.retries):
        try:
            return _run_once(job, stream=stream, phase=phase)
        except LabFailedError as error:
            phase(f"failed, once more: {error.problem}")
    return _run_once(job, stream=stream, phase=phase)


def _run_once(job: Job, *, stream: bool, phase: Callable[[str], object]) -> LabResult:
    start = time.monotonic()
    phase("preparing")
    lab = HOSTS[job.isa]
    collected: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}

    def write(number: int, data: bytes) -> None:
        collected[number] += data
        if stream:
            target = sys.stdout.buffer if number == 1 else sys.stderr.buffer
            target.write(data)
            target.flush()

    kernel = _kernel_of(job)
    with run_folder(job.isa) as folder:
        (folder / "job").mkdir()
        write_job(job, folder / "job")
        hidden = folder / "job" / "lower" / LAB_DIRECTORY
        if job.isa == "arm64":
            link_linux_guest(get_arm64_kernel(GUEST_SERIES), hidden, arm64_busybox())
        else:
            link_linux_guest(get_kernel(GUEST_SERIES), hidden)
        emulator = lab.prepare(job, kernel, folder)
        try:
            outcome = run_emulator(emulator, lab.limits(job), write, phase)
        except LabFailedError as error:
            if job.isa == "vmx":
                rescued = results_disk.rescue(emulator.results, job.out) if job.out else ()
            else:
                rescued = _rescue(folder / "job" / "files", job.out)
            raise error.with_files(len(rescued), job.out) from error
        files = _bring_back(emulator.results, job.out)
    return LabResult(
        outcome.status,
        bytes(collected[1]),
        bytes(collected[2]),
        outcome.booted_s,
        outcome.total_s,
        time.monotonic() - start,
        files,
        kernel.release,
    )


def _kernel_of(job: Job) -> Kernel:
    if job.kernel_image is not None:
        return get_own_kernel(job.kernel_image)
    return get_arm64_kernel(job.kernel) if job.isa == "arm64" else get_kernel(job.kernel)


def _validate(job: Job) -> None:
    if job.isa not in HOSTS:
        raise UsageError(f"no ISA {job.isa}; there are {', '.join(HOSTS)}")
    if job.mode and job.isa != "arm64":
        raise UsageError("--mode belongs to --isa arm64")
    if job.kernel_image is not None and job.isa != "arm64":
        raise UsageError("a kernel image of one's own is for --isa arm64")
    if not job.command:
        raise UsageError("no command")
    if job.isa == "vmx" and job.cpus != 1:
        raise UsageError("the VMX lab has one CPU (Bochs emulates them in turn); use --isa svm for more")
    if job.isa == "vmx" and job.memory_mib > vmx_host.MOST_MEMORY_MIB:
        raise UsageError(
            f"the VMX lab has at most {vmx_host.MOST_MEMORY_MIB} MiB of memory (Bochs); --isa svm has more"
        )


def _rescue(source: Path, target: Path | None) -> tuple[str, ...]:
    """Copy the files that a host brought out before it failed; return their relative paths."""
    if target is None or not source.is_dir():
        return ()
    shutil.copytree(source, target, dirs_exist_ok=True)
    return tuple(sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()))


def _bring_back(archive: Path, target: Path | None) -> tuple[str, ...]:
    """Unpack the archive of what the job made into `target`; return the files' relative paths."""
    if target is None:
        return ()
    target.mkdir(parents=True, exist_ok=True)
    if not _holds_anything(archive):
        return ()
    with tarfile.open(archive, "r:") as tar:
        # deleted files are devices in the overlay's upper layer
        members = [member for member in tar.getmembers() if not member.isdev()]
        # Python 3.12 warns without a filter, 3.11.2 does not know it; the archive is our own init's
        extra: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
        tar.extractall(target, members, **extra)  # noqa: S202
    return tuple(sorted(str(Path(member.name)) for member in members if not member.isdir()))


def _holds_anything(archive: Path) -> bool:
    """Whether an archive was written: the VMX lab's results disk is all zeros before."""
    if not archive.exists():
        return False
    with archive.open("rb") as handle:
        return any(handle.read(512))
