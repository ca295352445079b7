"""The VMX lab's root file system: what a recording needs, copied from this machine into an ext4 image.

Bochs has no file sharing, so the image holds busybox, the system's Python with its standard library, and of
QEMU, trace-cmd, perf and strace what is installed here, each with the libraries it is linked to.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError
from kvmtrace.lab.cache import cached, digest, file_key
from kvmtrace.lab.initramfs import find_busybox
from kvmtrace.lab.tools import run_tool

if TYPE_CHECKING:
    from kvmtrace.lab.kernels import Kernel

# optional programs, and the data QEMU reads
PROGRAMS = ("trace-cmd", "qemu-system-x86_64", "perf", "strace", "setpriv")
QEMU_DATA = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "linuxboot.bin", "pvh.bin")
SYSTEM_PYTHON = Path("/usr/bin/python3")
BCC_PACKAGE = Path("/usr/lib/python3/dist-packages/bcc")
# parts of the standard library that no recording needs
PYTHON_LEFT_OUT = (
    "test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
    "ensurepip",
    "tkinter",
    "config-*",
    "dist-packages",
    "__pycache__",
)
# Bochs derives the geometry of a disk from its size: 16 heads of 63 sectors
CYLINDER_BYTES = 16 * 63 * 512


def root_image(bcc_for: Kernel | None = None) -> Path:
    """Return the image, built when it or anything copied into it has changed.

    Parameters
    ----------
    bcc_for : add bcc (with LLVM) and the headers of this kernel, 400 MB

    Raises
    ------
    CapabilityError
        The system's Python, mke2fs or (if wanted) bcc is missing.
    """
    files = _program_files()
    if bcc_for is not None:
        files += _bcc_files()
    recipe = Path(__file__).read_bytes()
    key = digest([recipe, *sorted(map(file_key, files)), str(bcc_for and bcc_for.root)])

    def build(work: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="tree-", dir=work) as staging:
            _fill(Path(staging), files)
            if bcc_for is not None:
                _add_bcc(Path(staging), bcc_for)
            write_ext4(Path(staging), work / "root.img")

    return cached(f"vmx-root-{key}", build) / "root.img"


def pad_to_cylinder(path: Path) -> None:
    """Extend a disk image to whole cylinders."""
    size = path.stat().st_size
    os.truncate(path, max(1, -(-size // CYLINDER_BYTES)) * CYLINDER_BYTES)


def write_ext4(source: Path, image: Path) -> None:
    """Make an ext4 image holding the tree `source`, owned by root."""
    content = sum(path.lstat().st_size + 4096 for path in source.rglob("*"))
    cylinders = int(content * 1.15 + 16e6) // CYLINDER_BYTES
    with image.open("wb") as handle:
        handle.truncate(cylinders * CYLINDER_BYTES)
    features = ["-O", "^has_journal", "-E", "root_owner=0:0,lazy_itable_init=1"]
    run_tool(["mke2fs", "-q", "-F", "-t", "ext4", *features, "-d", str(source), str(image)])


def _program_files() -> list[Path]:
    """List what is copied: programs, Python's extension modules, and all libraries they are linked to."""
    if not SYSTEM_PYTHON.exists():
        raise CapabilityError(f"{SYSTEM_PYTHON} is missing", "apt-get install python3")
    python = SYSTEM_PYTHON.resolve()
    found = [Path(path) for path in map(shutil.which, PROGRAMS) if path]
    programs = [python, *(path.resolve() for path in found)]
    extensions = sorted((_standard_library(python) / "lib-dynload").glob("*.so"))
    return [*programs, *_libraries([*programs, *extensions])]


def _standard_library(python: Path) -> Path:
    return Path("/usr/lib") / python.name


def _libraries(files: list[Path]) -> list[Path]:
    """Return the shared libraries of all files, the dynamic loader included."""
    listing = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False).stdout
    # "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)"
    return [Path(path) for path in sorted(set(re.findall(r"(/\S+) \(0x", listing)))]


def _fill(root: Path, files: list[Path]) -> None:
    for name in (
        "proc",
        "sys",
        "dev",
        "tmp",
        "run",
        "root",
        "etc",
        "var",
        "usr/bin",
        "usr/lib64",
        "usr/local/bin",
    ):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "sbin").symlink_to("usr/bin")
    (root / "usr" / "sbin").symlink_to("bin")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    for file in files:
        _copy_file(root, file)
    _add_busybox(root)
    _add_python(root)
    for folder in ("/usr/share/qemu", "/usr/share/seabios"):
        for file in (Path(folder) / name for name in QEMU_DATA):
            if file.exists():
                _copy_file(root, file)


def _bcc_files() -> list[Path]:
    """List bcc's library and all that it is linked to."""
    libraries = sorted(Path("/usr/lib").glob("*-linux-gnu/libbcc.so.0"))
    if not libraries or not BCC_PACKAGE.is_dir():
        raise CapabilityError("bcc is missing", "apt-get install python3-bpfcc")
    return [*libraries, *_libraries(libraries)]


def _add_bcc(root: Path, kernel: Kernel) -> None:
    """Add bcc's Python package and the kernel's headers, where bcc looks for them."""
    shutil.copytree(BCC_PACKAGE, root / BCC_PACKAGE.relative_to("/"), ignore=shutil.ignore_patterns("__pycache__"))
    compile_tree(root / BCC_PACKAGE.relative_to("/"))
    shutil.copytree(kernel.root / "usr" / "src", root / "usr" / "src", symlinks=True)
    modules = root / "usr" / "lib" / "modules" / kernel.release
    modules.mkdir(parents=True)
    for name in ("build", "source"):
        (modules / name).symlink_to((kernel.modules / name).readlink())


def _copy_file(root: Path, file: Path) -> None:
    """Copy a file to its own path below `root` (/lib and /bin being links into /usr)."""
    target = root / file.parent.resolve().relative_to("/") / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)


def _add_busybox(root: Path) -> None:
    busybox = find_busybox()
    shutil.copy(busybox, root / "usr" / "bin" / "busybox")
    for name in run_tool([str(busybox), "--list"]).split():
        link = root / "usr" / "bin" / name
        if not link.exists():
            link.symlink_to("busybox")


def _add_python(root: Path) -> None:
    python = SYSTEM_PYTHON.resolve()
    library = _standard_library(python)
    target = root / library.relative_to("/")
    shutil.copytree(
        library,
        target,
        ignore=shutil.ignore_patterns(*PYTHON_LEFT_OUT),
        symlinks=False,
        ignore_dangling_symlinks=True,
    )
    (root / "usr" / "bin" / "python3").symlink_to(python.name)
    compile_tree(target)


def compile_tree(folder: Path) -> None:
    """Compile Python sources once and for all: compiling under emulation takes longer than recording."""
    command = [str(SYSTEM_PYTHON), "-m", "compileall", "-q", "-j", "2", "--invalidation-mode", "unchecked-hash"]
    run_tool([*command, str(folder)])
