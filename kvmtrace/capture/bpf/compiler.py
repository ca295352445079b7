"""C to BPF instructions with bcc's compiler; needs no kernel headers (tracers/include/linux/types.h says why)."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from kvmtrace.errors import CapabilityError
from kvmtrace.scratch import scratch_file

LOAD_IMM64 = 0x18  # BPF_LD | BPF_IMM | BPF_DW
NO_BCC = "install bcc for the system Python (Debian: apt-get install python3-bpfcc), or use --backend ftrace"


def find_tracers() -> Path:
    """Return the folder of the eBPF programs: in the installed package, or in the source tree."""
    package = Path(__file__).parents[2]
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
        self.file = scratch_file()
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
                text.encode(), 0, (ctypes.c_char_p * len(flags))(*flags), len(flags), False, None
            )
    finally:
        if before is None:
            del os.environ["BCC_KERNEL_SOURCE"]
        else:
            os.environ["BCC_KERNEL_SOURCE"] = before
    if not module:
        errors = [line for line in stderr.text.splitlines() if "error" in line] or stderr.text.splitlines()[-1:]
        raise CapabilityError(
            f"bcc cannot compile the tracers: {errors[0] if errors else 'no reason given'}", "use --backend ftrace"
        )
    try:
        return _instructions(lib, module)
    finally:
        lib.bpf_module_destroy(module)


def cache_folder() -> Path:
    """Return where compiled programs are kept: $KVMTRACE_BPF_CACHE, or the system's or user's cache."""
    named = os.environ.get("KVMTRACE_BPF_CACHE")
    if named:
        return Path(named)
    if os.geteuid() == 0:  # never below a home that sudo may have left as it was
        return Path("/var/cache/kvmtrace/bpf")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmtrace" / "bpf"


def compile_cached(text: str) -> dict[str, bytes]:
    """Compile a source, or take what it was compiled to before; bcc is needed only for the former.

    Parameters and errors are those of compile_source.
    """
    folder = cache_folder()
    path = folder / hashlib.sha256(text.encode()).hexdigest()
    found = _read_cached(path)
    if found is not None:
        return found
    code = compile_source(text)
    with contextlib.suppress(OSError):  # a cache that cannot be written is no cache
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder):
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({name: value.hex() for name, value in code.items()}))
            temporary.rename(path)
    return code


def _is_private(folder: Path) -> bool:
    """Say whether nobody else can have put programs there."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _read_cached(path: Path) -> dict[str, bytes] | None:
    try:
        if not _is_private(path.parent):
            return None
        value = json.loads(path.read_text())
        return {str(name): bytes.fromhex(code) for name, code in value.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def relocate(code: dict[str, bytes], values: dict[int, int]) -> dict[str, bytes]:
    """Put what is known only now into compiled programs.

    Parameters
    ----------
    code : function name -> instructions
    values : placeholder -> value, of 64-bit loads (maps by descriptor, kernel variables by id, constants)
    """
    return {name: _relocate(instructions, values) for name, instructions in code.items()}


def _relocate(instructions: bytes, values: dict[int, int]) -> bytes:
    out = bytearray(instructions)
    at = 0
    while at < len(out):
        if out[at] == LOAD_IMM64:
            number = int.from_bytes(out[at + 4 : at + 8], "little")
            if number in values:
                out[at + 4 : at + 8] = values[number].to_bytes(4, "little")
            at += 8  # it takes two slots
        at += 8
    return bytes(out)


def _instructions(lib: Any, module: int) -> dict[str, bytes]:
    programs = {}
    for index in range(lib.bpf_num_functions(module)):
        name = lib.bpf_function_name(module, index)
        start, size = lib.bpf_function_start(module, name), lib.bpf_function_size(module, name)
        programs[name.decode()] = ctypes.string_at(start, size)
    return programs
