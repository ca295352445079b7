"""What a comparison of a recording with the reference model says: the report document's `model`.

Values only. A violation is a value; nothing here computes or renders.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from collections.abc import Iterable

MODEL_NAME = "kvm-vcpu-lifecycle/1"


@dataclass(frozen=True)
class RuleResult:
    """How often a rule was checked and what came of it; checked == held + violated.

    `unknown` counts places where the rule applied and the recording does not say enough.
    """

    checked: int = 0
    held: int = 0
    violated: int = 0
    unknown: int = 0


def not_recorded(missing: Iterable[str]) -> str:
    """Say that these needs were not recorded; of a need "A or B", both are missing."""
    needs = list(dict.fromkeys(missing))
    names = list(dict.fromkeys(name for need in needs for name in need.split(" or ")))
    if len(names) == 1:
        return f"{names[0]} was not recorded"
    if len(needs) == 1:
        return f"neither {' nor '.join(names)} was recorded"
    return f"{', '.join(names)} were not recorded"


@dataclass(frozen=True)
class NotChecked:
    """A rule, or a part of one, that the recording does not allow to check.

    Parameters
    ----------
    rule : str, its id
    part : str, which part of the rule, in a few words; "" for all of it
    missing : events and fields ("event.field") that were not recorded
    places : how often it would have applied, as far as that can be told
    applies : False if the recording's architecture has not what is missing, whoever records
    """

    rule: str
    part: str
    missing: tuple[str, ...]
    places: int
    applies: bool = True

    @property
    def sentence(self) -> str:
        """The finding in words: "V6 not checked: kvm_exit.exit_reason was not recorded"."""
        part = f" ({self.part})" if self.part else ""
        if not self.applies:
            return f"{self.rule}{part} does not apply: this architecture has no {', '.join(self.missing)}"
        return f"{self.rule}{part} not checked: {not_recorded(self.missing)}"


@dataclass(frozen=True)
class PartNotSeen:
    """A part of the lifecycle (model.states.LIFECYCLE_PARTS) of which nothing was seen, recorded or not."""

    part: str
    recorded: bool


@dataclass(frozen=True)
class TransitionCount:
    """How often an edge was taken; p50_ns, p99_ns: time since the previous step, None if unknown."""

    from_state: str = field(metadata={"json": "from"})
    event: str
    to_state: str = field(metadata={"json": "to"})
    count: int
    p50_ns: int | None = None
    p99_ns: int | None = None


@dataclass(frozen=True)
class Coverage:
    """States, transitions and exit reasons that the recording exercised, of those in the model."""

    states_seen: int = 0
    states_in_model: int = 0
    transitions_seen: int = 0
    transitions_in_model: int = 0
    exit_reasons_seen: int = 0
    exit_reasons_in_model: int = 0
    not_seen: tuple[PartNotSeen, ...] = ()


@dataclass(frozen=True)
class ContextEvent:
    """An event around a violation: `event_index` is its row in the recording, `fields` as recorded."""

    event_index: int
    ts_ns: int
    cpu: int
    tid: int
    event: str
    fields: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Violation:
    """One place where the recording contradicts the model.

    Parameters
    ----------
    rule : str, key of RULES
    severity : "violation" or "suspicion"
    ts_ns, tid, vcpu_id, cpu : of the event found wrong; vcpu_id None if unknown
    event_index : int, row of that event in the whole recording
    event : str, kind of that event
    expected, observed, why, source : str, in words
    context : the thread's events around it, oldest first
    vm_exit : the number of the thread's VM-exit at or before it, which `--explain` takes; None before the first
    vm : name of its VM; None where the recorder did not note one
    """

    rule: str
    severity: str
    ts_ns: int
    tid: int
    vcpu_id: int | None
    cpu: int
    event_index: int
    event: str
    expected: str
    observed: str
    why: str
    source: str
    context: tuple[ContextEvent, ...] = ()
    vm_exit: int | None = None
    vm: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The outcome of stepping the model through a recording.

    `n_events` == explained + environment + unknown + unexplained + contradicting events. Environment: events of other
    threads and of interrupt context, which the model does not step through. `unexplained`: the vCPU threads' own events
    that no table of the model has, event -> count, most first. `violations` holds at most
    `limit` per rule in recorded order; `n_violations` and `rules` count all. `judged_share`: of the vCPU threads' own
    events, those that the model explained or contradicted; None without such events. `not_understood`: lines of a text
    that could not be read as events, counted as not judged. `n_kvm_events`: events of KVM, of any thread.
    `rule_errors`: a line for each rule of another package that could not be loaded or failed.
    """

    name: str = MODEL_NAME
    isa: str | None = None
    rules: dict[str, RuleResult] = field(default_factory=dict)
    transitions: tuple[TransitionCount, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    violations: tuple[Violation, ...] = ()
    n_violations: int = 0
    n_suspicions: int = 0
    first_divergence: Violation | None = None
    n_events: int = 0
    explained_events: int = 0
    environment_events: int = 0
    unknown_events: int = 0
    unexplained: dict[str, int] = field(default_factory=dict)
    cannot_see: tuple[str, ...] = ()
    not_checked: tuple[NotChecked, ...] = ()
    judged_share: float | None = None
    not_understood: int = 0
    n_kvm_events: int = 0
    rule_errors: tuple[str, ...] = ()

    @property
    def many_unexplained(self) -> bool:
        """Whether more than a few of the vCPU threads' own events are in no table of the model."""
        total = sum(self.unexplained.values())
        own = total + self.explained_events + self.unknown_events
        return total * 100 > own * threshold("unexplained_shown")

    @property
    def n_checks(self) -> int:
        """How many checks were made, over all rules."""
        return sum(result.checked for result in self.rules.values())

    @property
    def verdict(self) -> str:
        """The verdict in a few words."""
        if self.n_violations:
            return f"{self.n_violations:,} violation{'' if self.n_violations == 1 else 's'}"
        if not self.n_kvm_events:
            return "no KVM event"
        if not self.n_checks:
            return "nothing checked"
        whole = self.judged_share is not None and self.judged_share * 100 >= threshold("partly_judged")
        return "conforms" if whole and not self.not_understood else "conforms as far as judged"

    @property
    def conforms(self) -> bool:
        """Whether something was checked and nothing contradicts the model (suspicions may remain)."""
        return self.n_violations == 0 and self.n_checks > 0
