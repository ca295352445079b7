"""A small Linux guest for QEMU inside a lab host: a Debian kernel and a busybox initramfs."""

from __future__ import annotations

import os
import shutil
from importlib import resources
from typing import TYPE_CHECKING

from kvmtrace.lab.cache import cached, digest, file_key
from kvmtrace.lab.initramfs import base_archive, find_busybox

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.lab.kernels import Kernel

# the program that boots the guest inside a lab host
LINUX_GUEST = "kvmtrace-linux-guest"
GUEST_SERIES = "6.1"
# what the guest prints last; a recording of a boot that never got there is worth nothing
GUEST_DONE = "kvmtrace-guest: done"
_KERNEL_ARGS = "quiet nokaslr mitigations=off panic=-1 random.trust_cpu=on"
# QEMU, its machine, the guest's console
_MACHINES = {
    "x86": ("qemu-system-x86_64", "pc", "ttyS0 tsc=reliable"),
    "arm64": ("qemu-system-aarch64", "virt,gic-version=host", "ttyAMA0"),
}


def link_linux_guest(kernel: Kernel, folder: Path, busybox: Path | None = None) -> None:
    """Put the guest's kernel and initramfs into `folder`.

    Parameters
    ----------
    busybox : of the guest's architecture, without libraries; this machine's by default
    """
    script = (resources.files("kvmtrace.lab") / "guest-init.sh").read_bytes()
    busybox = busybox or find_busybox()

    def build(work: Path) -> None:
        (work / "guest-initramfs").write_bytes(base_archive(busybox, script).to_bytes())

    initramfs = cached(f"guest-{digest([script, file_key(busybox)])}", build) / "guest-initramfs"
    for source, name in ((initramfs, "guest-initramfs"), (kernel.image, "guest-kernel")):
        try:
            os.link(source, folder / name)
        except OSError:  # another file system
            shutil.copyfile(source, folder / name)


def linux_guest_script(folder: str, isa: str) -> str:
    """Return the program: `kvmtrace-linux-guest [VCPUS [QEMU-ARGUMENT...]]`."""
    qemu, machine, console = _MACHINES.get(isa, _MACHINES["x86"])
    return f"""#!/bin/sh
# Boots a small Linux under QEMU with KVM; exit code 0 if it got to its end.
vcpus=${{1:-1}}
[ $# -gt 0 ] && shift
log=$(mktemp)
{qemu} -nodefaults -no-user-config -no-reboot -display none -nic none \\
    -machine {machine} -accel kvm -cpu host -smp "$vcpus" -m 256 -serial file:"$log" \\
    -kernel {folder}/guest-kernel -initrd {folder}/guest-initramfs -append "console={console} {_KERNEL_ARGS}" "$@"
status=$?
cat "$log"
[ $status = 0 ] && grep -q '{GUEST_DONE}' "$log"
"""
