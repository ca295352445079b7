"""A job: the directory that tells a lab host what to run and takes what it made.

Its entries: `lower/` is laid over the root file system (the command, a `kvmtrace` of this installation),
`modules/` holds replacement kernel modules, `cwd` names the directory to run in, `want-files` is there if
files are to be brought back; `files/` gets each file once it is complete, for the case that the host fails;
`stdout`, `stderr` and `out.tar` are written by the SVM lab (the VMX lab uses
serial ports and a disk).
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import field
from pathlib import Path

import kvmtrace
from kvmtrace.errors import UsageError
from kvmtrace.lab.linux_guest import LINUX_GUEST, linux_guest_script
from kvmtrace.lazy_dataclass import dataclass

LAB_DIRECTORY = ".kvmtrace-lab"


@dataclass(frozen=True)
class Job:
    """What to run in a lab.

    Parameters
    ----------
    isa : "vmx", "svm" or "arm64"
    command : program and arguments, run as root in a copy of `cwd`
    kernel : series, "6.1", "6.12" or "7"
    cwd : directory whose content the command sees; its changes never reach the real one
    out : directory that is given the files which the command made or changed below `cwd`, or None
    timeout_s : limit for the command itself; the boot has its own
    cpus : of the lab host
    memory_mib : of the lab host
    module_dir : directory with replacements for kvm.ko, kvm-intel.ko, kvm-amd.ko (any subset), or None
    kernel_args : added to the kernel's command line; "kvm_amd.npt=0" sets a module's parameter
    kernel_image : arm64: a kernel to boot instead of Debian's, with all that the lab needs built in, or None
    mode : arm64: "vhe" or "nvhe", how KVM runs; None for the usual one
    with_bcc : VMX, arm64: a root file system with bcc (VMX: and the kernel's headers); SVM has this machine's
    environment : added to the command's environment
    retries : run again so often if the lab host itself fails (a boot that hangs, a kernel panic)
    """

    isa: str
    command: tuple[str, ...]
    kernel: str = "6.1"
    cwd: Path = field(default_factory=Path.cwd)
    out: Path | None = None
    timeout_s: float = 900.0
    cpus: int = 1
    memory_mib: int = 2048
    module_dir: Path | None = None
    kernel_image: Path | None = None
    kernel_args: tuple[str, ...] = ()
    mode: str | None = None
    with_bcc: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    retries: int = 0


def write_job(job: Job, folder: Path) -> None:
    """Fill the job directory (see the module docstring)."""
    hidden = folder / "lower" / LAB_DIRECTORY
    hidden.mkdir(parents=True)
    (hidden / "command").write_text(_command_script(job))
    (folder / "cwd").write_text(str(job.cwd.resolve()))
    (folder / "modules").mkdir()
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    if job.out is not None:
        (folder / "want-files").touch()
    if job.module_dir is not None:
        _copy_modules(job.module_dir, folder / "modules")
    programs = folder / "lower" / "usr" / "local" / "bin"
    programs.mkdir(parents=True)
    scripts = {"kvmtrace": _kvmtrace_wrapper(job.isa), LINUX_GUEST: linux_guest_script(f"/{LAB_DIRECTORY}", job.isa)}
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)


def package_parent() -> Path:
    """Return the directory that holds the running kvmtrace package."""
    return Path(kvmtrace.__file__).resolve().parent.parent


def _command_script(job: Job) -> str:
    settings = {"KVMTRACE_LAB": job.isa, "PYTHONDONTWRITEBYTECODE": "1", **job.environment}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    return f"{exports}cd {shlex.quote(str(job.cwd.resolve()))} || exit 125\nexec {shlex.join(job.command)}\n"


def _kvmtrace_wrapper(isa: str) -> str:
    """Return a script that starts this very kvmtrace: by its own Python (SVM), or the image's (VMX)."""
    python, parent = "/usr/bin/python3", "/usr/lib/kvmtrace"
    if isa == "svm":
        python, parent = shlex.quote(sys.executable), shlex.quote(str(package_parent()))
    return f'#!/bin/sh\nPYTHONPATH={parent} exec {python} -m kvmtrace "$@"\n'


def _copy_modules(source: Path, target: Path) -> None:
    files = sorted(source.glob("*.ko"))
    if not files:
        raise UsageError(f"{source} holds no .ko file")
    for file in files:
        shutil.copyfile(file, target / file.name)
