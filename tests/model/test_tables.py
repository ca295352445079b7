"""The model's tables are closed: every name exists, every step leads to one state, every row is cited."""

from __future__ import annotations

import ast
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.check import exit_conditions, guards, syndrome_comparisons
from kvmtrace.check.alphabet import CLASS_NAMES, N_CLASSES
from kvmtrace.check.excerpt import EXPECTATIONS
from kvmtrace.check.rule import SUSPICION, VIOLATION
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.check.state_machine import next_states, rows_for
from kvmtrace.isa.base import RipClass
from kvmtrace.isa.registry import ISAS
from kvmtrace.model.interrupts import LINE_EVENTS, PARTING_EVENTS, SENDERS
from kvmtrace.model.predicates import CHECKS, PREDICATES
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS, STATES, STEPS
from kvmtrace.model.thresholds import THRESHOLDS
from kvmtrace.model.transitions import FOLLOW_UP_STATES, GUARDS, LATE_EXIT_STATES, TRAITS, TRANSITIONS
from kvmtrace.render.model.describe import RIP_WORDS, render_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.check.rule import Rule

PACKAGE = Path(__file__).parents[2] / "kvmtrace"
ROWS = [row for row in EXPECTATIONS if row is not None]
KERNELS = [
    frozenset(traits) for traits in product(("entry_in_run", "entry_before_run"), ("exit_irqs_on", "exit_irqs_off"))
]
KERNELS += [kernel | {"old_fastpath"} for kernel in KERNELS]


def test_transitions_use_known_names() -> None:
    for row in TRANSITIONS:
        assert {row.state, row.next} <= STATES.keys(), row
        assert row.event in STEPS, row
        assert row.guard in {"", *GUARDS}, row
        assert row.only in {"", *TRAITS}, row
        assert row.source.strip(), row
        assert row.sentence.endswith("."), row
    assert len(set(TRANSITIONS)) == len(TRANSITIONS)


@pytest.mark.parametrize("traits", KERNELS, ids=lambda traits: "+".join(sorted(traits)))
def test_each_step_leads_to_one_state(traits: frozenset[str]) -> None:
    after = next_states(rows_for(traits))
    assert after["VM-entry"] == "guest"
    assert after["VM-exit"] == "exited"
    assert after["userspace exit"] == "left"


@pytest.mark.parametrize("traits", KERNELS, ids=lambda traits: "+".join(sorted(traits)))
def test_every_state_is_reached_from_userspace(traits: frozenset[str]) -> None:
    reached, rows = {"user"}, rows_for(traits)
    for _ in STATES:
        reached |= {row.next for row in rows if row.state in reached}
    optional = {"unknown"} | ({"switched_out"} if "exit_irqs_off" in traits else set())
    optional |= {"switching_in"} if "entry_before_run" in traits else set()
    # the run function has returned before kvm_exit: nothing tells the exit from its handler
    optional |= {"handling"} if "exit_irqs_on" in traits else set()
    assert reached >= STATES.keys() - optional


def test_state_sets_name_states() -> None:
    assert STATES.keys() >= FOLLOW_UP_STATES | LATE_EXIT_STATES


def test_classes_fit_a_mask_and_are_unique() -> None:
    assert N_CLASSES <= 64
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES)
    assert not set(FOLLOW_UPS) & set(BYSTANDERS)


