"""The initramfs of a lab host: busybox, the modules it needs to reach its root, and init.sh."""

from __future__ import annotations

import struct
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError
from kvmtrace.lab import kernels
from kvmtrace.lab.cache import cached, digest, file_key
from kvmtrace.lab.cpio import CpioArchive
from kvmtrace.lab.kernels import read_module
from kvmtrace.lab.tools import find_program

if TYPE_CHECKING:
    from kvmtrace.lab.kernels import Kernel

# what reaching the root file system takes, and KVM itself (loaded later: a job may replace these)
ROOT_MODULES: dict[str, tuple[str, ...]] = {
    "svm": ("virtio_pci", "9pnet_virtio", "9p", "overlay"),
    "vmx": ("ata_piix", "sd_mod", "crc32c_generic", "ext4", "overlay"),
    "arm64": ("virtio_pci", "9pnet_virtio", "9p", "overlay"),
}
KVM_MODULES: dict[str, str] = {"svm": "kvm_amd", "vmx": "kvm_intel", "arm64": "kvm"}  # arm64's is built in


def find_busybox() -> Path:
    """Return a busybox that needs no libraries.

    Raises
    ------
    CapabilityError
        There is none.
    """
    path = Path(find_program("busybox")).resolve()
    if _has_interpreter(path.read_bytes()):
        raise CapabilityError(f"{path} needs libraries", "apt-get install busybox-static")
    return path


def _has_interpreter(elf: bytes) -> bool:
    """Whether an ELF program asks for the dynamic loader (PT_INTERP)."""
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    return any(struct.unpack_from("<I", elf, table + i * size)[0] == 3 for i in range(count))


def lab_initramfs(kernel: Kernel, isa: str, busybox: Path | None = None) -> Path:
    """Return the initramfs for a lab host of `isa` (built once per kernel and script).

    Parameters
    ----------
    busybox : of the host's architecture, without libraries; this machine's by default
    """
    script = (resources.files("kvmtrace.lab") / "init.sh").read_bytes()
    busybox = busybox or find_busybox()
    modules = (*ROOT_MODULES[isa], KVM_MODULES[isa])
    recipe = Path(kernels.__file__).read_bytes() + Path(__file__).read_bytes()
    key = digest([script, recipe, file_key(busybox), kernel.release, isa, *modules])

    def build(work: Path) -> None:
        archive = base_archive(busybox, script)
        for phase, names in (("root", ROOT_MODULES[isa]), ("kvm", (KVM_MODULES[isa],))):
            add_modules(archive, kernel, phase, names)
        (work / "initramfs").write_bytes(archive.to_bytes())

    return cached(f"initramfs-{isa}-{kernel.release}-{key}", build) / "initramfs"


def base_archive(busybox: Path, init: bytes) -> CpioArchive:
    """Return an archive with a console, busybox as /bin/sh and `init` as /init."""
    archive = CpioArchive()
    for name in ("proc", "sys", "dev", "tmp"):
        archive.add_directory(name)
    archive.add_device("dev/console", 5, 1)
    archive.add_file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.add_symlink("bin/sh", "busybox")
    archive.add_file("init", init, 0o755)
    return archive


def add_modules(archive: CpioArchive, kernel: Kernel, phase: str, names: tuple[str, ...]) -> None:
    """Add modules with their dependencies, and modules/PHASE.list naming them in load order."""
    order = kernel.load_order(names)
    listing = []
    for path in order:
        name = path.name.split(".ko")[0]
        archive.add_file(f"modules/{name}.ko", read_module(path))
        listing.append(name)
    archive.add_file(f"modules/{phase}.list", "".join(f"{name}\n" for name in listing).encode())
