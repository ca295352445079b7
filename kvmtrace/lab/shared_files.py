"""Directories of this machine that a lab host under QEMU sees: virtio-9p."""

from __future__ import annotations


def share(path: str, tag: str, *, readonly: bool) -> list[str]:
    """Return QEMU's options for a directory that the lab host mounts by its tag."""
    mode = ",readonly=on" if readonly else ""
    quoted = path.replace(",", ",,")
    return [
        "-fsdev",
        f"local,id={tag},path={quoted},security_model=none,multidevs=remap{mode}",
        "-device",
        f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]
