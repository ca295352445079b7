"""Fields that a capture has under other names, or in pieces: read as kvmtrace calls them.

kvm_exit of x86 has exit_reason, guest_rip and isa, and those are the names that everything above asks for. What
another ISA's events call them, and of which pieces its exit code is made, its `Isa` says (signature, derived).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.base import WHOLE
from kvmtrace.isa.registry import recognise
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.isa.base import Part

EXIT = "kvm_exit"
ISA_FIELD = "isa"


@dataclass(frozen=True)
class Derived:
    """A field made of recorded ones: the sum of its parts, or a constant where there are none."""

    parts: tuple[Part, ...]
    constant: int = 0

    def column(self, read: Callable[[str], NDArray[Any]], n_rows: int) -> NDArray[Any]:
        """Return the field of all events of its kind.

        Parameters
        ----------
        read : gives a recorded field of that kind as a column
        n_rows : how many events of that kind there are
        """
        if not self.parts:
            return np.full(n_rows, self.constant, np.uint8)
        first = self.parts[0]
        if len(self.parts) == 1 and not first.shift and first.mask == WHOLE:
            return read(first.field)
        total = np.zeros(n_rows, np.uint64)
        for part in self.parts:
            piece = read(part.field).astype(np.uint64) & np.uint64(part.mask)
            total += piece << np.uint64(part.shift) if part.shift >= 0 else piece >> np.uint64(-part.shift)
        return total


def derived_fields(by_name: Mapping[str, Mapping[str, Any]]) -> Mapping[tuple[str, str], Derived]:
    """Return (event, field) -> how it is made, for a capture of an ISA whose events call things differently.

    Parameters
    ----------
    by_name : event -> its recorded fields
    """
    recorded = by_name.get(EXIT)
    if recorded is None or ISA_FIELD in recorded:
        return {}
    isa = recognise(recorded)
    if isa is None:
        return {}
    found = {(EXIT, ISA_FIELD): Derived((), isa.number)}
    for (event, name), parts in isa.derived.items():
        own = by_name.get(event, {})
        if name not in own and all(part.field in own for part in parts):
            found[event, name] = Derived(parts)
    return found
