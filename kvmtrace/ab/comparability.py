"""What of two sets of recordings cannot be compared, and why: found before anything is compared.

A time holds the cost of the trace events within it, a count those that were recorded, and a transition of the model
only what the recording shows. Where the sides differ in that, a difference says nothing of the software.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import BY_NAME
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.states import STEPS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from kvmtrace.ab.run import RunSamples, Traced

TIMES, RATES, BUDGET, TRANSITIONS = "times", "rates", "budget", "transitions"
EVERYTHING = frozenset({TIMES, RATES, BUDGET, TRANSITIONS})
_MODEL_EVENTS = frozenset(step.kind for step in STEPS.values())
_WORDS = {
    TIMES: "times",
    RATES: "rates",
    BUDGET: "time budgets",
    TRANSITIONS: "transitions of the model",
}
_SHOWN = 5  # events named in a sentence


@dataclass(frozen=True)
class Obstacle:
    """A difference that makes some quantities incomparable.

    Parameters
    ----------
    quantities : of EVERYTHING
    why : a sentence without its full stop
    """

    quantities: frozenset[str]
    why: str

    def describe(self) -> str:
        """Return "times and rates are not compared: why"."""
        if self.quantities == EVERYTHING:
            return f"nothing is compared: {self.why}"
        *others, last = [words for name, words in _WORDS.items() if name in self.quantities]
        return f"{', '.join(others)}{' and ' * bool(others)}{last} are not compared: {self.why}"


def find_obstacles(base: Sequence[RunSamples], new: Sequence[RunSamples]) -> tuple[Obstacle, ...]:
    """Return what stands against comparing two sides, the gravest first.

    Runs of which it is not known how they were recorded stand against nothing.
    """
    sides = [[run.traced for run in side if run.traced is not None] for side in (base, new)]
    if not all(sides):
        return ()
    times = frozenset({TIMES, RATES})
    found = [
        _differing(sides, EVERYTHING, "VM-exits of different architectures ({})", _isa),
        _differing(sides, EVERYTHING, "the guests are different ones ({})", lambda one: one.guest or "another"),
        _events(sides),
        _differing(sides, times, "different recorders ({}), which cost differently", lambda one: one.backend),
        _differing(sides, times | {TRANSITIONS}, "the recorder left out different events ({})", _filter),
        _lost(sides),
        _model_events(sides),
    ]
    kept: list[Obstacle] = []
    for one in found:
        if one is not None and one.quantities & allowed(kept):  # else it says nothing more
            kept.append(one)
    return tuple(kept)


def allowed(obstacles: Iterable[Obstacle]) -> frozenset[str]:
    """Return the quantities that may be compared."""
    return EVERYTHING.difference(*(one.quantities for one in obstacles))


def tell_userspace(side: Sequence[RunSamples]) -> bool:
    """Say whether a side recorded which VM-exits left to userspace."""
    return all(run.traced is None or run.traced.has("kvm_userspace_exit") for run in side)


def _isa(one: Traced) -> str | None:
    return BY_NAME[one.isa].title if one.isa in BY_NAME else one.isa


def _filter(one: Traced) -> str:
    """Describe the filters of events that count; those of other system calls change no time noticeably."""
    own = one.frequent | _MODEL_EVENTS
    words = [f"{name}: {what}" for name, what in sorted(one.filters.items()) if name.rpartition(":")[2] in own]
    return "; ".join(words) or "nothing"


def _differing(
    sides: list[list[Traced]], quantities: frozenset[str], why: str, of: Callable[[Traced], str | None]
) -> Obstacle | None:
    """Return an obstacle if a property differs between the runs and is known of all."""
    values = [[of(one) for one in side] for side in sides]
    known = [list(dict.fromkeys(value for value in side if value is not None)) for side in values]
    if None in (*values[0], *values[1]) or len({*known[0], *known[1]}) < 2:
        return None
    base, new = (" and ".join(side) for side in known)
    return Obstacle(quantities, why.format(f"base: {base}; new: {new}"))


def _events(sides: list[list[Traced]]) -> Obstacle | None:
    """Return an obstacle if an event that is frequent on one side was not recorded on the other."""
    missing = []
    for which, side, other in (("new", sides[0], sides[1]), ("base", sides[1], sides[0])):
        frequent = frozenset[str]().union(*(one.frequent for one in side)) - {"lost_events"}
        lacking = sorted(name for name in frequent if not all(one.has(name) for one in other))
        if lacking:
            missing.append(f"{which} lacks {_listed(lacking)}")
    if not missing:
        return None
    why = f"the sides recorded different events ({'; '.join(missing)}), and each event costs time"
    return Obstacle(frozenset({TIMES, RATES, BUDGET}), why)


def _listed(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _lost(sides: list[list[Traced]]) -> Obstacle | None:
    """Return an obstacle if events were lost: counts are too small then, and what is missing did perhaps happen."""
    words = []
    for which, side in zip(("base", "new"), sides, strict=True):
        if any(one.lost is None for one in side):
            words.append(f"{which} lost events, nobody knows how many")
        elif lost := sum(one.lost or 0 for one in side):
            words.append(f"{which} lost {lost:,} {'event' if lost == 1 else 'events'}")
    if not words:
        return None
    return Obstacle(frozenset({RATES, BUDGET, TRANSITIONS}), "; ".join(words))


def _model_events(sides: list[list[Traced]]) -> Obstacle | None:
    """Return an obstacle if the sides do not show the same steps of the model."""
    shown = [frozenset(name for name in _MODEL_EVENTS if all(one.has(name) for one in side)) for side in sides]
    if shown[0] == shown[1]:
        return None
    different = sorted(shown[0] ^ shown[1])
    return Obstacle(frozenset({TRANSITIONS}), f"only one side recorded {_listed(different)}")
