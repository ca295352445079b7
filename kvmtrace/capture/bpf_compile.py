"""C to BPF instructions with bcc's compiler; needs no kernel headers (tracers/include/linux/types.h says why)."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import Any

from kvmtrace.errors import CapabilityError

NO_BCC = "install bcc for the system Python (Debian: apt-get install python3-bpfcc), or use --backend ftrace"


def find_tracers() -> Path:
    """Return the folder of the eBPF programs: in the installed package, or in the source tree."""
    package = Path(__file__).parents[1]
    for folder in (package / "_tracers", package.parent / "tracers"):
        if (folder / "record.h").is_file():
            return folder
    raise CapabilityError(f"the folder tracers/ is missing beside {package}", "install kvmtrace again")


def load_bcc() -> Any:
    """Import bcc's compiler library.

    Raises
    ------
    CapabilityError
        It is not installed, or is another project's package of that name.
    """
    try:
        from bcc import lib
    except (ImportError, OSError, AttributeError):
        raise CapabilityError("the BPF compiler collection (bcc) is not installed", NO_BCC) from None
    if not hasattr(lib, "bpf_module_create_c_from_string"):
        raise CapabilityError("the package bcc is not the BPF compiler collection", NO_BCC)
    return lib


class _QuietStderr:
    """Catch what clang prints on file descriptor 2, for the error message."""

    def __enter__(self) -> _QuietStderr:
        self.saved = os.dup(2)
        self.file = tempfile.TemporaryFile()
        os.dup2(self.file.fileno(), 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self.saved, 2)
        os.close(self.saved)
        self.file.seek(0)
        self.text = self.file.read().decode("utf-8", "replace")
        self.file.close()


def compile_source(text: str, include: Path | None = None) -> dict[str, bytes]:
    """Compile a C source.

    Parameters
    ----------
    text : str, the source; each of its external functions becomes a program
    include : Path, the stand-in for the kernel source; by default ours

    Returns
    -------
    function name -> BPF instructions

    Raises
    ------
    CapabilityError
        bcc is missing, or cannot compile it.
    """
    lib = load_bcc()
    folder = include or find_tracers() / "include"
    flags = [b"-I" + os.fsencode(folder)]
    before = os.environ.get("BCC_KERNEL_SOURCE")
    os.environ["BCC_KERNEL_SOURCE"] = str(folder.parent)  # bcc looks for include/linux/kconfig.h below it
    try:
        with _QuietStderr() as stderr:
            module = lib.bpf_module_create_c_from_string(
                text.encode(), 0, (ctypes.c_char_p * len(flags))(*flags), len(flags), False, None)
    finally:
        if before is None:
            del os.environ["BCC_KERNEL_SOURCE"]
        else:
            os.environ["BCC_KERNEL_SOURCE"] = before
    if not module:
        errors = [line for line in stderr.text.splitlines() if "error" in line] or stderr.text.splitlines()[-1:]
        raise CapabilityError(f"bcc cannot compile the tracers: {errors[0] if errors else 'no reason given'}",
                              "use --backend ftrace")
    try:
        return _instructions(lib, module)
    finally:
        lib.bpf_module_destroy(module)


def _instructions(lib: Any, module: int) -> dict[str, bytes]:
    programs = {}
    for index in range(lib.bpf_num_functions(module)):
        name = lib.bpf_function_name(module, index)
        start, size = lib.bpf_function_start(module, name), lib.bpf_function_size(module, name)
        programs[name.decode()] = ctypes.string_at(start, size)
    return programs
