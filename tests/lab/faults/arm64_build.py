"""Build a small arm64 kernel that holds all of arm64's faults, each behind a number, from Debian's linux-source.

What the lab needs is built in. It is cross-compiled (gcc-aarch64-linux-gnu, flex, bison, bc), ten minutes of two
processors once, and kept in the lab's cache until the faults change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from faults.arm64_catalogue import ARM64_FAULTS, DECLARATIONS, apply_all
from faults.build import SERIES, unpack_parts
from kvmtrace.lab.cache import cached, digest
from kvmtrace.lab.tools import find_program

CONFIG = Path(__file__).with_name("arm64.config")
CROSS = "aarch64-linux-gnu-"
# of the kernel's tree, what configuring and building it for arm64 takes
_PARTS = (
    *("Kbuild", "Kconfig", "Makefile", "Documentation/Kconfig", "arch", "block", "certs", "crypto", "drivers", "fs"),
    *("include", "init", "io_uring", "ipc", "kernel", "lib", "mm", "net", "rust", "samples", "scripts", "security"),
    *("sound", "tools", "usr", "virt"),
)


def faulty_kernel() -> Path:
    """Return the image of the kernel with all faults, built if it is not cached."""
    edits = (*DECLARATIONS, *(fault.edit for fault in ARM64_FAULTS))
    recipe = [CONFIG.read_bytes(), *map(repr, edits)]
    return cached(f"arm64-faults-{digest(recipe)}", _build) / "Image"


def _build(work: Path) -> None:
    for program in (f"{CROSS}gcc", "flex", "bison", "bc"):
        find_program(program)
    source = work / "source"
    source.mkdir()
    unpack_parts(source, SERIES, _PARTS)
    apply_all(source)
    make(source, f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig")
    make(source, f"-j{len(os.sched_getaffinity(0))}", "Image")
    shutil.copyfile(source / "arch/arm64/boot/Image", work / "Image")
    shutil.rmtree(source)


def make(source: Path, *arguments: str) -> None:
    """Run make for arm64 in the kernel's tree."""
    command = ["nice", "-n", "10", "make", "-s", "ARCH=arm64", f"CROSS_COMPILE={CROSS}", *arguments]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"make {' '.join(arguments)}: {done.stderr[-2000:]}"
