"""The reference model as text for people and as one JSON object.

Pure views of the tables: states, transitions, exit rows, rules and world switch. Nothing is decided here.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvmtrace.check.rule_registry import all_rules
from kvmtrace.isa.base import EXIT_KINDS
from kvmtrace.isa.registry import BY_NAME, NAMES, has_never
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS, STATES, STEPS
from kvmtrace.model.transitions import GUARDS, TRAITS, TRANSITIONS
from kvmtrace.model.world_switch import BRACKETS, PHASES, STEPS_BY_ISA, UNSEEN_BY_ISA, steps_as_dicts
from kvmtrace.render.model.deciding_rows import condition_lines, deciding_rows, lines_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.check.rule import Rule
    from kvmtrace.isa.base import ExitRow, Isa, Must

SCHEMA = "kvmtrace.model/1"
RIP_WORDS = {
    "S": "same instruction",
    "A": "behind it",
    "E": "as emulated, else same",
    "T": "behind it (trap)",
    "N": "anywhere",
    "P": "same instruction, a step or an exception pending",
    "-": "never resumes",
}


def _must_words(must: Must) -> str:
    least, most = must.count
    times = "" if (least, most) == (1, 1) else f" (at least {least})" if most is None else f" ({least}-{most})"
    unless = f" unless {' or '.join(must.unless)}" if must.unless else ""
    return " or ".join(must.events) + times + unless


def exit_as_dict(isa: Isa, row: ExitRow) -> dict[str, Any]:
    """Return one exit row as a JSON-ready dictionary."""
    return {
        "code": row.code,
        "name": isa.describe(row.code),
        "handler": row.handler,
        "rip": row.rip.value,
        "rip_when": {name: rip.value for name, rip in row.rip_when},
        "length": row.length,
        "longest": row.longest,
        "kinds": list(row.kinds),
        "in_kernel": row.in_kernel,
        "userspace": {str(reason): describe_userspace_exit_reason(reason) for reason in sorted(row.userspace)},
        "must": [asdict(must) for must in row.must],
        "may": sorted(row.may),
        "checks": list(row.checks),
        "source": row.source,
        "note": row.note,
    }


def _any_exit_userspace(isas: Iterable[str]) -> dict[str, str]:
    causes = {reason: cause for isa in isas for reason, cause in BY_NAME[isa].any_exit_causes.items()}
    return {describe_userspace_exit_reason(reason): cause for reason, cause in causes.items()}


def model_as_dict(isas: Iterable[str] = NAMES) -> dict[str, Any]:
    """Return the whole model as one JSON-ready object, schema "kvmtrace.model/1"."""
    isas = tuple(isas)
    return {
        "schema": SCHEMA,
        "states": {name: asdict(state) for name, state in STATES.items()},
        "steps": {name: asdict(step) for name, step in STEPS.items()},
        "follow_ups": list(FOLLOW_UPS),
        "bystanders": list(BYSTANDERS),
        "transitions": [row._asdict() for row in TRANSITIONS],
        "guards": GUARDS,
        "traits": TRAITS,
        **deciding_rows(),
        "any_exit_userspace": _any_exit_userspace(isas),
        "exit_kinds": dict(EXIT_KINDS),
        "exits": {name: [exit_as_dict(BY_NAME[name], row) for row in BY_NAME[name].exits.values()] for name in isas},
        "world_switch": {isa: steps_as_dicts(isa) for isa in isas},
    }


def _wrap(text: str, indent: str = "    ") -> str:
    return textwrap.fill(
        text, 100, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _section(title: str) -> list[str]:
    return ["", title, "=" * len(title)]


def _state_lines() -> Iterable[str]:
    for name, state in STATES.items():
        yield _wrap(f"{name:13} {state.sentence} [{state.where}]", "  ").replace("\n  ", "\n" + " " * 16)


def _transition_lines() -> Iterable[str]:
    """Yield one line per event and next state, with all states it leaves from."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for row in TRANSITIONS:
        grouped.setdefault((row.event, row.next, row.guard, row.only), []).append(row.state)
    for (event, next_state, guard, only), states in grouped.items():
        condition = f"  if {guard}" if guard else ""
        condition += f"  where {only}" if only else ""
        words = f"  {event:17} {next_state:13} from {', '.join(states)}{condition}"
        yield _wrap(words, "").replace("\n", "\n" + " " * 34)


def exit_lines(isa: Isa, row: ExitRow) -> Iterable[str]:
    """Yield the lines that describe one exit row."""
    rip = RIP_WORDS[row.rip.value] + (f", length at least {row.length}" if row.rip.value == "A" else "")
    yield f"  {isa.describe(row.code)} ({isa.describe_code(row.code)})   {row.handler}"
    yield f"    continues: {rip}" + "".join(f"; if {name}: {RIP_WORDS[other.value]}" for name, other in row.rip_when)
    for must in row.must:
        yield _wrap(f"must: {_must_words(must)}")
    extra = row.may - {event for must in row.must for event in must.events}
    if extra:
        yield _wrap(f"may: {', '.join(sorted(extra))}")
    if row.userspace:
        yield _wrap("userspace: " + ", ".join(describe_userspace_exit_reason(r) for r in sorted(row.userspace)))
    if row.checks:
        yield _wrap(f"compared: {', '.join(row.checks)}")
    if row.note:
        yield _wrap(row.note)


