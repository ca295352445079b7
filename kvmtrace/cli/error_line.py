"""The one line that tells of an error, and the exit code that goes with it."""

from __future__ import annotations

import errno

from kvmtrace.errors import RESOURCES, UNFORESEEN, CapabilityError, FormatError, KvmtraceError, is_of_object_store

# errors of the environment, not of a file that was read, and what to do
REMEDIES = {
    **RESOURCES,
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.EFBIG: "the file would be larger than allowed: `ulimit -f unlimited`",
    errno.EROFS: "choose another place",
    errno.EACCES: "",
    errno.EPERM: "",
}


def explain(error: Exception) -> tuple[str, int]:
    """Return the one line that tells of an error, and the exit code."""
    if isinstance(error, KvmtraceError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("kvmtrace"):
        return f"the Python package {error.name} is not installed; pip install kvmtrace", CapabilityError.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; free some, or choose less with --from and --to", CapabilityError.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        name = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno)
        text = f"{name}{error.strerror or error}" + (f"; {remedy}" if remedy else "")
        return text, FormatError.exit_code if remedy is None else CapabilityError.exit_code
    said = " ".join(str(error).split())
    if is_of_object_store(error):
        return f"the object store: {said or type(error).__name__}; docs/fleet.md", CapabilityError.exit_code
    kind = type(error).__name__
    return (
        f"unforeseen error, please report it: {kind}{': ' + said if said else ''} (kvmtrace --debug shows where)",
        UNFORESEEN,
    )
