"""Runs of VM-exits that are alike: for storms (H2) and vCPUs that make no progress (H3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found


def run_lengths(same: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return, per element, how many Trues in a row end there."""
    number = np.arange(1, len(same) + 1)
    last_false = np.maximum.accumulate(np.where(same, 0, number))
    length: NDArray[np.intp] = number - last_false
    return length


def report_runs(
    excerpt: Excerpt, found: Found, same: NDArray[np.bool_], limit: int, exits: NDArray[np.intp] | None = None
) -> None:
    """Report each run of at least `limit` exits of a thread once, where it reaches the limit.

    Parameters
    ----------
    same : which exits equal the one before
    exits : the exits that are looked at, where those are not all
    """
    found.check(len(same))
    exits = np.arange(len(same)) if exits is None else exits
    if np.count_nonzero(same) < limit:
        return
    thread = excerpt.thread[exits]
    first = np.ones(len(same), bool)
    first[1:] = thread[1:] != thread[:-1]
    reached = exits[run_lengths(same & ~first) == limit]
    rip = excerpt.exits.get("guest_rip")
    found.violate(
        excerpt.exits.start[reached],
        lambda i: (
            f"fewer than {limit} in a row",
            f"{limit} times {excerpt.exit_name(reached[i])} at rip {int(rip[reached[i]]):#x}",
        ),
    )
