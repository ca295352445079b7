"""Which modules, with which parameters, meet which guest: the steps of a boot, healthy ones first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from history.catalogue import put_back
from kvmtrace.lab.cache import digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from faults.catalogue import Edit

    from history.catalogue import Bug


@dataclass(frozen=True)
class Step:
    """One recording.

    Parameters
    ----------
    name : of the files; a bug's own name, or "healthy-..." for a twin, which bugs of the same guest share
    edits : what the modules were built with
    parameters, trigger : as in Bug
    probes : those of the bugs that it is for
    """

    name: str
    edits: tuple[Edit, ...]
    parameters: tuple[str, ...]
    trigger: tuple[str, ...]
    probes: tuple[str, ...] = field(default=(), compare=False)


def twin_of(bug: Bug) -> Step:
    """Return the healthy recording beside a bug's."""
    key = digest([*bug.trigger, "", *bug.parameters, *(edit.pattern for edit in bug.aged)])[:8]
    words = [
        word.removeprefix("./").removesuffix("_test") for word in bug.trigger if word[0].isalpha() or word[0] == "."
    ]
    label = "-".join(word for word in words if word not in ("trigger", "unusual")).replace("_", "-")
    return Step(f"healthy-{label}-{key}", bug.aged, bug.parameters, bug.trigger)


def step_of(bug: Bug) -> Step:
    """Return the recording of a bug."""
    return Step(bug.name, (*bug.aged, *bug.edits), bug.parameters, bug.trigger, bug.probes)


def steps_for(isa: str, names: Iterable[str] = ()) -> list[Step]:
    """Return the steps of an ISA's lab: each twin once, before all that is faulty.

    Parameters
    ----------
    names : of bugs, none for all
    """
    wanted = set(names)
    bugs = [bug for bug in put_back(isa) if not wanted or bug.name in wanted]
    probes: dict[Step, dict[str, None]] = {}
    for bug in bugs:
        probes.setdefault(twin_of(bug), {}).update(dict.fromkeys(bug.probes))
    twins = [replace(twin, probes=tuple(own)) for twin, own in probes.items()]
    return [*sorted(twins, key=lambda step: (step.parameters, step.name)), *(step_of(bug) for bug in bugs)]
