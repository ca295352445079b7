"""Compile the C files beside this one into the module `_loops`; run by the build hook, by `make setup` and by tests.

    python kvmtrace/_native/compiling.py [--if-changed]

It imports nothing of kvmtrace: it runs before kvmtrace can be imported.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCES = Path(__file__).parent
HEADER = SOURCES / "loops.h"
LIBRARY = "_loops.abi3.so"  # Python's stable interface: one build for all versions from 3.11 on
FLAGS = ("-O3", "-s")
ALWAYS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared")


class CannotCompileError(Exception):
    """The compiled loops cannot be built here; the text says what to install."""


def declarations() -> str:
    """Return the header without the preprocessor's lines: what cffi reads."""
    return "".join(line for line in HEADER.read_text().splitlines(keepends=True) if not line.startswith("#"))


def compiler() -> list[str]:
    """Return the command of the C compiler.

    Raises
    ------
    CannotCompileError
        There is none, or Python's headers are missing.
    """
    command = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        raise CannotCompileError(
            f"kvmtrace's inner loops are written in C and there is no C compiler ({command[0]}): "
            "install gcc and libc6-dev (Debian: apt install gcc libc6-dev python3-dev)"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise CannotCompileError(
            f"Python.h is not in {sysconfig.get_path('include')}: install Python's headers "
            "(Debian: apt install python3-dev)"
        )
    return command


def build(folder: Path, *, sources: Path = SOURCES, flags: Sequence[str] = FLAGS) -> Path:
    """Compile the module into a folder.

    Parameters
    ----------
    folder : where `_loops.abi3.so` goes; it is replaced at once, so that who has it loaded keeps the old one
    sources : folder of the C files
    flags : for the compiler, beside those that are always given

    Raises
    ------
    CannotCompileError
    """
    from cffi import FFI

    command = compiler()
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source("kvmtrace._native._loops", f'#include "{HEADER.name}"')
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        generated, library = Path(scratch) / "_loops.c", Path(scratch) / LIBRARY
        with contextlib.redirect_stdout(io.StringIO()):  # cffi tells each file
            ffi.emit_c_code(str(generated))
        done = subprocess.run(
            [
                *command,
                *ALWAYS,
                *("-Wno-unused-parameter", "-Wno-missing-field-initializers"),  # of what cffi generates
                *flags,
                f"-I{sysconfig.get_path('include')}",
                f"-I{sources}",
                *("-o", str(library), str(generated)),
                *map(str, sorted(sources.glob("*.c"))),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CannotCompileError(f"the C files of {sources} do not compile:\n{done.stderr.strip()}")
        return library.replace(folder / LIBRARY)


def is_current(folder: Path = SOURCES) -> bool:
    """Say whether the module is there and newer than what it is made of."""
    library = folder / LIBRARY
    parts = [*SOURCES.glob("*.[ch]"), Path(__file__)]
    return library.exists() and library.stat().st_mtime > max(part.stat().st_mtime for part in parts)


if __name__ == "__main__":
    try:
        if "--if-changed" not in sys.argv or not is_current():
            build(SOURCES)
    except CannotCompileError as error:
        sys.exit(f"error: {error}")
