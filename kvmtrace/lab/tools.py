"""Finds and runs the programs that build a lab."""

from __future__ import annotations

import os
import shutil
import subprocess

from kvmtrace.errors import CapabilityError

# program -> Debian package
PACKAGES: dict[str, str] = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "apt-cache": "apt",
    "apt-get": "apt",
    "bochs": "bochs",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "xorriso": "xorriso",
}


def find_program(name: str) -> str:
    """Return a program's path; where administrators' programs lie is searched too.

    Raises
    ------
    CapabilityError
        It is missing; the remedy names its package.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise CapabilityError(f"{name} is missing", f"apt-get install {PACKAGES.get(name, name)}")
    return path


def run_tool(command: list[str], cwd: str | None = None, remedy: str = "") -> str:
    """Run a program to its end and return its standard output.

    Raises
    ------
    CapabilityError
        It is missing or failed; the message has its last line of complaint.
    """
    program = find_program(command[0])
    done = subprocess.run([program, *command[1:]], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        lines = [line for line in lines if line.startswith("E:")] or lines  # apt's errors, between its warnings
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise CapabilityError(f"{' '.join(command[:2])} failed: {said}", remedy)
    return done.stdout
