"""Fields of older kernels that mean something else than those of the same name today.

Linux 5.10 gave kvm_exit the fields intr_info and error_code. Until then info2 of one ISA was what intr_info is now, and
nothing told the vectoring information, which is its info2 since (arch/x86/kvm/vmx/vmx.c, vmx_get_exit_info()).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.isa.registry import BY_NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    from kvmtrace.table.format_text import EventFormat
    from kvmtrace.table.recording import Recording

    Made = TypeVar("Made", bound=Recording)

SINCE_5_10 = {"intr_info", "error_code"}
LOOKED_AT = 1 << 14  # events in each step of the search for the first kvm_exit


def _is_old(fmt: EventFormat) -> bool:
    return fmt.name == "kvm_exit" and {"info2", "isa"} <= fmt.fields.keys() and not SINCE_5_10 & fmt.fields.keys()


def _first_isa(recording: Recording) -> int | None:
    for table in recording.iter_events(LOOKED_AT):
        if table.count("kvm_exit") and table.has("kvm_exit", "isa"):
            return int(table.field("kvm_exit", "isa")[0])
    return None


def _renamed(fmt: EventFormat) -> EventFormat:
    """Return a format whose info2 is called intr_info, and has its size."""
    if not _is_old(fmt):
        return fmt
    info2 = fmt.fields["info2"]
    fields = {name: field for name, field in fmt.fields.items() if name != "info2"}
    fields["intr_info"] = replace(info2, name="intr_info", size=4, dtype=np.dtype("<u4"))
    return replace(fmt, fields=fields)


def with_settled_layout(make: Callable[[list[EventFormat]], Made], formats: Iterable[EventFormat]) -> Made:
    """Make a recording; again with its fields called by today's names, where its kernel calls them otherwise.

    Parameters
    ----------
    make : event formats -> the recording
    formats : as the file has them
    """
    formats = list(formats)
    recording = make(formats)
    if any(_is_old(fmt) for fmt in formats):
        isa = BY_NUMBER.get(_first_isa(recording) or 0)
        if isa is not None and isa.vectoring_field == "info2":
            return make([_renamed(fmt) for fmt in formats])
    return recording
