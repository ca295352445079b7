"""The automaton in the form that the kernel's Runtime Verification reads: DOT for dot2k or rvgen.

    kvmtrace model --format rv-dot > kvm_vcpu.dot
    dot2k -d kvm_vcpu.dot -t per_task            # in the kernel's tools/verification

It is the transition table as far as tracepoints show it: what only probes and system-call tracers see is stepped over,
and rows with a condition are allowed, so that the monitor accuses nobody whom `kvmtrace check` would not. It may begin
at any time: the initial state knows nothing, and every event leads out of it. Names are C identifiers; the comments say
which tracepoint each event is.

Source: Documentation/trace/rv/deterministic_automata.rst; tools/verification/dot2/automata.py
"""

from __future__ import annotations

import re

from kvmtrace.check.monitor_table import TRAITS, tracepoint_steps
from kvmtrace.check.state_machine import ILLEGAL, STATE_NAMES, UNKNOWN, compile_for
from kvmtrace.model.states import STATES

MODEL = "kvm_vcpu"


def identifier(name: str) -> str:
    """Return a name of the model as C has it: "FPU load" -> "fpu_load"."""
    return re.sub(r"\W+", "_", name).lower()


def rv_edges() -> dict[tuple[str, str], tuple[str, ...]]:
    """Return (state, next state) -> the steps that lead there, of the states that can be reached."""
    steps = tracepoint_steps()
    automaton = compile_for(frozenset(step.name for step in steps), TRAITS)
    edges: dict[tuple[str, str], list[str]] = {}
    todo, seen = [UNKNOWN], {UNKNOWN}
    while todo:
        state = todo.pop(0)
        for step in steps:
            number = automaton.classes[step.name]
            if automaton.verdict[state, number] == ILLEGAL:
                continue
            after = int(automaton.next_state[number])
            edges.setdefault((STATE_NAMES[state], STATE_NAMES[after]), []).append(step.name)
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return {pair: tuple(names) for pair, names in edges.items()}


def render_rv_dot() -> str:
    """Return the automaton; dot2k insists on this order of lines and on one line per edge."""
    edges = rv_edges()
    initial = identifier(STATE_NAMES[UNKNOWN])
    states = sorted({identifier(name) for pair in edges for name in pair})
    lines = ["digraph state_automaton {", *_comments(edges)]
    lines += [f'\t{{node [shape = circle] "{name}"}};' for name in states if name != initial]
    lines += [
        f'\t{{node [shape = plaintext, style=invis, label=""] "__init_{initial}"}};',
        f'\t{{node [shape = doublecircle] "{initial}"}};',
        f'\t{{node [shape = circle] "{initial}"}};',
        f'\t"__init_{initial}" -> "{initial}";',
    ]
    for name in states:
        lines.append(f'\t"{name}" [label = "{name}"];')
        for (source, target), names in edges.items():
            if identifier(source) == name:
                label = "\\n".join(identifier(step) for step in names)
                lines.append(f'\t"{name}" -> "{identifier(target)}" [ label = "{label}" ];')
    lines += ["\t{ rank = min ;", f'\t\t"__init_{initial}";', f'\t\t"{initial}";', "\t}", "}", ""]
    return "\n".join(lines)


def _comments(edges: dict[tuple[str, str], tuple[str, ...]]) -> list[str]:
    """Say what the names stand for: a monitor's author attaches each event to its tracepoint."""
    lines = ["\t// KVM's vCPU threads, one automaton per task; events and their tracepoints (outside interrupts):"]
    for step in tracepoint_steps():
        field, value = step.condition
        condition = f" with {field} == {value}" if field else ""
        lines.append(f"\t// {identifier(step.name)}: kvm:{step.kind}{condition}")
    lines.append("\t// states:")
    told = {name for pair in edges for name in pair}
    return lines + [f"\t// {identifier(name)}: {STATES[name].sentence}" for name in STATES if name in told]
