"""What a comparison of a recording with the reference model says: the report document's `model`.

Values only. A violation is a value; nothing here computes or renders.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Comparison:
    """The outcome of stepping the model through a recording.

    `n_events` == explained + environment + unknown + contradicting events. Environment: events of other
    threads and of interrupt context, which the model does not step through. `violations` holds at most
    `limit` per rule in recorded order; `n_violations` and `rules` count all.
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
    cannot_see: tuple[str, ...] = ()

    @property
    def conforms(self) -> bool:
        """Say whether nothing contradicts the model (suspicions may remain)."""
        return self.n_violations == 0
