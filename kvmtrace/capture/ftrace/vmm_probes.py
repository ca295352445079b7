"""uprobes on the functions by which a VMM builds its VM, for the recording of its start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.capture.elf_symbols import find_functions
from kvmtrace.errors import UsageError
from kvmtrace.kvm.vmm_symbols import VMM_FUNCTIONS

if TYPE_CHECKING:
    from kvmtrace.capture.ftrace.probe_events import Probes
    from kvmtrace.capture.settings import TargetSpec

MAX_SCRIPT_BYTES = 1 << 16
ENOUGH = 3  # functions of the table that make a binary a VMM we know


def vmm_binary(target: TargetSpec) -> Path | None:
    """Return the binary of the VMM that will be recorded, as far as its name tells."""
    if target.kind == "pid" and target.pid is not None:
        try:
            return Path(f"/proc/{target.pid}/exe").resolve(strict=True)
        except OSError:
            return None
    if target.kind != "command":
        return None
    # also behind a shell, a wrapper or in a script: the first word that names a QEMU
    words = [word for argument in (*target.command, _script(target.command[0])) for word in argument.split()]
    for word in (target.command[0], *(word for word in words if "qemu" in Path(word).name)):
        found = shutil.which(word)
        if found and _is_known(Path(found).resolve()):
            return Path(found).resolve()
    return None


def _script(program: str) -> str:
    """Return the text of a program that is a script, else ""."""
    found = shutil.which(program)
    if found is None:
        return ""
    try:
        with Path(found).open("rb") as file:
            head = file.read(MAX_SCRIPT_BYTES)
    except OSError:
        return ""
    return head.decode("utf-8", "replace") if head.startswith(b"#!") else ""


def _is_known(binary: Path) -> bool:
    try:
        return len(find_functions(binary, [f.symbols[0] for f in VMM_FUNCTIONS])) >= ENOUGH
    except UsageError:  # a script
        return False


def add_vmm_probes(probes: Probes, target: TargetSpec) -> list[dict[str, str]]:
    """Add the uprobes; return the metadata row of each: event, function, how.

    A probe fires in every process of that binary; the recording's own filter keeps the target's.
    """
    binary = vmm_binary(target)
    if binary is None or not _is_known(binary):
        return []
    offsets = find_functions(binary, [symbol for f in VMM_FUNCTIONS for symbol in f.symbols])
    rows = []
    for function in VMM_FUNCTIONS:
        symbol = next((s for s in function.symbols if s in offsets), None)
        if symbol is None:
            continue
        place = f"{binary}:{offsets[symbol]:#x}"
        if probes.add_user(function.role, place, function.fields, is_return=function.is_return):
            rows.append(
                {
                    "event": function.role,
                    "function": f"{binary}:{symbol}",
                    "how": "uretprobe" if function.is_return else "uprobe",
                }
            )
    return rows
