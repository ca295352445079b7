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
_KERNEL_ARGS = "console=ttyS0 quiet nokaslr mitigations=off panic=-1 tsc=reliable random.trust_cpu=on"


def link_linux_guest(kernel: Kernel, folder: Path) -> None:
    """Put the guest's kernel and initramfs into `folder`."""
    script = (resources.files("kvmtrace.lab") / "guest-init.sh").read_bytes()
    busybox = find_busybox()

    def build(work: Path) -> None:
        (work / "guest-initramfs").write_bytes(base_archive(busybox, script).to_bytes())

    initramfs = cached(f"guest-{digest([script, file_key(busybox)])}", build) / "guest-initramfs"
    for source, name in ((initramfs, "guest-initramfs"), (kernel.image, "guest-kernel")):
        try:
            os.link(source, folder / name)
        except OSError:  # another file system
            shutil.copyfile(source, folder / name)


def linux_guest_script(folder: str) -> str:
    """Return the program: `kvmtrace-linux-guest [VCPUS [QEMU-ARGUMENT...]]`."""
    return f"""#!/bin/sh
# Boots a small Linux under QEMU with KVM; exit code 0 if it got to its end.
vcpus=${{1:-1}}
[ $# -gt 0 ] && shift
log=$(mktemp)
qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -nic none \\
    -machine pc -accel kvm -cpu host -smp "$vcpus" -m 256 -serial file:"$log" \\
    -kernel {folder}/guest-kernel -initrd {folder}/guest-initramfs -append "{_KERNEL_ARGS}" "$@"
status=$?
cat "$log"
[ $status = 0 ] && grep -q '{GUEST_DONE}' "$log"
"""
