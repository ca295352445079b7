"""The VMX lab: Bochs emulates an Intel processor with VMX and EPT; its disks are built here.

Disks: the root file system (shared, never written), the job as a tar archive, and the job's results (see
results_disk.py). The kernel and the initramfs are on a CD, started by ISOLINUX.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError
from kvmtrace.lab.cache import cached, digest
from kvmtrace.lab.emulator import Emulator, Limits
from kvmtrace.lab.image import compile_tree, pad_to_cylinder, root_image
from kvmtrace.lab.initramfs import lab_initramfs
from kvmtrace.lab.job import package_parent
from kvmtrace.lab.results_disk import make_disk
from kvmtrace.lab.tools import find_program, run_tool

if TYPE_CHECKING:
    from kvmtrace.lab.job import Job
    from kvmtrace.lab.kernels import Kernel

BOOT_LIMIT_S = 600.0
# instructions per emulated second: also the frequency of the TSC
IPS = 100_000_000
HZ = 250  # of Debian's kernels
KERNEL_ARGS = (
    "console=ttyS0",
    "quiet",
    "panic=-1",
    "nokaslr",
    "mitigations=off",
    "tsc=reliable",
    f"lpj={IPS // HZ}",
    "random.trust_cpu=on",
    "cryptomgr.notests",
    "initcall_blacklist=load_system_certificate_list,init_blk_tracer",
    "lab.isa=vmx",
)
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
ISOLINUX = (Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"))
MOST_MEMORY_MIB = 2048  # of Bochs's host_size


def prepare(job: Job, kernel: Kernel, folder: Path) -> Emulator:
    """Return the Bochs that runs the job directory `folder`/job.

    Raises
    ------
    CapabilityError
        Something that apt could install is missing.
    """
    _check_tools()
    # Bochs keeps a lock file beside each image, and crashes on long paths: links in its own directory
    (folder / "boot.iso").symlink_to(_boot_iso(kernel, (*KERNEL_ARGS, *job.kernel_args)))
    (folder / "root.img").symlink_to(root_image(kernel if job.with_bcc else None))
    add_package(folder / "job" / "lower" / "usr" / "lib" / "kvmtrace")
    add_cwd(job, folder / "job" / "lower")
    disk = folder / "job.img"
    with tarfile.open(disk, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder / "job", ".", filter=_owned_by_root)
    pad_to_cylinder(disk)
    results = folder / "results.img"
    make_disk(results)
    (folder / "bochsrc").write_text(_configuration(job))
    (folder / "debugger").write_text("c\n")  # Debian's Bochs is the debugger build: tell it to go
    command = [*_without_network(), "bochs", "-q", "-f", "bochsrc", "-rc", "debugger"]
    return Emulator(
        "Bochs",
        command,
        folder,
        folder / "console",
        folder / "stdout",
        folder / "stderr",
        results,
        folder / "log",
    )


def limits(job: Job) -> Limits:
    """Return how long the boot and the command may take."""
    return Limits(BOOT_LIMIT_S, job.timeout_s)


def _check_tools() -> None:
    for program in ("bochs", "xorriso", "mke2fs"):
        find_program(program)
    for file, package in ((BIOS, "bochsbios"), (ISOLINUX[0], "isolinux"), (ISOLINUX[1], "syslinux-common")):
        if not file.exists():
            raise CapabilityError(f"{file} is missing", f"apt-get install {package}")


def _boot_iso(kernel: Kernel, arguments: tuple[str, ...]) -> Path:
    initramfs = lab_initramfs(kernel, "vmx")

    def build(work: Path) -> None:
        tree = work / "tree"
        tree.mkdir()
        for source, name in ((kernel.image, "vmlinuz"), (initramfs, "initrd")):
            shutil.copy(source, tree / name)
        for source in ISOLINUX:
            shutil.copy(source, tree)
        lines = [
            "DEFAULT lab",
            "PROMPT 0",
            "LABEL lab",
            "KERNEL vmlinuz",
            f"APPEND initrd=initrd {' '.join(arguments)}",
            "",
        ]
        (tree / "isolinux.cfg").write_text("\n".join(lines))
        command = [
            "xorriso",
            "-as",
            "mkisofs",
            "-quiet",
            "-o",
            str(work / "boot.iso"),
            "-b",
            "isolinux.bin",
            "-c",
            "boot.cat",
            "-no-emul-boot",
            "-boot-load-size",
            "4",
            "-boot-info-table",
            str(tree),
        ]
        run_tool(command)
        shutil.rmtree(tree)

    return cached(f"vmx-iso-{digest([str(kernel.image), str(initramfs), *arguments])}", build) / "boot.iso"


def add_package(target: Path) -> None:
    """Add this kvmtrace (its tracers too, where it runs from a checkout) and click, compiled for the image."""
    trees = [package_parent() / "kvmtrace", package_parent() / "tracers"]
    sources = sorted(path for tree in trees for path in tree.rglob("*") if path.is_file() and path.suffix != ".pyc")
    key = digest([*(path.read_bytes() for path in sources), *map(str, sources), metadata.version("click")])

    def build(work: Path) -> None:
        for path in sources:
            copy = work / path.relative_to(package_parent())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        import click

        shutil.copytree(Path(click.__file__).parent, work / "click", ignore=shutil.ignore_patterns("__pycache__"))
        compile_tree(work)

    shutil.copytree(cached(f"package-{key}", build), target)


# a working directory with more than this is not what somebody wants to send through an emulated disk
CWD_LIMIT_BYTES = 256 << 20


def add_cwd(job: Job, lower: Path) -> None:
    """Copy the working directory, without hidden directories and Python's caches."""
    source = job.cwd.resolve()
    files = []
    for folder, names, members in os.walk(source):
        names[:] = [name for name in names if not name.startswith(".") and name != "__pycache__"]
        files += [Path(folder) / name for name in members if (Path(folder) / name).is_file()]
    size = sum(path.stat().st_size for path in files)
    if size > CWD_LIMIT_BYTES:
        raise CapabilityError(
            f"{source} holds {size >> 20} MiB, the lab takes {CWD_LIMIT_BYTES >> 20}",
            "run it in a smaller directory",
        )
    target = lower / source.relative_to("/")
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _without_network() -> list[str]:
    """Return a prefix that keeps Bochs' display server (it has no headless display) off the network."""
    prefix = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-r", "-n"]
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if allowed else []


def _configuration(job: Job) -> str:
    disks = {"ata0-master": "root.img", "ata0-slave": "job.img", "ata1-slave": "results.img"}
    ports = {"com1": "console", "com2": "stdout", "com3": "stderr"}
    return "\n".join(
        [
            "config_interface: textconfig",
            'display_library: rfb, options="timeout=0"',
            f"cpu: model=corei7_haswell_4770, count=1, ips={IPS}, reset_on_triple_fault=0, ignore_bad_msrs=1",
            f"memory: guest={job.memory_mib}, host={job.memory_mib}",
            f"romimage: file={BIOS}",
            f"vgaromimage: file={VGA_BIOS}",
            "boot: cdrom",
            "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
            "ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15",
            *(f'{place}: type=disk, path="{image}", mode=flat' for place, image in disks.items()),
            'ata1-master: type=cdrom, path="boot.iso", status=inserted',
            *(f'{port}: enabled=1, mode=file, dev="{path}"' for port, path in ports.items()),
            "sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy",
            "speaker: enabled=0",
            "clock: sync=none",
            "log: bochs.log",
            "debug: action=ignore",
            "info: action=ignore",
            "error: action=ignore",
            "panic: action=fatal",
            "",
        ]
    )