def test_words_and_functions_are_the_same() -> None:
    """Every guard, predicate and comparison is a table's word, is registered, and is used; and nothing else is."""
    assert guards.REGISTERED.keys() == GUARDS.keys() == {row.guard for row in TRANSITIONS} - {""}
    assert {row.only for row in TRANSITIONS} - {""} <= TRAITS.keys()
    unless = {name for row in ROWS for must in row.must for name in must.unless}
    rip_when = {name for row in ROWS for name, _ in row.rip_when}
    # "string" tells how port accesses go on
    assert exit_conditions.REGISTERED.keys() == PREDICATES.keys() == unless | rip_when | {"string"}
    assert {name for row in ROWS for name in row.checks} == CHECKS.keys()
    in_v5 = {name for name, check in CHECKS.items() if check.rule == "V5"}
    assert syndrome_comparisons.COMPARISONS.keys() == in_v5
    assert CHECKS.keys() - in_v5 == {"io_next_rip"}  # V6's


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.handler.split()[0]}-{row.code:#x}")
def test_exit_rows_use_known_names(row) -> None:
    unless = {name for must in row.must for name in must.unless} | {name for name, _ in row.rip_when}
    assert unless <= PREDICATES.keys()
    known = {*FOLLOW_UPS, *BYSTANDERS, "kvm_inj_exception", "kvm_inj_virq", "kvm_vcpu_wakeup"}
    assert {event for must in row.must for event in must.events} | row.may <= known
    assert all(0 <= reason < 64 for reason in row.userspace)
    assert row.handler


def test_unknown_reason_has_no_expectation() -> None:
    assert EXPECTATIONS[0] is None
    assert len(ROWS) == sum(len(isa.exits) for isa in ISAS)


def test_rules_are_complete() -> None:
    rules = all_rules()
    assert [f"V{i}" for i in range(1, 16)] == [name for name in rules if name.startswith("V")]
    assert [f"I{i}" for i in range(1, 7)] == [name for name in rules if name.startswith("I")]
    assert [f"N{i}" for i in range(1, 8)] == [name for name in rules if name.startswith("N")]
    assert [f"J{i}" for i in range(1, 12)] == [name for name in rules if name.startswith("J")]
    assert [f"S{i}" for i in range(1, 7)] == [name for name in rules if name.startswith("S")]
    for name, rule in rules.items():
        assert rule.id == name
        assert rule.severity == (SUSPICION if name.startswith("H") else VIOLATION)
        assert rule.sentence.endswith(".")
        assert rule.source
        assert rule.needs
        assert rule.parts or rule.row_parts_of


SOURCES = [path for path in sorted((PACKAGE / "check").rglob("*.py")) if "_bring" not in path.name]
WORDS = {*STEPS, *FOLLOW_UPS, *BYSTANDERS, *(step.kind for step in STEPS.values())}


def _calls_with_needs(tree: ast.AST) -> set[int]:
    """Return the identities of nodes that name what is needed: `needs=`, second arguments of RowPart, NEEDS = ..."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "needs":
            skipped |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"RowPart", "Rule"}:
            skipped |= {id(inner) for argument in node.args for inner in ast.walk(argument)}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            skipped |= {id(inner) for inner in ast.walk(node) if _all_needs(node.value)}
    return skipped


def _all_needs(node: ast.Tuple) -> bool:
    words = [element.value for element in node.elts if isinstance(element, ast.Constant)]
    return any("." in str(word) for word in words)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_set_of_events_stands_in_a_checker(path: Path) -> None:
    """A set of more than two events that decides something is a row of the model, printed by `kvmtrace model`."""
    tree = ast.parse(path.read_text())
    skipped = _calls_with_needs(tree)
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.Tuple | ast.Set | ast.List | ast.Call | ast.Dict):
            continue
        elements = node.args if isinstance(node, ast.Call) else node.keys if isinstance(node, ast.Dict) else node.elts
        words = [one.value for one in elements if isinstance(one, ast.Constant) and one.value in WORDS]
        assert len(words) <= 2, (path.name, node.lineno, words)


def test_every_event_that_code_names_is_in_the_model() -> None:
    known = WORDS | {*SENDERS, *PARTING_EVENTS, *LINE_EVENTS}
    known |= {need.partition(".")[0] for rule in all_rules().values() for need in _needs(rule)}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            word = node.value if isinstance(node, ast.Constant) else None
            if isinstance(word, str) and re.fullmatch(r"kvm_[a-z_0-9]+", word):
                assert word in known, (path.name, word)


def _needs(rule: Rule) -> Iterator[str]:
    lists = [rule.needs, *(part.needs for part in rule.parts)]
    lists += [part.needs for row in ROWS for part in rule.row_parts(row)]
    for needs in lists:
        for need in needs:
            yield from need.split("|")


MODEL_FILES = (
    "interrupts",
    "ordering",
    "injection",
    "nesting",
    "userspace_actions",
    "thresholds",
    "states",
    "transitions",
    "predicates",
    "held_registers",
    "traced_by",
)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_every_table_of_the_model_is_used_and_printed(name: str) -> None:
    source = (PACKAGE / "model" / f"{name}.py").read_text()
    tables = {
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith("_")
    }
    code = "".join(path.read_text() for path in (PACKAGE / "check").rglob("*.py"))
    code += source  # one table may be made of another
    printed = "".join(path.read_text() for path in (PACKAGE / "render" / "model").glob("*.py")) + source
    for table in tables:
        assert len(re.findall(rf"\b{table}\b", code)) > 1, f"{table} is used by no code"
        assert len(re.findall(rf"\b{table}\b", printed)) > 1, f"{table} is not printed"


def test_every_threshold_is_used() -> None:
    code = "".join(path.read_text() for path in (PACKAGE / "check").rglob("*.py"))
    used = set(re.findall(r'threshold\("(\w+)"\)', code))
    assert used == THRESHOLDS.keys()


def test_every_rip_class_has_its_words() -> None:
    assert render_text([isa.name for isa in ISAS])
    assert {rip.value for rip in RipClass} == set(RIP_WORDS)
