"""The transition table as a monitor in the kernel takes it: bytes to look up, and the tracepoints that are its steps.

As for the kernel's Runtime Verification (render/model/rv_dot.py), only tracepoints are looked at, and rows with a
condition are allowed: a monitor accuses nobody whom `kvmtrace check` would not.
"""

from __future__ import annotations

from kvmtrace.check.state_machine import ILLEGAL, STATE_NAMES, compile_for
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.states import STEPS, ModelEvent

# kernels since 5.15 trace so: kvm_entry within the run function, kvm_exit with interrupts off
TRAITS = frozenset({"entry_in_run", "exit_irqs_off"})
OLD_TRAITS = frozenset({"entry_before_run", "exit_irqs_off", "old_fastpath"})
SINCE = (5, 15)
N_STATES, N_STEPS, FORBIDDEN = 16, 32, 0xFF  # of the table: tracers/monitor.h
GUEST, GUEST_MODE_STEPS = "guest", ("kvm_entry", "kvm_exit")
LIFECYCLE_RULE, GUEST_MODE_RULE = MONITORED_RULES = ("V1", "V2")  # of all rules, those that forbid a step


@dataclass(frozen=True)
class MonitorStep:
    """One letter: number in the table, and where it comes from; `field` == `value` selects among the kind's events."""

    number: int
    name: str
    kind: str
    field: str
    value: int


@dataclass(frozen=True)
class MonitorTable:
    """The automaton.

    Parameters
    ----------
    states : names; 0 is the state that knows nothing
    steps : MonitorStep, of tracepoints alone
    next_states : bytes, N_STATES * N_STEPS: next state + 1, FORBIDDEN where no row of the model allows the step
    """

    states: tuple[str, ...]
    steps: tuple[MonitorStep, ...]
    next_states: bytes

    def rule_of(self, state: str, step: str) -> str:
        """Return the rule that a step breaks which is forbidden in a state (wrong_steps.py)."""
        kinds = {one.name: one.kind for one in self.steps}
        return GUEST_MODE_RULE if state == GUEST or kinds[step] in GUEST_MODE_STEPS else LIFECYCLE_RULE


def tracepoint_steps() -> tuple[ModelEvent, ...]:
    """Return the steps that tracepoints show, in the model's order."""
    return tuple(step for step in STEPS.values() if not step.optional)


def monitor_table(release: str = "") -> MonitorTable:
    """Return the automaton for a kernel.

    Parameters
    ----------
    release : of the kernel ("5.10.0-28-amd64"); "" for one of today
    """
    chosen = tracepoint_steps()
    automaton = compile_for(frozenset(step.name for step in chosen), _traits(release))
    assert len(STATE_NAMES) <= N_STATES
    table = bytearray(b"\xff" * (N_STATES * N_STEPS))
    steps = []
    for step in chosen:
        number = automaton.classes[step.name]
        assert number < N_STEPS
        steps.append(MonitorStep(number, step.name, step.kind, *step.condition))
        for state in range(len(STATE_NAMES)):
            if automaton.verdict[state, number] != ILLEGAL:
                table[state * N_STEPS + number] = int(automaton.next_state[number]) + 1
    return MonitorTable(STATE_NAMES, tuple(steps), bytes(table))


def _traits(release: str) -> frozenset[str]:
    """Return the traits of a kernel; one that names no version counts as of today."""
    numbers = [int(part) for part in release.partition("-")[0].split(".")[:2] if part.isdecimal()]
    return OLD_TRAITS if len(numbers) == 2 and tuple(numbers) < SINCE else TRAITS
