"""Options of `kvmtrace report` that do not go together: one of the two would be passed over in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection

# fmt: off
# (option, what it does, the options that mean nothing beside it)
PAIRS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("--explain", "tells one VM-exit, as text",
     ("--format", "--by", "--sort", "--from", "--to", "--perf-compatible", "--no-model",
      "--guest-symbols", "--slowest", "--show", "--level")),
    ("--perf-compatible", "prints perf's tables; JSON has them always, as perf_compatible",
     ("--by", "--sort", "--format", "--guest-symbols", "--slowest", "--show", "--level")),
    ("--format html", "holds all tables, and sorts them by a click", ("--by", "--sort", "--slowest", "--show")),
    ("--format", "json is in the document's order", ("--sort", "--show")),
    ("--by", "prints one table", ("--slowest", "--show")),
    ("--slowest", "prints one table, slowest first", ("--sort", "--show")),
)
# fmt: on


def refuse_pairs(given: Collection[str]) -> None:
    """Refuse the first pair of options of which one would be passed over.

    Raises
    ------
    UsageError
        There is such a pair.
    """
    for option, does, beside in PAIRS:
        for other in beside:
            if option in given and other in given:
                raise UsageError(f"{other} does not go with {option}: {option} {does}")