def _applies(rule: Rule, isas: Iterable[str]) -> bool:
    """Say whether a kernel of one of these ISAs has what a rule needs."""
    return any(
        not any(all(has_never((BY_NAME[isa].number,), one) for one in need.split("|")) for need in rule.needs)
        for isa in isas
    )


def _source(rule: Rule, isas: tuple[str, ...]) -> str:
    own = BY_NAME[isas[0]].rule_sources if len(isas) == 1 else {}
    return own.get(rule.id, rule.source)


def _rule_lines(isas: tuple[str, ...]) -> Iterable[str]:
    rules = [rule for rule in all_rules().values() if _applies(rule, isas)]
    for rule in rules:
        yield f"  {rule.id:4} {rule.title} ({rule.severity})"
        yield _wrap(rule.sentence, "       ")
        yield _wrap(f"[{_source(rule, isas)}]", "       ")
        yield _wrap(f"needs: {', '.join(rule.needs).replace('|', ' or ')}", "       ")
        for part in rule.parts:
            if part.needs:
                yield _wrap(f"{part.about} needs: {', '.join(part.needs).replace('|', ' or ')}", "         ")
        if rule.cannot_see:
            yield _wrap(f"cannot see: {rule.cannot_see}", "       ")
    others = [name for name in all_rules() if name not in {rule.id for rule in rules}]
    if others:
        yield _wrap(f"{', '.join(others)} do not apply: KVM traces nothing to check them by there", "  ")


def _deciding_lines() -> Iterable[str]:
    """Yield the smaller tables, one section each."""
    rows = deciding_rows()
    yield from _section("Conditions on a VM-exit, and comparisons of its payload")
    yield from (_wrap(line, "  ") for line in condition_lines())
    for key, title in (
        ("thresholds", "Numbers that decide"),
        ("ordering", "Order"),
        ("side_events", "Events beside the life of a vCPU"),
        ("wake_ups", "What ends a HLT"),
        ("vcpus", "Which vCPU it is"),
        ("injection", "Injection"),
        ("userspace", "Userspace between two KVM_RUNs"),
        ("traced_by", "What traces the follow-ups of a VM-exit"),
        ("registers", "Registers that hold what is written to them, and which bits"),
    ):
        yield from _section(title)
        yield from (_wrap(line, "  ") for line in lines_of(rows[key]))


def _switch_lines(isa: str) -> Iterable[str]:
    """Yield the world switch, phase by phase in the order in which the steps happen."""
    phase = ""
    for number, step in enumerate(STEPS_BY_ISA[isa], 1):
        if step.phase != phase:
            phase = step.phase
            yield f"  {phase}"
        yield f"    {number:2} {step.title}"
        yield _wrap(f"[{step.function}]", "       ")
        if step.kvm:
            yield _wrap(f"KVM: {step.kvm}", "       ")
        if step.hardware:
            yield _wrap(f"processor: {step.hardware}", "       ")
        if step.fields:
            yield _wrap(f"{BY_NAME[isa].control_structure}: {', '.join(step.fields)}", "       ")
        yield f"       seen between {step.after.replace('|', ' or ')} and {step.before.replace('|', ' or ')}"
    for event, following, words in BRACKETS[isa]:
        yield _wrap(f"{event} .. {following}: {words}", "  ")


def render_text(isas: Iterable[str] = NAMES) -> str:
    """Return the whole model as text of at most 100 columns."""
    isas = tuple(isas)
    lines = ["kvmtrace reference model of the vCPU lifecycle"]
    lines += [*_section("States of a vCPU thread"), *_state_lines()]
    lines += [*_section("Transitions"), f"  {'event':17} {'next state':13}", *_transition_lines()]
    lines += [_wrap(f"{name}: {words}", "  ") for name, words in {**GUARDS, **TRAITS}.items()]
    for isa in isas:
        lines += _section(f"What each {isa.upper()} exit owes")
        for row in BY_NAME[isa].exits.values():
            lines += exit_lines(BY_NAME[isa], row)
    lines += _section("Userspace exits that may follow any VM-exit")
    lines += [_wrap(f"{reason}: {cause}", "  ") for reason, cause in _any_exit_userspace(isas).items()]
    lines += [*_section("Rules"), *_rule_lines(isas), *_deciding_lines()]
    for isa in isas:
        lines += [*_section(f"The world switch on {isa.upper()}"), _wrap("; ".join(PHASES), "  "), *_switch_lines(isa)]
    unseen = dict.fromkeys(words for isa in isas for words in UNSEEN_BY_ISA[isa])
    lines += [*_section("What no recording shows of it"), *(_wrap(words, "  ") for words in unseen)]
    return "\n".join(lines) + "\n"
