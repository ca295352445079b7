"""What `--vm NAME|UUID|GLOB` means, wherever it is given."""

from __future__ import annotations

import fnmatch


def is_meant(wanted: str, name: str | None, uuid: str | None) -> bool:
    """Say whether a VM is meant: by its name, its uuid (in any case), or a pattern (`web-*`) of its name.

    A name that holds *, ? or [ is meant by itself too.
    """
    if uuid is not None and wanted.lower() == uuid.lower():
        return True
    return name is not None and (wanted == name or fnmatch.fnmatchcase(name, wanted))


def vm_label(name: str | None, kind: str | None, comm: str | None, pid: int | None) -> str:
    """Return what a VM is called: its name, else its VMM and process."""
    if name:
        return name
    who = kind or comm or "VM"
    return f"{who} {pid}" if pid is not None else who
