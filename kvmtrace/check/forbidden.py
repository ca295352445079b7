"""Follow-ups that an exit's row neither owes nor allows: J7's after window exits, else V13's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS_NAMES, FOLLOW_UP_MASK, mask_of
from kvmtrace.check.excerpt import allowed_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

_INJECTIONS = mask_of("inject interrupt", "inject exception")
_EMULATE = mask_of("kvm_emulate_insn")


def is_window(row: ExitRow) -> bool:
    """Say whether the exit is an interrupt window."""
    return "interrupt_window" in row.kinds


def check_forbidden(excerpt: Excerpt, group: NDArray[np.intp], found: Found, *, row: ExitRow) -> None:
    """Report exits of a row whose segment holds a follow-up that the row does not know."""
    mask = excerpt.exits.mask[group]
    stray = mask & FOLLOW_UP_MASK & ~allowed_mask(row)
    # where KVM decodes to skip, soft events are decoded by the emulator, in the injection pass
    injected = ((mask & _INJECTIONS) != 0) & excerpt.isa_of(group).decodes_to_skip
    stray &= ~np.where(injected, _EMULATE, np.uint64(0))
    found.check(len(group))
    bad = group[stray != 0]
    strays = stray[stray != 0]

    def describe(i: int) -> tuple[str, str]:
        allowed = [CLASS_NAMES[c] for c in range(64) if int(allowed_mask(row)) >> c & 1]
        observed = [CLASS_NAMES[c] for c in range(64) if int(strays[i]) >> c & 1]
        return f"after {excerpt.exit_name(bad[i])}: {', '.join(allowed) or 'no follow-up'}", ", ".join(observed)

    found.violate(excerpt.exits.start[bad], describe)
